"""Pairs that eval.py scores in a second, beside a loop over single sequences.

    python -m bench eval

10,000 pairs of random units, as long as words (0.4 to 1 s, 9 to 22 units) and sentences (1.5 to 3.5 s, 33 to 77 units), by the
pocket speech LM on the CPU, in ten slices; of each slice the loop then scores 40 pairs, one sequence in a forward. Medians.
"""
import statistics
import time

import torch

import twist
from evaluation import likelihood
from training import distributed

PAIRS, SLICES, PART = 10_000, 10, 40  # pairs, divided into slices; those of each slice that the loop scores


@torch.inference_mode()
def one_by_one(model, rows):
    """The plain way, as a yardstick: mean log-likelihood of each row, a forward each."""
    scores = []
    for row in rows:
        log_probabilities = model(row[None, :-1])[0].log_softmax(-1)
        scores.append(log_probabilities.gather(1, row[1:, None]).mean().item())
    return scores


def bench_eval(options):
    """Rows of (length, pairs per second of ours and of the loop, their ratio, largest difference of a score in nats)."""
    model, vocab = twist.load_speech_lm()
    alone, rows = distributed.Dist(0, 1, torch.device("cpu")), []
    for name, (low, high) in {"words, 9 to 22 units": (9, 22), "sentences, 33 to 77 units": (33, 77)}.items():
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(low, high + 1, (2 * PAIRS,), generator=generator).tolist()
        ids = [vocab.encode(torch.randint(vocab.num_units, (n,), generator=generator), bos=True) for n in lengths]
        seconds, furthest = {"ours": [], "loop": []}, 0.0
        for part in torch.arange(2 * PAIRS).view(SLICES, -1).tolist():
            some, begin = [ids[i] for i in part], time.perf_counter()
            ours = [values.mean() for values in likelihood.log_probabilities(model, some, alone)]
            between = time.perf_counter()
            loop = one_by_one(model, some[:2 * PART])
            seconds["ours"].append((between - begin) / (PAIRS // SLICES))
            seconds["loop"].append((time.perf_counter() - between) / PART)
            furthest = max(furthest, *(abs(a - b) for a, b in zip(ours, loop)))
        a_pair = {way: statistics.median(measured) for way, measured in seconds.items()}
        rows.append({"length": name, "ours_pairs_per_second": round(1 / a_pair["ours"], 1),
                     "loop_pairs_per_second": round(1 / a_pair["loop"], 1),
                     "ours_over_loop": round(a_pair["loop"] / a_pair["ours"], 2), "difference": float(f"{furthest:.1e}")})
    return rows
