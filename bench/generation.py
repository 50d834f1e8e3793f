"""A continuation beside transformers' generate, and beside what reading the weights once a token would take.

    python -m bench generate                   # the pocket model and OPT-125M's shape in float32, and ours in bfloat16, on a CPU
    python -m bench generate --device=cuda     # the shapes of OPT-125M and OPT-350M in bfloat16; ours with both attentions

150 new units after a prompt of 60, the likeliest each time, as sample.py runs it: weights are packed once, before (`packing_ms`);
a GPU's graph is recorded in every call. transformers with a cache that grows and with a static one. `over_peer` is the time of
the better of the peers over ours; `over_limit` ours over bytes of the weights / read bandwidth, which is the sum over a large
tensor, measured before (the pocket's weights fit into caches, so its limit is none). `same` is the share of units that the peers
drew, too: all of them in float32; in bfloat16 rounding decides between two that are nearly as likely, and what follows differs.
Medians of rounds in turn; spread is the interquartile range over it.
"""
import os
import statistics
import tempfile
import time
from contextlib import ExitStack

import numpy as np
import torch

import twist
from bench.memory import SIZES
from bench.timing import chosen, take_turns
from checkpoints import files
from kernels.packed import packed
from model import generate

PROMPT, NEW = 60, 150  # units
SHAPES = {"cpu": ("pocket", "OPT-125M"), "cuda": ("OPT-125M", "OPT-350M")}
BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 64)}


def read_bandwidth(device):
    """Bytes a second."""
    x, seconds = torch.ones(2**28, device=device), []
    for _ in range(7):
        begin = time.perf_counter()
        x.sum().item()
        seconds.append(time.perf_counter() - begin)
    return x.nbytes / min(seconds)


def pair(name, device):
    """(our model, transformers' of the same weights, None where that package is not installed), float32 on the CPU."""
    if name == "pocket":
        ours, folder = twist.load_speech_lm()[0], files.KINDS["model"]
    else:
        shape, folder = SIZES[name], tempfile.mkdtemp()
        ours = twist.build(shape, twist.cold_tensors(shape)).eval()
        twist.save_speech_lm(ours, twist.UnitVocab(shape.vocab_size - 2), folder)
    try:
        import transformers  # the peer, imported here because ours runs without it
    except ImportError:
        return ours, None
    return ours, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def forced(function, backend):
    """function with one of our implementations of attention over a cache."""
    def run():
        before = os.environ.get("TWIST_KERNELS")
        os.environ["TWIST_KERNELS"] = backend
        try:
            return function()
        finally:
            os.environ.pop("TWIST_KERNELS") if before is None else os.environ.update(TWIST_KERNELS=before)
    return run


def ways_of(ours, theirs, wide, ids, device):
    """{name: function that draws}; wide: our model in float32, on a CPU."""
    def own(model):
        return generate(model, ids, NEW, temperature=0)

    def peer(cache):
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                               eos_token_id=None, pad_token_id=0, cache_implementation=cache, disable_compile=True)

    if device == "cpu":
        ways = {"ours": lambda: own(wide), "bfloat16": lambda: own(ours)}
    else:
        ways = {"ours": forced(lambda: own(ours), "torch"), "triton": forced(lambda: own(ours), "triton")}
    return ways | ({} if theirs is None else {"dynamic": lambda: peer(None), "static": lambda: peer("static")})


@torch.inference_mode()
def bench_generate(options):
    """Yields rows of (model, B, ms a token of ours and of the peers, ratios, spread, share of the limit)."""
    device = options.device
    bandwidth = read_bandwidth(device)
    for name in chosen(options, dict.fromkeys(SHAPES[device])):
        with ExitStack() as stack:
            yield from rows_of(name, options, bandwidth, stack)


def rows_of(name, options, bandwidth, stack):
    """Of one model."""
    device = options.device
    wide, theirs = pair(name, device)
    rounded = [(key, x.bfloat16()) for key, x in wide.state_dict().items()]
    ours = twist.build(wide.config, iter(rounded), torch.bfloat16).to(device)
    if theirs is not None and device == "cuda":
        theirs = theirs.to(device, torch.bfloat16)
    subject = wide if device == "cpu" else ours
    size, begin = sum(p.nbytes for p in subject.parameters()), time.perf_counter()
    stack.enter_context(packed(subject))
    packing = 1000 * (time.perf_counter() - begin)
    stack.enter_context(packed(ours))
    for B in BATCHES[device]:
        ids = torch.randint(2, 100, (B, PROMPT), generator=torch.Generator().manual_seed(B)).to(device)
        ways = ways_of(ours, theirs, wide, ids, device)
        drawn = {way: function() for way, function in ways.items()}
        rounds, stopped = take_turns(ways, options.repeats, device)
        ms = {way: 1000 / NEW * statistics.median(seconds) for way, seconds in rounds.items() if seconds}
        peers = [ms[way] for way in ("dynamic", "static") if way in ms]
        quarters = np.percentile(rounds["ours"], (25, 75)) * 1000 / NEW
        fastest = min(ms[way] for way in ("ours", "triton") if way in ms)
        yield {"model": name, "B": B, "dtype": str(subject.wte.weight.dtype).removeprefix("torch."),
               **{f"{way}_ms": round(value, 3) for way, value in ms.items()},
               "over_peer": round(min(peers) / fastest, 2) if peers else None,
               **({"over_own_float32": round(ms["ours"] / ms["bfloat16"], 2)} if device == "cpu" else {}),
               "packing_ms": round(packing) if device == "cpu" else None,
               "spread": round((quarters[1] - quarters[0]) / ms["ours"], 3),
               "over_limit": round(fastest / (1000 * size / bandwidth), 2) if size > 1e8 else None,
               "read_gb_s": round(bandwidth / 1e9, 1),
               "same": {way: round((units == drawn["ours"])[:, PROMPT:].float().mean().item(), 3)
                        for way, units in drawn.items() if way != "ours"},
               **({"stopped": stopped} if stopped else {})}
