"""TWIST, shuffled and cold starts side by side: validation loss, and steps to the others' final loss.

For each start the learning rate is tuned on seed 0; the best one is then run with further seeds. Every run is the same
command but for --init, --peak-lr and --seed, so data order and budget are equal. Runs that are complete are not repeated.

    python scripts/compare_starts.py --out=results/starts            # two runs at a time, one thread each
"""
import csv
import dataclasses
import json
import statistics
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from checkpoints import files  # noqa: E402
from kernels.dtypes import hardware_bfloat16, training_dtype  # noqa: E402

ARMS = ("twist", "shuffled", "cold")


@dataclass(frozen=True)
class CompareConfig:
    out: str = "results/starts"  # folder for starts.csv, curves.csv and summary.json
    runs: str = "runs/starts"  # folder of the run folders
    rates: tuple[str, ...] = ("1e-3", "2e-3", "4e-3", "8e-3")  # learning rates tried for every start
    seeds: int = 3  # seeds per start, at its best learning rate
    steps: int = 0  # updates per run; 0: train.py's default
    parallel: int = 2  # runs at a time, one thread each
    dtype: str = "auto"  # as train.py; results/ has what bfloat16 gave
    eval_interval: int = 20  # updates between validations: the resolution of "steps to the same loss"
    RANGES = {"seeds": (2, config.MOST), "parallel": (1, 1024), "eval_interval": (1, config.MOST)}


def run(options, arm, rate, seed):
    """Train one model unless its curve is complete; returns [(step, validation loss), ...]."""
    folder = Path(options.runs) / f"{arm}_{rate}_{seed}"
    if not (folder / "model" / "config.json").is_file():
        command = [sys.executable, "train.py", f"--init={arm}", f"--peak-lr={rate}", f"--seed={seed}", f"--out={folder}",
                   "--threads=1", f"--dtype={options.dtype}", f"--eval-interval={options.eval_interval}",
                   "--save-interval=1000000", "--keep=1", "--overwrite=true"]
        command += [f"--steps={options.steps}"] if options.steps else []
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if finished.returncode:
            raise ValueError(f"the run of {folder} failed: {finished.stderr.strip()[-1000:]}")
    before = tomllib.loads((folder / "config.toml").read_text())  # of a complete run of an earlier call, too
    for name in ("dtype", "eval_interval", *["steps"] * bool(options.steps)):
        if before[name] != getattr(options, name):
            raise ValueError(f"{folder} is a run with --{name.replace('_', '-')}={before[name]}, not {getattr(options, name)}; "
                             "delete it, or give another --runs")
    with open(folder / "log.csv", newline="") as file:
        return [(int(row["step"]), float(row["val_loss"])) for row in csv.DictReader(file) if row["val_loss"]]


def steps_to(curve, loss):
    """First step at which the curve is at or below `loss`, linear between validations; None if it never is."""
    for (step, value), (next_step, next_value) in zip(curve, curve[1:]):
        if next_value <= loss:
            return next_step if value <= next_value else step + (next_step - step) * max(0, value - loss) / (value - next_value)
    return None


def main(argv=None):
    options = config.load(CompareConfig, argv)
    dtype, why = training_dtype(options.dtype, hardware_bfloat16(config.choose_device("auto")))
    options = dataclasses.replace(options, dtype=dtype)  # one for all runs, and for summary.json
    print(why)
    pool = ThreadPoolExecutor(options.parallel)
    jobs = {(arm, rate, 0): pool.submit(run, options, arm, rate, 0) for rate in options.rates for arm in ARMS}
    best = {}
    for arm in ARMS:
        best[arm] = min(options.rates, key=lambda rate: jobs[arm, rate, 0].result()[-1][1])
        jobs.update({(arm, best[arm], seed): pool.submit(run, options, arm, best[arm], seed) for seed in range(1, options.seeds)})
    curves = {key: job.result() for key, job in jobs.items()}

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["init", "peak_lr", "seed", "step", "val_loss"])
        writer.writerows([*key, step, loss] for key, curve in sorted(curves.items()) for step, loss in curve)
    summary = {"steps": next(iter(curves.values()))[-1][0], "dtype": options.dtype}
    finals = {arm: [curves[arm, best[arm], seed][-1][1] for seed in range(options.seeds)] for arm in ARMS}
    for arm in ARMS:
        summary[arm] = {"best peak_lr": best[arm], "final validation loss, by seed": finals[arm],
                        "mean": statistics.mean(finals[arm]), "standard deviation": statistics.stdev(finals[arm]),
                        "seed 0, by peak_lr": {rate: curves[arm, rate, 0][-1][1] for rate in options.rates}}
    for other in ("cold", "shuffled"):  # against the same seed of the other start, both at their best learning rate
        shares = [steps_to(curves["twist", best["twist"], seed], finals[other][seed]) for seed in range(options.seeds)]
        summary[f"twist: steps to the final loss of {other}, as a share of its steps, by seed"] = [
            None if share is None else share / summary["steps"] for share in shares]
    files.write_json(out / "summary.json", summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    config.command(main)
