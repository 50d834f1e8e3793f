"""The benchmark of training steps, on tiny models: that both ways train the same weights, and what its table says."""
import dataclasses

import pytest
import torch

import train
from bench import training as bench_training
from bench.__main__ import BenchConfig
from bench.memory import SIZES
from training import logs

pytest.importorskip("transformers")
OPTIONS = BenchConfig(device="cpu", repeats=3)


def tiny(name):
    return bench_training.narrow(bench_training.Shape(name, SIZES[name], 0, 0))


@pytest.fixture
def no_processes(monkeypatch):
    monkeypatch.setattr(bench_training, "peak_on_cpu", lambda *_: 5_000_000)


@pytest.mark.parametrize("name", ["OPT-125M", "OPT-350M", "LLaMA-7B"])
def test_all_ways_have_the_same_losses_for_several_steps(name, tmp_path):
    shape = tiny(name)
    bench_training.write_start(shape, tmp_path / "model")
    steps = [build(shape, tmp_path / "model", False, "cpu") for build in bench_training.BUILDERS.values()]
    losses = torch.tensor([[step() for _ in range(4)] for step in steps])
    for peer in losses[1:]:
        torch.testing.assert_close(losses[0], peer, atol=1e-5, rtol=0)
    assert losses[0, -1] < losses[0, 0] - 1e-4  # and they do train


def test_the_table_has_all_ways_and_their_ratios(no_processes):
    shape = tiny("OPT-125M")
    mine, peer, fused = bench_training.bench_train(OPTIONS, [shape])
    assert [row["way"] for row in (mine, peer, fused)] == ["ours", "transformers", "transformers, fused AdamW"]
    assert mine["rows_x_T"] == "2 x 16"
    assert peer["over_peer"] == 1 and mine["over_peer"] == pytest.approx(peer["ms"] / mine["ms"], rel=0.1)
    assert fused["over_fused"] == 1 and mine["over_fused"] == pytest.approx(fused["ms"] / mine["ms"], rel=0.1)
    assert abs(mine["first_loss"] - peer["first_loss"]) < 1e-4 and mine["peak_mb"] == 5
    assert mine["mfu"] == "-" and mine["note"] == ""  # a CPU has no peak in the table of logs.py


def test_speed_and_mfu_follow_from_the_median(monkeypatch):
    monkeypatch.setattr(logs, "peak_flops", lambda _: 1e9)
    found = bench_training.Found(6.25, 2_000_000, "", [0.5, 0.1, 0.1, 0.1, 0.2])
    peer = bench_training.Found(6.25, None, "", [0.2])
    row = bench_training.row_of(tiny("OPT-125M"), "ours", found, {"over_peer": peer}, 1e6, "cpu")
    assert row["ms"] == 100 and row["units_per_second"] == 320 and row["mfu"] == 32 and row["over_peer"] == 2
    assert row["spread"] == 1 and row["peak_mb"] == 2 and row["tflops"] == 0


@pytest.mark.slow
def test_models_of_other_weights_are_noticed(no_processes, monkeypatch):
    def other(shape, folder, compiled, device):
        step = bench_training.ours(shape, folder, compiled, device)
        return lambda: step() + 2e-4
    monkeypatch.setitem(bench_training.BUILDERS, "transformers", other)
    rows = []
    with pytest.raises(ValueError, match="OPT-350M, 2 x 16: the first losses are .*: not of the same weights"):
        for row in bench_training.bench_train(OPTIONS, [tiny("OPT-125M"), tiny("OPT-350M")]):
            rows.append(row)
    assert len(rows) == 6 and all(row["ms"] > 0 and "not of the same weights" in row["note"] for row in rows)


@pytest.mark.slow
def test_a_way_that_finds_no_memory_leaves_its_reason(no_processes, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB.\nmore")
    monkeypatch.setitem(bench_training.BUILDERS, "transformers", full)
    mine, peer, _ = bench_training.bench_train(OPTIONS, [tiny("OPT-125M")])
    assert peer["note"] == "CUDA out of memory. Tried to allocate 40 GiB." and peer["ms"] == peer["over_peer"] == "-"
    assert mine["ms"] > 0 and mine["over_peer"] == "-"


@pytest.mark.slow
def test_memory_that_runs_out_between_timed_steps_costs_that_way_alone(no_processes, monkeypatch):
    def later(shape, folder, compiled, device, calls=None, **fused):
        step, calls = bench_training.transformers_loop(shape, folder, compiled, device, **fused), []

        def once():
            calls.append(1)
            if len(calls) > bench_training.WARM_UP + 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return step()
        return once
    monkeypatch.setitem(bench_training.BUILDERS, "transformers", later)
    mine, peer, fused = bench_training.bench_train(OPTIONS, [tiny("OPT-125M")])
    assert peer["note"] == "CUDA out of memory." and peer["ms"] == mine["over_peer"] == "-" and mine["ms"] > 0 < fused["ms"]


@pytest.mark.slow
def test_a_split_model_and_recomputation_are_timed_one_way_after_the_other(no_processes, monkeypatch):
    turns, take_turns = [], bench_training.take_turns
    monkeypatch.setattr(bench_training, "take_turns", lambda steps, *rest: turns.append(list(steps)) or take_turns(steps, *rest))
    shape = dataclasses.replace(tiny("LLaMA-7B"), optimizer="split", recompute="selective")
    rows = list(bench_training.bench_train(dataclasses.replace(OPTIONS, repeats=1), [shape]))
    assert turns == [["ours"], ["transformers"], ["transformers, fused AdamW"], []] and all(row["ms"] > 0 for row in rows)


@pytest.mark.slow
def test_memory_is_that_of_the_training_and_not_of_the_libraries(tmp_path):
    config = dataclasses.replace(SIZES["OPT-125M"], block_size=64, n_layer=4, n_head=8, n_kv_head=8, n_embd=512, embed_dim=512,
                                 n_inner=2048)
    shape = bench_training.Shape("OPT, 13M", config, 1, 16)
    parameters = bench_training.write_start(shape, tmp_path / "model")
    peak = bench_training.peak_on_cpu("ours", shape, tmp_path / "model")
    assert 15 * parameters < peak < 24 * parameters  # weights, gradients, two moments: 16 bytes; and a little


def test_the_recipe_of_the_largest_model_is_one_of_train():
    for shape in bench_training.shapes("cuda"):
        assert isinstance(shape.options(True, "cuda"), train.TrainConfig) and shape.T <= shape.config.block_size
