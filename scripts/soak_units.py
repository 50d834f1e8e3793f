"""A soak of hubert_units.py: many files, some broken, killed several times; the shards must be those of one clean run.

    generated files --hubert_units.py, kill -9 at random moments, one process and two by turns--> shards A, failures.csv
    the same without the broken ones --hubert_units.py, once--> shards B;  A == B byte for byte, failures.csv = the broken ones

    python scripts/soak_units.py                                   # 2,000 files, 40 of them broken, 5 kills; a few minutes
    python scripts/soak_units.py --files=60 --broken=6 --kills=2
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

import numpy as np
import soundfile

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from checkpoints.files import refuse_existing, write_json  # noqa: E402


@dataclass(frozen=True)
class SoakConfig:
    files: int = 2000  # recordings, the broken ones included
    broken: int = 40  # of them: empty, text, cut short, NaN, shorter than a frame
    kills: int = 5  # interruptions by SIGKILL
    seed: int = 0  # of the files and of the moments
    work: str = "build/soak"  # folder for the files and both results; removed when the soak has passed
    out: str = "results/soak_units.json"  # what was found
    RANGES = {"files": (1, config.MOST), "kills": (1, config.MOST)}


def write_files(folder, options, rng):
    """Recordings of .2 to 4 s in several formats, rates and folders; returns the paths of the broken ones."""
    speech, _ = soundfile.read(ROOT / "pocket/prompt.wav", dtype="float32")
    broken = set(rng.sample(range(options.files), options.broken))
    paths = []
    for i in range(options.files):
        path = folder / f"{i % 7}" / f"{i:05d}.{('wav', 'flac', 'ogg', 'wav')[i % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        begin, length = rng.randrange(len(speech) // 2), rng.randrange(3200, 64_000)
        samples = np.resize(speech[begin:], length) * rng.uniform(0.2, 1)
        soundfile.write(path, samples, rng.choice((8000, 16_000, 16_000, 16_000, 22_050)))
        if i in broken:
            paths.append(path)
            kind = len(paths) % 5
            if kind == 0:
                path.write_bytes(b"")
            elif kind == 1:
                path.write_text("this is not audio")
            elif kind == 2:
                path.write_bytes(path.read_bytes()[:40])
            elif kind == 3:
                soundfile.write(path, np.full(9000, np.nan, np.float32), 16_000, format="WAV", subtype="FLOAT")
            else:
                soundfile.write(path, samples[:200], 16_000, format="WAV")
    return paths


def start(out, audio, processes):
    launcher = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen([*launcher, "hubert_units.py", str(audio), f"--out={out}", "--device=cpu", "--budget=20"], cwd=ROOT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def finish(process):
    error = process.communicate()[1].decode()
    if process.returncode:
        raise ValueError(f"hubert_units.py ended with {process.returncode}: {error[-2000:]}")


def finished(out):
    """Recordings in the journals so far."""
    return sum(path.read_bytes().count(b"\n") for path in (out / "work").glob("*.jsonl"))


def kill(process, out):
    """SIGKILL to the launcher and to its workers, which stand in sessions of their own and would go on without it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended in the meantime
            if f"--out={out}\0".encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
    process.communicate()


def main(argv=None):
    options = config.load(SoakConfig, argv)
    rng, work = random.Random(options.seed), Path(options.work).resolve()
    refuse_existing(work, remedy="delete it, or give another --work")
    broken = write_files(work / "audio", options, rng)
    begin, done = time.perf_counter(), []
    for number in range(options.kills):
        process = start(work / "a", work / "audio", 1 + number % 2)
        before = finished(work / "a")
        enough = before + (options.files - before) // (options.kills - number + 2)
        while process.poll() is None and finished(work / "a") < enough:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is not None:
            raise ValueError(f"run {number} ended before it was killed; give more --files")
        kill(process, work / "a")
        done.append(finished(work / "a"))
    process = start(work / "a", work / "audio", 2)
    finish(process)
    seconds = time.perf_counter() - begin
    with open(work / "a" / "failures.csv", newline="") as file:
        failed = sorted(row[0] for row in list(csv.reader(file))[1:])
    for path in broken:
        path.unlink()
    finish(start(work / "b", work / "audio", 1))
    shards = sorted(path.name for path in (work / "b").iterdir() if path.name[:5].isdigit())
    same = shards == sorted(path.name for path in (work / "a").iterdir() if path.name[:5].isdigit()) and all(
        (work / "a" / name).read_bytes() == (work / "b" / name).read_bytes() for name in shards)
    meta = json.loads((work / "a" / "meta.json").read_text())
    result = {"command": "python scripts/soak_units.py", "files": options.files, "broken": options.broken,
              "finished_at_each_kill": done, "shard_files": len(shards), "shards_are_byte_identical": same,
              "failures_are_the_broken_files": failed == sorted(map(str, broken)), "documents": meta["files"],
              "seconds_of_the_interrupted_run": round(seconds)}
    write_json(options.out, result)
    print(json.dumps(result, indent=2))
    if not (same and result["failures_are_the_broken_files"] and meta["files"] == options.files - options.broken):
        raise ValueError(f"the soak failed; its files stay in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    config.command(main)
