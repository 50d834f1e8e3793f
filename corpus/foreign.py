"""Units in the files of other projects: slamkit's JSON lines, fairseq's lists.

    features.jsonl   slamkit: {"units": [5, 2], "duration": [3, 1], "file_name": "a.wav"} a line; without duration, 1 each
    x.tsv + x.km     fairseq: the folder of the audio, then path<TAB>samples a line; in x.km the frame units of each, "5 5 5 2"

read() goes through such files document by document and checks every line. Nothing here opens a shard folder; the command
that imports and exports is `python -m corpus`. Shapes: T units per document, K units in all.
"""
import itertools
import json
from pathlib import Path

import numpy as np

from checkpoints.recognise import recognise
from speech.audio import SAMPLE_RATE
from speech.encoder import deduplicate


def read(paths, num_units, frame_rate):
    """Yields (name, units (T,), runs (T,), seconds) from one .jsonl file, or from a .tsv and its .km in either order.

    Args: num_units: K, every unit must lie in [0, K - 1]; frame_rate: frames per second, for the seconds of a .jsonl.
    Raises: ValueError that names the file and the line.
    """
    paths = sorted(map(Path, paths), key=lambda path: path.suffix, reverse=True)  # .tsv, .km
    if len(paths) == 2:
        yield from read_fairseq(*paths, num_units)
        return
    for name, units, runs in read_jsonl(paths[0], num_units):
        runs = np.ones_like(units) if runs is None else runs
        yield name, units, runs, float(runs.sum() / frame_rate)


def open_text(path):
    """Paths in these files need not be UTF-8; surrogate escapes carry any byte through."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def checked(units, num_units, where):
    """A list of whole numbers -> (T,) int64."""
    if not isinstance(units, list) or not all(type(unit) is int for unit in units):  # true is an int to isinstance
        raise ValueError(f"{where}: units must be a list of whole numbers")
    if units and (min(units) < 0 or max(units) >= num_units):
        wrong = min(units) if min(units) < 0 else max(units)
        raise ValueError(f"{where}: unit {wrong} lies outside 0 to {num_units - 1}; there are {num_units} units")
    return np.array(units, dtype=np.int64)


def read_jsonl(path, num_units):
    """Yields (name, units (T,), runs (T,) or None where a line has no durations) from slamkit's JSON lines.

    Empty lines are skipped; a line without file_name is called line_NUMBER.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or "units" not in row:
                if number == 1 and '"units"' not in line and (said := recognise(path)):
                    raise ValueError(f"{path} {said}")
                raise ValueError(f'{where}: expected {{"units": [...], "duration": [...], "file_name": "..."}}')
            units, name, runs = checked(row["units"], num_units, where), row.get("file_name"), row.get("duration")
            if name is not None and not isinstance(name, str):
                raise ValueError(f"{where}: file_name must be a text, got {json.dumps(name)[:40]}")
            whole = isinstance(runs, list) and all(type(run) is int and 0 < run < 2**31 for run in runs)
            if runs is not None and not (whole and len(runs) == len(units)):
                raise ValueError(f"{where}: duration must be a list of {len(units)} whole numbers from 1 up, one for each unit")
            yield name or f"line_{number}", units, None if runs is None else np.array(runs, dtype=np.int64)


def read_fairseq(tsv, km, num_units):
    """As read(), from a list of audio files and the frame units of each; all run lengths are 1."""
    with open_text(tsv) as files, open_text(km) as rows:
        root = files.readline().rstrip("\r\n")
        if not root or "\t" in root:
            raise ValueError(f"{tsv}, line 1: expected the folder of the audio files, got {root[:40]!r}")
        for number, (file, row) in enumerate(itertools.zip_longest(files, rows), start=1):
            if file is None or row is None:
                raise ValueError(f"{km} has no line {number}" if row is None else f"{tsv} has no line {number + 1}"
                                 + "; the two must be of the same recordings, and the .tsv has one line more, its first")
            name, tab, samples = file.rstrip("\r\n").rpartition("\t")
            if not tab or not name or not (samples.isascii() and samples.isdigit()):
                raise ValueError(f"{tsv}, line {number + 1}: expected path<TAB>number of samples, got {file.strip()[:40]!r}")
            words = row.split()
            if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
                raise ValueError(f"{km}, line {number}: expected whole numbers and spaces, got {row.strip()[:40]!r}")
            units = checked([int(word) for word in words], num_units, f"{km}, line {number}")
            yield str(Path(root, name)), units, np.ones_like(units), int(samples) / SAMPLE_RATE


def collapse(units, runs):
    """deduplicate() of units that have run lengths: those of equal neighbours are added up. [5 5 2], [1 1 3] -> [5 2], [2 3]."""
    units, joined = (part.numpy() for part in deduplicate(units))
    return units, np.add.reduceat(runs, np.cumsum(joined) - joined)


def write_jsonl(documents, file):
    """(name, units, runs) of every document -> slamkit's JSON lines."""
    for name, units, runs in documents:
        file.write(json.dumps({"units": units.tolist(), "duration": runs.tolist(), "file_name": name}) + "\n")
