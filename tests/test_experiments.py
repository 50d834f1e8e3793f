"""Experiments: the right runs in the right order, none twice, and verdicts that follow from their rule."""
import dataclasses
import json
import math
import re
import threading
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from checkpoints import files
from conftest import arguments_of_a_run
from experiments import __main__ as command
from experiments import declared, report, runner, statistics
from experiments.runner import Contrast, Experiment, Run
from pocket.variants import ENCODING


@pytest.mark.parametrize("df", [1, 2, 4, 9, 30])
def test_students_quantile_is_that_of_scipy(df):
    assert math.isclose(statistics.student_t(df), stats.t.ppf(0.975, df), rel_tol=1e-4)


def test_intervals_are_those_of_scipy():
    values = [0.3, 0.1, 0.25, 0.2, 0.15]
    found = statistics.interval(values)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert np.allclose([found.mean, found.low, found.high, found.n], [0.2, low, high, 5], rtol=1e-4)


@pytest.mark.parametrize("values, word", [
    ((), "not tested"), ((0.1,), "suggested"), ((-0.1,), "not seen"), ((0.10, 0.11), "suggested"), ((0.1, 0.9), "not seen"),
    ((0.1, 0.12, 0.11, 0.1, 0.12), "seen"), ((0.1, 0.12, 0.11, 0.1), "suggested"), ((-0.1, -0.12, -0.11), "contradicted"),
    ((0.1, -0.12, 0.11, -0.1, 0.0), "not seen")])
def test_a_verdict_follows_from_the_rule(values, word):
    assert statistics.verdict(statistics.interval(values) if values else None) == word


def test_updates_to_a_loss_lie_between_evaluations():
    curve = [(0, 5.0), (10, 4.0), (20, 2.0), (30, 2.5)]
    assert statistics.updates_to(curve, 3.0) == 15 and statistics.updates_to(curve, 4.0) == 10
    assert statistics.updates_to(curve, 6.0) == 0 and statistics.updates_to(curve, 1.9) is None


# ---------------------------------------------------------------------------------------------- runs

@pytest.fixture
def made_up(monkeypatch):
    """An experiment whose runs are numbers: the best rate of `warm` is b, of `cold` a; seeds move all losses alike."""
    contrast = Contrast(("x", "warm"), ("x", "cold"), share=True)
    experiment = Experiment("is warm below cold?", "yes", {"warm": {"init": "twist"}, "cold": {"init": "cold"}}, (contrast,),
                            {"x": {"lm": "{0.8 M}"}, "y": {"lm": "other"}},
                            {"steps": "20"}, {"": ("a", "b")}, {"": 3, "y": 1})
    made, loss = [], {("warm", "a"): 2.0, ("warm", "b"): 1.0, ("cold", "a"): 3.0, ("cold", "b"): 4.0}

    def perform(run, options, tasks, folder, threads):
        made.append((run, options))
        final = loss[run.arm, run.rate] + run.seed / 10
        return {"cell": run.cell, "arm": run.arm, "seed": run.seed, "peak_lr": run.rate, "loss": final, "steps": 20,
                "curve": [[0, 5.0], [10, final + 1], [20, final]], "wall_seconds": 60.0, "threads": threads, "processor": "none",
                "bits_per_second": 10 * final, "seconds": 40.0, "memory_gb": 0.5, "parameters": 10**9,
                "tokens_per_step": 100, "hours": 3.0}

    monkeypatch.setattr(runner, "perform", perform)
    monkeypatch.setitem(declared.MATERIAL, "0.8 M", lambda folder: "L")
    monkeypatch.setitem(declared.EXPERIMENTS, "made_up", experiment)
    return experiment, made


