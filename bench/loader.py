"""Batches for training: units per second of the loader, beside a reader of JSON lines; and what a large corpus takes.

    python -m bench loader                 # 300 MB of temporary files

Batches of 64 windows of 1024 from four made-up shards of 12 million units, documents of 100 to 500, on one core. The peer reads
slamkit's JSON lines of the same documents in their order, makes ids and cuts windows. Taking turns; medians of 20 batches.

The last row is of ten million documents of 100 to 600 units, 3.5 billion together, in a process of its own: their offsets are
real, their units are holes in sparse files, so no disk is read but memory is mapped as it would be. Seconds from UnitShards() to
the first batch; the most memory that the process gained by then, and by 20 batches more: mb, of it mb_mapped mapped pages of the
shards, which the system may drop.
"""
import functools
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import config
import twist
from bench.memory import in_own_process, resident
from bench.timing import side_by_side
from checkpoints.files import write_json
from corpus import foreign
from corpus.loader import UnitLoader
from corpus.shards import FORMAT, SHARD_UNITS, ShardWriter, UnitShards, publish

LOADER_BATCH, LOADER_T, LOADER_SHARDS, LOADER_DOCUMENTS = 64, 1024, 4, 40_000  # documents of a shard, 300 units on average
LARGE_DOCUMENTS = 10_000_000
RECIPE = {"kind": "hubert", "num_units": 500, "frame_rate": 25.0, "model": "made up"}


def json_batches(path, vocab):
    """The plain way, as a yardstick: yields ids, targets (B, T) of a file of JSON lines, over and over, in its order."""
    ids, size = [], LOADER_BATCH * LOADER_T
    while True:
        with open(path) as lines:
            for line in lines:
                ids.append(vocab.bos)
                ids.extend([unit + vocab.offset for unit in json.loads(line)["units"]])
                while len(ids) > size:
                    batch, ids = torch.tensor(ids[:size + 1]), ids[size:]
                    yield batch[:-1].view(LOADER_BATCH, LOADER_T), batch[1:].view(LOADER_BATCH, LOADER_T)


def write_sparse(folder, documents):
    """A folder of shards whose units are all 0 and take no room on the disk."""
    folder.mkdir()
    bounds = np.append(0, np.cumsum(np.random.default_rng(0).integers(100, 601, documents)))
    cuts = np.searchsorted(bounds, np.arange(0, bounds[-1], SHARD_UNITS)).tolist()
    for shard, (first, last) in enumerate(itertools.pairwise([*cuts, documents])):
        (bounds[first:last + 1] - bounds[first]).astype("<i8").tofile(folder / f"{shard:05d}.offsets.bin")
        for name in ("units.bin", "runs.bin", "files.jsonl"):
            with open(folder / f"{shard:05d}.{name}", "wb") as file:
                file.truncate(0 if name == "files.jsonl" else 2 * int(bounds[last] - bounds[first]))
    write_json(folder / "meta.json", {"format": FORMAT, "recipe": RECIPE, "files": documents, "units": int(bounds[-1])})


def open_large(folder):
    """In a process of its own: the row of a large corpus."""
    torch.set_num_threads(1)
    rows, before, mapped, began = LOADER_BATCH, resident("VmRSS"), resident("RssFile"), time.perf_counter()
    shards = UnitShards(folder)
    loader = UnitLoader(shards, twist.UnitVocab(500), LOADER_T, rows, 0)
    loader.rows(0, 0, rows)
    first, first_mb = time.perf_counter() - began, round((resident("VmHWM") - before) / 1e6)
    for step in range(1, 21):
        loader.rows(step, 0, rows)
    units = 20 * rows * LOADER_T / (time.perf_counter() - began - first)
    return {"way": f"{shards.meta['units'] / 1e9:.1f} billion units in {len(shards):,} documents",
            "million_units_per_second": round(units / 1e6, 1), "seconds_to_first_batch": round(first, 2),
            "mb_to_first_batch": first_mb, "mb": round((resident("VmHWM") - before) / 1e6),
            "mb_mapped": round((resident("RssFile") - mapped) / 1e6)}


def bench_loader(options):
    """Rows of (way, million units a second, over the peer's)."""
    torch.set_num_threads(1)
    rng, vocab = np.random.default_rng(0), twist.UnitVocab(500)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        writers = [ShardWriter(folder / "units", shard) for shard in range(LOADER_SHARDS)]
        for writer in config.progress(writers, desc="writing"):
            for length in rng.integers(100, 501, LOADER_DOCUMENTS):
                units = rng.integers(0, 500, length)
                writer.add(units, np.ones_like(units), "made up", length / 25)
            writer.finish()
        publish(folder / "units", RECIPE, writers)
        shards = UnitShards(folder / "units")
        with open(folder / "units.jsonl", "w") as file:
            foreign.write_jsonl(itertools.islice(shards, 10_000), file)
        peer, ways = json_batches(folder / "units.jsonl", vocab), {}
        for packing in ("stream", "documents"):
            loader = UnitLoader(shards, vocab, LOADER_T, LOADER_BATCH, 0, packing=packing)
            ways[packing] = map(functools.partial(loader.rows, first=0, count=LOADER_BATCH), itertools.count())
        ways["JSON lines"] = peer
        for ours, theirs in zip(loader.window(*range(LOADER_BATCH)), next(peer)):  # ids, targets
            assert ours.equal(theirs), "the peer cuts other windows"

        def draw(batches):
            for _ in range(20):
                next(batches)

        seconds = side_by_side({way: functools.partial(draw, batches) for way, batches in ways.items()}, options.repeats, "cpu")
        write_sparse(folder / "large", LARGE_DOCUMENTS)
        large = in_own_process(open_large, folder / "large")
    return [*({"way": way, "million_units_per_second": round(20 * LOADER_BATCH * LOADER_T / seconds[way] / 1e6, 1),
             "over_json_lines": round(seconds["JSON lines"] / seconds[way], 1)} for way in ways), large]
