"""Small real things that several test files use."""
import numpy as np
import pytest
import torch

import twist
from checkpoints import files
from corpus.shards import write_shards as write_documents
from model import TransformerConfig

TINY = TransformerConfig(vocab_size=60, block_size=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, head_dim=16, n_inner=64,
                         norm="rmsnorm", position="rope", mlp="swiglu", attention_bias=False, mlp_bias=False, init_std=0.1,
                         family="llama")
RECIPE = {"kind": "hubert", "model": "made up", "num_units": 20, "layer": 1, "centers": "none", "frame_rate": 25.0, "dedup": True}


def write_shards(folder, seed, documents=30, recipe=RECIPE):
    """Documents that count upwards from a random unit, with slips: something that a few steps can learn."""
    rng = np.random.default_rng(seed)
    spoken = [(rng.integers(20) + np.arange(int(rng.integers(20, 80))) + (rng.random() < 0.1)) % 20 for _ in range(documents)]
    write_documents(folder, recipe, [(f"{i}.wav", units, np.ones_like(units), len(units) / 25) for i, units in enumerate(spoken)])
    return folder


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A folder with text_lm/, train/ and val/."""
    folder = tmp_path_factory.mktemp("world")
    lm = twist.cold_start(TINY, twist.UnitVocab(58), seed=0)
    twist.save_speech_lm(lm, twist.UnitVocab(58), folder / "text_lm")
    write_shards(folder / "train", 0)
    write_shards(folder / "val", 1, documents=8)
    return folder


def arguments_of_a_run(world, out):
    """Options of a run of a few seconds."""
    return [f"--lm={world}/text_lm", f"--data={world}/train", f"--val-data={world}/val", f"--out={out}",
            "--steps=12", "--tokens-per-step=128", "--block-size=32", "--warmup=2", "--eval-interval=6", "--save-interval=5",
            "--eval-rows=4", "--threads=1", "--peak-lr=1e-2", "--dtype=float32"]


@pytest.fixture
def train_arguments(tiny_world, tmp_path):
    return arguments_of_a_run(tiny_world, tmp_path / "run")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """A name that is no local path must not send a test to the network, or into the caches of whoever runs it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for variable in ("NANOTWIST_HOME", "TEXTLESS_CHECKPOINT_ROOT", "HF_HUB_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "no_cache"))


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-equal sums need the same number of threads everywhere; tiny tensors are fastest with one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_noted():
    """What is said once in a process is said once in a test, whichever tests were there before."""
    files.note.cache_clear()
