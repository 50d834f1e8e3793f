"""Folders of recordings -> unit shards: on one process or many, interrupted at any moment, broken files listed and left out.

    files --list_audio, as_named--> work/names (listing.py), divided over the processes--> decoded ahead, groups of like length
          --UnitEncoder--> frame units --deduplicate--> journal of each process --assemble, one process--> shards, failures.csv

`python hubert_units.py FOLDER --out=units/mine` is the command. Shapes: S samples, F frames, T units.
"""
import collections
import contextlib
import functools
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import config
from checkpoints.archive import walk
from checkpoints.files import locked, note, write_bytes
from corpus.journal import Journal, assemble, finished, full_disk_explained
from corpus.listing import Listing, blocks, hashes, held, in_order, known
from corpus.shards import names_in, read_meta, refuse_other_recipe
from speech import audio
from speech.audio import SAMPLE_RATE
from speech.encoder import deduplicate
from speech.kmeans import reservoir

AUDIO_SUFFIXES = {f".{ending}" for ending in (  # of what libsndfile reads, without those that also mean other things (raw, mat)
    "wav wave flac ogg oga opus mp3 mp2 mp1 mpga aiff aif aifc au snd caf w64 rf64 sph nist voc avr sf ircam paf pvf svx 8svx "
    "iff sds wve xi").split()}
CONVERTIBLE = {f".{ending}" for ending in "m4a m4b aac mp4 mov mkv mka webm wma wmv avi 3gp amr ac3 ape wv alac spx".split()}
WINDOW = 2000  # files whose lengths are looked at together, to find recordings of like length
AHEAD = 4  # groups of recordings that are decoded while one is encoded
HELD_SECONDS = 600  # longer recordings are not held in memory, but read twice, block by block, while they are encoded


def find_audio(paths, quiet=False):
    """Files as given, folders searched recursively, linked ones too; sorted, as a list.

    What a folder holds beyond recordings is counted on screen, unless quiet.
    """
    return [*map(Path, list_audio(paths, ".", quiet))]


def list_audio(paths, folder, quiet=False):
    """The same one at a time, as text; of many, most wait in unnamed files in folder."""
    paths = [*map(Path, paths)]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no audio file or folder at {path}; check the path")
    return in_order(each_audio(paths, quiet), folder)


def each_audio(paths, quiet):
    """Yields recordings, each once, under the name that comes first; a/../b.wav is b.wav."""
    alone, met = {os.path.abspath(path) for path in paths if not path.is_dir()}, set()
    others, seen, count = collections.Counter(), set(), 0
    for path in paths:
        for file in recordings_in(path, others, seen) if path.is_dir() else [str(path)]:
            if alone and (whole := os.path.abspath(file)) in alone:
                if whole in met:
                    continue
                met.add(whole)
            count += 1
            yield file
    passed = "passed over: " + ", ".join(f"{count} {ending}" for ending, count in sorted(others.items())) if others else ""
    if convertible := sorted(CONVERTIBLE & {*others}):
        passed += f'; libsndfile does not read {convertible[0]}, convert each: ffmpeg -i a{convertible[0]} a.wav'
    if not count:
        raise ValueError(f"no audio found in {', '.join(map(str, paths)) or 'nothing'}{passed and f' ({passed})'}; "
                         "give files or folders: python hubert_units.py recordings/ --out=units/mine")
    if passed and not quiet:
        note(passed)


def recordings_in(root, others, seen):
    """Yields the recordings in a folder as text; counts what else is there, by endings, in others. seen: see walk."""
    for folder, names in walk(root, seen):
        before = str(folder / "_")[:-1]
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if ending in AUDIO_SUFFIXES:
                yield before + name
            else:
                others[ending if len(ending) > 1 else "without an ending"] += 1


