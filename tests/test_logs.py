"""logs.py: what a row of log.csv says, and that rows of a lost future are dropped."""
import csv
import math
from types import SimpleNamespace

import pytest
import torch

import twist
from model import TransformerConfig
from training import logs


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_says_perplexity_bits_per_second_and_hours():
    start = {"step": 3, "seconds": 0.0, "units": 21_600, "process_seconds": 0.0}
    facts = SimpleNamespace(units_per_second_of_speech=10.0, start=start)
    options = SimpleNamespace(tokens_per_step=7_200, block_size=64)
    learner = SimpleNamespace(dist=SimpleNamespace(device=torch.device("cpu")))
    row = logs.derived({"step": 5, "loss": math.log(2), "units_per_second": 100}, learner, facts, options)
    assert row["perplexity"] == pytest.approx(2) and row["bits_per_second"] == pytest.approx(10) and row["hours"] == 1


def test_rows_beyond_the_restored_step_are_dropped(tmp_path):
    log = logs.Log(tmp_path, 0, True)
    for step in range(5):
        log.write({"step": step, "loss": 1.0})
    log.close()
    log = logs.Log(tmp_path, 2, True)
    log.write({"step": 3, "loss": 2.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("0", "1.0"), ("1", "1.0"), ("2", "1.0"), ("3", "2.0")]


def test_what_was_spent_counts_what_went_before_a_resumption():
    """40 units in 5 s of two processes, then two steps of 16 in 3 s of four."""
    start = {"step": 10, "seconds": 5.0, "units": 40, "process_seconds": 10.0}
    facts, options = SimpleNamespace(start=start), SimpleNamespace(tokens_per_step=16)
    assert logs.spent(facts, options, 12, 8.0, 4) == (72, 22.0)


@pytest.mark.parametrize("torn", ["1", "12,0.5", "\0\0\0\0\n", "\n", "4.5e,1\n", "\udcff"])
def test_what_a_power_cut_left_of_the_last_row_is_dropped(torn, tmp_path):
    log = logs.Log(tmp_path, 0, True)
    for step in range(3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with open(tmp_path / "log.csv", "a", errors="surrogateescape") as file:
        file.write(torn)
    log = logs.Log(tmp_path, 20, True)
    assert log.step == 2
    log.write({"step": 3, "loss": 2.0})
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3"]


def test_a_log_of_older_columns_goes_on(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n1,0.5\n2,0.25\n")
    logs.Log(tmp_path, 1, True).close()
    assert [row["loss"] for row in rows(tmp_path)] == ["0.5"] and list(rows(tmp_path)[0]) == list(logs.COLUMNS)


def test_other_processes_write_nothing(tmp_path):
    log = logs.Log(tmp_path, 0, False)
    log.write({"step": 1})
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, package", [(dict(tensorboard=True), "tensorboard"), (dict(wandb="speech"), "wandb")])
def test_a_service_that_is_not_installed_is_named(options, package, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.delitem(__import__("sys").modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ValueError, match="pip install"):
        logs.Log(tmp_path, 0, True, **options)


def test_wandb_gets_every_row(tmp_path, monkeypatch):
    calls = []

    class Service:
        @staticmethod
        def init(**options):
            calls.append(options)
            return Service

        @staticmethod
        def log(numbers, step):
            calls.append((numbers, step))

        @staticmethod
        def finish():
            calls.append("finished")

    monkeypatch.setitem(__import__("sys").modules, "wandb", Service)
    log = logs.Log(tmp_path / "run", 0, False, wandb="speech")
    log.close()
    assert calls == []
    (tmp_path / "run").mkdir()
    log = logs.Log(tmp_path / "run", 0, True, wandb="speech", options={"steps": 3})
    log.write({"step": 1, "loss": 2.0, "val_loss": ""})
    log.close()
    assert calls[0]["project"] == "speech" and calls[1:] == [({"loss": 2.0}, 1), "finished"]


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_unit_are_six_a_weight_of_the_products_and_twelve_a_position_of_attention(tied):
    config = TransformerConfig(vocab_size=502, block_size=1024, tie_embeddings=tied)  # OPT-125M's body
    parameters = sum(parameter.numel() for parameter in twist.empty(config).parameters())
    body = 12 * (4 * 768**2 + 2 * 768 * 3072)
    found = logs.flops_per_unit(config, parameters, 1024)
    assert found == pytest.approx(6 * (body + 502 * 768) + 12 * 12 * 768 * 1024, rel=2e-3)  # norms and biases are counted too


def test_the_peak_of_a_card_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 SXM")
    assert logs.peak_flops(torch.device("cuda")) == 989e12 and logs.peak_flops(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Unheard Of 1")
    assert logs.peak_flops(torch.device("cuda")) is None
    assert logs.memory_gb(torch.device("cpu")) > 0.05