def start(tmp_path, *more, name="made_up"):
    return command.main([name, f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}", "--parallel=1", *more])


def test_rates_are_tuned_on_one_seed_and_the_others_take_the_best(made_up, tmp_path, capsys):
    experiment, made = made_up
    start(tmp_path)
    keys = [tuple(run) for run, _ in made]
    assert keys[:4] == [("x", arm, rate, 0) for rate in "ab" for arm in ("warm", "cold")]
    assert keys[4:8] == [("x", "warm", "b", 1), ("x", "cold", "a", 1), ("x", "warm", "b", 2), ("x", "cold", "a", 2)]
    assert keys[8:] == [("y", arm, rate, 0) for rate in "ab" for arm in ("warm", "cold")]
    assert made[0][1] == {"steps": "20", "lm": "L", "init": "twist", "peak_lr": "a", "seed": "0"}
    assert runner.total(experiment) == len(made) and "12 of 12 runs are done; 0 are left" in capsys.readouterr().out


def test_what_is_done_is_not_done_again_and_a_line_cut_short_is(made_up, tmp_path, capsys):
    start(tmp_path, "--minutes=1e-9")
    assert not made_up[1]  # no run was begun
    start(tmp_path, "--plan")
    assert not made_up[1] and "12 are left, about 2 minutes" in capsys.readouterr().out
    start(tmp_path)
    path, first = tmp_path / "out/made_up.jsonl", len(made_up[1])
    start(tmp_path)
    assert len(made_up[1]) == first == 12
    path.write_text(path.read_text()[:-20])
    start(tmp_path)
    assert len(made_up[1]) == 13 and len(runner.read_lines(path)) == 12


def test_a_run_that_ends_is_kept_while_material_of_the_next_is_made(made_up, tmp_path, monkeypatch):
    path, begun, kept = tmp_path / "out/made_up.jsonl", threading.Event(), []

    def perform(run, *rest, before=runner.perform):
        assert run[:2] != ("x", "cold") or begun.wait(timeout=60)
        return before(run, *rest)

    def slow(folder):
        begun.set()
        until = time.monotonic() + 60
        while len(runner.read_lines(path)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        kept.append(len(runner.read_lines(path)))
        return "S"

    monkeypatch.setattr(runner, "perform", perform)
    monkeypatch.setitem(declared.MATERIAL, "slow", slow)
    monkeypatch.setitem(declared.EXPERIMENTS, "made_up", dataclasses.replace(
        made_up[0], cells={"x": {"lm": "other"}, "y": {"lm": "{slow}"}}, rates={"": ("a",)}, seeds={"": 1}))
    start(tmp_path, "--parallel=2")
    assert kept == [2] and len(path.read_text().splitlines()) == len(made_up[1]) == 4


def test_material_that_cannot_be_made_costs_its_cell_alone(made_up, tmp_path, monkeypatch, capsys):
    def missing(folder):
        raise ValueError("no such thing")

    monkeypatch.setitem(declared.MATERIAL, "0.8 M", missing)
    start(tmp_path)
    assert {run.cell for run, _ in made_up[1]} == {"y"} and capsys.readouterr().err.count("x: left out: no such thing") == 1


def test_a_declaration_that_changed_is_no_silent_mixture(made_up, tmp_path, monkeypatch):
    start(tmp_path)
    changed = dataclasses.replace(made_up[0], options={"steps": "30"})
    monkeypatch.setitem(declared.EXPERIMENTS, "made_up", changed)
    with pytest.raises(ValueError, match="another steps than is declared now"):
        start(tmp_path)


def test_a_run_that_another_experiment_made_with_the_same_options_is_not_made_again(made_up, tmp_path, monkeypatch, capsys):
    start(tmp_path)
    other = dataclasses.replace(made_up[0], cells={"z": {"lm": "{0.8 M}", "embedding": "fresh"}, "y": {}},  # fresh is the default
                                arms={"first": {"init": "cold"}, "second": {"init": "shuffled"}}, contrasts=())
    monkeypatch.setitem(declared.EXPERIMENTS, "other", other)
    made = made_up[1]
    made.clear()
    monkeypatch.setattr(runner, "perform", lambda run, *rest, before=runner.perform: before(run._replace(arm="warm"), *rest)
                        | {"arm": run.arm})
    start(tmp_path, "--plan", name="other")
    assert not (tmp_path / "out/other.jsonl").exists() and "4 of 12 runs are done" in capsys.readouterr().out
    start(tmp_path, name="other")
    lines = runner.read_lines(tmp_path / "out/other.jsonl")
    taken = {key: line for key, line in lines.items() if "from" in line}
    assert set(taken) == {("z", "first", rate, seed) for rate, seed in (("a", 0), ("b", 0), ("a", 1), ("a", 2))}
    assert taken["z", "first", "a", 2]["loss"] == 3.2 and taken["z", "first", "a", 2]["from"] == "made_up" and len(made) == 8
    command.main(["report", f"--out={tmp_path / 'out'}"])
    assert "12 runs, 8 of its own" in (tmp_path / "out/README.md").read_text()


def test_a_run_without_the_scores_that_are_asked_for_is_made_again(made_up, tmp_path, monkeypatch):
    start(tmp_path)
    monkeypatch.setitem(declared.EXPERIMENTS, "other", dataclasses.replace(made_up[0], tasks=("swuggy",)))
    made_up[1].clear()
    start(tmp_path, name="other")
    assert len(made_up[1]) == 12


def test_every_name_in_an_option_is_known_material():
    for experiment in declared.EXPERIMENTS.values():
        for options in (experiment.options, *experiment.arms.values(), *experiment.cells.values()):
            named = {*re.findall("{(.*?)}", " ".join(options.values()))}
            assert named <= {*declared.MATERIAL} and not named & {"3M", "llama", "text4000"}  # they are there under other names


def test_the_report_has_verdict_interval_and_figure(made_up, tmp_path):
    start(tmp_path)
    command.main(["report", f"--out={tmp_path / 'out'}"])
    text = (tmp_path / "out/README.md").read_text()
    assert "| warm before cold (x) | +2.000 nats [+2.000, +2.000], 3 seeds; reached after 33%, 33%, 32% | suggested |" in text
    assert "| x | warm | b | 1.100 (0.100) | 1.100 (0.100) | 11.0 | 3 | a: 2.000, b: 1.000 |" in text and "**not tested**" in text
    assert "excludes 0 in the claimed direction" in text and (tmp_path / "out/made_up.svg").read_text().startswith("<svg xmlns")


def test_what_it_costs_to_come_to_the_cold_starts_loss(made_up, tmp_path, capsys):
    start(tmp_path)
    command.main(["cost", f"--runs={tmp_path}", f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr().out  # 33, 33 and 32 % of 20 updates of 2 s, 100 ids each; x of `warm` is 2 below at each seed
    assert "| made_up | x | warm | 7 | 13 | 3.9 | 0.50 |" in said and "| made_up | x | cold | 20 | 40 | 12.0 | 0.50 |" in said


def test_scores_stand_beside_losses_with_both_kinds_of_spread(made_up, tmp_path):
    experiment = dataclasses.replace(made_up[0], tasks=("swuggy", "sblimp"))  # of which one was measured
    start(tmp_path)
    lines = runner.read_lines(tmp_path / "out/made_up.jsonl")
    for (*_, seed), line in lines.items():
        line["scores"] = {"swuggy": [60.0 + seed, 55.0 + seed, 65.0 + seed, 300]}
    head, *rows = report.losses_of(experiment, lines)
    row = next(row for row in rows if row[:2] == ("x", "warm"))
    assert head[-2:] == ["swuggy, %", "sblimp, %"] and row[-2:] == ("61.0 ± 5.0 (1.0)", "")
    for (*_, seed), line in lines.items():  # units of its own
        line |= {"encoding": 40.0 + seed, "seconds": 9.0}
    head, *rows = report.losses_of(experiment, lines)
    assert "encoding" in head[-1] and next(row for row in rows if row[:2] == ("x", "warm"))[-1] == "41, 3"


def test_the_figure_has_a_chart_a_cell_in_both_colours(made_up, tmp_path):
    start(tmp_path)
    svg = report.figure(made_up[0], runner.read_lines(tmp_path / "out/made_up.jsonl"))
    tree = ElementTree.fromstring(svg)
    assert len(tree.findall("{http://www.w3.org/2000/svg}svg")) == 2 and svg.count('data-label="warm"') == 2
    style = tree.find("{http://www.w3.org/2000/svg}style").text
    assert style.count("{") == style.count("}") and "prefers-color-scheme: dark" in style


def test_options_of_eval_go_to_eval_alone_and_what_encoding_took_is_kept(tmp_path, monkeypatch):
    called, run = [], tmp_path / "run"
    monkeypatch.setattr(runner, "call", lambda arguments, log: called.append(arguments))
    monkeypatch.setattr(runner.twist, "count_parameters", lambda folder: 7)
    monkeypatch.setattr(runner, "score_of", lambda out: [60.0, 55.0, 65.0, 300])
    (run / "model").mkdir(parents=True)
    (run / "log.csv").write_text("step,loss,val_loss,seconds,bits_per_second,hours,memory_gb\n0,,3.0,0,,,\n4,2.0,2.5,9,4.0,1,1\n")
    (run / "config.toml").write_text("tokens_per_step = 64\n")
    files.write_json(tmp_path / "units" / ENCODING, {"seconds_an_hour": 30.5})
    options = {"steps": "4", "data": str(tmp_path / "units/train"), "eval.train_data": "D"}
    line = runner.perform(Run("", "twist", "1e-2", 0), options, ("swuggy",), run, 1)
    assert line["encoding"] == 30.5 and line["scores"] == {"swuggy": [60.0, 55.0, 65.0, 300]} and line["parameters"] == 7
    assert not [word for word in called[0] if "train-data" in word] and not (run / "model").exists()
    assert called[1][:2] == ["eval.py", "--task=swuggy"] and "--train-data=D" in called[1]


def test_there_is_no_verdict_before_all_rates_are_tried(made_up, tmp_path):
    start(tmp_path)
    lines = {key: line for key, line in runner.read_lines(tmp_path / "out/made_up.jsonl").items() if key != ("x", "cold", "b", 0)}
    assert report.rows_of(made_up[0], lines)[0][1:] == (
        "+2.000 nats [+2.000, +2.000], 3 seeds; reached after 33%, 33%, 32%; not all rates are tried", "not tested")


def test_another_dtype_is_that_of_every_run_and_mixes_with_none(made_up, tmp_path):
    start(tmp_path, "--dtype=float32")
    assert {options["dtype"] for _, options in made_up[1]} == {"float32"}
    with pytest.raises(ValueError, match="another dtype than is declared now"):
        start(tmp_path)


@pytest.mark.parametrize("hardware, dtype, told",
                         [("", "bfloat16", True), ("", "float32", False), ("avx512_bf16", "bfloat16", False)])
def test_emulated_bfloat16_is_told_before_hours_are_spent(made_up, tmp_path, monkeypatch, capsys, hardware, dtype, told):
    monkeypatch.setattr(command, "hardware_bfloat16", lambda device: hardware)
    monkeypatch.setitem(declared.EXPERIMENTS, "made_up", dataclasses.replace(made_up[0], options={"dtype": dtype}))
    start(tmp_path, "--plan")
    assert ("bfloat16 is emulated" in capsys.readouterr().out) == told


def test_the_lowest_validation_is_told_apart_from_the_last(made_up, tmp_path):
    start(tmp_path)
    lines = runner.read_lines(tmp_path / "out/made_up.jsonl")
    for (_, arm, _, _), line in lines.items():
        line["curve"] = [[0, 5.0], [10, 0.5 if arm == "cold" else 1.25], [20, line["loss"]]]  # cold learns by heart
    lowest = dataclasses.replace(made_up[0].contrasts[0], measure="lowest", share=False)
    experiment = dataclasses.replace(made_up[0], contrasts=(*made_up[0].contrasts, lowest))
    (_, last, _), (name, least, _) = report.rows_of(experiment, lines)
    assert last.startswith("+2.000 nats") and name == "warm before cold (x, lowest)" and least.startswith("-0.600 nats")


def test_small_budgets_leave_the_results_alone(made_up, tmp_path):
    start(tmp_path, "--budget=small", "--seeds=2")
    assert not (tmp_path / "out/made_up.jsonl").exists()
    lines = (tmp_path / "runs/made_up-small/made_up.jsonl").read_text().splitlines()
    assert [json.loads(line)["peak_lr"] for line in lines] == ["a"] * 8
    assert made_up[1][0][1]["steps"] == runner.SMALL["steps"]


def test_a_run_is_the_ordinary_command_and_leaves_its_log_and_no_weights(tiny_world, tmp_path):
    """Some 20 seconds of real training and evaluation commands, through the runner."""
    given = dict(word[2:].split("=", 1) for word in arguments_of_a_run(tiny_world, tmp_path / "run"))
    for name in ("out", "save-interval", "threads", "peak-lr"):
        given.pop(name)
    options = {name.replace("-", "_"): value for name, value in given.items()}
    line = runner.perform(Run("", "twist", "1e-2", 0), {**options, "peak_lr": "1e-2"}, (), tmp_path / "run", 1)
    assert line["steps"] == 12 and [step for step, _ in line["curve"]] == [0, 6, 12] and line["loss"] < line["curve"][0][1]
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == []
    assert (tmp_path / "run/log.csv").exists() and (tmp_path / "run/config.toml").exists()


@pytest.mark.slow
def test_the_starts_run_in_minutes_at_a_small_budget(tmp_path, capsys):
    command.main(["starts", "--budget=small", "--seeds=1", f"--runs={tmp_path}"])
    lines = runner.read_lines(tmp_path / "starts-small/starts.jsonl")
    assert len(lines) == 12 and {line["options"]["dtype"] for line in lines.values()} == {"float32"}
    assert all(line["steps"] == 4 and line["scores"]["swuggy"][3] == 300 for line in lines.values())
    assert "twist before cold (100): " in capsys.readouterr().out
