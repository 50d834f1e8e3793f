"""Lists of names too long to hold: sorted and written down outside memory, known again by their hashes.

    names --in_order--> sorted --absent, those that a folder holds left out--> new ones --Listing.write--> OUT/work/names
    OUT/work/names --Listing.left, on every process--> its share of what is not finished

Ten million names are some gigabytes as Python's strings. Here a process holds 8 bytes of each name that it compares with, its
hash, and of the list itself a few megabytes at a time. `python -m bench listing` measures it.
"""
import heapq
import itertools
import json
import os
import tempfile
from pathlib import Path

import numpy as np

BLOCK = 1000  # names that are read, compared or written together
RUN = 200_000  # names that are sorted in memory, some 25 MB


def blocks(things, size=None):
    """Yields lists of at most `size` of them, BLOCK if it is not given."""
    things = iter(things)
    while block := [*itertools.islice(things, size or BLOCK)]:
        yield block


def in_order(paths, folder):
    """Yields paths (text) in the order of their parts, as sorted() has Paths: a/z before a.b/c.

    At most RUN are held. More are merged from unnamed files in folder, or the nearest above it that exists; a kill leaves none.
    """
    keys = (path.replace(os.sep, "\0") for path in paths)
    runs = [run if len(run) < RUN else Aside(folder, run) for run in map(sorted, blocks(keys, RUN))]
    return (key.replace("\0", os.sep) for key in heapq.merge(*runs))


class Aside:
    """Names in an unnamed file, in folder or the nearest above it that exists; gone through when all are added."""

    def __init__(self, folder, names=()):
        place = next(above for above in (Path(folder), *Path(os.path.abspath(folder)).parents) if above.is_dir())
        self.file = tempfile.TemporaryFile("w+", dir=place)
        self.add(names)

    def add(self, names):
        for block in blocks(names):
            print(json.dumps(block), file=self.file)

    def __iter__(self):
        self.file.seek(0)
        return itertools.chain.from_iterable(map(json.loads, self.file))


def hashes(names):
    """(names,) int64, in their order; of this process alone, as Python draws its hash anew in each."""
    return np.fromiter(map(hash, names), np.int64)


def known(names):
    """The same sorted: what held() and absent() compare with."""
    found = hashes(names)
    found.sort()  # in place: 8 bytes a name are all that is held
    return found


def held(wanted, among):
    """Which hashes (n,) occur in sorted ones (m,): (n,) bool. One by chance: n m / 2^64, one in 180,000 for ten million each."""
    at = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    return among[at] == wanted if len(among) else np.zeros(len(wanted), bool)


def absent(names, among):
    """Yields the names whose hashes are not among sorted ones."""
    for block in blocks(names):
        yield from itertools.compress(block, ~held(hashes(block), among))


class Listing:
    """The names that an extraction was asked for and which are to do, in a file that one writes at every start and all read.

    A line is [[name, ...], [whether it is left to do, ...]] in JSON.
    """

    def __init__(self, path):
        self.path = Path(path)

    def write(self, names, finished):
        """How many names there are, and how many of them are left. finished: sorted hashes."""
        counts = np.zeros(2, np.int64)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w") as file:
            for block in blocks(names):
                left = ~held(hashes(block), finished)
                counts += len(block), left.sum()
                print(json.dumps([block, left.tolist()]), file=file)
        return counts.tolist()

    def __iter__(self):
        """Every name, in order."""
        with open(self.path) as file:
            for line in file:
                yield from json.loads(line)[0]

    def left(self, rank, world):
        """Yields the names that process `rank` of `world` has to do: each takes every world-th of what is left."""
        with open(self.path) as file:
            left = (name for line in file for name in itertools.compress(*json.loads(line)))
            yield from itertools.islice(left, rank, None, world)
