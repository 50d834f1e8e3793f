"""Results of an evaluation -> tables on screen, result.json, result.csv, scores of every pair, ZeroSpeech submission files.

A result is a list of rows, each a dictionary: benchmark, subset, system, measure, value, low, high, n, p, weights. low and high
are the ends of the 95 % interval, n the questions or documents behind it, p that of the paired test (in rows `model - versus`),
weights the dtype of a language model's.

The submission files are what the official scorers of sLM21 take, `lexical/dev.txt` and so on, a stem and a score in each line.
Their other parts describe a system and are the user's to write: `zrc submission:init sLM21 FOLDER` makes them.
"""
import csv
import io
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from checkpoints import files
from evaluation.sets import GOLD

FIELDS = ("benchmark", "subset", "system", "measure", "value", "low", "high", "n", "p", "weights")
MOST_ROWS = 20  # of one label (type, voice, ...) on screen; the files have all


def row(benchmark, subset, system, measure, estimate):
    """An accuracy.Estimate as a row of the result."""
    return {"benchmark": benchmark, "subset": subset, "system": system, "measure": measure, **asdict(estimate)}


def label(sections, models, weights):
    """Say in every row what the weights of its language model are stored in. models: the systems that are one."""
    for each in (row for section in sections for row in section["rows"]):
        each["weights"] = weights if each["system"].partition(" - ")[0] in models else None


def shown(system, weights):
    """A system's name at the head of a column: scores of rounded weights say so."""
    return system if weights in (None, "float32") else f"{system} ({weights})"


def cell(found):
    if found["value"] is None:
        return "n/a"
    digits = 4 if found["measure"].startswith("nats") else 3 if abs(found["value"]) < 2 and found["measure"] != "%" else 2
    text = f"{found['value']:.{digits}f}"
    if found["low"] is not None:
        text += f" [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
    return text + (f" p={found['p']:.4f}" if found["p"] is not None else "")


def table(rows):
    """Rows of one benchmark -> text: a line a subset, a column a system."""
    systems = list(dict.fromkeys(each["system"] for each in rows))
    subsets = Counter(name.partition(" = ")[0] for name in {each["subset"] for each in rows})  # by label
    hidden = sorted(label for label, count in subsets.items() if count > MOST_ROWS)
    heads = {each["system"]: shown(each["system"], each.get("weights")) for each in rows}
    lines = {"head": ["subset", "measure", "n", *heads.values()]}  # then those on screen, by subset and measure
    for each in rows:
        if each["subset"].partition(" = ")[0] not in hidden:
            start = [each["subset"], each["measure"], f"{each['n']:,}", *[""] * len(systems)]
            line = lines.setdefault((each["subset"], each["measure"]), start)
            line[3 + systems.index(each["system"])] = cell(each)
    widths = [max(map(len, column)) for column in zip(*lines.values())]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines.values()]
    return "\n".join(f"  {line}" for line in [*text, *(f"({label}: {subsets[label]} rows in result.csv)" for label in hidden)])


def text_of(sections, conventions, systems):
    """The whole result as text. sections: [{"title", "notes", "rows"}]."""
    lines = [f"{name}: {what}" for name, what in systems.items()] + [f"convention: {line}" for line in conventions]
    for section in sections:
        lines += ["", section["title"], *(f"  note: {note}" for note in section["notes"]), table(section["rows"])]
    return "\n".join(lines)


def csv_text(header, rows):
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def write(out, sections, conventions, systems, options):
    """result.json and result.csv in the folder `out`; those of another evaluation are kept under a number."""
    result = {"options": asdict(options), "conventions": conventions, "systems": systems, "sections": sections}
    files.write_beside(Path(out) / "result.json", json.dumps(result, indent=2) + "\n")
    rows = [[each.get(name) for name in FIELDS] for section in sections for each in section["rows"]]
    files.write_beside(Path(out) / "result.csv", csv_text(FIELDS, rows))


def write_scores(out, benchmark, pairs, scores, lengths, weights="float32"):
    """pairs of one benchmark with the scores of every system: scores {system: (positive (N,), negative (N,))}."""
    systems = list(scores)
    names = [shown(system, weights if system in ("model", "versus") else None) for system in systems]
    header = ["positive", "negative", "item", "voice", "positive_units", "negative_units",
              *(f"{name}_{side}" for name in names for side in ("positive", "negative"))]
    rows = [[pair.positive, pair.negative, pair.item, pair.voice, lengths[pair.positive], lengths[pair.negative],
             *(repr(float(side[i])) for system in systems for side in scores[system])] for i, pair in enumerate(pairs)]
    name = f"{benchmark.task}_{benchmark.name}_pairs.csv".replace("/", "_").replace(" ", "_")
    files.write_beside(Path(out) / name, csv_text(header, rows))


def write_submission(out, benchmark, score_of):
    """submission/lexical/dev.txt or its like: `stem score` for every recording in score_of, in the order of gold.csv."""
    lines = [f"{stem} {float(score_of[path])!r}\n" for path, stem in benchmark.stems.items() if path in score_of]
    folder = Path(out) / "submission" / GOLD[benchmark.task][0]
    files.write_text(folder / f"{benchmark.split or 'dev'}.txt", "".join(lines))
