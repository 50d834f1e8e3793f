"""Training steps of ours beside those of transformers: time, units per second, MFU, memory.

    random weights --twist.save_tensors--> folder --+--> ours: what train.py builds and updates
                                                    +--> transformers: the same weights, scaled_dot_product_attention,
                                                         torch.optim.AdamW and clipping in a plain loop;
                                                         once more with AdamW's fused=True, which is off by default on CPUs

    python -m bench train --repeats=15                   # on the CPU, float32
    python -m bench train --repeats=15 --compile         # and compiled by torch.compile, which takes minutes on two cores
    python -m bench train --repeats=20 --device=cuda     # bfloat16 by autocast, eager and compiled

All take the same batch of random units in one process, and the losses of their first steps must agree; then they take turns.
Medians, and the interquartile range over the median as spread. `over_peer` is the time of transformers' eager step over a way's
own, `over_fused` that of its step with the fused AdamW. Memory that is freed is kept for all of them, as train.py does. FLOPs as
in logs.py. Ours is compiled block by block by the same call of training/learner.py that train.py makes, for rows that never
change; transformers' model as a whole; an eager step is the same model with compilation switched off. Ours is the update that
train.py makes: on a GPU a thread pins the rows, and the loss is read one step late, where the loop of transformers reads each at
once. A sample on a GPU is UPDATES in a row, so that a host that runs ahead can.

Memory of a way: on GPUs the most that was allocated in two steps, less what was before its model was made; on CPUs likewise of
resident memory, in a process of its own that first trained a tiny model, so that libraries are not counted.

LLaMA-7B in float32 is too large twice: ways follow each other, with ours as configs/llama-7b.toml plans it for one GPU.
"""
import dataclasses
import functools
import gc
import itertools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import config
import train
import twist
from bench.memory import SIZES, in_own_process, resident
from bench.timing import attempt, chosen, take_turns, wanted
from corpus.loader import Batch
from model import TransformerConfig
from training import distributed, logs, pipeline
from training.learner import Learner

AGREE = {"float32": 1e-4, "bfloat16": 2e-2}  # nats: most that the first losses may differ; bfloat16 has 8 bits
UPDATES = {"cuda": 4, "cpu": 1}  # of a sample
WARM_UP = 2  # steps of each way before those that count; the first compiles


@dataclass(frozen=True)
class Shape:
    name: str
    config: TransformerConfig
    rows: int  # of a forward; one forward a step
    T: int
    optimizer: str = "adamw"  # of ours; split: bfloat16 weights, and ways that follow each other instead of taking turns
    recompute: str = "none"  # of ours; transformers' model then recomputes whole blocks, the one way it has

    def options(self, compiled, device):
        return train.TrainConfig(optimizer=self.optimizer, recompute=self.recompute, compile="blocks" if compiled else "none",
                                 peak_lr=1e-4, device=device, dtype=self.dtype(device))

    def dtype(self, device):
        return "bfloat16" if device == "cuda" or self.optimizer == "split" else "float32"


def shapes(device):
    if device == "cuda":
        return (Shape("OPT-125M", SIZES["OPT-125M"], 64, 1024), Shape("OPT-350M", SIZES["OPT-350M"], 32, 1024),
                Shape("OPT-1.3B", SIZES["OPT-1.3B"], 16, 1024),
                Shape("LLaMA-7B", SIZES["LLaMA-7B"], 4, 2048, "split", "selective"))
    small = dataclasses.replace(SIZES["OPT-125M"], n_layer=6, n_head=8, n_kv_head=8, n_embd=512, embed_dim=512, n_inner=2048)
    return (Shape("pocket", twist.load_speech_lm("pocket")[0].config, 8, 256), Shape("OPT, 19M", small, 2, 256),
            Shape("OPT, 19M", small, 4, 256), Shape("OPT-125M", SIZES["OPT-125M"], 2, 256))


