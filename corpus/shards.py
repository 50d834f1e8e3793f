"""Unit shards: the on-disk format, its writer and reader. Batches are made of them in loader.py.

    folder/00000.units.bin    uint16, the units of all documents in a row (raw: no vocabulary offset, no special tokens)
           00000.runs.bin     uint16, how many frames each unit lasted (for the vocoder and the inspector; the LM ignores it)
           00000.offsets.bin  int64, document i is units[offsets[i]:offsets[i + 1]]
           00000.files.jsonl  one JSON a document: file_name, seconds
           meta.json          the recipe that made the units, totals; written last: without it no shard counts
           failures.csv       recordings that could not be encoded, and why
           named_from.txt     the folder, seen from this one, that relative file names count from
           work/              what an unfinished extraction has done so far, see journal.py

A folder holds as many shards as it needs. What is added later goes into shards of its own: the older ones stay as they are, for
whoever has them open. `python -m corpus FOLDER` says what is in one. Shapes: T units per document.
"""
import csv
import functools
import io
import json
import mmap
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from checkpoints.files import read_json, write_bytes
from checkpoints.recognise import check_values, recognise
from corpus.listing import blocks

RECIPE = {"kind": str, "num_units": int, "layer": int, "frame_rate": float, "pad": int, "chunking": str, "dedup": bool,
          "precision": str}
ABSENT = {"pad": 0, "chunking": "overlap", "dedup": True, "precision": "float32"}  # what recipes mean that are older than these
FORMAT = 1  # version of the layout above
MAX_UNIT = 2**16 - 1
REPLACED = {"fa1da69ec2a8638b": "d78477e"}  # centres of a pocket tokenizer that is no more: the last commit that has it
SHARD_UNITS = 2**28  # most units of one shard (one document may exceed it): 512 MB, some 5,000 hours at the pocket's 15 a second


def read_if_there(path):
    """The dictionary in a JSON file, None where there is no file."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        said = recognise(path) if path.stat().st_size else None
        raise ValueError(f"{path} {said or 'is damaged: it holds no JSON object; delete it and repeat the command'}") from None


def read_meta(folder):
    """meta.json of a folder of shards, None where there is none."""
    meta = read_if_there(Path(folder) / "meta.json")
    if meta and meta.get("format") != FORMAT:
        raise ValueError(f"{folder} is written in format {meta.get('format')}, this code reads {FORMAT}; encode the audio again")
    if meta and not (isinstance(meta.get("recipe"), dict) and type(meta.get("files")) is int):
        raise ValueError(f"{folder}/meta.json has no dictionary `recipe`, or no number of `files`; copy the file again")
    check_values(meta["recipe"] if meta else {}, RECIPE, f"{folder}/meta.json")
    return meta


def prefixes_of(folder, meta):
    """Paths of the shards that meta.json counts, less their suffixes; behind them may lie some of an interrupted addition."""
    prefixes, documents = [], 0
    for path in sorted(Path(folder).glob("*.offsets.bin")) if meta else ():
        if documents < meta["files"]:
            documents += path.stat().st_size // 8 - 1
            prefixes.append(str(path)[:-len("offsets.bin")])
    if meta and documents != meta["files"]:
        raise ValueError(f"{folder} holds {documents} documents, its meta.json promises {meta['files']}; copy it again")
    return prefixes


def names_in(folder):
    """Yields file_name of every document that a folder holds, in order; none where there are no shards."""
    for prefix in prefixes_of(folder, read_meta(folder)):
        with open(prefix + "files.jsonl", "rb") as lines:
            for block in blocks(lines):
                yield from (file["file_name"] for file in json.loads(b"[%b]" % b",".join(block)))


def read_failures(folder):
    """{file: reason} of a folder's failures.csv."""
    path = Path(folder) / "failures.csv"
    text = path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else ""
    return dict(row for row in list(csv.reader(io.StringIO(text, newline="")))[1:] if len(row) == 2)


def refuse_other_recipe(folder, recipe, overwrite=False):
    """Raise ValueError if the shards in a folder (unless they are overwritten), or what an unfinished extraction has done there,
    are of another recipe."""
    recipe, folder = json.loads(json.dumps({**ABSENT, **recipe})), Path(folder)  # as it would be read: tuples are lists
    shards = None if overwrite else (read_if_there(folder / "meta.json") or {}).get("recipe")
    work = read_if_there(folder / "work/recipe.json")
    for found, what, remedy in ((shards, f"{folder} holds units", "that folder (--overwrite replaces it)"),
                                (work, f"{folder / 'work'} holds unfinished units", folder / "work")):
        if found is not None and (found := {**ABSENT, **found}) != recipe:
            key = next(key for key in sorted({*found, *recipe}) if found.get(key, "absent") != recipe.get(key, "absent"))
            raise ValueError(f"{what} of another recipe ({key} is {found.get(key, 'absent')}, now {recipe.get(key, 'absent')}); "
                             f"choose another --out, or delete {remedy}")


