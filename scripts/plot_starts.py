"""Draw results/starts/curves.csv: validation loss against steps, one line a start (mean of its seeds), band from least to most.

    pip install -e '.[plot]' && python scripts/plot_starts.py
"""
import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FOLDER = Path(__file__).parent.parent / "results/starts"
COLORS = {"twist": "#c1440e", "shuffled": "#8a8a8a", "cold": "#1f5f8b"}


def main():
    summary = json.loads((FOLDER / "summary.json").read_text())
    losses = defaultdict(lambda: defaultdict(list))  # start -> step -> one loss a seed
    with open(FOLDER / "curves.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["peak_lr"] == summary[row["init"]]["best peak_lr"]:
                losses[row["init"]][int(row["step"])].append(float(row["val_loss"]))
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for start, color in COLORS.items():
        steps = [step for step in sorted(losses[start]) if step > 0]
        values = [losses[start][step] for step in steps]
        axes.plot(steps, [sum(v) / len(v) for v in values], color=color, label=start)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="updates", ylabel="validation loss of the stream (nats per token)", ylim=(None, 3.0))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(FOLDER / "curves.svg")


if __name__ == "__main__":
    main()
