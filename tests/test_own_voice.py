"""docs/own_voice.md, and the factory's one command, as they are written, on minutes of made-up speech."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from test_factory import record

from corpus.shards import UnitShards
from hubert_units import load_unit_encoder
from vocoder import load_vocoder

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
# Options of a small budget, by command; what the page says stays in front of them.
FEW = {"pocket.people": "", "hubert_units.py": "", "sample.py": "--max-new-units=20",
       "pocket.train_hubert": "--steps-1=4 --steps-2=4 --steps=4 --batch=4 --crop-frames=50",
       "pocket.train_vocoder": "--steps=4 --crop=16 --batch=2",
       "train.py": "--steps=4 --tokens-per-step=256 --block-size=64 --eval-interval=2"}


@pytest.fixture
def copy(tmp_path):
    """The repository without what it has made."""
    out = tmp_path / "nanotwist"
    shutil.copytree(ROOT, out, ignore=shutil.ignore_patterns(".git", ".venv", "build", "runs", "samples", "tests", ".*cache"))
    return out


def run(line, folder, **environment):
    done = subprocess.run(["bash", "-ec", line.replace("python ", f"{sys.executable} ", 1)], cwd=folder, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | environment, timeout=600)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def test_the_page_leads_from_a_folder_of_recordings_to_speech(copy):
    record(copy / "recordings/anna", [f"{i}.wav" for i in range(14)], 5.0)
    record(copy / "recordings/ben", [f"{i}.wav" for i in range(10)], 5.0)
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/own_voice.md").read_text(), re.DOTALL)
    lines = [line.partition("#")[0].rstrip() for line in (blocks[0] + blocks[2]).splitlines()]  # the second needs a network
    assert len(lines) == 10 and len(blocks) == 3
    for line in lines:
        name = re.match(r"python (?:-m )?(\S+)", line).group(1)
        run(f"{line} {FEW[name]}", copy)
    assert load_unit_encoder(copy / "mine/ears").num_units == 200
    assert UnitShards(copy / "mine/units/train").recipe["num_units"] == 200
    wav, = (copy / "samples").glob("*.wav")
    assert soundfile.info(wav).duration > 1


SMALL = ("--stories=200 --spoken=12 --text-steps=2 --hubert-steps=6 --taught-steps=6 --vocoder-minutes=0.02 --speech-steps=2 "
         "--questions=2 --dtype=float32 --threads=1")
# In place of the recogniser of the extra `factory`: an encoder that says the spectrum.
PACKAGES = {"moonshine_voice.py": "", "onnxruntime.py": """
import numpy as np

class SessionOptions:
    pass

class InferenceSession:
    def __init__(self, path, options, providers):
        pass

    def run(self, _, inputs):
        wave = inputs["input_values"][0]
        frames = np.lib.stride_tricks.sliding_window_view(wave, 895)[::384]
        return [np.abs(np.fft.rfft(frames, 1022))[None, :, :288].astype(np.float32)]
"""}


@pytest.mark.parametrize("with_people, with_extra", ((False, False), (True, True)))
def test_the_factorys_one_command_works_with_and_without_people_and_the_extra(with_people, with_extra, copy, tmp_path):
    if not with_extra and importlib.util.find_spec("moonshine_voice"):
        pytest.skip("the extra is installed")
    if not shutil.which("espeak-ng") or not Path("/usr/share/dict/words").exists():
        pytest.skip("espeak-ng or the word list is not installed")
    for part in ("text_lm", "hubert", "units", "vocoder", "speech_lm", "benchmarks"):
        shutil.rmtree(copy / "pocket" / part)
    for part in ("prompt.wav", "story.wav"):
        (copy / "pocket" / part).unlink()
    extra = tmp_path / "extra"
    extra.mkdir()
    for name, text in PACKAGES.items():
        (extra / name).write_text(text if with_extra else "raise ImportError")
    people = ""
    if with_people:
        record(copy / "recordings/anna", [f"{i}.wav" for i in range(14)], 5.0)
        record(copy / "recordings/ben", [f"{i}.wav" for i in range(10)], 5.0)
        people = "--recordings=recordings"
    environment = {"PYTHONPATH": str(extra)} if with_extra else {}
    printed = run(f"python -m pocket.build {SMALL} {people}", copy, **environment)
    assert ("without labels" in printed) is not with_extra and ("the synthesiser is all" in printed) is not with_people
    vocoder = load_vocoder(copy / "pocket/vocoder")
    assert vocoder.speakers == (["anna", "espeak"] if with_people else [])
    recipe = UnitShards(copy / "pocket/units/train").recipe
    assert vocoder.config.num_embeddings == recipe["num_units"] == (200 if with_extra else 100)
    assert len([*(copy / "pocket/benchmarks").glob("*/pairs.csv")]) == 4
    spoken = run("python sample.py pocket/prompt.wav --max-new-units=10", copy)
    assert "samples/prompt_0.wav" in spoken
    again = run(f"python -m pocket.build {SMALL} {people}", copy, **environment)
    assert again.count("exists, skipped") >= 9
