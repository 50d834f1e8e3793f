"""Ten million recordings by name alone: memory and time of listing them, of a process's share, and of joining the journals.

    python -m bench listing                # 3 GB of temporary files

The names are made up: the walk over folders yields them, 1,000 a folder, 56 characters long, and no file is looked at. Half of
them are in the folder of shards already, 100,000 are finished in the journal of an interrupted start. Each row is a process of
its own: mb is the most that it gained over what it held after its imports. list: what the first process does before encoding
begins; share: what each of 64 processes reads then; assemble: journals of a million recordings of ten units to shards.
"""
import json
import os
import tempfile
import time
from pathlib import Path

from bench.memory import in_own_process, resident
from corpus import extract, journal
from corpus.listing import Listing
from corpus.shards import FORMAT

NAMES, IN_FOLDER, FINISHED, ASSEMBLED, WORLD = 10_000_000, 5_000_000, 100_000, 1_000_000, 64
RECIPE = {"kind": "hubert", "model": "made up", "num_units": 500, "frame_rate": 25.0}


def made_up(count):
    """Yields (folder, names of 1,000 recordings) as walk does, not in the order of their paths."""
    for number in range(count // 1000):
        yield (Path(f"recordings/speaker-{number * 7919 % 100_000:05d}/chapter-{number:06d}"),
               [f"utterance-{i:04d}.flac" for i in range(1000)])


def measured(work, *arguments):
    """In a process of its own: {mb, seconds of the clock, seconds of the processor} of work(*arguments), and what it returns."""
    before, began, busy = resident("VmRSS"), time.perf_counter(), time.process_time()
    found = work(*arguments)
    return {"mb": round((resident("VmHWM") - before) / 1e6), "seconds": round(time.perf_counter() - began, 1),
            "processor_seconds": round(time.process_time() - busy, 1)}, found


def paths_of(count):
    return (f"{folder}/{name}" for folder, names in made_up(count) for name in names)


def write_folder(out, count, finished):
    """A folder of shards by its names and sizes alone, and the journal of `finished` recordings beyond them, ten units each."""
    (out / "work").mkdir(parents=True)
    with open(out / "00000.files.jsonl", "w") as file:
        file.writelines(json.dumps({"file_name": name, "seconds": 15.0}) + "\n" for name in paths_of(count))
    with open(out / "00000.offsets.bin", "wb") as file:
        file.truncate(8 * (count + 1))
    (out / "meta.json").write_text(json.dumps({"format": FORMAT, "recipe": RECIPE, "files": count, "units": 0, "hours": 0.0}))
    ten = "AQACAAMABAAFAAYABwAIAAkACgA="  # base64 of the units 1 to 10
    with open(out / "work/00000.00000.jsonl", "wb") as file:
        for number, name in enumerate(paths_of(count + finished)):
            if number >= count:
                row = {"file_name": name, "seconds": 15.0, "units": ten, "runs": ten}
                file.write(journal.seal(json.dumps(row)[:-1].encode()))


def list_names(out, count):
    """What the command does to list them: how many are new, and how many of them are left."""
    os.chdir(out.parent)
    (out.parent / "recordings").mkdir(exist_ok=True)
    extract.walk = lambda root, seen: made_up(count)
    names = extract.as_named(extract.list_audio(["recordings"], out), out)
    return Listing(out / "work/names").write(names, journal.finished(out / "work"))


def read_share(out):
    return sum(1 for _ in Listing(out / "work/names").left(1, WORLD))


def assemble(out):
    (out / "meta.json").unlink()
    return journal.assemble(out, RECIPE, Listing(out / "work/names"))["files"]


def bench_listing(options, names=NAMES, in_folder=IN_FOLDER, finished=FINISHED, assembled=ASSEMBLED):
    """Yields rows of (what, names, mb, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        write_folder(one, in_folder, finished)
        row, found = in_own_process(measured, list_names, one, names)
        assert found == [names - in_folder, names - in_folder - finished], found
        yield {"what": "list", "names": names, **row}
        row, found = in_own_process(measured, read_share, one)
        assert found == len(range(1, names - in_folder - finished, WORLD)), found
        yield {"what": "share", "names": names - in_folder, **row}
        write_folder(two, 0, assembled)
        Listing(two / "work/names").write(paths_of(assembled), journal.known(()))
        row, found = in_own_process(measured, assemble, two)
        assert found == assembled, found
        yield {"what": "assemble", "names": assembled, **row}
