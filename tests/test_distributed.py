"""distributed.py: two processes take the same steps as one (gloo on the CPU)."""
import csv
import subprocess
import sys
from pathlib import Path

import torch

import checkpoint

ROOT = Path(checkpoint.__file__).parent


def launch(processes, arguments):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "train.py"]
    result = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def losses(folder):
    with open(folder / "log.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def test_two_processes_give_the_losses_and_weights_of_one_and_resume_on_either(train_arguments, tmp_path):
    one = launch(1, ["--init=twist", *train_arguments])
    two = launch(2, ["--init=twist", *train_arguments, f"--out={tmp_path}/two", "--micro-batch=1"])
    assert "1 processes x 1 x 4 x 32" in one and "2 processes x 2 x 1 x 32" in two
    assert two.count("validation loss") == 1  # rank 0 alone prints
    for a, b in zip(losses(tmp_path / "run"), losses(tmp_path / "two"), strict=True):
        assert abs(a - b) < 1e-4
    expected, result = (checkpoint.read_tensors(tmp_path / name / "model") for name in ("run", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-2, atol=1e-3)
    # the state written by two processes goes on in one
    text = launch(1, ["--init=resume", f"--out={tmp_path}/two", "--steps=14"])
    assert "steps 12 to 14" in text and len(losses(tmp_path / "two")) == 14
