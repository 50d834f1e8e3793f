"""What came out: verdicts and intervals of every experiment, as text, as results/paper/README.md, and a figure of each.

    NAME.jsonl --found--> Intervals of the contrasts --verdict--> rows --write--> README.md, NAME.svg

Losses are compared at the end of training, each arm at the best of its rates, paired by seed; other measures likewise, with
eval.py's bootstrap interval over questions beside them.
"""
from pathlib import Path

import numpy as np

import twist
from checkpoints import files
from experiments import declared, statistics, text_lms
from experiments.runner import TUNED, best_rate, read_lines
from pages import charts
from pages.html import HERE

LOSSES = {"loss": "nats", "lowest": "nats", "bits_per_second": "bits a second"}
HEAD = ["cell", "arm", "rate", "final loss (s.d.)", "lowest (s.d.)", "bits a second", "seeds", "seed 0, by rate"]
COSTS = ["experiment", "cell", "start", "updates", "seconds", "TFLOP", "memory, GB"]
COUNTED = """To the final loss of the cold start. An update takes as long from every start, and so does a unit of a continuation,
because the network is the same. What the text LM took is not counted: the pocket's {:.0f} TFLOP in 4,000 updates of 4,096 bytes.
So a warm start saves where somebody else has trained the text LM. One that overfits passes it on its way down."""
MEANING = """## What these units and scores can say

A loss says how well the next unit is foretold, less than a tenth of a second of sound. Most of it is told by the units just
before; a lower loss need not be more sense. mini-sWUGGY and mini-sBLIMP ask for word forms and short grammar of a closed world
of some hundred words, in two synthetic voices. StoryCloze is near chance up to 400 updates; after 1,600 two thirds of a story's
endings are told from another story's, from every start alike, so it is speech that taught them. Of people's speech there are
losses alone. What is seen says that weights which have learnt text help to foretell units: not that anything is understood.
Experiments share the runs that they have in common, so their verdicts are not independent."""


def at_best(experiment, lines, cell, arm):
    """{seed: line} of an arm at the best of its rates that were run."""
    best = best_rate(lines, cell, arm, [rate for rate in experiment.of("rates", cell) if (cell, arm, rate, TUNED) in lines])
    return {key[3]: line for key, line in lines.items() if key[:3] == (cell, arm, best)}


def value_of(line, measure):
    scores = {task: score for task, (score, *_) in line.get("scores", {}).items()}
    return {**line, **scores, "lowest": min(loss for _, loss in line["curve"])}.get(measure)


def differences(experiment, lines, contrast):
    """By how much the better arm is ahead, a number a seed that both have; and of `share`, updates to the other's final loss."""
    ours, theirs = (at_best(experiment, lines, *which) for which in (contrast.better, contrast.worse))
    sign = 1 if contrast.measure in (*LOSSES, "ppl") else -1
    both = sorted(seed for seed in ours.keys() & theirs.keys()
                  if None not in (value_of(ours[seed], contrast.measure), value_of(theirs[seed], contrast.measure)))
    ahead = [sign * (value_of(theirs[seed], contrast.measure) - value_of(ours[seed], contrast.measure)) for seed in both]
    reached = [statistics.updates_to(ours[i]["curve"], value_of(theirs[i], contrast.measure)) for i in both * contrast.share]
    return ahead, [None if updates is None else updates / ours[seed]["steps"] for seed, updates in zip(both, reached)]


