"""How likely a sequence of units is: log p of every unit given those before it, by a language model or by counting.

    ids (n,) -> log p(ids[i + 1] | ids[0 .. i]) for i = 0 .. n - 2, in nats

Sequences are sorted by length and share a forward pass up to a budget of tokens, padded on the right: a causal model does not
see what comes after, so each gets what it gets alone, up to the rounding of float32. Equal sequences are scored once, so they
tie whatever the rounding. A sequence longer than the model's window is scored in overlapping windows: the first scores all its
units, each later one only what the window before it did not reach, so that those have at least window - stride units of context.

The n-gram models are what a language model must beat. p(b | a) = (count(a b) + k) / (count(a) + k V) with k = 0.1.

Shapes: B sequences of a batch, T tokens, V vocabulary, K units.
"""
import math

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import config
from kernels.packed import packed

BUDGET = {"cpu": 2048, "cuda": 65_536}  # tokens of one forward pass, padding included
SMOOTHING = 0.1  # k: the count that every n-gram gets for nothing
PIECE = 2**22  # units that are counted at a time


def windows(length, window, stride):
    """Yields (begin, end, first) for ids of `length`: inputs are ids[begin:end], scored targets those from ids[first] on."""
    first = 1
    for end in (*range(window, length - 1, stride), length - 1):
        yield max(0, end - window), end, first
        first = end + 1


def batches(lengths, budget):
    """Indices sorted by length, divided so that rows x longest stays within the budget."""
    found = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found and (len(found[-1]) + 1) * lengths[i] <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def log_probabilities(model, rows, dist, stride=None, budget=None, label="scoring"):
    """Score sequences of any length; the processes of `dist` share the work and all get the result.

    Args: model: Transformer. rows: list of (n,) int64 tensors. stride: step of the window, default half of it.
        budget: tokens of one forward pass.
    Returns: list of (n - 1,) float64 arrays, nats; empty for fewer than 2 ids.
    Raises: ValueError where they are not finite.
    """
    different = {}  # ids as bytes: the sequence's number and itself
    places = [different.setdefault(row.numpy().tobytes(), (len(different), row))[0] for row in rows]
    rows = [row for _, row in different.values()]
    window, device = model.config.block_size, model.wte.weight.device
    stride = min(stride or max(1, window // 2), window)
    ends = np.cumsum([0] + [max(0, len(row) - 1) for row in rows])
    flat = np.zeros(ends[-1])
    pieces = [(i, *piece) for i, row in enumerate(rows) if len(row) > 1 for piece in windows(len(row), window, stride)]
    groups = batches([end - begin for _, begin, end, _ in pieces], budget or BUDGET.get(device.type, BUDGET["cpu"]))
    bar = config.progress(total=len(pieces), desc=label, unit="sequence", shown=dist.is_main)
    with packed(model), bar, torch.inference_mode():
        for group in groups[dist.rank::dist.world]:
            some = [pieces[i] for i in group]
            both = pad_sequence([rows[i][begin:end + 1] for i, begin, end, _ in some], batch_first=True).to(device)
            logits = model(both[:, :-1]).float()  # (B, T, V)
            found = (logits.gather(-1, both[:, 1:, None])[..., 0] - logits.logsumexp(-1)).cpu().numpy()  # (B, T)
            for values, (i, begin, end, first) in zip(found, some):
                flat[ends[i] + first - 1:ends[i] + end] = values[first - 1 - begin:end - begin]
            bar.update(len(some) * dist.world)
    scored = dist.sum_array(flat)
    if not np.isfinite(scored).all():
        raise ValueError(f"the model's numbers are not finite in {str(model.wte.weight.dtype).removeprefix('torch.')}: "
                         "its weights are damaged, or it needs --dtype=bfloat16 or float32")
    scored = np.split(scored, ends[1:-1])
    return [scored[i] for i in places]


@torch.no_grad()
def surprisal(model, vocab, units, runs):
    """Bits that each of units (T,) costs a model after those before it: (T,), NaN for the first where nothing is before it.

    They fit its window. A model of frames pays for a unit of runs (T,) frames in each of them.
    """
    frames = units if vocab.dedup else units.repeat_interleave(runs)
    ids = vocab.encode(frames, bos=vocab.bos is not None).to(model.wte.weight.device)
    bits = -model(ids[None, :-1])[0].float().log_softmax(dim=1).gather(1, ids[1:, None])[:, 0].cpu() / math.log(2)
    bits = torch.cat([bits.new_full((len(frames) - len(bits),), math.nan), bits])
    return bits if vocab.dedup else torch.stack([part.sum() for part in bits.split(runs.tolist())])


class UnitCounts:
    """Unigram and bigram frequencies of the units in a shard folder.

    Row K counts what documents begin with; with `eos`, column K counts what they end with.

    Args: shards: UnitShards. num_units: K. eos: whether the end of a document is predicted too.
    """

    def __init__(self, shards, num_units, eos=False):
        K = self.num_units = num_units
        counts = np.zeros((K + 1) * (K + 1))
        for units, _, offsets, _ in shards.parts:
            spoken = np.diff(offsets) > 0  # documents that are not empty
            firsts, lasts = (units[at[spoken]].astype(np.int64) for at in (offsets[:-1], offsets[1:] - 1))
            for begin in range(0, len(units), PIECE):
                piece = units[begin:begin + PIECE + 1].astype(np.int64)
                counts += np.bincount(piece[:-1] * (K + 1) + piece[1:], minlength=len(counts))
            counts -= np.bincount(lasts[:-1] * (K + 1) + firsts[1:], minlength=len(counts))  # no pair of two documents
            counts += np.bincount(K * (K + 1) + firsts, minlength=len(counts))
            counts += np.bincount(lasts * (K + 1) + K, minlength=len(counts))  # without eos, column K is dropped
        counts = counts.reshape(K + 1, K + 1)[:, :K + eos]
        unigram, bigram = counts.sum(0) + SMOOTHING, counts + SMOOTHING
        self.unigram = np.log(unigram / unigram.sum())  # (K [+ 1],)
        self.bigram = np.log(bigram / bigram.sum(1, keepdims=True))  # (K + 1, K [+ 1])

    def log_probabilities(self, units, order, bos, eos):
        """Units (T,) -> nats of the same targets that a language model scores: without `bos` the first unit is none."""
        units = np.asarray(units, dtype=np.int64)
        targets = np.append(units, self.num_units) if eos else units
        if order == 1:
            return self.unigram[targets[0 if bos else 1:]]
        before = np.concatenate([[self.num_units], units])[:len(targets)]
        return self.bigram[before, targets][0 if bos else 1:]
