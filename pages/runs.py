"""The run page: how a training goes, from what it writes down; and several runs side by side.

    runs/NAME: log.csv, config.toml, samples/ --read--> Run --body_of--> runs/NAME/report.html, kept current by train.py
    [Run, ...] --comparison--> compared.html: their curves together, differences at equal steps, options that differ

A log may be of any length, and may be written while it is read: a row without its end is left for the next time.
"""
import os
import re
import time
import tomllib
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from pages import charts, html

SHARE = 0.01  # of a training's time that may go into its page
MOST_PLAYERS = 200  # each of them opens its file when the page opens
NOTHING = np.zeros(0), np.zeros(0)
LOSSES = {"val_loss": "validation loss", "loss": "training loss"}
OTHERS = {"lr": ("Learning rate", "of the update"), "grad_norm": ("Gradient norm", "before clipping"),
          "units_per_second": ("Speed", "units per second")}
SWITCH = "".join(f'<input type="radio" name="axes" id="{kind}"{checked}><label for="{kind}">{kind} axes</label> '
                 for kind, checked in (("logarithmic", " checked"), ("linear", "")))
KEYS = ('<p class="keys">Point at a picture, or focus it and press <kbd>←</kbd> <kbd>→</kbd>, for its values. Of the rows of the '
        "log that fall into one column of a picture, the lowest and the highest are drawn; logarithmic axes have no step 0.</p>")


@dataclass(frozen=True)
class Run:
    """What a run folder says. curves: {column of log.csv: (steps (N,), values (N,))}, of the rows that have a value there."""

    folder: Path
    curves: dict
    options: dict  # of config.toml; empty where there is none

    def last(self, column, pick=lambda values: values[-1]):
        """A column's last finite value, or another that `pick` takes from all of them; None where there is none."""
        values = self.curves.get(column, NOTHING)[1]
        return float(pick(values[np.isfinite(values)])) if np.isfinite(values).any() else None


def read_log(path):
    """log.csv -> {column: (steps (N,), values (N,))}, steps ascending. Rows that are not whole are passed over.

    Where steps go back, as after a resume, the later rows count, and none before them of the same steps or beyond.
    """
    with open(path, "rb") as file:
        names, flat = file.readline().decode("utf-8", "replace").strip().split(","), array("d")
        if "step" not in names:
            return {}
        for line in file:
            try:
                values = [float(text or b"-inf") for text in line.strip().split(b",")]  # -inf: left empty
            except ValueError:
                continue
            if len(values) == len(names) and line.endswith(b"\n"):
                flat.extend(values)
    table, place = np.array(flat).reshape(-1, len(names)), names.index("step")
    table = table[np.isfinite(table[:, place])]
    later = np.append(np.minimum.accumulate(table[::-1, place])[::-1], np.inf)[1:]  # the least step that comes after each
    table = table[table[:, place] < later]
    given = table != -np.inf
    return {name: (table[given[:, i], place], table[given[:, i], i]) for i, name in enumerate(names) if given[:, i].any()}


def read(folder):
    """A run folder -> Run. Raises: FileNotFoundError if it has no log.csv."""
    folder = Path(folder)
    if not (folder / "log.csv").is_file():
        raise FileNotFoundError(f"{folder}: no log.csv is there; give run folders, as train.py --out writes them")
    try:
        options = tomllib.loads((folder / "config.toml").read_text())
    except (OSError, ValueError):  # a log that was copied alone
        options = {}
    return Run(folder, read_log(folder / "log.csv"), options)


# ---------------------------------------------------------------------------------------------- one run

def results(run):
    """[(name, text, or None)] of what a run came to."""
    steps, losses = run.curves.get("val_loss", NOTHING)
    lowest, seconds = run.last("val_loss", np.min), run.last("seconds")
    found = [("steps", run.last("step")), ("steps planned", run.options.get("steps")),
             ("training loss", run.last("loss")), ("validation loss", run.last("val_loss")),
             ("lowest validation loss", lowest), ("reached at step", None if lowest is None else steps[losses == lowest][0]),
             ("bits per second of speech", run.last("bits_per_second")), ("hours of speech seen", run.last("hours")),
             ("hours of training", None if seconds is None else seconds / 3600),
             ("units per second (median)", run.last("units_per_second", np.median)),
             ("memory, GB", run.last("memory_gb")), ("MFU, %", run.last("mfu"))]
    return [(name, f"{round(value, 4):,.12g}" if isinstance(value, (int, float)) else None) for name, value in found]


def both_axes(title, series, y_label):
    """A chart on logarithmic and on linear axes, of which the page shows one."""
    return "".join(f'<div class="{name}">{charts.figure(title, charts.curves(series, "step", y_label, log, log))}</div>'
                   for name, log in (("logarithmic", True), ("linear", False)))


def samples(run, place):
    """The continuations of a run as players, newest first, for a page in the folder `place`."""
    found = {path: int(path.parent.name[5:]) for path in (run.folder / "samples").glob("step_*/*.wav")
             if re.fullmatch("step_[0-9]+", path.parent.name)}
    own = [path for path in found if found[path] <= (run.last("step") or 0)]  # others are of a run that stood here before
    own.sort(key=lambda path: (-found[path], path.name))
    parts = [f"<figure><figcaption>{html.escape(label)}</figcaption>{html.player(html.address(path, place), label)}</figure>"
             for path in own[:MOST_PLAYERS] for label in [f"step {found[path]}: {path.name}"]]
    if len(found) > len(parts):
        parts.append(f'<p class="soft">{len(found) - len(parts)} older files, or of steps beyond the log, are not shown.</p>')
    return f'<section><h2>Samples</h2>{"".join(parts)}</section>' if parts else ""


