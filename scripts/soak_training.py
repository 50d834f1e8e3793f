"""A soak of train.py: killed at random moments, one process or all, during saves too; the result must be that of one clean run.

    one clean run, of one process and of two --> weights A
    the same, kill -9 of one rank or of all, started again, and so on --> weights B

    A == B to the bit on one process, to 1e-6 on two; every loss of the log likewise.

    python scripts/soak_training.py                          # ten kills on one process, ten on two; some minutes
    python scripts/soak_training.py --kills=2 --steps=60
"""
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from checkpoints import files  # noqa: E402
from training import state  # noqa: E402


@dataclass(frozen=True)
class SoakConfig:
    kills: int = 10  # interruptions by SIGKILL, for each number of processes
    steps: int = 300  # updates of a run; a state is saved after every one, so that many kills fall into a save
    seed: int = 0  # of the moments
    work: str = "build/soak_training"  # folder for the runs; removed when the soak has passed
    out: str = "results/soak_training.json"  # what was found
    RANGES = {"kills": (1, config.MOST), "steps": (1, config.MOST)}


def command(processes, out, options):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "train.py", "--init=twist", f"--out={out}", f"--steps={options.steps}", "--block-size=64",
            "--tokens-per-step=256", "--save-interval=1", "--eval-interval=100", "--eval-rows=8", "--threads=1", "--auto-resume",
            "--parallel=fsdp", "--dtype=float32"]  # as the figures in results/


def descendants(pid):
    """Worker processes below a launcher; the process itself where it has none."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found or [pid]


def killed_run(processes, out, options, rng):
    """Run to the end through the kills; returns a list of (step of the newest state, whether a save was going on, who died)."""
    moments = []
    while True:
        process = subprocess.Popen(command(processes, out, options), cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        if len(moments) < options.kills:
            before = state.latest(out)
            while state.latest(out) == before and process.poll() is None:  # it has begun to train
                time.sleep(0.005)
            time.sleep(rng.random() * 0.02 * options.steps / (options.kills + 1))
            saving = any(Path(out).glob("step_*.tmp"))
            everybody = rng.random() < 0.5
            with suppress(ProcessLookupError, FileNotFoundError):
                if everybody:
                    os.killpg(process.pid, signal.SIGKILL)
                    for pid in descendants(process.pid):
                        os.kill(pid, signal.SIGKILL)
                else:
                    os.kill(rng.choice(descendants(process.pid)), signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
        if process.returncode == 0:
            return moments
        found = state.latest(out)
        moments.append((None if found is None else found.name, saving, "all" if everybody else "one"))
        print(f"{processes} processes, kill {len(moments)}: {moments[-1]}", flush=True)
        if len(moments) > options.kills:
            raise ValueError(f"{out} failed without a kill:\n{errors[-3000:]}")


def losses(out):
    with open(Path(out) / "log.csv", newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}


def largest_difference(a, b):
    pairs = [(value.double(), b[name].double()) for name, value in a.items()]
    return max((x - y).abs().max().item() for x, y in pairs)


def main(argv=None):
    options = config.load(SoakConfig, argv)
    work, rng = Path(options.work), random.Random(options.seed)
    files.refuse_existing(work, remedy="delete it, or give another --work")
    rows = []
    for processes in (1, 2):
        out, undisturbed = work / f"killed_{processes}", work / f"clean_{processes}"
        subprocess.run(command(processes, undisturbed, options), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        moments = killed_run(processes, out, options, rng)
        clean, expected, found = files.read_tensors(undisturbed / "model"), losses(undisturbed), losses(out)
        rows.append({"processes": processes, "kills": len(moments), "during_a_save": sum(saving for _, saving, _ in moments),
                     "of_all": sum(who == "all" for *_, who in moments), "moments": moments,
                     "weights_differ_by": largest_difference(clean, files.read_tensors(out / "model")),
                     "losses_differ_by": max(abs(expected[step] - found[step]) for step in found),
                     "rows_missing": len(expected) - len(found)})
        print({key: value for key, value in rows[-1].items() if key != "moments"}, flush=True)
    files.write_text(options.out, json.dumps({"command": "python scripts/soak_training.py", "steps": options.steps,
                                              "rows": rows}, indent=2) + "\n")
    wrong = [row for row, tolerance in zip(rows, (0.0, 1e-6)) if row["weights_differ_by"] > tolerance or row["rows_missing"]]
    if wrong:
        raise ValueError(f"the killed runs differ from the clean one; see {options.out} and {work}")
    shutil.rmtree(work)
    print("the killed runs are the clean one")


if __name__ == "__main__":
    config.command(main)
