"""Two folders of units of the same recordings, and where they differ.

    folders --matched--> pairs of documents --at_equal_times--> two rows of frame units --agreement--> shares, mutual information
            --compare--> HTML

K, the centres and even the frame rate may be others; then units are compared by what they tell of each other. Shapes: F, G, N
frames.
"""
import os

import numpy as np

import config
from corpus.extract import named_from, whole_paths
from pages import html

FRAMES = 10_000  # of a document that are compared, at most: 400 s at 25 Hz
CONFUSED = 20  # rows of that table


def paths_of(shards):
    """Yields the whole path of every document's recording; names count from where the encoding was started (named_from.txt)."""
    base = os.path.join(os.path.realpath(shards.folder), named_from(shards.folder))
    return whole_paths((file["file_name"] for file in shards.each_file()), base)


def matched(x, y):
    """[(document of x, document of y), ...] of the same recording: of equal whole paths or, if there are none, of equal names."""
    for names in (paths_of, lambda shards: (file["file_name"] for file in shards.each_file())):
        there = {name: j for j, name in enumerate(names(y))}
        if pairs := [(i, there[name]) for i, name in enumerate(names(x)) if name in there]:
            return pairs
    raise ValueError(f"{x.folder} and {y.folder} have no recording in common (the first one's first is {next(paths_of(x))}); "
                     "encode the same recordings into both")


def at_equal_times(parts, rates):
    """Frame units (F,), (G,) of one recording at two rates, Hz -> (N,), (N,): what both are at the frames of the finer rate."""
    rate = max(rates)
    count = int(min(len(part) / its for part, its in zip(parts, rates)) * rate + 1e-6)
    times = (np.arange(count) + 0.5) / rate
    return [part[(times * its).astype(int)] for part, its in zip(parts, rates)]


def partners(a, b, frames):
    """Of pairs of units (N,), (N,) that stand together in so many frames (N,): which b each a has most often, (65536,)."""
    found, order = np.arange(2**16), np.argsort(frames, kind="stable")
    found[a[order]] = b[order]  # of several the last one stays
    return found


def agreement(first, second, same):
    """How well two rows of frame units (F,), (F,) agree, F > 0, as numbers by name.

    same: whether equal numbers mean the same. Else two units agree if one of them is what most often stands beside the other, so
        that a unit which is several in the other folder agrees with them all.
    Returns: equal, agreeing: shares of the frames; information: mutual information in bits; nmi: that over the mean of both
        entropies; agree: function of two rows -> where they agree; confused: [(unit, unit, frames, share of the first's), ...].
    """
    pairs, frames = np.unique(first.astype(np.int64) << 16 | second, return_counts=True)
    a, b = pairs >> 16, pairs & 0xFFFF
    beside_a, beside_b = (np.arange(2**16),) * 2 if same else (partners(a, b, frames), partners(b, a, frames))

    def agree(first, second):
        return (beside_a[first] == second) | (beside_b[second] == first)

    of_a, right = np.bincount(a, frames), agree(a, b)
    x, y, both = (float(-(p * np.log2(p)).sum()) for n in (of_a, np.bincount(b, frames), frames) for p in [n[n > 0] / len(first)])
    information = max(0.0, x + y - both)  # rounding may leave it below
    wrong = [i for i in np.argsort(-frames, kind="stable") if not right[i]][:CONFUSED]
    return {"equal": frames[a == b].sum() / len(first), "agreeing": frames[right].sum() / len(first), "agree": agree,
            "information": information, "nmi": 2 * information / (x + y) if x + y else 1.0,
            "confused": [(int(a[i]), int(b[i]), int(frames[i]), frames[i] / of_a[a[i]]) for i in wrong]}


def compare(x, y, pairs):
    """Two folders, matched documents -> HTML, and where their units agree: `agree` of agreement()."""
    rates, rows, other = [shards.recipe["frame_rate"] for shards in (x, y)], ([], []), 0
    for pair in config.progress(pairs, desc="comparing", unit="file"):
        parts = [np.repeat(*shards.document(i)) for shards, i in zip((x, y), pair)]
        other += abs(len(parts[0]) / rates[0] - len(parts[1]) / rates[1]) > 0.2
        for row, frames in zip(rows, at_equal_times(parts, rates)):
            row.append(frames[:FRAMES].astype(np.uint16))
    first, second = map(np.concatenate, rows)
    if not len(first):
        raise ValueError(f"the recordings that {x.folder} and {y.folder} share have no frames; encode longer ones")
    alike = x.recipe.get("num_units") == y.recipe.get("num_units")
    same = alike and x.recipe.get("centers") == y.recipe.get("centers")
    found = agreement(first, second, same)
    said = html.facts([
        ("compared", f"{len(pairs):,} recordings, {len(first):,} frames, at equal times"),
        ("lengths", f"{other:,} of these recordings differ by over 0.2 s: are they the same?" if other else None),
        ("equal units", f"{100 * found['equal']:.2f} % of the frames" if alike else None),
        ("agreeing units", None if same else f"{100 * found['agreeing']:.2f} % of the frames: one of both units is what most "
         "often stands beside the other; equal numbers mean nothing, for the centres are others"),
        ("mutual information", f"{found['information']:.3f} bits a frame; normalised by the mean of both entropies "
         f"{found['nmi']:.4f}")])
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in (x.folder, y.folder, "frames", "of the first one's"))
    lines = "".join(f"<tr><td>{a}</td><td>{b}</td><td>{frames:,}</td><td>{100 * share:.1f} %</td></tr>"
                    for a, b, frames, share in found["confused"])
    table = f'<h3>Confused most</h3><div class="along"><table><tr>{head}</tr>{lines}</table></div>' if lines else ""
    return f"<section><h2>Where they differ</h2>{said}{table}</section>", found["agree"]