def rows_of(experiment, lines):
    """[(contrast as text, figure as text, verdict)] of an experiment."""
    found = []
    for contrast in experiment.contrasts:
        ahead, shares = differences(experiment, lines, contrast)
        apart = statistics.interval(ahead) if ahead else None
        text = "" if apart is None else f"{apart.mean:+.3f} {LOSSES.get(contrast.measure, 'points')}" + (
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
        where = [*filter(None, (other_cell, "" if contrast.measure == "loss" else contrast.measure))]
        name = arm + f" ({cell})" * (cell != other_cell) + f" before {other}" + f" ({', '.join(where)})" * bool(where)
        found.append((name, text, statistics.verdict(apart if tuned else None)))
    return found


def mean_of(values):
    """A mean, with the standard deviation where there are several."""
    return f"{np.mean(values):.3f}" + (f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else "")


def score_of(scores):
    """Of scores (accuracy, low, high, questions) of several seeds: their mean ± half of the interval over questions (s.d.)."""
    if not scores:  # a small budget measures one task of several
        return ""
    values, low, high, _ = np.array(scores).T
    return f"{values.mean():.1f} ± {(high - low).mean() / 2:.1f}" + (f" ({values.std(ddof=1):.1f})" if len(values) > 1 else "")


def losses_of(experiment, lines):
    """A head, and rows of losses and scores: means over seeds, with standard deviations; of units made for it, their seconds."""
    encoded = any("encoding" in line for line in lines.values())
    found = [[*HEAD, *(f"{task}, %" for task in experiment.tasks), *["seconds an hour of speech: encoding, training"] * encoded]]
    for cell in experiment.cells:
        for arm in experiment.arms:
            if some := at_best(experiment, lines, cell, arm):
                tried = {rate: lines.get((cell, arm, rate, TUNED)) for rate in experiment.of("rates", cell)}
                made, means = [*some.values()], [mean_of([value_of(it, of) for it in some.values()]) for of in ("loss", "lowest")]
                taken = [(line.get("encoding", np.nan), line["seconds"] / line["hours"]) for line in made]
                found.append((cell, arm, made[0]["peak_lr"], *means,
                              f"{np.mean([line['bits_per_second'] for line in made]):.1f}", str(len(made)),
                              ", ".join(f"{rate}: {line['loss']:.3f}" for rate, line in tried.items() if line),
                              *(score_of([line["scores"][task] for line in made if task in line.get("scores", {})])
                                for task in experiment.tasks),
                              *["{:.0f}, {:.0f}".format(*np.median(taken, 0))] * encoded))
    return found


def costs(out):
    """Rows of COSTS: what each start takes to the final loss of the cold one, mean over seeds, in all experiments that have both.

    An update takes the median over all starts of a cell, which train one network; FLOP are 6 a parameter and token.
    """
    found = []
    for name, experiment in declared.EXPERIMENTS.items():
        lines = read_lines(Path(out, f"{name}.jsonl"))
        for cell in experiment.cells if "cold" in experiment.arms else ():
            arms = {arm: at_best(experiment, lines, cell, arm) for arm in experiment.arms}
            for arm, some in arms.items():
                reached = [statistics.updates_to(line["curve"], arms["cold"][seed]["loss"])
                           for seed, line in some.items() if seed in arms["cold"]]
                if not reached or None in reached:
                    found += [(name, cell, arm, "not by all seeds", "", "", "")] * bool(reached)
                    continue
                updates, line = np.mean(reached), next(iter(some.values()))
                second = np.median([line["seconds"] / line["steps"] for each in arms.values() for line in each.values()])
                operations = 6 * line["parameters"] * line["tokens_per_step"] * updates
                found.append((name, cell, arm, f"{updates:.0f}", f"{second * updates:.0f}", f"{operations / 1e12:.1f}",
                              f"{np.mean([line['memory_gb'] for line in some.values()]):.2f}"))
    return found


def table(head, *rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def text_of(name, experiment, lines, out):
    """An experiment's results on screen."""
    if not experiment.arms:
        return table(COSTS, *costs(out))
    said = (f"{name}: {claim}: {word}{shown and f': {shown}'}" for claim, shown, word in rows_of(experiment, lines))
    return "\n".join([table(*losses_of(experiment, lines)), "", *said])


def figure(experiment, lines):
    """The mean curve of every arm, a chart a cell, two beside each other, as one SVG; None if there is nothing to draw."""
    drawn = []
    for cell in experiment.cells:
        series = []
        for arm in experiment.arms:
            if some := [line["curve"] for line in at_best(experiment, lines, cell, arm).values()]:
                curves = np.array(some)  # (seeds, evaluations, 2)
                series.append((arm, curves[0, 1:, 0], curves[:, 1:, 1].mean(0)))
        if series:
            label = f"{cell}: " * bool(cell) + "validation loss, nats per token"
            drawn.append(charts.curves(series, "updates", label, log_x=True, log_y=True))
    if not drawn:
        return None
    wide, high = charts.WIDTH, charts.HEIGHT + charts.LEGEND * len(experiment.arms)
    placed = [chart.replace('<svg class="chart"', f'<svg x="{i % 2 * wide}" y="{i // 2 * high}" width="{wide}" height="{high}" '
                            'preserveAspectRatio="xMinYMin"', 1) for i, chart in enumerate(drawn)]
    root, rules = (HERE / "style.css").read_text().split("* {", 1)  # colours, light and dark, come first
    style = root + "".join(rule for rule in rules.splitlines() if rule.startswith((".curve", "svg text {", "svg.chart")))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {wide * min(2, len(drawn))} '
            f'{high * -(-len(drawn) // 2)}"><style>{style}</style>{"".join(placed)}</svg>')


def write(out):
    """results/paper/README.md and the figures; returns its path."""
    out, parts, verdicts = Path(out), [], []
    for name, experiment in declared.EXPERIMENTS.items():
        lines = read_lines(out / f"{name}.jsonl")
        rows = rows_of(experiment, lines)
        _, text, verdict = rows[0] if rows else ("", "", "not tested") if experiment.arms else ("", "its table", "no claim")
        linked = f"[{name}](#{name})" if lines or not experiment.arms else name
        verdicts.append((linked, experiment.question, f"**{verdict}**", text, f"`python -m experiments {name}`"))
        if not lines and experiment.arms:
            continue
        parts += [f"## {name}", "", experiment.question, "", f"The paper: {experiment.published}", ""]
        if not experiment.arms:
            text_lm = 6 * twist.count_parameters(files.KINDS["lm"]) * text_lms.BUNDLED * 4096  # FLOP
            parts += [table(COSTS, *costs(out)), "", COUNTED.format(text_lm / 1e12), ""]
            continue
        own = [line for line in lines.values() if "from" not in line]
        spent = sum(line["wall_seconds"] * line["threads"] for line in own) / 3600
        machines = ", ".join(sorted({line["processor"] for line in lines.values()}))
        parts += [table(["claim", "figure", "verdict"], *rows), "",
                  table(*losses_of(experiment, lines)), "",
                  f"{len(lines)} runs, {len(own)} of its own ({spent:.1f} core-hours); {machines}", ""]
        if drawn := figure(experiment, lines):
            files.write_text(out / f"{name}.svg", drawn)
            parts += [f"![Validation loss of the arms of {name}]({name}.svg)", ""]
    rule = statistics.__doc__.partition("THE RULE, ")[2].partition("\nNothing")[0]
    head = ["# The paper in miniature", "", "`python -m experiments report` made it from the lines of runs beside it.", "",
            table(["experiment", "question", "verdict", "figure", "command"], *verdicts), "",
            "## The rule", "", "```", rule, "```", "", MEANING, ""]
    files.write_text(out / "README.md", "\n".join([*head, *parts]))
    return out / "README.md"
