"""Unit shards: the on-disk format, its writer and reader, and the loader whose batches depend on (seed, step) alone.

    folder/00000.units.bin    uint16, the units of all documents in a row (raw: no vocabulary offset, no special tokens)
           00000.runs.bin     uint16, how many frames each unit lasted (for the vocoder and the inspector; the LM ignores it)
           00000.offsets.bin  int64, document i is units[offsets[i]:offsets[i + 1]]
           00000.files.jsonl  one JSON a document: file_name, seconds
           meta.json          the recipe that made the units, totals

One process writes one shard; a folder may hold many. Shapes: B batch, T units per window.

    python data.py units/mine            # what is in a folder
    python data.py units/mine --jsonl    # the same as slamkit's JSON lines (units, duration, file_name)
"""
import csv
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

FORMAT = 1  # version of the layout above
MAX_UNIT = 2**16 - 1


def fingerprint(tensor):
    """First 16 hex digits of the SHA-256 of a float32 tensor's bytes: tells k-means tables apart."""
    return hashlib.sha256(tensor.contiguous().cpu().numpy().astype("<f4").tobytes()).hexdigest()[:16]


class ShardWriter:
    """Writes one shard. Nothing appears under its final name before close()."""

    def __init__(self, folder, recipe, shard=0):
        self.folder, self.recipe, self.shard = Path(folder), recipe, f"{shard:05d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        existing = self.folder / "meta.json"
        if existing.is_file() and json.loads(existing.read_text())["recipe"] != recipe:
            raise ValueError(f"{folder} holds units of another recipe; choose another --out, or delete that folder")
        self.units = open(self._temporary("units.bin"), "wb")
        self.runs = open(self._temporary("runs.bin"), "wb")
        self.files = open(self._temporary("files.jsonl"), "w")
        self.offsets, self.seconds = [0], 0.0

    def _temporary(self, suffix):
        return self.folder / f"{self.shard}.{suffix}.tmp"

    def add(self, units, runs, name, seconds):
        """One document. units (T,) in [0, 65535]; runs (T,) frames; seconds: its length as audio."""
        units, runs = np.asarray(units), np.asarray(runs)
        if len(units) and (units.min() < 0 or units.max() > MAX_UNIT):
            raise ValueError(f"{name}: units must lie in [0, {MAX_UNIT}], got {units.min()} to {units.max()}")
        self.units.write(units.astype("<u2").tobytes())
        self.runs.write(np.minimum(runs, MAX_UNIT).astype("<u2").tobytes())
        self.files.write(json.dumps({"file_name": name, "seconds": round(seconds, 4)}) + "\n")
        self.offsets.append(self.offsets[-1] + len(units))
        self.seconds += seconds

    def close(self, failures=()):
        """Give the shard its final name. failures: (file, reason) pairs, kept as failures.csv lines."""
        for file in (self.units, self.runs, self.files):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        np.asarray(self.offsets, dtype="<i8").tofile(self._temporary("offsets.bin"))
        for suffix in ("units.bin", "runs.bin", "files.jsonl", "offsets.bin"):
            os.replace(self._temporary(suffix), self.folder / f"{self.shard}.{suffix}")
        part = {"recipe": self.recipe, "files": len(self.offsets) - 1, "units": self.offsets[-1],
                "seconds": self.seconds, "failures": list(failures)}
        path = self.folder / f"{self.shard}.part.json"
        path.with_suffix(".tmp").write_text(json.dumps(part))
        os.replace(path.with_suffix(".tmp"), path)


def merge_meta(folder, shards=1):
    """Join the parts of all `shards` processes into meta.json and failures.csv; returns the meta.

    Shards with higher numbers, which an earlier run on more processes left, are removed: their documents stand in the new ones.
    """
    folder = Path(folder)
    for path in folder.glob("[0-9]" * 5 + ".*"):
        if int(path.name[:5]) >= shards:
            path.unlink()
    parts = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.part.json"))}
    failures = [failure for part in parts.values() for failure in part["failures"]]
    with open(folder / "failures.csv.tmp", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "reason"])
        writer.writerows(failures)
    os.replace(folder / "failures.csv.tmp", folder / "failures.csv")
    meta = {"format": FORMAT, "recipe": next(iter(parts.values()))["recipe"],
            "files": sum(part["files"] for part in parts.values()),
            "units": sum(part["units"] for part in parts.values()),
            "hours": sum(part["seconds"] for part in parts.values()) / 3600, "failures": len(failures)}
    (folder / "meta.json.tmp").write_text(json.dumps(meta, indent=2) + "\n")
    os.replace(folder / "meta.json.tmp", folder / "meta.json")
    for path in parts:
        path.unlink()
    return meta


