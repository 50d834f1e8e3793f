"""Runs what a declaration asks for: train.py and eval.py in processes of their own, each run once, its summary a line of JSON.

    Experiment --every rate on seed 0--> best rate of each arm --other seeds at it--> NAME.jsonl
               --what their options name is made first--> data, text LMs (Material)

A line says all that is needed later: arm, cell, seed, rate, options, the curve of validation, scores, seconds, processor. A run
whose line is there is not made again; one that was interrupted goes on from its last state. Of a finished run the log stays in
the run folder, and no weights. Options whose names begin with "eval." are eval.py's, all others train.py's. A run that another
experiment made with the same options (a {name} means the same to all) is taken from its lines.
"""
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import config
import twist
from checkpoints import files
from pocket.variants import ENCODING
from train import TrainConfig

ROOT = Path(__file__).parent.parent
STATES = 4  # resumable states in a run
TUNED = 0  # the seed that rates are tuned on
KEEPING = threading.Lock()  # runs may end at the same time
DEFAULTS = {each.name: str(each.default) for each in fields(TrainConfig)}
SMALL = {"steps": "4", "tokens_per_step": "512", "eval_rows": "2"}  # --budget=small: of all runs, over their own


@dataclass(frozen=True)
class Contrast:
    """A claim: arm `better` of a cell ends below arm `worse` of a cell (loss), or above it (any other measure)."""

    better: tuple[str, str]  # (cell, arm)
    worse: tuple[str, str]
    measure: str = "loss"  # the last; or lowest, of all validations; bits_per_second; a task of eval.py
    share: bool = False  # also the updates after which `better` reaches the final loss of `worse`


@dataclass(frozen=True)
class Experiment:
    """A declaration. Options are those of train.py, as text; {name} in one is a piece of material."""

    question: str  # one sentence
    published: str  # what the paper says, with its status
    arms: dict = field(default_factory=dict)  # {name: options}; none: it is computed from the runs of others
    contrasts: tuple = ()  # of Contrasts, the first being the claim
    cells: dict = field(default_factory=lambda: {"": {}})  # {levels of the factors: options}
    options: dict = field(default_factory=dict)  # of all runs
    rates: dict = field(default_factory=lambda: {"": ("2e-3",)})  # {cell: peak rates that are tried}; "": of all others
    seeds: dict = field(default_factory=lambda: {"": 5})  # {cell: how many}; "": of all others
    tasks: tuple = ()  # of eval.py, for every run
    pace: float = 0.5  # seconds an update, before a run was timed

    def of(self, table, cell):
        return getattr(self, table).get(cell, getattr(self, table).get(""))


class Run(NamedTuple):
    cell: str
    arm: str
    rate: str
    seed: int

    @property
    def folder(self):
        return re.sub(r"[^\w.]+", "-", "_".join((self.cell or "all", self.arm, self.rate, str(self.seed))))


def read_lines(path):
    """{(cell, arm, rate, seed): line} of a NAME.jsonl; a line that a kill cut short is passed over."""
    found = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[line["cell"], line["arm"], line["peak_lr"], line["seed"]] = line
    return found


