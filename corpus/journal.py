"""Work that can be interrupted: what is finished is written down at once, and nothing half-written ever counts.

    recordings --encoder, many processes--> journals in OUT/work/ --assemble, one process--> shards, in the order of the list

    work/recipe.json         the recipe of the units
         names               the recordings that the last start was asked for, and which were left to do (listing.py)
         00003.00001.jsonl   what process 3 finished at its start number 1 (counted from 0), one line a recording:
    {"file_name": ..., "seconds": ..., "units": base64 of uint16, "runs": base64 of uint16, "crc32": of the line up to here}
    {"file_name": ..., "reason": ..., "crc32": ...}                                        one that cannot be encoded

A line that a kill has torn, or that was damaged later, does not match its checksum: its recording counts as not done and
is done again. So a process may die at any byte, and the next start may have any number of processes.
"""
import array
import base64
import errno
import functools
import itertools
import json
import os
import shutil
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import config
from checkpoints.files import write_bytes
from corpus.listing import absent, blocks, hashes, held, known
from corpus.shards import as_uint16, names_in, read_meta, refuse_other_recipe, write_shards


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
                if (row := unseal(line)) is not None:
                    yield path, offset, row
                offset += len(line)


def finished(work):
    """Sorted hashes of the recordings that are done, good or failed."""
    return known(row["file_name"] for _, _, row in read_journals(work))


@contextmanager
def full_disk_explained(folder):
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = len(np.unique(finished(folder / "work")))
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(f"no room left in {folder} ({free:.1f} MB free on its disk; a quota counts too): {kept} recordings are "
                      "finished and kept; make room and start the same command again, it goes on from there") from None


class Journal:
    """What one process writes down of an extraction. As torn lines do not count, nothing waits for the disk here (no fsync).

    Args: folder: OUT. recipe: of the units. rank: number of this process.
    Raises: ValueError if its work/ is of another recipe.
    """

    def __init__(self, folder, recipe, rank=0):
        self.folder = Path(folder)
        work = self.folder / "work"
        shutil.rmtree(self.folder / "work.done", ignore_errors=True)  # left by a kill at the very end
        refuse_other_recipe(self.folder, recipe, overwrite=True)
        work.mkdir(parents=True, exist_ok=True)
        paths = (work / f"{rank:05d}.{start:05d}.jsonl" for start in itertools.count())
        path = next(path for path in paths if not path.exists())  # a new file each time: nothing follows a torn line
        with full_disk_explained(self.folder):
            write_bytes(work / "recipe.json", json.dumps(recipe).encode(), work / f"recipe.{rank:05d}.tmp")
            self.file = open(path, "xb")

    def _append(self, row):
        with full_disk_explained(self.folder):
            self.file.write(seal(json.dumps(row)[:-1].encode()))
            self.file.flush()  # a kill from now on does not lose it

    def add(self, name, units, runs, seconds):
        """One finished recording. units (T,) in [0, 65535]; runs (T,) frames; seconds: its length as audio."""
        units, runs = (base64.b64encode(part.tobytes()).decode() for part in as_uint16(name, units, runs))
        self._append({"file_name": str(name), "seconds": float(seconds), "units": units, "runs": runs})

    def fail(self, name, reason):
        """One recording that cannot be encoded, with a sentence for failures.csv."""
        self._append({"file_name": str(name), "reason": str(reason)})

    def close(self):
        with full_disk_explained(self.folder):
            self.file.close()


