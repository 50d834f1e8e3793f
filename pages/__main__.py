"""Pages of what is there already: of a run, of several side by side, of speech for raters.

    runs/NAME --runs.read--> Run --> report.html;  several --> compared.html, beside them

    python -m pages runs/mine                                   # runs/mine/report.html, as train.py keeps it
    python -m pages runs/twist runs/cold                        # runs/compared.html: curves, differences, options that differ
    python -m pages runs/twist runs/cold --out=comparison.html
    python -m pages rate --systems=twist=DIR,cold=DIR           # a page for each rater: rating.py
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import config
from pages import rating, runs


@dataclass(frozen=True)
class PagesConfig:
    runs: tuple[str, ...] = ()  # run folders, as train.py --out writes them
    out: str | None = None  # the page; none: report.html in a run's folder, compared.html beside several
    FILES = {"out": "the page"}


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["rate"]:
        return rating.main(argv[1:])
    options = config.load(PagesConfig, argv, positional="runs")
    if not options.runs:
        raise ValueError("no run given: python -m pages runs/mine")
    if options.out and Path(options.out).is_dir():
        raise ValueError(f"--out={options.out} is a folder; name the page that is to be written there")
    if len(set(map(os.path.realpath, options.runs))) < len(options.runs):
        raise ValueError("a run is given twice; give each once")
    print(runs.write(options.runs[0], options.out) if len(options.runs) == 1 else runs.compare(options.runs, options.out))


if __name__ == "__main__":
    config.command(main)