def keep(path, line):
    """Add a line, which is on the disk when this returns it; behind one that a kill cut short a new one begins."""
    with KEEPING, open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        broken = file.read() not in (b"", b"\n")
        file.write(b"\n" * broken + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return line


def best_rate(lines, cell, arm, rates):
    """The rate with the lowest final loss on the seed for tuning; None while one is not run."""
    losses = {rate: lines[cell, arm, rate, TUNED]["loss"] for rate in rates if (cell, arm, rate, TUNED) in lines}
    return min(losses, key=losses.get) if losses and len(losses) == len(rates) else None


def wanted(experiment, lines, seeds=None, small=False):
    """Runs that are to be made next and are not in lines, in order: of each cell its rates, then the seeds of the best ones."""
    runs = []
    for cell in experiment.cells:
        rates = experiment.of("rates", cell)[:1 if small else None]
        runs += [Run(cell, arm, rate, TUNED) for rate in rates for arm in experiment.arms]
        best = {arm: best_rate(lines, cell, arm, rates) for arm in experiment.arms}
        runs += [Run(cell, arm, best[arm], seed) for seed in range(1, seeds or experiment.of("seeds", cell))
                 for arm in experiment.arms if best[arm]]
    return [run for run in runs if run not in lines]


def total(experiment, seeds=None, small=False):
    """How many runs there are in all."""
    return sum(len(experiment.arms) * ((1 if small else len(experiment.of("rates", cell)))
                                       + (seeds or experiment.of("seeds", cell)) - 1) for cell in experiment.cells)


def options_of(experiment, run, small):
    """{option of train.py: text} of a run, as declared: {names} of material, not this machine's paths."""
    return {**experiment.options, **experiment.cells[run.cell], **experiment.arms[run.arm], **(SMALL if small else {}),
            "peak_lr": run.rate, "seed": str(run.seed)}


def made_elsewhere(path, experiment, lines, seeds):
    """{run: line} of runs that are wanted and whose options, and scores, another NAME.jsonl beside `path` has."""
    made, found = {}, {}
    for other in sorted({*path.parent.glob("*.jsonl")} - {path}):
        for line in read_lines(other).values():
            made[frozenset((DEFAULTS | line["options"]).items())] = {"from": other.stem} | line
    for run in wanted(experiment, lines, seeds):
        options = options_of(experiment, run, small=False)
        line = made.get(frozenset((DEFAULTS | options).items()))
        if line and line.get("scores", {}).keys() >= {*experiment.tasks}:
            found[run] = line | {"cell": run.cell, "arm": run.arm, "options": options}
    return found


class Material(dict):
    """{name: path}; what is missing is made when it is asked for."""

    def __init__(self, makers, folder):
        self.makers, self.folder = makers, folder

    def __missing__(self, name):
        self[name] = self.makers[name](self.folder)
        return self[name]


def processor():
    lines = open("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else ()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def call(arguments, log):
    """A command of this repository in a process of its own, its output in a file. Raises: ValueError with its last words."""
    with open(log, "a") as file:
        code = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = Path(log).read_text(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"{' '.join(arguments)} ended with {code}: {' '.join(last)} ({log})")


def score_of(out):
    """[accuracy in %, low, high, questions] of the model, over all questions of eval.py's one task, from its result.json."""
    rows = json.loads((out / "result.json").read_text())["sections"][0]["rows"]
    row = next(row for row in rows if (row["system"], row["subset"], row["measure"]) == ("model", "all", "%"))
    return [row[name] for name in ("value", "low", "high", "n")]


def perform(run, options, tasks, folder, threads):
    """Train one model with options, and measure it; returns its line, less the options."""
    began, steps = time.perf_counter(), int(options.get("steps", 400))
    folder.mkdir(parents=True, exist_ok=True)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    call(["train.py", *(word for word in given if not word.startswith("--eval.")), f"--out={folder}", "--auto-resume",
          f"--save-interval={max(1, steps // STATES)}", "--keep=1", f"--threads={threads}", "--no-report"], folder / "output.txt")
    with open(folder / "log.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    curve = [[int(row["step"]), float(row["val_loss"])] for row in rows if row["val_loss"]]
    bits = next(float(row["bits_per_second"]) / float(row["loss"]) for row in rows if row["loss"])  # of speech, for a nat a token
    line = {"cell": run.cell, "arm": run.arm, "seed": run.seed, "peak_lr": run.rate, "loss": curve[-1][1],
            "bits_per_second": round(curve[-1][1] * bits, 3), "curve": curve,
            "seconds": float(rows[-1]["seconds"]), "steps": curve[-1][0], "memory_gb": float(rows[-1]["memory_gb"] or 0),
            "hours": float(rows[-1]["hours"]), "parameters": twist.count_parameters(folder / "model"),
            "tokens_per_step": tomllib.loads((folder / "config.toml").read_text())["tokens_per_step"],
            "processor": processor(), "threads": threads}
    if (encoding := Path(options.get("data", "")).parent / ENCODING).exists():
        line["encoding"] = files.read_json(encoding)["seconds_an_hour"]
    for task in tasks:
        call(["eval.py", f"--task={task}", f"--model={folder / 'model'}", "--dtype=float32", f"--out={folder / task}",
              *(word.replace("eval.", "", 1) for word in given if word.startswith("--eval."))], folder / "output.txt")
        line["scores"] = line.get("scores", {}) | {task: score_of(folder / task)}
    for part in [*folder.glob("step_*"), folder / "model"]:
        shutil.rmtree(part)
    return line | {"wall_seconds": round(time.perf_counter() - began, 1)}


def left(experiment, lines, seeds, small, parallel):
    """How much there is still to do, as text."""
    each, more = [], total(experiment, seeds, small) - len(lines)
    for run in wanted(experiment, lines, seeds, small):
        alike = [line for key, line in lines.items() if key[:2] == run[:2]] or [*lines.values()]
        pace = sum(line["wall_seconds"] for line in alike) / sum(line["steps"] for line in alike) if alike else experiment.pace
        each.append(pace * int((DEFAULTS | options_of(experiment, run, small))["steps"]))
    minutes = sum(each) / max(1, len(each)) * more / 60 / parallel
    return f"{len(lines)} of {len(lines) + more} runs are done; {more} are left, about {minutes:.0f} minutes"


def work(name, experiment, makers, options):
    """All runs of an experiment that are not done, options.parallel at a time, on what makers make; returns {key: line}."""
    small, seeds = options.budget == "small", options.seeds
    runs_folder = Path(options.runs, f"{name}-small" if small else name)
    path = (runs_folder if small else Path(options.out)) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read_lines(path)
    for key, line in lines.items():
        if differ := line["options"].items() ^ options_of(experiment, Run(*key), small).items():
            raise ValueError(f"{path} has a run ({', '.join(map(str, key))}) with another {min(differ)[0]} than is declared now; "
                             "give another --out, or declare what was run")
    while found := not small and made_elsewhere(path, experiment, lines, seeds):
        lines |= found
        for line in found.values() if not options.plan else ():
            keep(path, line)
    print(left(experiment, lines, seeds, small, options.parallel))
    if options.plan or not wanted(experiment, lines, seeds, small):
        return lines
    material = Material(makers, Path(options.runs, "material"))
    until = time.monotonic() + options.minutes * 60 if options.minutes else float("inf")
    threads = max(1, (os.cpu_count() or 1) // options.parallel)
    running, without = {}, set()
    bar = config.progress(total=total(experiment, seeds, small), initial=len(lines), desc=name, unit="run")
    with ThreadPoolExecutor(options.parallel) as pool, bar:
        while True:
            for run in wanted(experiment, lines, seeds, small) if time.monotonic() < until else ():
                if len(running) < options.parallel and run not in running.values() and run.cell not in without:
                    said = options_of(experiment, run, small)
                    try:
                        filled = {name: re.sub("{(.+?)}", lambda found: str(material[found[1]]), value)
                                  for name, value in said.items()}
                    except (ValueError, OSError, subprocess.SubprocessError) as error:  # the other cells go on
                        without.add(run.cell)
                        print(f"{run.cell}: left out: {config.sentence(error)}", file=sys.stderr)
                        continue
                    given = run, filled, experiment.tasks[:1 if small else None], runs_folder / run.folder, threads
                    running[pool.submit(  # kept at once: material of the next run may take an hour
                        lambda given=given, said=said: keep(path, perform(*given) | {"options": said}))] = run
            if not running:
                return lines
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                lines[run] = line = future.result()
                bar.update()
                print(f"{run.folder}: loss {line['loss']:.4f} after {line['steps']} updates, {line['wall_seconds']:.0f} s; "
                      + left(experiment, lines, seeds, small, options.parallel))
