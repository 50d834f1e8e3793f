"""Draw the picture of the README: what TWIST does, beside what it gains, from curves.csv and summary.json -> docs/twist.svg.

    left    prompt -> units -> speech LM -> more units -> voice; the text LM gives the body, not the table
    right   validation loss against updates, one line a start (mean of its seeds), band from least to most

    pip install -e '.[plot]' && python scripts/plot_starts.py
"""
import csv
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402

COLORS = {"twist": "#c1440e", "shuffled": "#8a8a8a", "cold": "#1f5f8b"}
NAMES = {"twist": "TWIST: the text LM's body", "shuffled": "the same numbers, shuffled", "cold": "cold: random weights"}
INK, PAPER = "#222222", "#f4f1ea"
# (text, x, y of the middle, width, height, colour of the frame), on a canvas of 10 x 10
BOXES = (("prompt.wav", 1.5, 1.2, 2.8, 1.1, INK), ("HuBERT, k-means", 1.5, 3.7, 2.8, 1.1, INK),
         ("speech LM", 5.2, 6.1, 3.8, 3.1, COLORS["twist"]), ("unit vocoder", 8.9, 3.7, 2.8, 1.1, INK),
         ("continuation.wav", 8.9, 1.2, 2.8, 1.1, INK), ("text LM", 5.2, 9.5, 3.8, 1.0, COLORS["twist"]))
# (from x, y, to x, y, colour, what passes, its x, y)
ARROWS = ((1.5, 1.75, 1.5, 3.15, INK, "", 0, 0), (1.5, 4.25, 3.3, 6.0, INK, "71 12 40 ...", 1.5, 5.6),
          (7.1, 6.0, 8.9, 4.25, INK, "... 9 71 33", 8.9, 5.6), (8.9, 3.15, 8.9, 1.75, INK, "", 0, 0),
          (5.2, 9.0, 5.2, 7.65, COLORS["twist"], "body kept, vocabulary dropped", 7.35, 8.33))


@dataclass(frozen=True)
class PlotConfig:
    starts: str = str(ROOT / "results/starts")  # folder of scripts/compare_starts.py, with curves.csv and summary.json
    out: str = str(ROOT / "docs/twist.svg")  # the picture; what stands there is replaced


def draw_pipeline(plt, axes):
    axes.set(xlim=(0, 10.4), ylim=(0.2, 10.2))
    axes.axis("off")
    for text, x, y, width, height, color in BOXES:
        axes.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor=PAPER, edgecolor=color))
        axes.text(x, y + (1.05 if height > 2 else 0), text, ha="center", va="center", fontsize=9, color=INK)
    for x, y, to_x, to_y, color, text, text_x, text_y in ARROWS:
        axes.annotate("", (to_x, to_y), (x, y), arrowprops={"arrowstyle": "->", "color": color})
        axes.text(text_x, text_y, text, ha="center", va="center", fontsize=8, color=color)
    for y, text, color in ((6.45, "blocks, norms, positions", COLORS["twist"]), (5.75, "unit table, drawn anew", INK),
                           (5.05, "trained on speech alone", INK)):
        axes.text(5.2, y, text, ha="center", va="center", fontsize=8, color=color)


def draw_curves(axes, folder):
    summary = json.loads((folder / "summary.json").read_text())
    losses = defaultdict(lambda: defaultdict(list))  # start -> step -> one loss a seed
    with open(folder / "curves.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["peak_lr"] == summary[row["init"]]["best peak_lr"]:
                losses[row["init"]][int(row["step"])].append(float(row["val_loss"]))
    lowest = min(min(found) for each in losses.values() for found in each.values())
    for start, color in COLORS.items():
        steps = [step for step in sorted(losses[start]) if step > 0]
        values = [losses[start][step] for step in steps]
        axes.plot(steps, [sum(v) / len(v) for v in values], color=color, label=NAMES[start])
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="updates", ylabel="validation loss, nats per token", xlim=(0, max(steps)),
             ylim=(lowest - 0.05, 2.5 * lowest))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv=None):
    options = config.load(PlotConfig, argv)
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install -e '.[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.7), width_ratios=(1.15, 1), layout="constrained")
    draw_pipeline(plt, left)
    draw_curves(right, Path(options.starts))
    figure.savefig(options.out, metadata={"Date": None})
    print(f"wrote {options.out}")


if __name__ == "__main__":
    config.command(main)