def as_named(files, folder):
    """Yields the names of those files that a folder of shards does not hold, which knows a recording by its path: as they were
    given, or the whole path if an earlier call was made in another working folder, from which relative names count
    (named_from.txt)."""
    here, origin = os.path.relpath(".", os.path.realpath(folder)), named_from(folder)
    inside = recordings_held(folder)
    for block in blocks(files):
        paths = [*whole_paths(block, os.getcwd())]
        yield from itertools.compress(block if origin == here else paths, ~held(hashes(paths), inside))


def named_from(folder):
    """Where the relative names in a folder of shards count from, as a path from that folder; an empty one's: from here."""
    file = Path(folder, "named_from.txt")
    return os.fsdecode(file.read_bytes()) if file.exists() else os.path.relpath(".", os.path.realpath(folder))


def recordings_held(folder):
    """Sorted hashes of the whole paths of the recordings in a folder of shards, which may be linked."""
    return known(whole_paths(names_in(folder), os.path.join(os.path.realpath(folder), named_from(folder))))


def whole_paths(names, folder):
    """Yields the whole path of each name, relative ones counted from a whole folder; join() would take a tenth of a listing."""
    before = os.path.join(folder, "")
    return (os.path.normpath(name if name.startswith(os.sep) else before + name) for name in names)


def tried(function, *arguments):
    """function(*arguments), or the error that says what is wrong with a file."""
    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        return error