def as_uint16(name, units, runs):
    """units (T,) in [0, 65535], runs (T,) frames -> the same as little-endian uint16; longer runs end at 65535."""
    units, runs = np.asarray(units), np.asarray(runs)
    if len(units) != len(runs):
        raise ValueError(f"{name}: {len(units)} units, but {len(runs)} run lengths; there must be one for each unit")
    if len(units) and (units.min() < 0 or units.max() > MAX_UNIT):
        raise ValueError(f"{name}: units must lie in [0, {MAX_UNIT}], got {units.min()} to {units.max()}")
    return units.astype("<u2"), np.minimum(runs, MAX_UNIT).astype("<u2")


class ShardWriter:
    """Writes one shard. Nothing stands under its final name before publish()."""

    SUFFIXES = ("units.bin", "runs.bin", "files.jsonl", "offsets.bin")

    def __init__(self, folder, shard=0):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.paths = [Path(folder) / f"{shard:05d}.{suffix}" for suffix in self.SUFFIXES]
        self.streams = [open(f"{path}.tmp", "wb") for path in self.paths]
        self.streams[-1].write(bytes(8))  # the first offset, 0
        self.documents, self.units, self.seconds = 0, 0, 0.0

    def add(self, units, runs, name, seconds):
        """One document. units (T,) in [0, 65535]; runs (T,) frames; seconds: its length as audio."""
        units, runs = as_uint16(name, units, runs)
        self.documents, self.units, self.seconds = self.documents + 1, self.units + len(units), self.seconds + seconds
        line = json.dumps({"file_name": name, "seconds": round(seconds, 4)}).encode() + b"\n"
        offset = np.array(self.units, dtype="<i8")
        for file, content in zip(self.streams, (units.tobytes(), runs.tobytes(), line, offset.tobytes())):
            file.write(content)

    def finish(self):
        """Everything on the disk, still under temporary names."""
        for file in self.streams:
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def discard(self):
        """Close and remove what is not published; nothing happens after that."""
        for file, path in zip(self.streams, self.paths):
            with suppress(OSError):  # the disk may be full, and what cannot be written is removed anyway
                file.close()
            Path(f"{path}.tmp").unlink(missing_ok=True)


def publish(folder, recipe, writers, failures=(), onto=None):
    """Give the shards of finished writers their names; returns the meta.

    Args: failures: all (file, reason) pairs, the lines of failures.csv. onto: the meta of what the folder holds, which stays; the
        writers' shards are numbered after it, so a kill leaves the folder as it was or as it will be. None: they replace it.
    """
    folder, before, count = Path(folder), onto or {"files": 0, "units": 0, "hours": 0.0}, len(prefixes_of(folder, onto))
    if not onto:
        (folder / "meta.json").unlink(missing_ok=True)  # it must never describe a mixture of old shards and new
    for path in (path for writer in writers for path in writer.paths):
        os.replace(f"{path}.tmp", path)
    for path in folder.glob("[0-9]" * 5 + ".*"):  # of an earlier run with more shards
        if int(path.name[:5]) >= count + len(writers):
            path.unlink()
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("file", "reason"), *failures])
    write_bytes(folder / "failures.csv", table.getvalue().encode("utf-8", "surrogateescape"))
    meta = {"format": FORMAT, "recipe": recipe, "files": before["files"] + sum(writer.documents for writer in writers),
            "units": before["units"] + sum(writer.units for writer in writers),
            "hours": before["hours"] + sum(writer.seconds for writer in writers) / 3600, "failures": len(failures)}
    write_bytes(folder / "meta.json", json.dumps(meta, indent=2).encode() + b"\n")
    return meta


def write_shards(folder, recipe, documents, failures=(), overwrite=False):
    """Documents into a folder, by one process, after those that it holds; returns the meta.

    Args: documents: iterable of (name, units (T,), runs (T,), seconds), written in this order. failures: (file, reason) pairs;
        those of earlier calls stay listed, but for what is written now. overwrite: what the folder held is replaced at the end.
    Raises: ValueError if it holds units of another recipe.
    """
    refuse_other_recipe(folder, recipe, overwrite)
    onto = None if overwrite else read_meta(folder)
    listed, first = {**(read_failures(folder) if onto else {}), **dict(failures)}, len(prefixes_of(folder, onto))
    writers = [ShardWriter(folder, first)]
    try:
        for name, units, runs, seconds in documents:
            if writers[-1].units and writers[-1].units + len(units) > SHARD_UNITS:
                writers[-1].finish()
                writers.append(ShardWriter(folder, first + len(writers)))
            writers[-1].add(units, runs, name, seconds)
            listed.pop(name, None)
        writers[-1].finish()
        return publish(folder, recipe, [writer for writer in writers if writer.documents or not onto], [*listed.items()], onto)
    finally:
        for writer in writers:
            writer.discard()


