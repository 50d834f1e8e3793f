"""Work that can be interrupted: what is finished is written down at once, and nothing half-written ever counts.

    recordings --encoder, many processes--> journals in OUT/work/ --assemble, one process--> shards, in the order of the list

    OUT/work/recipe.json         the recipe of the units
             00003.00001.jsonl   what process 3 finished at its start number 1 (counted from 0), one line a recording:
    {"file_name": ..., "seconds": ..., "units": base64 of uint16, "runs": base64 of uint16, "crc32": of the line up to here}
    {"file_name": ..., "reason": ..., "crc32": ...}                                        one that cannot be encoded

A line that a kill has torn, or that was damaged later, does not match its checksum: its recording counts as not done and
is done again. So a process may die at any byte, and the next start may have any number of processes.
"""
import base64
import errno
import functools
import json
import os
import shutil
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from checkpoints import files

MAX_UNIT = 2**16 - 1


def read_if_there(path):
    """The dictionary in a JSON file, None where there is no file."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{path} is damaged: it holds no JSON dictionary; delete it and start the same command again") from None


def refuse_other_recipe(found, recipe, what, remedy):
    """found: the recipe on disk, None if there is none. recipe: this run's."""
    recipe = json.loads(json.dumps(recipe))  # as it would be read: tuples are lists
    if found is not None and found != recipe:
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


def seal(payload):
    """A JSON dictionary less its closing brace (bytes) -> the journal's line: its CRC-32 as the last key."""
    return payload + b', "crc32": "%08x"}\n' % zlib.crc32(payload)


def unseal(line):
    """A line of a journal -> its dictionary, None if the line is torn or damaged."""
    payload = line[:-len(seal(b""))]
    return json.loads(payload + b"}") if line == seal(payload) else None


def read_journals(work):
    """Yields (file, byte offset of the line, dictionary) of every sound line in a work/ folder."""
    for path in sorted(work.glob("*.jsonl")):
        with open(path, "rb") as file:
            offset = 0
            for line in file:
                row = unseal(line)
                if row is not None:
                    yield path, offset, row
                offset += len(line)


@contextmanager
def full_disk_explained(folder):
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = len({row["file_name"] for _, _, row in read_journals(folder / "work")})
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(f"no room left in {folder} ({free:.1f} MB free on its disk; a quota counts too): {kept} recordings are "
                      "finished and kept; make room and start the same command again, it goes on from there") from None


class Journal:
    """What one process writes down of an extraction. As torn lines do not count, nothing waits for the disk here (no fsync).

    Args: folder: OUT. recipe: of the units. rank: number of this process.
    Attributes: finished, set of file names that are done, good or failed: those of earlier starts and what is added here.
        Processes open their journals at different moments, so divide the list of names first and leave out these then.
    Raises: ValueError if the folder, or its work/, is of another recipe.
    """

    def __init__(self, folder, recipe, rank=0):
        self.folder = Path(folder)
        work = self.folder / "work"
        shutil.rmtree(self.folder / "work.done", ignore_errors=True)  # left by a kill at the very end
        meta = read_if_there(self.folder / "meta.json") or {}
        refuse_other_recipe(meta.get("recipe"), recipe, f"{folder} holds units", "that folder")
        refuse_other_recipe(read_if_there(work / "recipe.json"), recipe, f"{work} holds unfinished units", work)
        work.mkdir(parents=True, exist_ok=True)
        self.finished = {row["file_name"] for _, _, row in read_journals(work)}
        start = 0
        while (path := work / f"{rank:05d}.{start:05d}.jsonl").exists():  # a new file each time: nothing follows a torn line
            start += 1
        with full_disk_explained(self.folder):
            files.write_bytes(work / "recipe.json", json.dumps(recipe).encode(), work / f"recipe.{rank:05d}.tmp")
            self.file = open(path, "xb")

    def _append(self, row):
        with full_disk_explained(self.folder):
            self.file.write(seal(json.dumps(row)[:-1].encode()))
        self.finished.add(row["file_name"])

    def add(self, name, units, runs, seconds):
        """One finished recording. units (T,) in [0, 65535]; runs (T,) frames; seconds: its length as audio."""
        units, runs = (base64.b64encode(part.tobytes()).decode() for part in as_uint16(name, units, runs))
        self._append({"file_name": str(name), "seconds": float(seconds), "units": units, "runs": runs})

    def fail(self, name, reason):
        """One recording that cannot be encoded, with a sentence for failures.csv."""
        self._append({"file_name": str(name), "reason": str(reason)})

    def flush(self):
        """After a batch: a kill from now on does not lose it."""
        with full_disk_explained(self.folder):
            self.file.flush()

    def close(self):
        with full_disk_explained(self.folder):
            self.file.close()


def collect(folder, recipe, names):
    """What all journals of a folder hold of `names`, whose order it takes.

    Returns: documents, iterator of (name, units (T,), runs (T,), seconds), read from the disk one by one;
        failures, list of (name, reason).
    Raises: ValueError if some are neither encoded nor failed.
    """
    work = Path(folder) / "work"
    refuse_other_recipe(read_if_there(work / "recipe.json"), recipe, f"{work} holds unfinished units", work)
    places, reasons = {}, {}
    for path, offset, row in read_journals(work):
        if "reason" in row:
            reasons[row["file_name"]] = row["reason"]
        else:
            places[row["file_name"]] = path, offset
    missing = [name for name in names if name not in places and name not in reasons]
    if missing:
        raise ValueError(f"{len(missing)} of {len(names)} recordings are not finished, e.g. {missing[0]}; "
                         "start the same command again, it does only these")
    failures = [(name, reasons[name]) for name in names if name not in places]
    return read_places([(name, *places[name]) for name in names if name in places]), failures


def read_places(places):
    """Yields (name, units, runs, seconds) for each (name, file, byte offset)."""
    opened = functools.lru_cache(maxsize=256)(lambda path: open(path, "rb"))  # of thousands, not all may be open at once
    for name, path, offset in places:
        opened(path).seek(offset)
        row = unseal(opened(path).readline())
        if row is None:
            raise ValueError(f"{path} changed while it was read ({name}); start the same command again")
        yield name, *(np.frombuffer(base64.b64decode(row[key]), "<u2") for key in ("units", "runs")), row["seconds"]


def remove(folder):
    """Drop the journals, in one step: a part of them would look like work still to do."""
    work, done = Path(folder) / "work", Path(folder) / "work.done"
    shutil.rmtree(done, ignore_errors=True)
    os.replace(work, done)
    shutil.rmtree(done, ignore_errors=True)