def decoders(workers, device):
    """Threads that decode: `workers`, or for 0 two beside an encoder on the same cores, up to twelve for one on a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of the processes that torchrun started here
    return workers or (max(2, min(12, share - 1)) if device.type == "cuda" else 2)


def decoded(files, encoder, pool):
    """Groups of (file, future of its samples), neighbours being of like length; decoding runs ahead of whoever takes them.

    Recordings that are too long to be held are not decoded: None in place of their futures.
    """
    queue, measure, windows = collections.deque(), functools.partial(pool.submit, tried, audio.duration), blocks(files, WINDOW)
    window = next(windows, [])
    measured = [measure(file) for file in window]
    while window:
        following = next(windows, [])
        lengths = {file: 0.0 if isinstance(seconds, Exception) else seconds  # what is wrong shows when it is read
                   for file, seconds in zip(window, [future.result() for future in measured])}
        measured, unmeasured = [], iter(following)
        groups, total = [], 0.0
        for file in sorted(window, key=lambda file: (lengths[file], file)):
            if not groups or total + lengths[file] > encoder.budget:
                groups.append([])
                total = 0.0
            groups[-1].append(file)
            total += lengths[file]
        for group in groups:
            queue.append([(file, None if lengths[file] > HELD_SECONDS else pool.submit(audio.read_wav, file)) for file in group])
            measured += [measure(file) for file in itertools.islice(unmeasured, len(group))]  # nobody waits for them all at once
            if len(queue) > AHEAD:
                yield queue.popleft()
        window = following
    yield from queue


def encode_long(file, encoder):
    """Frame units and seconds of a recording that is read block by block."""
    lengths = []

    def blocks():
        lengths.clear()  # of an earlier pass
        for block in audio.read_blocks(file):
            lengths.append(len(block))
            yield block

    return encoder.encode_stream(blocks), sum(lengths) / SAMPLE_RATE


def begin_group(group, encoder):
    """A group of decoded() -> function that waits for {file: (frame units, seconds), or error}; a GPU has the work already."""
    wavs = {file: future and tried(future.result) for file, future in group}
    results = {file: wav if isinstance(wav, Exception) else
               tried(encode_long, file, encoder) if wav is None else tried(encoder.checked, wav) for file, wav in wavs.items()}
    good = {file: wav for file, wav in wavs.items() if isinstance(results[file], torch.Tensor)}
    begun = encoder.begin([*good.values()]) if good else list

    def finish():
        units = tried(begun)
        if isinstance(units, Exception):  # of one of them
            units = [tried(encoder.encode, wav) for wav in good.values()]
        for (file, wav), frames in zip(good.items(), units):
            results[file] = frames if isinstance(frames, Exception) else (frames, len(wav) / SAMPLE_RATE)
        return results
    return finish


def encode_files(names, encoder, options, dist):
    """The command: every process journals what it finishes; when all have, one joins the journals to shards.

    What the folder holds stays; with options.overwrite it is replaced.
    Args: names: recordings that are not in it, each once, in the order of the shards; the first process goes through them, once.
    Returns: the meta and the number of recordings that came in, on the first process; (None, 0) on others.
    """
    recipe, out, names = {**encoder.recipe, "dedup": options.dedup}, Path(options.out), iter(names)
    refuse_other_recipe(out, recipe, options.overwrite)
    first = dist.from_main(lambda: [*itertools.islice(names, 1)])
    if not first and not dist.any(any(out.glob("work*"))):
        return read_meta(out), 0
    with contextlib.ExitStack() as stack:
        dist.from_main(stack.enter_context, locked(out, "units"))
        encode_new(itertools.chain(first, names), encoder, options, recipe, dist)
        if not dist.is_main:
            return None, 0
        before = not options.overwrite and read_meta(out) or {"files": 0}
        meta = assemble(out, recipe, Listing(out / "work/names"), options.overwrite)
        return meta, meta["files"] - before["files"]


def encode_new(names, encoder, options, recipe, dist):
    """This process's share of the recordings into its journal. The first process lists them for all, in work/names."""
    listing, origin = Listing(Path(options.out, "work/names")), Path(options.out, "named_from.txt")

    def write_list():
        with full_disk_explained(Path(options.out)):
            counts = listing.write(names, finished(Path(options.out, "work")))
            if (options.overwrite or not origin.exists()) and not all(map(os.path.isabs, listing)):
                write_bytes(origin, os.fsencode(os.path.relpath(".", os.path.realpath(options.out))))
        return counts

    count, left = dist.from_main(write_list)
    mine, done = range(dist.rank, left, dist.world), (count - left) // dist.world
    journal = Journal(options.out, recipe, dist.rank)
    heard, failures, began = 0.0, 0, time.perf_counter()  # seconds, files
    bar = config.progress(total=done + len(mine), initial=done, desc="encoding", unit="file", shown=dist.is_main)
    with ThreadPoolExecutor(decoders(options.workers, dist.device)) as pool, bar:
        begun = (begin_group(group, encoder) for group in decoded(listing.left(dist.rank, dist.world), encoder, pool))
        for finish, _ in itertools.pairwise(itertools.chain(begun, [None])):  # waits for a group when the next one is begun
            for file, result in (results := finish()).items():
                if isinstance(result, Exception):
                    journal.fail(file, config.sentence(result))
                    failures += 1
                    continue
                frames, seconds = result
                journal.add(file, *(deduplicate(frames) if options.dedup else (frames, torch.ones_like(frames))), seconds)
                heard += seconds
            bar.update(len(results))
            speed = heard / (time.perf_counter() - began)
            bar.set_postfix_str(f"{heard / 3600:.2f} h, {speed:.0f} x real time, {failures} failed")
    journal.close()
    dist.barrier()


def sample_features(files, encoder, size, generator):
    """A random sample (N, C) of the frames of all files, at most `size`, and how many frames there were. On one process.

    Raises: ValueError if no file gives features.
    """
    sample, seen = None, 0
    for file in config.progress(files, desc="features", unit="file"):
        wav = tried(audio.read_wav, file)
        features = wav if isinstance(wav, Exception) else tried(encoder.features, wav)
        if isinstance(features, Exception):
            tqdm.write(f"left out: {config.sentence(features)}")
            continue
        sample = reservoir(sample, features.cpu(), seen, size, generator)
        seen += len(features)
    if sample is None:
        raise ValueError(f"none of the {len(files)} files gave features; see above")
    return sample, seen