def body_of(run, place):
    """The page of one run, as HTML, for the folder `place`."""
    losses = [(name, *run.curves[column]) for column, name in LOSSES.items() if column in run.curves]
    pictures = [both_axes("Loss", losses[::-1], "nats per token")]
    pictures += [both_axes(title, [(title.lower(), *run.curves[column])], y_label)
                 for column, (title, y_label) in OTHERS.items() if column in run.curves]
    return (f'{html.facts(results(run))}{SWITCH}<div class="charts">{"".join(pictures)}</div>{KEYS}{samples(run, place)}'
            f"<section><details><summary>All options</summary>{html.facts(run.options.items())}</details></section>")


def write(folder, out=None):
    """The page of the run in a folder: folder/report.html, which it replaces, or `out`. Returns its path."""
    run, path = read(folder), Path(out or Path(folder) / "report.html")
    html.write(path, html.document(f"Run {run.folder.resolve().name}", body_of(run, path.parent), "runs"), keep=bool(out))
    return path


class Report:
    """folder/report.html, kept current: a call writes it, unless that would take more than SHARE of the time.

    A page that cannot be written is said once, by say(text), and stops nothing.
    """

    def __init__(self, folder, say):
        self.folder, self.say, self.failed, self.due = folder, say, False, 0.0

    def __call__(self, last=False):
        began = time.monotonic()
        if began < self.due and not last:
            return
        try:
            write(self.folder)
        except (OSError, ValueError, MemoryError) as error:
            if not self.failed:
                self.say(f"report.html is not kept current: {config.sentence(error)}")
            self.failed = True
        self.due = time.monotonic() + (time.monotonic() - began) / SHARE


# ---------------------------------------------------------------------------------------------- several runs

def difference(first, other, column):
    """(steps (N,), other's values less those of first (N,)) at the steps that both have, where both are finite."""
    (steps, values), (others, compared) = first.curves.get(column, NOTHING), other.curves.get(column, NOTHING)
    both, here, there = np.intersect1d(steps, others, assume_unique=True, return_indices=True)
    less = compared[there] - values[here]
    return both[np.isfinite(less)], less[np.isfinite(less)]


def verdict(first, other, steps, less):
    """Which of two runs is below and from where on, as words. first, other: names; steps, less: as `difference` gives them."""
    if not len(less):
        return f"{first} and {other} have no step in common"
    changes = np.flatnonzero(np.sign(less) != np.sign(less[-1]))
    since = f"from step {steps[changes[-1] + 1 if len(changes) else 0]:.0f} on"
    if less[-1] == 0:
        return f"{first} and {other} are equal {since}"
    lower, upper = (other, first) if less[-1] < 0 else (first, other)
    return f"{lower} is below {upper} {since}, by {abs(less[-1]):.4f} at step {steps[-1]:.0f}"


def table(names, rows):
    """rows: [(what, a value of each run)], None where a run has none."""
    rows = ["".join(f"<td>{html.escape('' if cell is None else cell)}</td>" for cell in row) for row in [("", *names), *rows]]
    return f'<div class="along" tabindex="0"><table><tr>{"</tr><tr>".join(rows)}</tr></table></div>'


def comparison(runs, names):
    """Runs side by side, as HTML; differences are from the first."""
    pictures, differences, verdicts = [], [], []
    for column, title in LOSSES.items():
        series = [(name, *run.curves[column]) for name, run in zip(names, runs) if column in run.curves]
        pictures.append(both_axes(title.capitalize(), series, "nats per token"))
        less = [(name, *difference(runs[0], run, column)) for name, run in zip(names[1:], runs[1:])]
        differences.append(charts.figure(f"{title.capitalize()} less that of {names[0]}",
                                         charts.curves(less, "step", "nats per token"), "at equal steps, linear axes"))
        verdicts += [f"{title}: {verdict(names[0], *one)}" for one in less]
    keys = dict.fromkeys(key for run in runs for key in run.options)
    differ = {key: values for key in keys if len(set(map(repr, values := [run.options.get(key) for run in runs]))) > 1}
    if "tokens_per_step" in differ:
        verdicts.append("tokens_per_step differs: at equal steps the runs have seen unequally much")
    found = [results(run) for run in runs]
    rows = [(cells[0][0], *(text for _, text in cells)) for cells in zip(*found)]
    return (f'<ul class="notes">{"".join(f"<li>{html.escape(said)}</li>" for said in verdicts)}</ul>{SWITCH}<div class="charts">'
            f'{"".join(pictures + differences)}</div>{KEYS}<section><h2>Results</h2>{table(names, rows)}</section>'
            f'<section><h2>Options that differ</h2>{table(names, [(key, *values) for key, values in differ.items()])}</section>')


def compare(folders, out=None):
    """The page of several runs: compared.html in the folder that holds them all, or `out`. Returns its path."""
    runs, places = [read(folder) for folder in folders], [Path(folder).resolve() for folder in folders]
    names = [place.name for place in places]
    names = names if len(set(names)) == len(names) else [*map(str, folders)]
    path = Path(out or Path(os.path.commonpath([place.parent for place in places])) / "compared.html")
    html.write(path, html.document("Runs compared", comparison(runs, names), "runs"))
    return path
