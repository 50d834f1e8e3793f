"""The pocket table: COLD and TWIST, three seeds each, on the pocket benchmarks, beside unigram, bigram and length.

    train.py --init=twist|cold --seed=s --> runs --eval.py--> an accuracy a seed, its interval --> results/pocket_eval.json, table

    python scripts/pocket_table.py                            # trains what is not there yet: an hour on two cores; then minutes
    python scripts/pocket_table.py --runs=build/table --seeds=1

Each cell of a start is the mean over seeds. Behind ± stands half the width of eval.py's bootstrap interval over questions, the
mean over seeds (all answer the same questions), and then the standard deviation over seeds.
"""
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from checkpoints import files  # noqa: E402
from kernels.dtypes import hardware_bfloat16, training_dtype  # noqa: E402


@dataclass(frozen=True)
class TableConfig:
    runs: str = "runs/table"  # folder of the runs, INIT_SEED/model each
    seeds: int = 3  # of each start
    dtype: str = "auto"  # as train.py; results/ has what bfloat16 gave
    out: str = "results/pocket_eval.json"  # every accuracy, with its interval
    RANGES = {"seeds": (1, config.MOST)}


def evaluated(run):
    """{(task, system): (value, low, high, pairs)} of a run's model: `all` of every benchmark, perplexity."""
    out, found = run / "eval", {}
    if not (out / "result.json").exists():
        subprocess.run([sys.executable, "eval.py", f"--model={run}/model", "--dtype=float32", f"--out={out}"], cwd=ROOT,
                       check=True, stdout=subprocess.DEVNULL)
    for section in json.loads((out / "result.json").read_text())["sections"]:
        for row in section["rows"]:
            if row["subset"] in ("all", "perplexity") and row["measure"] in ("%", "per unit"):
                found[row["benchmark"].split()[0], row["system"]] = row["value"], row["low"], row["high"], row["n"]
    return found


def main(argv=None):
    options = config.load(TableConfig, argv)
    dtype, why = training_dtype(options.dtype, hardware_bfloat16(config.choose_device("auto")))
    print(why)
    runs, rows = Path(options.runs), []
    for init in ("cold", "twist"):
        for seed in range(options.seeds):
            run = runs / f"{init}_{seed}"
            if not (run / "model").exists():
                subprocess.run([sys.executable, "train.py", f"--init={init}", f"--seed={seed}", f"--dtype={dtype}",
                                "--auto-resume", f"--out={run}"], cwd=ROOT, check=True)
            for (task, system), (value, low, high, n) in evaluated(run).items():
                if system == "model" or (init, seed) == ("twist", 0):  # baselines do not depend on the model
                    rows.append({"task": task, "system": init if system == "model" else system, "seed": seed,
                                 "value": value, "low": low, "high": high, "n": n})
    files.write_json(options.out, {"command": f"python scripts/pocket_table.py --dtype={dtype}",
                                   "dtype": dtype, "rows": rows})
    tasks, systems = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "system"))
    print(f"| | {' | '.join(tasks)} |\n|---|{'---|' * len(tasks)}")
    for system in systems:
        cells = []
        for task in tasks:
            of = [row for row in rows if (row["task"], row["system"]) == (task, system)]
            if not of:
                cells.append("")
                continue
            value = statistics.mean(row["value"] for row in of)
            half = statistics.mean((row["high"] - row["low"]) / 2 for row in of)
            apart = f", s.d. {statistics.stdev(row['value'] for row in of):.1f}" if len(of) > 1 else ""
            cells.append(f"{value:.1f} ± {half:.1f}{apart}" if task != "ppl" else f"{value:.2f} ± {half:.2f}")
        print(f"| {system} | {' | '.join(cells)} |")


if __name__ == "__main__":
    config.command(main)
