"""What came out: verdicts and intervals of every experiment, as text, as results/paper/README.md, and a figure of each.

    NAME.jsonl --found--> Intervals of the contrasts --verdict--> rows --write--> README.md, NAME.svg

Losses are compared at the end of training, each arm at the best of its rates, paired by seed; other measures likewise, with
eval.py's bootstrap interval over questions beside them.
"""
from pathlib import Path

import numpy as np

from checkpoints import files
from experiments import declared, statistics
from experiments.runner import TUNED, best_rate, read_lines
from pages import charts
from pages.html import HERE

LOSSES = {"loss": "nats", "bits_per_second": "bits a second"}
HEAD = ["cell", "arm", "rate", "final loss (s.d.)", "seeds", "seed 0, by rate"]


def at_best(experiment, lines, cell, arm):
    """{seed: line} of an arm at the best of its rates that were run."""
    best = best_rate(lines, cell, arm, [rate for rate in experiment.of("rates", cell) if (cell, arm, rate, TUNED) in lines])
    return {key[3]: line for key, line in lines.items() if key[:3] == (cell, arm, best)}


def value_of(line, measure):
    return line[measure] if measure in LOSSES else line.get("scores", {}).get(measure, [None])[0]


def differences(experiment, lines, contrast):
    """By how much the better arm is ahead, a number a seed that both have; and of `share`, updates to the other's final loss."""
    ours, theirs = (at_best(experiment, lines, *which) for which in (contrast.better, contrast.worse))
    sign = 1 if contrast.measure in (*LOSSES, "ppl") else -1
    both = sorted(seed for seed in ours.keys() & theirs.keys()
                  if None not in (value_of(ours[seed], contrast.measure), value_of(theirs[seed], contrast.measure)))
    ahead = [sign * (value_of(theirs[seed], contrast.measure) - value_of(ours[seed], contrast.measure)) for seed in both]
    reached = [statistics.updates_to(ours[seed]["curve"], theirs[seed]["loss"]) for seed in both] if contrast.share else []
    return ahead, [None if updates is None else updates / ours[seed]["steps"] for seed, updates in zip(both, reached)]


def rows_of(experiment, lines):
    """[(contrast as text, figure as text, verdict)] of an experiment."""
    found = []
    for contrast in experiment.contrasts:
        ahead, shares = differences(experiment, lines, contrast)
        apart = statistics.interval(ahead) if ahead else None
        what = LOSSES.get(contrast.measure, "points")
        text = "" if apart is None else f"{apart.mean:+.3f} {what}" + (
            f" [{apart.low:+.3f}, {apart.high:+.3f}]" if apart.low is not None else "") + f", {apart.n} seed{'s' * (apart.n > 1)}"
        if ahead and contrast.measure not in LOSSES:
            scores = [line["scores"][contrast.measure] for line in at_best(experiment, lines, *contrast.better).values()]
            text += f"; ± {np.mean([(high - low) / 2 for _, low, high, _ in scores]):.1f} of one arm's score over its questions"
        if shares:
            text += "; reached after " + ", ".join("never" if share is None else f"{share:.0%}" for share in shares)
        (cell, arm), (other_cell, other) = contrast.better, contrast.worse
        tuned = all((*which, rate, TUNED) in lines for which in (contrast.better, contrast.worse)
                    for rate in experiment.of("rates", which[0]))
        text += "; not all rates are tried" * bool(ahead and not tuned)
        where = dict.fromkeys(filter(None, (cell, other_cell, "" if contrast.measure == "loss" else contrast.measure)))
        name = f"{arm} before {other}" + f" ({', '.join(where)})" * bool(where)
        found.append((name, text, statistics.verdict(apart if tuned else None)))
    return found


def losses_of(experiment, lines):
    """Rows of HEAD: final losses are means, with standard deviations over seeds."""
    found = []
    for cell in experiment.cells:
        for arm in experiment.arms:
            some = at_best(experiment, lines, cell, arm)
            tried = {rate: lines.get((cell, arm, rate, TUNED)) for rate in experiment.of("rates", cell)}
            if some:
                losses = [line["loss"] for line in some.values()]
                apart = f" ({np.std(losses, ddof=1):.3f})" if len(losses) > 1 else ""
                found.append((cell, arm, next(iter(some.values()))["peak_lr"], f"{np.mean(losses):.3f}{apart}", str(len(losses)),
                              ", ".join(f"{rate}: {line['loss']:.3f}" for rate, line in tried.items() if line)))
    return found


def table(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def text_of(name, experiment, lines):
    """An experiment's results on screen."""
    said = (f"{name}: {claim}: {word}{shown and f': {shown}'}" for claim, shown, word in rows_of(experiment, lines))
    return "\n".join([table(HEAD, losses_of(experiment, lines)), "", *said])


def figure(experiment, lines):
    """The mean curve of every arm, a chart a cell, as one SVG that needs nothing else; None if there is nothing to draw."""
    series = []
    for cell in experiment.cells:
        for arm in experiment.arms:
            some = [line["curve"] for line in at_best(experiment, lines, cell, arm).values()]
            if some:
                curves = np.array(some)  # (seeds, evaluations, 2)
                series.append((f"{arm}{cell and f', {cell}'}", curves[0, 1:, 0], curves[:, 1:, 1].mean(0)))
    if not series:
        return None
    svg = charts.curves(series, "updates", "validation loss, nats per token", log_x=True, log_y=True)
    rules = (HERE / "style.css").read_text().splitlines()
    style = "".join(rule for rule in rules if ":root" in rule or "svg" in rule or "curve" in rule)
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="720" ', 1).replace(
        ">", f"><style>{style} text {{ font-family: sans-serif }}</style>", 1)


def write(out):
    """results/paper/README.md and the figures; returns its path."""
    out, parts, verdicts = Path(out), [], []
    for name, experiment in declared.EXPERIMENTS.items():
        lines = read_lines(out / f"{name}.jsonl")
        rows = rows_of(experiment, lines)
        claim, text, verdict = rows[0] if rows else ("", "", "not tested")
        verdicts.append((f"[{name}](#{name})" if lines else name, experiment.question, f"**{verdict}**", text,
                         f"`python -m experiments {name}`"))
        if not lines:
            continue
        spent = sum(line["wall_seconds"] * line["threads"] for line in lines.values()) / 3600
        machines = ", ".join(sorted({line["processor"] for line in lines.values()}))
        parts += [f"## {name}", "", experiment.question, "", f"The paper: {experiment.published}", "",
                  table(["claim", "figure", "verdict"], rows), "",
                  table(HEAD, losses_of(experiment, lines)), "",
                  f"{len(lines)} runs, {spent:.1f} core-hours on {machines}", ""]
        if drawn := figure(experiment, lines):
            files.write_text(out / f"{name}.svg", drawn)
            parts += [f"![Validation loss of the arms of {name}]({name}.svg)", ""]
    rule = statistics.__doc__.partition("THE RULE, ")[2].partition("\nNothing")[0]
    head = ["# The paper in miniature", "", "`python -m experiments report` made it from the lines of runs beside it.", "",
            table(["experiment", "question", "verdict", "figure", "command"], verdicts), "",
            "## The rule", "", "```", rule, "```", ""]
    files.write_text(out / "README.md", "\n".join([*head, *parts]))
    return out / "README.md"
