"""Packed weights beside nn.Linear's own, at what our commands do without gradients on a CPU: scoring, sampling, encoding.

    python -m bench cpu

The pocket models and random ones of real sizes (OPT-125M's shape, the 25 Hz HuBERT base). Scoring: sequences of 40 to 120 random
units, as evaluation/likelihood.py batches them. Sampling: 150 new units after a prompt of 50, a KV cache. Encoding: recordings of
3 s alone and of 10 s in fours, up to the last layer. Packing itself is counted in each, once a call. Medians, taking turns.
"""
import functools

import torch

import twist
from bench.memory import SIZES
from bench.timing import side_by_side
from evaluation import likelihood
from hubert_units import load_unit_encoder
from kernels import packed
from model import generate
from speech.hubert import Hubert, HubertConfig
from training import distributed

AVAILABLE = packed.AVAILABLE
SEQUENCES = {"pocket": 400, "OPT-125M": 60}


def tasks():
    """Yields (what, model, function that does it)."""
    random, alone = torch.Generator().manual_seed(0), distributed.Dist(0, 1, torch.device("cpu"))
    models = {"pocket": twist.load_speech_lm()[0],
              "OPT-125M": twist.build(SIZES["OPT-125M"], twist.cold_tensors(SIZES["OPT-125M"])).requires_grad_(False)}
    for name, model in models.items():
        lengths = torch.randint(40, 121, (SEQUENCES[name],), generator=random).tolist()
        rows = [torch.randint(2, 100, (length,), generator=random) for length in lengths]
        yield f"scoring {len(rows)} sequences, {name}", model, lambda model=model, rows=rows: likelihood.log_probabilities(
            model, rows, alone)
        for B in (1, 4, 8):
            prompts = torch.randint(2, 100, (B, 50), generator=random)
            yield f"sampling 150 units, B = {B}, {name}", model, lambda model=model, prompts=prompts: generate(
                model, prompts, 150, temperature=0)
    torch.manual_seed(0)
    networks = {"pocket": load_unit_encoder().hubert, "HuBERT base": Hubert(HubertConfig(pos_batch_norm=True)).eval()}
    for name, network in networks.items():
        for B, seconds in ((1, 3), (4, 10)):
            wav = 0.1 * torch.randn(B, 16_000 * seconds, generator=random)
            yield f"encoding {B} x {seconds} s, {name}", network, lambda network=network, wav=wav: network(wav)


def bench_cpu(options):
    """Rows of (what, ms with plain and with packed weights, how many times as fast the latter are)."""
    found = []
    for what, model, function in tasks():
        def way(available, model=model, function=function):
            packed.AVAILABLE = available and AVAILABLE
            with torch.inference_mode(), packed.packed(model):
                function()

        ways = {"plain": functools.partial(way, False), "packed": functools.partial(way, True)}
        seconds = side_by_side(ways, options.repeats, "cpu")
        packed.AVAILABLE = AVAILABLE
        plain, fast = 1000 * seconds["plain"], 1000 * seconds["packed"]
        found.append({"what": what, "plain_ms": round(plain, 1), "packed_ms": round(fast, 1), "times": round(plain / fast, 2)})
    return found
