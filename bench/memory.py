"""What fits where: the plan of training/memory.py for the published sizes, and the plan beside a measured run.

    python -m bench memory

fits: for each size, GPU memory, number of processes and optimizer, the state (weights, gradients, optimizer, copies) and the most
rows of 1024 ids in a forward of one process, for each way of recomputing; 0: not even one. bfloat16, 500 units. One process
takes several forwards an update, several processes one each; they are spread as --parallel=auto spreads them, 64 as 8 nodes of
8. GB are 10^9 bytes. A card sold as 80 GB holds 80 * 2^30 bytes, 7 % more; the difference is left to CUDA, NCCL and gaps.

measured: two updates of two forwards each of a model of 25 million parameters on the CPU, in a fresh process: highest resident
memory less what the process held before the model, beside the plan's total. The C library is told to give freed memory back to
the system at once (MALLOC_MMAP_THRESHOLD_); left alone it keeps some of it, and the process is larger than what it uses.
"""
import dataclasses
import itertools
import multiprocessing
import os
import types
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

import config
import twist
from model import Transformer, TransformerConfig
from training import distributed, memory
from training import optimizer as optimizers

OPT = dict(vocab_size=twist.UnitVocab(500).size)
LLAMA = OPT | dict(norm="rmsnorm", norm_eps=1e-6, position="rope", mlp="swiglu", attention_bias=False, mlp_bias=False,
                   tie_embeddings=False, family="llama")
SIZES = {
    "OPT-125M": TransformerConfig(**OPT),
    "OPT-350M": TransformerConfig(**OPT, n_layer=24, n_head=16, n_kv_head=16, n_embd=1024, n_inner=4096, embed_dim=512,
                                  norm_order="post"),
    "OPT-1.3B": TransformerConfig(**OPT, n_layer=24, n_head=32, n_kv_head=32, n_embd=2048, n_inner=8192),
    "LLaMA-7B": TransformerConfig(**LLAMA, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128, n_inner=11008),
    "LLaMA-13B": TransformerConfig(**LLAMA, n_layer=40, n_head=40, n_kv_head=40, n_embd=5120, head_dim=128, n_inner=13824)}
GPUS = (24, 40, 80, 141)  # GB
WORLDS = (1, 8, 64)
T, MOST_ROWS = 1024, 1024
SMALL = TransformerConfig(**OPT, block_size=256, n_layer=8, n_head=8, n_kv_head=8, n_embd=512, n_inner=2048)
SMALL_ROWS, SMALL_PIECES = 4, 2


def resident(key):
    """VmRSS (now) or VmHWM (highest so far) of this process, bytes."""
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"the system does not say {key}; this needs Linux")


def in_own_process(function, *arguments):
    """What the function returns in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def spread_over(world, parameters):
    """(parallel, processes that share a copy) of --parallel=auto."""
    if world == 1:
        return "none", 1
    if parameters <= distributed.DDP_LARGEST:
        return "ddp", 1
    return ("fsdp", world) if world <= 8 else ("hsdp", 8)


def plans(size, world, optimizer, recompute):
    """A function: rows of a forward -> Plan; what grows with the rows grows along a straight line."""
    config = SIZES[size]
    parallel, shard = spread_over(world, sum(parameter.numel() for parameter in twist.empty(config).parameters()))
    one, two = (memory.plan(config, parallel=parallel, shard=shard, micro_rows=rows, block_size=T, dtype=torch.bfloat16,
                            optimizer=optimizer, recompute=recompute, pieces=2 if world == 1 else 1) for rows in (1, 2))

    def of(rows):
        grown = {name: getattr(one, name) + (rows - 1) * (getattr(two, name) - getattr(one, name))
                 for name in ("activations", "working")}
        return dataclasses.replace(one, **grown)
    return of, parallel if shard == 1 else f"{parallel} {shard}"


def most_rows(of, room):
    """Largest number of rows whose plan fits into `room` bytes, at most MOST_ROWS."""
    low, high = 0, MOST_ROWS + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle).total <= room else (low, middle)
    return low


def fits():
    """Rows of (size, processes, how, optimizer, GPU, state, most rows for none, selective, full)."""
    rows = []
    for size, world, optimizer in config.progress([*itertools.product(SIZES, WORLDS, memory.STATES)], desc="fits"):
        found = {recompute: plans(size, world, optimizer, recompute) for recompute in memory.RECOMPUTE}
        plan, spread = found["full"][0](1), found["full"][1]
        state = plan.weights + plan.gradients + plan.optimizer + plan.copies
        for gpu in GPUS:
            rows.append({"size": size, "processes": world, "spread": spread, "optimizer": optimizer, "gpu_gb": gpu,
                         "state_gb": round(state / 1e9, 1)}
                        | {recompute: most_rows(of, gpu * 1e9) for recompute, (of, _) in found.items()})
    return rows


def train_small(optimizer, recompute, dtype):
    """In a process of its own: peak bytes above what was held before the model."""
    settings = types.SimpleNamespace(optimizer=optimizer, peak_lr=1e-3, weight_decay=0.1, beta_2=0.95)

    def updates(config):
        model = Transformer(config).train()
        for block in model.h:
            block.recompute = recompute
        trained, ids = optimizers.make_optimizer(model, settings), torch.zeros(SMALL_ROWS, config.block_size, dtype=torch.int64)
        for _ in range(2):
            for _ in range(SMALL_PIECES):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    model(ids, ids).backward()
            trained.step()
            trained.zero_grad(set_to_none=True)

    updates(dataclasses.replace(SMALL, n_layer=1, block_size=16, n_embd=64, n_inner=64))  # what libraries load when first used
    before = resident("VmRSS")
    updates(SMALL)
    return resident("VmHWM") - before


@contextmanager
def returning_memory():
    """Processes that start in here give freed blocks of 64 KB and more back to the system."""
    before = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        yield
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        if before is not None:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = before


def measured():
    """Rows of (optimizer, recompute, dtype, plan and measurement in MB, measured / planned)."""
    rows = []
    modes = ("adamw", torch.float32), ("adamw", torch.bfloat16), ("split", torch.bfloat16)
    for (optimizer, dtype), recompute in config.progress([*itertools.product(modes, memory.RECOMPUTE)], desc="measured"):
        plan = memory.plan(SMALL, parallel="none", shard=1, micro_rows=SMALL_ROWS, block_size=SMALL.block_size, dtype=dtype,
                           optimizer=optimizer, recompute=recompute, pieces=SMALL_PIECES)
        with returning_memory():
            peak = in_own_process(train_small, optimizer, recompute, dtype)
        rows.append({"optimizer": optimizer, "recompute": recompute, "dtype": str(dtype).removeprefix("torch."),
                     "parameters": plan.parameters, "planned_mb": round(plan.total / 1e6), "measured_mb": round(peak / 1e6),
                     "measured_over_planned": round(peak / plan.total, 3)})
    return rows


def bench_memory(options):
    return {"fits": fits(), "measured": measured()}