def narrow(shape):
    """The same architecture, tiny."""
    config = dataclasses.replace(shape.config, n_layer=1, n_head=1, n_kv_head=1, n_embd=64, embed_dim=64, n_inner=64)
    return dataclasses.replace(shape, config=config, rows=2, T=16)


def write_start(shape, folder):
    """Random weights, as both read them."""
    tensors = dict(twist.cold_tensors(shape.config))
    twist.save_tensors(shape.config, tensors, twist.UnitVocab(shape.config.vocab_size - 2), folder)
    return sum(tensor.numel() for tensor in tensors.values())


def draw_batch(shape, device="cpu"):
    """Random units, without special tokens; transformers' loss has no target for the last id of a row, so neither has ours."""
    ids = torch.randint(2, shape.config.vocab_size, (shape.rows, shape.T), generator=torch.Generator().manual_seed(0))
    targets = torch.cat([ids[:, 1:], torch.full((shape.rows, 1), -100)], dim=1)
    return Batch(ids.to(device), targets.to(device), None)


# ------------------------------------------------------------------------------------------------ one step of each

def ours(shape, folder, compiled, device):
    """A function that makes an update and returns its loss."""
    options, dist = shape.options(compiled, device), distributed.Dist(0, 1, torch.device(device))
    model_config, tensors, _ = twist.open_speech_lm(folder)
    learner, batch, before = Learner(model_config, options, dist).fill(tensors.items()), draw_batch(shape), None
    batches = pipeline.ahead(lambda _: batch, itertools.count(), dist.device)

    def step():
        nonlocal before
        update = learner.update(next(batches), shape.rows, batch.count, options.peak_lr)
        late, before = (before or update) if learner.on_gpu else update, update
        return late.read()[0]
    return step


def transformers_loop(shape, folder, compiled, device, fused=None):
    """The same with transformers' model; fused: of AdamW, None for PyTorch's default."""
    import transformers  # the peer, imported here because the rest runs without it
    options = shape.options(compiled, device)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.to(device).train()
    if shape.recompute != "none":
        model.gradient_checkpointing_enable()
    if compiled:
        model.compile()
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": options.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.peak_lr, betas=(0.9, options.beta_2), fused=fused)
    ids = draw_batch(shape, device).ids

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


BUILDERS = {"ours": ours, "transformers": transformers_loop,
            "transformers, fused AdamW": functools.partial(transformers_loop, fused=True)}


def eagerly(step):
    """The step with every torch.compile in it switched off."""
    with torch.compiler.set_stance("force_eager"):
        return step()


def variants(builder, step, compiled):
    """{way: function}"""
    return {builder: functools.partial(eagerly, step)} | ({f"{builder}, compiled": step} if compiled else {})


# ------------------------------------------------------------------------------------------------ memory and time

def peak_in_process(builder, shape, folder):
    """In a process of its own, on the CPU: most bytes above what was held before the model."""
    with tempfile.TemporaryDirectory() as other:
        tiny = narrow(shape)
        write_start(tiny, Path(other) / "model")
        BUILDERS[builder](tiny, Path(other) / "model", False, "cpu")()
    gc.collect()
    before = resident("VmRSS")
    step = BUILDERS[builder](shape, folder, False, "cpu")
    for _ in range(2):
        step()
    return resident("VmHWM") - before


def peak_on_cpu(builder, shape, folder):
    return in_own_process(peak_in_process, builder, shape, folder)


def warm_up(step, device, before):
    """(loss of the first step, most bytes above `before` in the second step; None on CPUs)."""
    loss = step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP - 1):
        step()
    return loss, torch.cuda.max_memory_allocated() - before if device == "cuda" else None


@dataclass
class Found:
    """What was measured of a way."""

    loss: float | None = None  # of the first step; None for a compiled way, which goes on from the eager one
    peak: int | None = None  # bytes
    note: str = ""  # why it does not run
    seconds: list[float] = dataclasses.field(default_factory=list)


