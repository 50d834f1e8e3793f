"""The paper's claims in miniature, each a command:

    python -m experiments real                          # units of people's speech, text LMs that others trained
    python -m experiments starts                        # TWIST, shuffled and cold starts at three budgets; hours on two cores
    python -m experiments starts --plan                 # how many runs are left, and how long they will take
    python -m experiments starts --full                 # runs nothing: launch lines of full size, the paper's numbers
    python -m experiments starts --budget=small         # the same in minutes, to see that it works; its numbers mean nothing
    python -m experiments report                        # results/paper/README.md: a verdict, an interval, a figure for each

What is compared stands in declared.py, the rule of a verdict in statistics.py. Runs that are done are not repeated, interrupted
ones go on; their lines of JSON are kept in results/paper, their logs in --runs.
"""
from dataclasses import dataclass, replace

import config
from experiments import declared, full_size, report, runner
from kernels.dtypes import hardware_bfloat16


@dataclass(frozen=True)
class ExperimentsConfig:
    names: tuple[str, ...] = ()  # experiments to run, in order, or `report`
    runs: str = "runs/experiments"  # folder of the runs and of what they are made of
    out: str = "results/paper"  # folder of the lines of finished runs and of the report
    seeds: int | None = None  # of each arm; none: as declared
    budget: str = "pocket"  # pocket | small: a few updates of everything, in float32 if --dtype says nothing, kept in --runs
    dtype: str = "declared"  # declared | float32 | bfloat16, of the products of all runs; another wants an --out of its own
    parallel: int = 2  # runs at a time; the processor's threads are divided among them
    minutes: float = 0.0  # no run is begun after so many; 0: all are
    plan: bool = False  # say what is left to do and how long it will take, and stop
    full: bool = False  # print what the experiments are at full size, and stop
    CHOICES = {"budget": ("pocket", "small"), "dtype": ("declared", "float32", "bfloat16")}
    RANGES = {"seeds": (1, 1000), "parallel": (1, 1024), "minutes": (0, 1e6)}


def main(argv=None):
    options = config.load(ExperimentsConfig, argv, positional="names")
    known = declared.EXPERIMENTS
    if not options.names:
        raise ValueError(f"no experiment given: one of {', '.join(known)}, or report")
    for name in options.names:
        if name not in (full_size.TWINS if options.full else {**known, "report": 0}):
            raise ValueError(f"no experiment {name!r}: expected one of {', '.join(known)}, or report")
    for name in options.names:
        if options.full:
            print(full_size.text(name))
        elif name == "report":
            print(report.write(options.out))
        else:
            print(f"{name}: {known[name].question}")
            dtype = "float32" if (options.budget, options.dtype) == ("small", "declared") else options.dtype
            experiment = known[name]
            if dtype != "declared":
                experiment = replace(experiment, arms={arm: {**own, "dtype": dtype} for arm, own in experiment.arms.items()})
            elif "bfloat16" in str(experiment) and not hardware_bfloat16("cpu"):
                print("bfloat16 is emulated here, ten times slower than float32, which is had by --dtype=float32 --out=FOLDER")
            print(report.text_of(name, experiment, runner.work(name, experiment, declared.MATERIAL, options), options.out))


if __name__ == "__main__":
    config.command(main)