class Places:
    """Where in the journals each recording is: 16 bytes of each are held, and the names and reasons of those that failed.

    Attributes: reasons, {name: why it failed}. rows: of those that did not, hash and place, sorted; -1, which no name hashes to,
        is among them. asked: rows that a search met. unasked: names in reasons that none met.
    """

    BITS = 40  # of a place: journals are shorter than 2^40 bytes; above them stands the number of the journal

    def __init__(self, work):
        self.files, self.reasons, rows = [], {}, array.array("q", (-1, -1))
        for path, offset, row in read_journals(work):
            if "reason" in row:
                self.reasons[row["file_name"]] = row["reason"]
                continue
            if path not in self.files[-1:]:
                self.files.append(path)
            rows.extend((hash(row["file_name"]), len(self.files) - 1 << self.BITS | offset))
        self.rows = np.frombuffer(rows, [("hash", np.int64), ("place", np.int64)])
        self.rows.sort()
        self.asked, self.unasked = self.rows["place"] < 0, {*self.reasons}
        self.opened = functools.lru_cache(maxsize=256)(lambda path: open(path, "rb"))  # of thousands, not all may be open at once

    def search(self, names):
        """Yields (name, place) for each name; the place of one that is not encoded is -1."""
        for block in blocks(names):
            wanted = np.array([(hash(name), 2**62) for name in block], self.rows.dtype)
            at = np.searchsorted(self.rows, wanted) - 1  # the last of its hash
            found = self.rows["hash"][at] == wanted["hash"]
            self.asked[at[found]] = True
            self.unasked.difference_update(block)
            yield from zip(block, np.where(found, self.rows["place"][at], -1).tolist())

    def beyond(self, inside):
        """Whether there are recordings that no search asked for. inside: sorted hashes of some that do not count."""
        last = np.append(self.rows["hash"][1:] != self.rows["hash"][:-1], True)
        return not all(held(rest, inside).all() for rest in (self.rows["hash"][last & ~self.asked], hashes(self.unasked)))

    def read(self, name, place):
        """units, runs (T,) uint16, and seconds of a recording."""
        path, offset = self.files[place >> self.BITS], place & (1 << self.BITS) - 1
        self.opened(path).seek(offset)
        row = unseal(self.opened(path).readline())
        if row is None or row["file_name"] != name:
            raise ValueError(f"{path} changed while it was read ({name}); start the same command again")
        return *(np.frombuffer(base64.b64decode(row[key]), "<u2") for key in ("units", "runs")), row["seconds"]


def assemble(folder, recipe, names, overwrite=False):
    """Journals -> shards, by one process, after all have closed theirs; returns the meta.

    What is new is added after what the folder holds; the bytes depend on the documents and the order of `names` alone.
    Interrupted at any point, it is simply called again: the journals go last. They stay if they hold recordings beyond `names`,
    of another extraction that was interrupted, which so can still go on.

    Args: names: every recording that was asked for, each once; gone through twice. overwrite: what the folder held,
        and all work, is replaced.
    Raises: ValueError if some are neither encoded nor failed; OSError, in a sentence, if the disk is full.
    """
    folder = Path(folder)
    refuse_other_recipe(folder, recipe, overwrite)
    inside, places = known(() if overwrite else names_in(folder)), Places(folder / "work")
    count, missing, example, failures = 0, 0, None, []

    def new():
        return places.search(absent(map(str, names), inside))

    for name, place in new():
        count += 1
        if place < 0 and name in places.reasons:
            failures.append((name, places.reasons[name]))
        elif place < 0:
            missing, example = missing + 1, example or name
    if missing:
        raise ValueError(f"{missing} of {count} recordings are not finished, e.g. {example}; "
                         "start the same command again, it does only these")
    meta = read_meta(folder)
    if count or meta is None:
        documents = ((name, *places.read(name, place)) for name, place in new() if place >= 0)
        with full_disk_explained(folder):
            bar = config.progress(documents, desc="assembling", unit="file", total=count - len(failures))
            meta = write_shards(folder, recipe, bar, failures, overwrite)
    if (folder / "work").exists() and (overwrite or not places.beyond(inside)):
        os.replace(folder / "work", folder / "work.done")  # in one step: a part of them would look like work still to do
    shutil.rmtree(folder / "work.done", ignore_errors=True)
    return meta