def measure(shape, folder, options, compiled):
    """{way: Found}"""
    found, steps, device = {}, {}, options.device
    for builder, build in wanted(options, BUILDERS).items():
        before = torch.cuda.memory_allocated() if device == "cuda" else None
        step, note = attempt(build, (shape, folder, compiled, device))
        for way, function in variants(builder, step, compiled).items():
            (loss, peak), note = (None, None), note
            if not note:
                warmed, note = attempt(warm_up, (function, device, before))
                loss, peak = warmed or (None, None)
            found[way] = Found(loss if way == builder else None, peak, note or "")
            if not note:
                steps[way] = function
        if shape.optimizer == "split":  # the next needs the room
            take_times(steps, found, options)
            steps, step, function = {}, None, None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    take_times(steps, found, options)
    return found


def take_times(steps, found, options):
    updates = UPDATES[options.device]
    in_a_row = {way: lambda step=step: [step() for _ in range(updates)] for way, step in steps.items()}
    seconds, stopped = take_turns(in_a_row, options.repeats, options.device)
    for way in steps:
        found[way].seconds, found[way].note = [taken / updates for taken in seconds[way]], stopped.get(way, "")


def disagreement(found, dtype):
    """What is wrong with the losses of the first steps, in words; empty if they agree."""
    losses = [one.loss for one in found.values() if one.loss is not None]
    if not losses or max(losses) - min(losses) < AGREE[dtype]:
        return ""
    return f"the first losses are {', '.join(f'{loss:.5f}' for loss in losses)}: not of the same weights"


def row_of(shape, way, one, peers, flops, device):
    """One line of the table."""
    row = {"shape": shape.name, "rows_x_T": f"{shape.rows} x {shape.T}", "way": way,
           "first_loss": "-" if one.loss is None else round(one.loss, 5)}
    if not one.seconds:
        return row | dict.fromkeys(("ms", "spread", "units_per_second", "tflops", "mfu", *peers, "peak_mb"), "-") | {
            "note": one.note}
    seconds, peak_flops = statistics.median(one.seconds), logs.peak_flops(torch.device(device))
    low, high = np.percentile(one.seconds, [25, 75])
    speed = shape.rows * shape.T / seconds
    return row | {"ms": round(1000 * seconds, 1), "spread": round(float(high - low) / seconds, 3),
                  "units_per_second": round(speed),
                  "tflops": round(speed * flops / 1e12, 3),
                  "mfu": round(100 * speed * flops / peak_flops, 1) if peak_flops else "-",
                  **{name: round(statistics.median(peer.seconds) / seconds, 3) if peer.seconds else "-"
                     for name, peer in peers.items()},
                  "peak_mb": "-" if one.peak is None else round(one.peak / 1e6), "note": one.note}


def bench_train(options, among=None):
    """Yields rows of (shape, way, time of a step, units a second, MFU in %, over transformers' eager step, memory).

    Raises: ValueError, after all rows, if first losses differ.
    """
    compiled, wrong = options.compile or options.device == "cuda", ""
    names = {f"{shape.name}, {shape.rows} x {shape.T}": shape for shape in among or shapes(options.device)}
    for name, shape in config.progress(chosen(options, names).items(), desc="train"):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder) / "model"
            flops = logs.flops_per_unit(shape.config, write_start(shape, folder), shape.T)
            found = measure(shape, folder, options, compiled)
            if options.device == "cpu":
                for builder in wanted(options, BUILDERS):
                    found[builder].peak = peak_on_cpu(builder, shape, folder)
        peers = {"over_peer": found.get("transformers", Found()), "over_fused": found.get("transformers, fused AdamW", Found())}
        if disagreed := disagreement(found, shape.dtype(options.device)):
            wrong = f"{name}: {disagreed}"
        for way, one in found.items():
            one.note = "; ".join(filter(None, (one.note, disagreed)))
            yield row_of(shape, way, one, peers, flops, options.device)
    if wrong:
        raise ValueError(wrong)
