"""Which recordings of a call are encoded, and for what: some filtered by name, some held out for validation.

    recordings --keep--> those that a list names --HoldOut--> for OUT/val the speakers (folders, files) that are held out,
                                                              for OUT/train all others; without --hold-out all for OUT

A share holds out every group (say, a speaker) for which a number in [0, 1) is below the share, one that the group's name and the
seed decide alone. So no group is divided, each keeps its side when recordings are added, on any number of processes and wherever
they lie, and a larger share holds out what a smaller one does and more. Names of recordings pass through unnamed files; of each
line of a list 16 bytes are held.
"""
import functools
import hashlib
import itertools
import os

import numpy as np

from corpus.extract import as_named, list_audio, recordings_held, whole_paths
from corpus.listing import Aside, blocks, hashes, held, known
from corpus.shards import read_meta

GROUPS = ("speaker", "folder", "file")  # --by: what is held out as a whole


def folders(options):
    """The folders of shards that a call writes: --out, or with --hold-out OUT/train and OUT/val.

    Raises: ValueError if a call of the other kind wrote there.
    """
    out, parts = options.out, [os.path.join(options.out, part) for part in ("train", "val")]
    for begun in (part for part in [out, *parts] if read_meta(part) or os.path.exists(os.path.join(part, "work"))):
        if options.hold_out and begun == out:
            raise ValueError(f"{out} holds units of a call without --hold-out; choose another --out for train and val")
        if not options.hold_out and begun != out:
            raise ValueError(f"{begun} holds units, perhaps of a call with --hold-out; repeat that, or choose another --out")
    return parts if options.hold_out else [out]


def lines_of(path, option):
    """Yields the lines of a text that are not blank; bytes that are no text come as in names of files."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--{option}={path}: no such file; give a text file of names, one a line")
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            if "\0" in line:
                raise ValueError(f"--{option}={path} holds bytes of value 0, so it is no text in UTF-8; save it as such")
            if line.strip():
                yield line.rstrip("\n")


def ways_to_call(names):
    """What a list may call recordings: by their names here, by whole paths, by the names of the files, by those less endings."""
    files = [*map(os.path.basename, names)]
    return ([*map(os.path.normpath, names)], [*whole_paths(names, os.getcwd())], files,
            [os.path.splitext(file)[0] for file in files])


class Names:
    """The names in a file, in which others are looked up; sorted by hash: where they stand, and which were found (met)."""

    def __init__(self, path, option):
        self.path, self.option = path, option
        self.hashes, self.places = np.unique(hashes(map(os.path.normpath, lines_of(path, option))), return_index=True)
        self.met = np.zeros(len(self.hashes), bool)
        if not len(self.hashes):
            raise ValueError(f"--{option}={path} names nothing; write one name a line")

    def find(self, *ways):
        """Which are in the file, (n,) bool. ways: lists of n ways to call the same."""
        found = np.zeros(len(ways[0]), bool)
        for wanted in map(hashes, ways):
            at = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
            here = self.hashes[at] == wanted
            self.met[at[here]] = True
            found |= here
        return found

    def said(self):
        """How many of the lines were found, as text, and the first that was not."""
        idle = self.places[~self.met]
        first = next(itertools.islice(lines_of(self.path, self.option), idle.min(), None)) if len(idle) else None
        return f"{self.met.sum()} of {len(self.met)} lines of {self.path} name some" + (f", not {first!r}" if first else "")


@functools.lru_cache(1000)
def drawn(group, seed):
    """The number in [0, 1) that the name of a group and the seed decide, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{group}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class HoldOut:
    """Which recordings are held out, in groups; met: the groups on either side, but for single files."""

    def __init__(self, text, by, seed):
        try:
            self.share, self.listed = float(text), None
        except ValueError:
            self.share, self.listed = 0.0, Names(text, "hold-out")
        if not self.listed and not 0 < self.share < 1:
            raise ValueError(f"--hold-out={text}: expected a share above 0 and below 1, such as 0.01, or a file of names")
        self.seed, self.met, self.by = seed, (set(), set()), by or ("file" if self.listed else "speaker")

    def groups(self, names):
        """What each is held out together with, as text. Raises: ValueError if a speaker is not known."""
        paths = [whole.rsplit(os.sep, 3) for whole in whole_paths(names, os.getcwd())]  # ..., outer folder, folder, file
        if self.by != "speaker":
            return [path[-2] if self.by == "folder" else os.path.join(path[-2], os.path.splitext(path[-1])[0]) for path in paths]
        for name, path in zip(names, paths):
            if len(path) < 4 or not path[1].isdecimal():
                raise ValueError(f"the speaker of {name} is not known, as the second folder above it is no number; LibriSpeech, "
                                 "Libri-Light and MLS have SPEAKER/BOOK/FILE. --by=folder and --by=file hold out folders and "
                                 "recordings, whoever speaks there, and --hold-out=names.txt the recordings that you list")
        return [path[1] for path in paths]

    def __call__(self, names):
        """(names,) bool."""
        groups = self.groups(names)
        if self.listed:
            out = self.listed.find(*(ways_to_call(names) if self.by == "file" else [groups]))
        else:
            out = np.array([drawn(group, self.seed) < self.share for group in groups])
        for side in (0, 1) if self.by != "file" else ():
            self.met[side].update(itertools.compress(groups, out == side))
        return out

    def said(self, left, out):
        """How much is held out, as text. left, out: numbers of recordings."""
        some = ", ".join([*sorted(self.met[1])[:3], *["..."] * (len(self.met[1]) > 3)]) or "none"
        of = f"{len(self.met[1])} of {sum(map(len, self.met))} {'folder' if self.by == 'folder' else 'speaker'}s ({some}), "
        return f"{of * (self.by != 'file')}{out} of {left + out} recordings" + (f"; {self.listed.said()}" if self.listed else "")