class UnitShards:
    """All documents of a shard folder, memory-mapped."""

    def __init__(self, folder):
        folder = Path(folder)
        self.folder, self.meta = folder, read_meta(folder)
        if self.meta is None:
            remedy = ("its work/ is of an extraction that was interrupted: start the same command again"
                      if (folder / "work").is_dir() else "make them with python hubert_units.py AUDIO... --out=FOLDER")
            raise FileNotFoundError(f"no meta.json in {folder}, so it holds no unit shards" + (
                f": it {said}" if (said := recognise(folder)) else f"; {remedy}"))
        self.recipe, self.parts = self.meta["recipe"], []
        for prefix in prefixes_of(folder, self.meta):
            offsets = np.memmap(prefix + "offsets.bin", dtype="<i8", mode="r")
            if missing := [name for name in ("units.bin", "runs.bin", "files.jsonl") if not os.path.isfile(prefix + name)]:
                raise FileNotFoundError(f"{prefix}{missing[0]} is not there, though its offsets.bin is; copy it, too")
            for file in (prefix + "units.bin", prefix + "runs.bin"):
                if (size := os.path.getsize(file) // 2) != offsets[-1]:
                    said = recognise(file) or f"holds {size} units, its offsets promise {offsets[-1]}; copy it again"
                    raise ValueError(f"{file} {said}")
            units, runs = (np.memmap(prefix + f"{name}.bin", dtype="<u2", mode="r") if size else np.zeros(0, "<u2")
                           for name in ("units", "runs"))
            self.parts.append((units, runs, offsets, prefix + "files.jsonl"))
        self.firsts = np.cumsum([0] + [len(offsets) - 1 for _, _, offsets, _ in self.parts])  # each shard's first document
        if not any(offsets[-1] for _, _, offsets, _ in self.parts):
            raise ValueError(f"{folder} holds no units; see its failures.csv")

    def __len__(self):
        return int(self.firsts[-1])

    def bounds(self, extra=0):
        """(documents + 1,) int64: where each begins in a row of all, and the last ends; each is `extra` longer than its units."""
        bounds = np.empty(len(self) + 1, np.int64)
        bounds[0] = 0
        for first, (_, _, mapped, _) in zip(self.firsts, self.parts):
            offsets = np.fromfile(mapped.filename, dtype="<i8")  # pages of the map would count as our memory
            bounds[first + 1:first + len(offsets)] = bounds[first] + (offsets + extra * np.arange(len(offsets)))[1:]
        return bounds

    @functools.cached_property
    def lengths(self):
        """Units of each document, (documents,) int64."""
        return np.diff(self.bounds())

    def read_at_random(self):
        """From now on read no more from the disk than is asked for; by itself the system reads megabytes around every place."""
        for units, *_ in self.parts:
            if isinstance(units, np.memmap) and hasattr(mmap, "MADV_RANDOM"):  # Windows has none
                units.base.madvise(mmap.MADV_RANDOM)

    def document(self, i):
        """units (T,), runs (T,) int64 of document i."""
        part = int(np.searchsorted(self.firsts, i, side="right")) - 1
        units, runs, offsets, _ = self.parts[part]
        rows = slice(*offsets[i - self.firsts[part]:][:2])
        return units[rows].astype(np.int64), runs[rows].astype(np.int64)

    def each_file(self):
        """Yields {"file_name": ..., "seconds": ...} of every document."""
        for *_, files in self.parts:
            with open(files) as lines:
                yield from map(json.loads, lines)

    @property
    def names(self):
        """file_name of every document, as a list."""
        return [file["file_name"] for file in self.each_file()]

    def __iter__(self):
        """Yields (name, units (T,), runs (T,)) of every document."""
        for i, file in enumerate(self.each_file()):
            yield file["file_name"], *self.document(i)


def check_recipe(recipe, expected, where, but=()):
    """Units made in different ways must never mix: every number would be meaningless, without any error.

    Everything that changes units counts, but for the keys in `but`; the model's name does not, since the same weights lie under
    many.
    """
    for key in ("kind", "num_units", "layer", "centers", "frame_rate", *ABSENT):
        found, wanted = recipe.get(key, ABSENT.get(key)), expected.get(key, ABSENT.get(key))
        if found != wanted and key not in but:
            old = next((REPLACED[of["centers"]] for of in (recipe, expected) if of.get("centers") in REPLACED), None)
            raise ValueError(f"{where}: units of another tokenizer ({key} is {found}, expected {wanted}); " + (
                "a text LM is given as --lm" if key == "kind" and "bytes" in (found, wanted) else
                f"one of them is the pocket tokenizer that was replaced: `git worktree add ../before {old}` brings it back, "
                "with all that belongs to it" if old else
                "encode the audio with the matching --tokenizer and its options"))