class UnitShards:
    """All documents of a shard folder, memory-mapped."""

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise FileNotFoundError(f"no meta.json in {folder}, so it holds no unit shards; "
                                    "make them with python hubert_units.py AUDIO... --out=FOLDER")
        self.folder, self.meta = folder, json.loads((folder / "meta.json").read_text())
        if self.meta.get("format") != FORMAT:
            raise ValueError(f"{folder} is written in format {self.meta.get('format')}, this code reads {FORMAT}; "
                             "encode the audio again")
        self.recipe, self.parts = self.meta["recipe"], []
        for path in sorted(folder.glob("*.offsets.bin")):
            prefix = str(path)[: -len("offsets.bin")]
            offsets = np.fromfile(path, dtype="<i8")
            size = os.path.getsize(prefix + "units.bin") // 2
            if offsets[-1] != size:
                raise ValueError(f"{prefix}units.bin holds {size} units, its offsets promise {offsets[-1]}; copy it again")
            units, runs = (np.memmap(prefix + f"{name}.bin", dtype="<u2", mode="r") if size else np.zeros(0, "<u2")
                           for name in ("units", "runs"))
            self.parts.append((units, runs, offsets, prefix + "files.jsonl"))
        lengths = [np.diff(offsets) for _, _, offsets, _ in self.parts]
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)  # units of each document
        self.firsts = np.cumsum([0] + [len(part) for part in lengths])  # index of each shard's first document
        if self.lengths.sum() == 0:
            raise ValueError(f"{folder} holds no units; see its failures.csv")

    def __len__(self):
        return len(self.lengths)

    def document(self, i):
        """units (T,), runs (T,) int64 of document i."""
        part = int(np.searchsorted(self.firsts, i, side="right")) - 1
        units, runs, offsets, _ = self.parts[part]
        rows = slice(*offsets[i - self.firsts[part]:][:2])
        return units[rows].astype(np.int64), runs[rows].astype(np.int64)

    @property
    def names(self):
        """file_name of every document."""
        return [json.loads(line)["file_name"] for part in self.parts for line in open(part[3])]


def check_recipe(recipe, expected, where):
    """Units of different tokenizers must never mix: every number would be meaningless, without any error."""
    for key in ("kind", "num_units", "layer", "centers", "frame_rate"):
        if recipe.get(key) != expected.get(key):
            raise ValueError(f"{where}: units of another tokenizer ({key} is {recipe.get(key)}, "
                             f"expected {expected.get(key)}); encode the audio with the matching --tokenizer")


class UnitLoader:
    """Windows of T + 1 ids over the stream  <S> document <S> document ... , without replacement within an epoch.

    The batch of step s is a pure function of (seed, s): every process computes the same order and takes its rows, so
    a run gives the same batches on any number of processes and resumes exactly where it stopped.

    Args:
        shards: UnitShards; vocab: has encode() and bos (or none); block_size: T; batch: rows B of the whole step.
    """

    def __init__(self, shards, vocab, block_size, batch, seed):
        self.shards, self.vocab, self.T, self.batch, self.seed = shards, vocab, block_size, batch, seed
        self.separator = 0 if vocab.bos is None else 1
        self.ends = np.cumsum(shards.lengths + self.separator)  # stream position behind each document
        # windows overlap by one id: the target of a window's last position is the first input of the next
        self.windows = (int(self.ends[-1]) - 1) // block_size
        if self.windows < 1:
            raise ValueError(f"{shards.folder} holds {int(self.ends[-1])} ids, fewer than one window of {block_size + 1}; "
                             "give more audio or a smaller --block-size")
        self.epoch, self.order = None, None

    def window(self, w):
        """ids (T + 1,) int64 of window w of the stream."""
        begin, end = w * self.T, w * self.T + self.T + 1
        pieces, position = [], begin
        i = int(np.searchsorted(self.ends, begin, side="right"))
        while position < end:
            units, _ = self.shards.document(i)
            document = self.vocab.encode(units, bos=bool(self.separator))
            start = int(self.ends[i]) - len(document)
            piece = document[position - start:end - start]
            pieces.append(piece)
            position, i = position + len(piece), i + 1
        return torch.cat(pieces)

    def rows(self, step, first, count):
        """ids (count, T + 1): rows first .. first + count of the batch of this step."""
        rows = []
        for position in range(step * self.batch + first, step * self.batch + first + count):
            epoch, index = divmod(position, self.windows)
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = np.random.default_rng([self.seed, epoch]).permutation(self.windows)
            rows.append(self.window(int(self.order[index])))
        return torch.stack(rows)


def main():
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    if len(arguments) != 1:
        print(__doc__.strip())
        raise SystemExit(0 if "--help" in sys.argv else 2)
    shards = UnitShards(arguments[0])
    if "--jsonl" in sys.argv:
        for i, name in enumerate(shards.names):
            units, runs = shards.document(i)
            print(json.dumps({"units": units.tolist(), "duration": runs.tolist(), "file_name": name}))
        return
    print(json.dumps(shards.meta, indent=2))
    print(f"{len(shards)} documents; first units of the first: {shards.document(0)[0][:20].tolist()}")


if __name__ == "__main__":
    main()
