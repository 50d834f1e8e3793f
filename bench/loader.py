"""Batches for training: units per second of the loader, beside a reader of JSON lines.

    python -m bench loader                 # 220 MB of temporary files

Batches of 64 windows of 1024 from four made-up shards of 12 million units, documents of 100 to 500, on one core. The peer reads
slamkit's JSON lines of the same documents in their order, makes ids and cuts windows. Taking turns; medians of 20 batches.
"""
import functools
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import config
import twist
from bench.timing import side_by_side
from corpus import foreign
from corpus.loader import UnitLoader
from corpus.shards import ShardWriter, UnitShards, publish

LOADER_BATCH, LOADER_T, LOADER_SHARDS, LOADER_DOCUMENTS = 64, 1024, 4, 40_000  # documents of a shard, 300 units on average


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


def bench_loader(options):
    """Rows of (way, million units a second, over the peer's)."""
    torch.set_num_threads(1)
    rng, vocab = np.random.default_rng(0), twist.UnitVocab(500)
    recipe = {"kind": "hubert", "num_units": 500, "frame_rate": 25.0, "model": "made up"}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        writers = [ShardWriter(folder / "units", shard) for shard in range(LOADER_SHARDS)]
        for writer in config.progress(writers, desc="writing"):
            for length in rng.integers(100, 501, LOADER_DOCUMENTS):
                units = rng.integers(0, 500, length)
                writer.add(units, np.ones_like(units), "made up", length / 25)
            writer.finish()
        publish(folder / "units", recipe, writers)
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
    return [{"way": way, "million_units_per_second": round(20 * LOADER_BATCH * LOADER_T / seconds[way] / 1e6, 1),
             "over_json_lines": round(seconds["JSON lines"] / seconds[way], 1)} for way in ways]
