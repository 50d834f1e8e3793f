"""Folders of recordings -> unit shards: on one process or many, interrupted at any moment, broken files listed and left out.

    files --find_audio, divided over the processes--> decoded ahead, groups of like length --UnitEncoder--> frame units
          --deduplicate--> journal of each process --assemble, one process--> shards, failures.csv (journal.py, shards.py)

`python hubert_units.py FOLDER --out=units/mine` is the command. Shapes: S samples, F frames, T units.
"""
import collections
import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import config
from checkpoints.archive import walk
from checkpoints.files import locked, note, write_bytes
from corpus.journal import Journal, assemble
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
    """Files as given, folders searched recursively, linked ones too; sorted, so that every process sees the same order.

    What a folder holds beyond recordings is counted on screen, unless quiet.
    """
    found, others, seen = [], collections.Counter(), set()
    for path in map(Path, paths):
        if path.is_dir():
            for folder, names in walk(path, seen):
                for name in names:
                    ending = Path(name).suffix.lower()
                    if ending in AUDIO_SUFFIXES:
                        found.append(folder / name)
                    else:
                        others[ending or "without an ending"] += 1
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"no audio file or folder at {path}; check the path")
    passed = "passed over: " + ", ".join(f"{count} {ending}" for ending, count in sorted(others.items())) if others else ""
    if convertible := sorted(CONVERTIBLE & {*others}):
        passed += f'; libsndfile does not read {convertible[0]}, convert each: ffmpeg -i a{convertible[0]} a.wav'
    if not found:
        raise ValueError(f"no audio found in {', '.join(map(str, paths)) or 'nothing'}{passed and f' ({passed})'}; "
                         "give files or folders: python hubert_units.py recordings/ --out=units/mine")
    if passed and not quiet:
        note(passed)
    return sorted({os.path.abspath(path): path for path in reversed(found)}.values())  # a/../b.wav is b.wav


def as_named(files, folder):
    """The names of files in a folder of shards, which knows a recording by its path: that which is in it, else as it was given,
    or the whole path if an earlier call was made in another working folder, from which relative names count (named_from.txt)."""
    base = os.path.realpath(folder)  # which may be linked
    here, origin = os.path.relpath(".", base), Path(folder, "named_from.txt")
    origin = os.fsdecode(origin.read_bytes()) if origin.exists() else here
    inside = {os.path.normpath(os.path.join(base, origin, name)): name for name in names_in(folder)}
    paths = {os.path.abspath(file): str(file) for file in files}
    return [inside.get(path, name if origin == here else path) for path, name in paths.items()]


def tried(function, *arguments):
    """function(*arguments), or the error that says what is wrong with a file."""
    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        return error


def decoded(files, encoder, pool):
    """Groups of (file, future of its samples), neighbours being of like length; decoding runs ahead of whoever takes them.

    Recordings that are too long to be held are not decoded: None in place of their futures.
    """
    queue = collections.deque()
    for begin in range(0, len(files), WINDOW):
        window = files[begin:begin + WINDOW]
        lengths = {file: 0.0 if isinstance(seconds, Exception) else seconds  # what is wrong shows when it is read
                   for file, seconds in zip(window, pool.map(lambda file: tried(audio.duration, file), window))}
        groups, total = [], 0.0
        for file in sorted(window, key=lambda file: (lengths[file], file)):
            if not groups or total + lengths[file] > encoder.budget:
                groups.append([])
                total = 0.0
            groups[-1].append(file)
            total += lengths[file]
        for group in groups:
            queue.append([(file, None if lengths[file] > HELD_SECONDS else pool.submit(audio.read_wav, file)) for file in group])
            if len(queue) > AHEAD:
                yield queue.popleft()
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


def encode_group(group, encoder):
    """A group of decoded() -> {file: (frame units, seconds), or error}."""
    wavs = {file: future and tried(future.result) for file, future in group}
    results = {file: wav if isinstance(wav, Exception) else
               tried(encode_long, file, encoder) if wav is None else tried(encoder.checked, wav) for file, wav in wavs.items()}
    good = {file: wav for file, wav in wavs.items() if isinstance(results[file], torch.Tensor)}
    for (file, wav), frames in zip(good.items(), encoder.encode_batch([*good.values()]) if good else ()):
        results[file] = frames, len(wav) / SAMPLE_RATE
    return results


def encode_files(files, encoder, options, dist):
    """The command: every process journals what it finishes; when all have, one joins the journals to shards.

    What the folder holds stays, and recordings of a name that is in it are passed over; with options.overwrite it is replaced.
    Returns: the meta and the number of recordings that came in, on the first process; (None, 0) on others.
    """
    recipe, out = {**encoder.recipe, "dedup": options.dedup}, Path(options.out)
    refuse_other_recipe(out, recipe, options.overwrite)
    inside = set() if options.overwrite else set(names_in(out))
    names = [name for name in map(str, files) if name not in inside]
    if not dist.any(names or any(out.glob("work*"))):
        return read_meta(out), 0
    with contextlib.ExitStack() as stack:
        dist.from_main(stack.enter_context, locked(out, "units"))
        encode_new(names, encoder, options, recipe, dist)
        if not dist.is_main:
            return None, 0
        meta = assemble(out, recipe, names, options.overwrite)
        return meta, meta["files"] - len(inside)


def encode_new(names, encoder, options, recipe, dist):
    """This process's share of the recordings into its journal."""
    journal, mine = Journal(options.out, recipe, dist.rank), names[dist.rank::dist.world]
    left = [file for file in mine if file not in journal.finished]
    origin = Path(options.out, "named_from.txt")
    if dist.is_main and not all(map(os.path.isabs, names)) and (options.overwrite or not origin.exists()):
        write_bytes(origin, os.fsencode(os.path.relpath(".", os.path.realpath(options.out))))
    heard, failures, began = 0.0, 0, time.perf_counter()  # seconds, files
    bar = config.progress(total=len(mine), initial=len(mine) - len(left), desc="encoding", unit="file", shown=dist.is_main)
    with ThreadPoolExecutor(options.workers) as pool, bar:
        for group in decoded(left, encoder, pool):
            for file, result in encode_group(group, encoder).items():
                if isinstance(result, Exception):
                    journal.fail(file, config.sentence(result))
                    failures += 1
                    continue
                frames, seconds = result[0].cpu(), result[1]
                journal.add(file, *(deduplicate(frames) if options.dedup else (frames, torch.ones_like(frames))), seconds)
                heard += seconds
            bar.update(len(group))
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