def divide(options):
    """The recordings that a call is to encode: {folder of folders(options): names}.

    Raises: ValueError if there are none for a folder that does not exist, if a speaker is not known, or if a folder holds a
        recording that is not for it; OSError for lists and recordings that are not there.
    """
    parts, keep = folders(options), options.keep and Names(options.keep, "keep")
    hold_out = options.hold_out and HoldOut(options.hold_out, options.by, options.seed)
    names = list_audio(options.audio, options.out)
    chosen = sides(names, parts, keep, hold_out, options.overwrite) if keep or hold_out else {options.out: names}
    return {part: names if options.overwrite else as_named(names, part) for part, names in chosen.items()}


def sides(names, parts, keep, hold_out, overwrite):
    """{part: names for it}; what --keep leaves out is for none."""
    asides, counts, name = [Aside(part) for part in parts], np.zeros(len(parts) + 1, int), ""
    inside = [known(()) if overwrite else recordings_held(part) for part in parts]
    for block in blocks(names):
        kept = keep.find(*ways_to_call(block)) if keep else np.ones(len(block), bool)
        side, name = np.where(kept, 0, len(parts)), block[0]
        if hold_out and kept.any():
            side[kept] = hold_out([*itertools.compress(block, kept)])
        counts += np.bincount(side, minlength=len(counts))
        paths = hashes(whole_paths(block, os.getcwd()))
        for number, part in enumerate(parts):
            asides[number].add(itertools.compress(block, side == number))
            for moved in itertools.compress(block, held(paths, inside[number]) & (side != number)):
                raise ValueError(f"{part} holds {moved}, which is not for it by this --keep, --hold-out, --by and --seed; give "
                                 "those of the call before, another --out, or --overwrite")
    if keep:
        print(f"kept: {sum(counts[:-1])} of {sum(counts)} recordings; {keep.said()}")
        if not any(counts[:-1]):
            raise ValueError(f"--keep={keep.path} names no recording that is there, such as {name}; a line is a path, or the "
                             "name of a file with or without its ending")
    if hold_out:
        print(f"held out: {hold_out.said(*counts[:-1])}")
    for part, count in zip(parts, counts):
        if not count and (overwrite or read_meta(part) is None):
            raise ValueError(f"no recording is for {part}: give another share (a small one holds out none of few speakers), "
                             "another --seed, or a file that lists what to hold out: speakers, or with --by=file recordings")
    return dict(zip(parts, asides))
