"""What a folder of units looks like in numbers: hours, frequencies, entropy, run lengths.

    UnitShards --count, piece by piece--> how often each unit and each run length occurs --measure--> numbers --inspect--> text

`python hubert_units.py --inspect=FOLDER` and `python -m corpus FOLDER` print it. Shapes: T units per document, K units in all.
"""
import itertools
import math

import numpy as np

from corpus.shards import UnitShards

PIECE = 2**22  # units counted at a time: a folder may hold more than the memory
RANGES = {"1": (1, 1), "2": (2, 2), "3": (3, 3), "4": (4, 4), "5-8": (5, 8), "9+": (9, None)}  # run lengths in groups, frames


def count(streams):
    """How often each uint16 value occurs in memory-mapped arrays: (65536,) int64."""
    total = np.zeros(2**16, dtype=np.int64)
    for values in streams:
        for begin in range(0, len(values), PIECE):
            total += np.bincount(values[begin:begin + PIECE], minlength=2**16)
    return total


def measure(shards):
    """The numbers of UnitShards, by name; counts (K,): how often each unit occurs."""
    counts, runs = count(part[0] for part in shards.parts), count(part[1] for part in shards.parts)
    units, frames = int(counts.sum()), int(runs @ np.arange(len(runs)))
    K = max(shards.recipe.get("num_units") or 0, int(counts.nonzero()[0][-1]) + 1)
    share = counts[counts > 0] / units
    entropy = float(-(share * np.log2(share)).sum())
    seconds = shards.meta["hours"] * 3600
    per_second = units / seconds if seconds else math.nan  # text has no length in seconds
    median, most = np.searchsorted(np.cumsum(runs), (0.5 * units, 0.95 * units))  # values that such a share does not exceed
    ranges = {label: int(runs[low:high and high + 1].sum()) for label, (low, high) in RANGES.items()}
    return {
        "seconds": seconds, "documents": len(shards), "failures": shards.meta["failures"], "units": units,
        "units_per_second": per_second, "document_mean": float(shards.lengths.mean()),
        "document_median": float(np.median(shards.lengths)), "document_longest": int(shards.lengths.max()),
        "counts": counts[:K], "never": int((counts[:K] == 0).sum()), "entropy": entropy, "perplexity": 2**entropy,
        "bits_per_second": entropy * per_second, "frames": frames, "run_mean": frames / units, "run_median": int(median),
        "run_95": int(most), "run_max": int(runs.nonzero()[0][-1]), "run_ranges": ranges}


def table(title, rows, whole, longest):
    """Lines `label  share  bar`; rows: (label, number), whole: the number that is 100 %, longest: the one of a full bar."""
    return ["", title, *(f"{label:>8} {100 * number / whole:6.2f} %  {'#' * round(50 * number / longest)}".rstrip()
                         for label, number in rows)]


def summary(shards, m):
    """What measure() found of UnitShards in a few lines, as (name, text)."""
    seconds, used = m["seconds"], f"perplexity {m['perplexity']:.1f} of {len(m['counts'])} units, {m['never']} never used"
    longest = next(itertools.islice(shards.each_file(), int(shards.lengths.argmax()), None))["file_name"]
    return [
        ("speech", f"{seconds / 3600:,.3f} hours in {m['documents']:,} documents; {m['failures']:,} recordings failed"),
        ("units", f"{m['units']:,}" + (f" ({m['units_per_second']:.2f} per second of speech)" if seconds else "")),
        ("documents", f"mean {m['document_mean']:,.1f} units, median {m['document_median']:,.1f}, "
         f"longest {m['document_longest']:,} ({longest})"),
        ("unigram", f"{m['entropy']:.3f} bits a unit, {used}"
         + (f"; {m['bits_per_second']:.1f} bits per second of speech" if seconds else "")),
        ("runs", f"mean {m['run_mean']:.2f} frames, median {m['run_median']}, 95 % at most {m['run_95']}, "
         f"longest {m['run_max']}")]


def inspect(folder):
    """What is in a shard folder, as text."""
    shards = UnitShards(folder)
    m = measure(shards)
    counts, units = m["counts"], m["units"]
    used = np.argsort(-counts, kind="stable")[:len(counts) - m["never"]]  # the most frequent first
    name, first, _ = next(iter(shards))
    recipe = ", ".join(f"{key} {value}" for key, value in shards.recipe.items())
    lines = [f"{shards.folder}: {recipe}", "", *(f"{name:<10} {text}" for name, text in summary(shards, m))]
    lines += table("  frames  share of the runs", m["run_ranges"].items(), units, units)
    for title, some in (("most", used[:10]), ("least", used[::-1][:10])):
        lines += table(f"    unit  share, the {title} frequent", [(unit, counts[unit]) for unit in some], units, counts.max())
    text = "\n".join([*lines, "", f"first units of {name}: {' '.join(map(str, first[:20]))}"])
    return text.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are no text
