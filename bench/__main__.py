"""Ours beside the peers: what an operation costs, as ratios -> a table on screen and results/NAME.json.

    python -m bench memory                    # what training fits on which GPU, and the plan beside a measured run
    python -m bench opening                   # peak memory of opening a sharded checkpoint of 2 GiB
    python -m bench units                     # speech -> units, in times real time, beside transformers' HubertModel
    python -m bench hubert                    # what the parts of our HuBERT cost on a CPU, and their alternatives
    python -m bench long                      # peak memory of encoding recordings of two minutes and of an hour
    python -m bench chunking long.wav         # units of long recordings in pieces against those of the whole
    python -m bench loader                    # batches for training, beside a reader of JSON lines
    python -m bench listing                   # ten million names: memory and time of listing and assembling them
    python -m bench generate                  # a continuation, beside transformers' generate
    python -m bench vocoder                   # units -> speech on a CPU, beside the plain network with weight norm kept
    python -m bench start                     # import, --help and the first audible sample of sample.py, with their parts
    python -m bench train                     # training steps, beside transformers' model in a plain loop
    python -m bench attention                 # our kernels beside PyTorch's, cuDNN's and FlexAttention; needs a CUDA GPU
    python -m bench cross_entropy             # our loss, fused with the head and alone, beside eager and compiled; needs a GPU
    python -m bench cpu                       # packed weights beside nn.Linear's, in scoring, sampling and encoding
    python -m bench eval                      # pairs that eval.py scores in a second, beside a loop over single sequences

What each measures, and how, stands at the head of its file: memory.py, opening.py, units.py (hubert, long and chunking too),
listing.py, loader.py, training.py, generation.py, vocoding.py (vocoder), start.py, kernels.py (attention, cross_entropy),
packing.py (cpu), scoring.py (eval).
"""
import os
import platform
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import config
from bench.generation import bench_generate
from bench.kernels import bench_attention, bench_cross_entropy
from bench.listing import bench_listing
from bench.loader import bench_loader
from bench.memory import bench_memory
from bench.opening import bench_opening
from bench.packing import bench_cpu
from bench.scoring import bench_eval
from bench.start import bench_start
from bench.timing import OF_GPUS, check_device, tables
from bench.training import bench_train
from bench.units import bench_chunking, bench_hubert, bench_long, bench_units
from bench.vocoding import bench_vocoder
from checkpoints import files


@dataclass(frozen=True)
class BenchConfig:
    what: tuple[str, ...] = ()  # which benchmark, and for chunking recordings
    out: str = "results"  # folder for the JSON file
    gib: float = 2.0  # opening: size of the model in float32
    shards: int = 4  # opening: files it is divided into
    repeats: int = 5  # times that each way is measured; attention, cross_entropy: at least 20 on a GPU
    device: str | None = None  # cpu | cuda, of generate, units and train (none: cpu), attention and cross_entropy (none: cuda)
    cases: tuple[str, ...] = ()  # where there are several: those whose name, without commas, holds one of these
    ways: tuple[str, ...] = ()  # attention, cross_entropy, train: only these, such as ours, flash
    compile: bool = False  # train: also compiled steps on a CPU
    CHOICES = {"device": ("cpu", "cuda")}
    RANGES = {"gib": (config.ABOVE_0, 10_000), "shards": (1, 10_000), "repeats": (1, config.MOST)}


BENCHMARKS = {"attention": bench_attention, "chunking": bench_chunking, "cpu": bench_cpu, "cross_entropy": bench_cross_entropy,
              "eval": bench_eval, "generate": bench_generate, "hubert": bench_hubert, "listing": bench_listing,
              "loader": bench_loader, "long": bench_long, "memory": bench_memory, "opening": bench_opening, "start": bench_start,
              "train": bench_train, "units": bench_units, "vocoder": bench_vocoder}
ALSO = {"scoring": "eval"}  # second names


def machine(device):
    """What the numbers were measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.partition(": ")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if os.path.exists("/proc/cpuinfo") else [platform.processor()]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def place(what, options):
    """The file of a benchmark: each GPU has its own, and so have a rehearsal on a CPU and a part of the cases or ways."""
    where = [torch.cuda.get_device_name()] if options.device == "cuda" else ["cpu"] * (what in OF_GPUS)
    words = [re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-").removeprefix("nvidia-")
             for word in (*where, *options.cases, *options.ways)]
    return Path(options.out) / ("_".join([what, *words]) + ".json")


def main(argv=None):
    options = config.load(BenchConfig, argv, positional="what")
    what = ALSO.get(options.what[0], options.what[0]) if options.what else None
    if what not in BENCHMARKS or (len(options.what) > 1 and what != "chunking"):
        raise ValueError(f"expected one of {', '.join(BENCHMARKS)}, got {' '.join(options.what) or 'nothing'}")
    options = replace(options, device=options.device or ("cuda" if what in OF_GPUS else "cpu"))
    check_device(what, options.device)
    settings = {key: value for key, value in asdict(options).items() if key not in ("what", "out")}
    head = {"command": " ".join(["python -m bench", *(Path(word).name for word in options.what)]), "options": settings,
            "machine": machine(options.device), "torch": torch.__version__}
    measured, found = BENCHMARKS[what](options), {}
    try:
        for found in [measured] if isinstance(measured, dict) else growing(what, measured, options):
            files.write_json(place(what, options), head | found)  # at every row: the next may end the process
    finally:
        for name, rows in found.items():
            show(name, rows)


def growing(what, rows, options):
    """The tables after every row that comes."""
    known = []
    for row in rows:
        known.append(row)
        yield tables(known, options.device) if what in OF_GPUS else {"rows": known}


def show(name, rows):
    print(f"{name}: {len(rows)}")
    keys = dict.fromkeys(key for row in rows for key in row)  # a row of what did not run has fewer
    widths = {key: max(len(str(row.get(key, ""))) for row in [*rows, {key: key}]) for key in keys}
    for row in ({key: key for key in keys}, *rows) if rows else ():
        print("  ".join(f"{row.get(key, '')!s:<{width}}" for key, width in widths.items()))


if __name__ == "__main__":
    config.command(main)
