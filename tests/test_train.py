"""train.py: every start trains, resuming is exact to the bit, and a mistake costs nothing."""
import csv
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import config
import train
import twist
from checkpoints import files
from conftest import TINY
from corpus.loader import UnitLoader
from corpus.shards import UnitShards
from training import state
from training.distributed import Dist
from training.learner import Learner

ROOT = Path(train.__file__).parent


def rows(folder):
    with open(Path(folder) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return files.read_tensors(Path(folder) / "model")


def launch(arguments, **options):
    return subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=180,
                          **options)


@pytest.mark.parametrize("init", ["twist", "cold", "shuffled"])
def test_every_start_learns_and_leaves_a_model_a_log_and_its_options(init, train_arguments, tmp_path):
    train.main([f"--init={init}", *train_arguments])
    losses = [float(row["val_loss"]) for row in rows(tmp_path / "run") if row["val_loss"]]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.1  # at steps 0, 6 and 12
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == list(range(13))
    slm, vocab = twist.load_speech_lm(tmp_path / "run" / "model")
    assert vocab.num_units == 20 and vocab.recipe["centers"] == "none"
    assert "peak_lr = 0.01" in (tmp_path / "run" / "config.toml").read_text()


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_and_resumed_ends_with_the_same_bits(train_arguments, tmp_path):
    whole, broken = [*train_arguments, "--steps=60"], [*train_arguments, "--steps=60", f"--out={tmp_path}/broken"]
    assert launch(["--init=twist", *whole]).returncode == 0
    process = subprocess.Popen([sys.executable, "train.py", "--init=twist", *broken], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:  # wait until it has trained a few steps
        if (tmp_path / "broken/log.csv").exists() and len(rows(tmp_path / "broken")) > 4:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "go on with: python train.py --init=resume" in output, output
    stopped = len(rows(tmp_path / "broken")) - 1
    assert stopped < 60
    resumed = launch(["--init=resume", f"--out={tmp_path}/broken"])
    assert resumed.returncode == 0, resumed.stderr
    expected, result = weights(tmp_path / "run"), weights(tmp_path / "broken")
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items()) and result.keys() == expected.keys()
    for a, b in zip(rows(tmp_path / "run"), rows(tmp_path / "broken"), strict=True):
        assert (a["step"], a["loss"], a["val_loss"], a["grad_norm"]) == (b["step"], b["loss"], b["val_loss"], b["grad_norm"])


def test_a_killed_run_goes_on_from_its_last_state(train_arguments, tmp_path, monkeypatch):
    train.main(["--init=twist", *train_arguments])
    expected = weights(tmp_path / "run")
    # what kill -9 leaves: log rows beyond the last state, and half-written folders
    assert [path.name for path in train.state.step_folders(tmp_path / "run")] == ["step_000010", "step_000012"]
    shutil.rmtree(tmp_path / "run/step_000012")  # `latest` still names it, as when somebody tidied up
    (tmp_path / "run/step_000012.tmp").mkdir()
    train.main(["--init=resume", f"--out={tmp_path}/run"])
    assert all(torch.equal(weights(tmp_path / "run")[name], tensor) for name, tensor in expected.items())
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == list(range(13))


def test_a_row_that_was_lost_between_state_and_log_comes_back_whole(train_arguments, tmp_path):
    train.main(["--init=twist", *train_arguments])
    shutil.rmtree(tmp_path / "run/step_000012")
    log = tmp_path / "run/log.csv"
    expected = rows(tmp_path / "run")[10]
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:11]))  # killed before step 10 was written
    train.main(["--init=resume", f"--out={tmp_path}/run"])
    assert rows(tmp_path / "run")[10] == expected and expected["seconds"] and expected["perplexity"] and expected["memory_gb"]


def test_accumulation_gives_the_step_of_the_whole_batch(train_arguments, tmp_path):
    train.main(["--init=cold", *train_arguments])
    train.main(["--init=cold", *train_arguments, "--micro-batch=1", f"--out={tmp_path}/pieces"])
    for a, b in zip(rows(tmp_path / "run"), rows(tmp_path / "pieces"), strict=True):
        if a["loss"]:
            assert abs(float(a["loss"]) - float(b["loss"])) < 1e-4


def test_training_goes_on_from_a_speech_lm_folder(train_arguments, tmp_path):
    train.main(["--init=twist", *train_arguments])
    train.main([f"--init={tmp_path}/run/model", *train_arguments, f"--out={tmp_path}/more"])
    assert float(rows(tmp_path / "more")[0]["val_loss"]) == pytest.approx(float(rows(tmp_path / "run")[-1]["val_loss"]), abs=1e-6)


def test_transformers_opens_the_trained_folder_with_the_same_logits(train_arguments, tmp_path):
    transformers = pytest.importorskip("transformers")
    train.main(["--init=twist", *train_arguments])
    slm, vocab = twist.load_speech_lm(tmp_path / "run/model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    ids = torch.randint(0, vocab.size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(slm(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_packed_documents_train_as_documents_alone_would(train_arguments, tmp_path):
    """The first loss is the mean over the units of each piece of a document by itself."""
    train.main(["--init=cold", *train_arguments, "--packing=documents", "--steps=1"])
    vocab, shards = twist.UnitVocab(20), UnitShards(train_arguments[1].partition("=")[2])
    batch = UnitLoader(shards, vocab, 32, 4, 0, packing="documents").rows(0, 0, 4)
    model = twist.cold_start(twist.load_lm_config(train_arguments[0].partition("=")[2]), vocab, 0)
    total = 0.0
    for ids, targets, starts in zip(*batch):
        for start in starts.unique():
            alone = starts == start
            total += model(ids[None, alone], targets[None, alone]).item() * int(alone.sum())
    assert len(batch.document_starts.unique()) > 2
    assert float(rows(tmp_path / "run")[1]["loss"]) == pytest.approx(total / batch.count, abs=1e-5)


def test_documents_without_a_token_between_them_train_to_the_same_step_in_any_pieces(tiny_world, train_arguments, tmp_path):
    """Then rows have different numbers of targets, and a mean of means would not be the mean."""
    vocab = twist.UnitVocab(20, bos=None)
    batch = UnitLoader(UnitShards(tiny_world / "train"), vocab, 32, 8, 0, packing="documents").rows(0, 0, 8)
    assert len(set((batch.targets != -100).sum(1).tolist())) > 1
    twist.save_speech_lm(twist.cold_start(twist.load_lm_config(tiny_world / "text_lm"), vocab, 0), vocab, tmp_path / "start")
    results = []
    for micro in (8, 4, 1):
        train.main([*train_arguments, f"--init={tmp_path}/start", "--packing=documents", "--tokens-per-step=256", "--steps=1",
                    f"--micro-batch={micro}", f"--out={tmp_path}/{micro}"])
        results.append([float(rows(tmp_path / str(micro))[1][name]) for name in ("loss", "grad_norm")])
    assert results[0] == pytest.approx(results[1], abs=1e-6) and results[0] == pytest.approx(results[2], abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
def test_our_kernels_train_as_pytorchs_do(tmp_path, tiny_world, monkeypatch):
    """A small convergence run, attention and loss in Triton's interpreter on against off: the same curve to rounding."""
    config = dataclasses.replace(TINY, n_embd=64, embed_dim=64, head_dim=32, n_kv_head=1)
    twist.save_speech_lm(twist.cold_start(config, twist.UnitVocab(58), seed=0), twist.UnitVocab(58), tmp_path / "text_lm")
    curves = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("TWIST_KERNELS", backend)
        train.main(["--init=twist", f"--lm={tmp_path}/text_lm", f"--data={tiny_world}/train", f"--val-data={tiny_world}/val",
                    f"--out={tmp_path}/{backend}", "--steps=15", "--tokens-per-step=64", "--block-size=32", "--warmup=2",
                    "--packing=documents", "--eval-interval=15", "--eval-rows=2", "--peak-lr=1e-2", "--threads=1",
                    "--dtype=float32"])  # the interpreter computes bfloat16 wrongly
        curves[backend] = [float(row["loss"]) for row in rows(tmp_path / backend)[1:]]
    assert curves["torch"][-1] < curves["torch"][0] - 0.5
    assert curves["triton"] == pytest.approx(curves["torch"], abs=2e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "inverse_sqrt", "constant", "cooldown"])
def test_the_learning_rate_warms_up_to_its_peak_and_then_never_rises(schedule):
    options = train.TrainConfig(steps=100, warmup=10, peak_lr=1.0, schedule=schedule)
    rates = [train.lr_at(step, options) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    if schedule in ("cosine", "linear", "cooldown"):
        assert rates[-1] == pytest.approx(0.1)
    if schedule == "cooldown":
        assert rates[78:80] == [1.0, 1.0] and rates[80] < 1


@pytest.mark.parametrize("argument, words", {
    "--peek-lr=1": "did you mean --peak-lr", "--block-size=256": "at most 128", "--tokens-per-step=100": "multiple",
    "--data=nowhere": "--data=nowhere: no such folder", "--lm=nowhere": "no such file or folder", "--schedule=sine": "cosine",
    "--dtype=float8": "bfloat16", "--init=resume": "nothing to resume", "--init=nowhere": "no such file or folder"}.items())
def test_a_mistake_is_one_sentence_exit_code_2_and_no_run_folder(argument, words, train_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *train_arguments, argument])
    with pytest.raises(SystemExit) as stopped:
        config.command(train.main)
    *notes, error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and error.startswith("train.py: error: ") and words in error
    assert not any("rror" in note for note in notes)
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/log.csv").exists()


def test_a_run_is_resumed_with_options_in_either_form(train_arguments, tmp_path):
    train.main(["--init=cold", *train_arguments])
    words = ["configs/pocket.toml", "--init", "resume", "--out", f"{tmp_path}/run", "--steps", "14"]
    options, resuming = train.load_options(words)
    assert resuming and (options.steps, options.init, options.block_size, options.peak_lr) == (14, "cold", 32, 1e-2)


def test_a_finished_run_is_not_overwritten_unasked(train_arguments, tmp_path):
    train.main(["--init=twist", *train_arguments])
    before = (tmp_path / "run/log.csv").read_text()
    with pytest.raises(ValueError, match="already holds a run"):
        train.main(["--init=cold", *train_arguments])
    assert (tmp_path / "run/log.csv").read_text() == before
    train.main(["--init=cold", *train_arguments, "--overwrite=true"])
    assert (tmp_path / "run/log.csv").read_text() != before


def test_shards_of_another_tokenizer_are_refused(train_arguments, tmp_path):
    from conftest import RECIPE, write_shards
    other = write_shards(tmp_path / "other", 0, recipe={**RECIPE, "centers": "different"})
    with pytest.raises(ValueError, match="another tokenizer"):
        train.main(["--init=twist", *train_arguments, f"--val-data={other}"])
    train.main(["--init=twist", *train_arguments])
    with pytest.raises(ValueError, match="another tokenizer"):
        train.main([f"--init={tmp_path}/run/model", *train_arguments, f"--data={other}", f"--val-data={other}",
                    f"--out={tmp_path}/mixed"])


def test_steps_that_are_not_finite_are_skipped_and_then_end_the_run(train_arguments, tmp_path, capsys):
    with pytest.raises(ValueError, match="not finite"):
        train.main(["--init=cold", *train_arguments, "--peak-lr=1e30", "--clip=1e30", "--warmup=0", "--steps=50"])
    assert "update skipped" in capsys.readouterr().out


def test_validation_is_the_same_for_any_number_of_rows_per_forward(tiny_world):
    vocab = twist.UnitVocab(20)
    loader = UnitLoader(UnitShards(tiny_world / "val"), vocab, 8, 1, 0)
    model = twist.cold_start(twist.load_lm_config(tiny_world / "text_lm"), vocab)
    learner = Learner(model.config, train.TrainConfig(dtype="float32"), Dist(0, 1, torch.device("cpu")))
    together = learner.fill(model.state_dict().items()).evaluate(loader, rows=0)
    alone = [model(window.ids, window.targets).item() for window in map(loader.window, range(loader.windows))]
    assert together == pytest.approx(sum(alone) / len(alone), abs=1e-5)


# ---------------------------------------------------------------------------------------------- what a run goes on from

@pytest.fixture(scope="module")
def finished(tiny_world, tmp_path_factory):
    """A run of 12 steps, from the text LM, with states of steps 10 and 12, and its arguments."""
    run = tmp_path_factory.mktemp("finished") / "run"
    arguments = [f"--lm={tiny_world}/text_lm", f"--data={tiny_world}/train", f"--val-data={tiny_world}/val", "--steps=12",
                 "--tokens-per-step=128", "--block-size=32", "--warmup=2", "--eval-interval=6", "--save-interval=5",
                 "--eval-rows=4", "--threads=1", "--peak-lr=1e-2"]
    train.main([*arguments, f"--out={run}"])
    return run, arguments


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run, and the arguments of the command that made it."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run", [*finished[1], f"--out={tmp_path}/run"]


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("given, words", [
    (["--init=cold", "--auto-resume"], "--init=twist, which cannot go on with --init=cold"),
    (["--init=pocket", "--auto-resume"], "cannot go on with --init=pocket"), (["--init=resume", "--lm=other"], "--lm=other"),
    (["--init=resume", "--embedding=matched"], "--embedding=matched"),
    (["--init=resume", "--optimizer=split"], "--optimizer=split"),
    (["--init=resume", "--steps=11"], "has done 12 steps"), (["--init=resume", "--block-size=256"], "at most 128"),
    (["--init=twist"], "already holds a run"), (["--init=resume", "--tensorboard"], "pip install")])
def test_what_contradicts_a_state_is_refused_and_changes_nothing(given, words, run, monkeypatch):
    folder, arguments = run
    before = content(folder)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=words):
        train.main([*([] if "--init=resume" in given else arguments), f"--out={folder}", *given])
    assert content(folder) == before


@pytest.mark.parametrize("other", [{"model": "another"}, {"centers": "different"}, {"precision": "float16"}])
def test_units_of_another_tokenizer_do_not_go_on(other, run, tmp_path):
    from conftest import RECIPE, write_shards
    write_shards(tmp_path / "units", 0, recipe=RECIPE | other)
    before = content(run[0])
    with pytest.raises(ValueError, match=f"--data={tmp_path}/units: units of another tokenizer"):
        train.main(["--init=resume", f"--data={tmp_path}/units", f"--val-data={tmp_path}/units", "--steps=14", f"--out={run[0]}"])
    assert content(run[0]) == before


def test_what_may_change_is_announced_and_what_was_trained_is_counted(run, capsys):
    folder, arguments = run
    train.main(["--init=resume", f"--out={folder}", "--steps=14", "--peak-lr=5e-3", "--tokens-per-step=256"])
    said = capsys.readouterr().out
    assert "from step 12 on with other options: " in said and "--peak-lr 0.01 -> 0.005" in said and "--steps 12 -> 14" in said
    assert "for 2,048 units" in said  # 12 x 128 + 2 x 256
    found = train.state.read(folder)
    assert found["units"] == 2048 and found["process_seconds"] == pytest.approx(found["seconds"]) and found["seconds"] > 0
    hours = [float(row["hours"]) for row in rows(folder)[1:]]
    assert hours[13] == pytest.approx(hours[11] / 1536 * 2048, abs=1e-4)
    assert 'init = "twist"' in (folder / "config.toml").read_text()
    train.main([*arguments, "--steps=15", "--auto-resume"])  # the same command again: each step counts as it was
    assert "for 2,176 units" in capsys.readouterr().out


def test_the_same_command_announces_nothing(run, capsys):
    shutil.rmtree(run[0] / "step_000012")
    train.main([*run[1], "--auto-resume"])
    said = capsys.readouterr().out
    assert "steps 10 to 12" in said and "other options" not in said and "for 1,536 units" in said


def test_the_options_of_a_run_come_before_those_of_a_file(run, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text("peak_lr = 1.0\nsteps = 100\n")
    train.main([str(tmp_path / "recipe.toml"), "--init=resume", f"--out={run[0]}", "--steps=13"])
    assert "other options: --steps 12 -> 13\n" in capsys.readouterr().out


def spoil_state(folder, change):
    found = json.loads((folder / "state.json").read_text())
    change(found)
    (folder / "state.json").write_text(json.dumps(found))


def older(found):
    """What states held before they said what was spent, and which files they have."""
    for key in ("units", "process_seconds", "files"):
        del found[key]


def test_a_state_of_an_earlier_version_goes_on(run, capsys):
    shutil.rmtree(run[0] / "step_000012")
    spoil_state(run[0] / "step_000010", older)
    expected = weights(run[0])
    train.main(["--init=resume", f"--out={run[0]}"])
    assert all(torch.equal(weights(run[0])[name], tensor) for name, tensor in expected.items())
    assert "for 1,536 units" in capsys.readouterr().out


def cut(folder):
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1000)


DAMAGE = {"cut": cut, "gone": lambda folder: next(folder.glob("*.safetensors")).unlink(),
          "old and cut": lambda folder: (spoil_state(folder, older), cut(folder)),
          "state.json cut": lambda folder: os.truncate(folder / "state.json", 100),
          "state.json empty": lambda folder: os.truncate(folder / "state.json", 0),
          "state.json gone": lambda folder: (folder / "state.json").unlink(),
          "state.json without model": lambda folder: spoil_state(folder, lambda found: found.pop("model")),
          **{f"another {key}, {value}": lambda folder, new={key: value}: spoil_state(folder, lambda found: found.update(new))
             for key, value in (("step", "x"), ("step", 10), ("row", []), ("options", 3), ("model", {"n": 1}), ("vocab", {}),
                                ("units", "many"), ("files", []))},
          "garbled": lambda folder: next(folder.glob("*.safetensors")).write_bytes(bytes(100))}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("start", [["--init=resume"], ["--auto-resume"]], ids=lambda start: start[0])
def test_a_damaged_state_is_named_and_the_one_before_it_offered(damage, start, run, capsys):
    folder, arguments = run
    DAMAGE[damage](folder / "step_000012")
    before = content(folder)
    arguments = arguments if start == ["--auto-resume"] else [f"--out={folder}"]
    with pytest.raises(ValueError, match="step_000012 is damaged .*; delete it and repeat the command: .* step_000010$"):
        train.main([*arguments, *start])
    assert content(folder) == before
    shutil.rmtree(folder / "step_000012")
    train.main([*arguments, *start])
    assert "steps 10 to 12" in capsys.readouterr().out
    assert [int(row["step"]) for row in rows(folder)] == list(range(13))


def test_an_old_state_that_lacks_a_file_of_several_is_refused(finished, run, tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(train.state, "FILE_BYTES", 2**15)
    train.main([*finished[1], "--steps=1", f"--out={tmp_path}/several"])
    files = sorted((tmp_path / "several/step_000001").glob("*.safetensors"))
    assert len(files) > 3
    spoil_state(tmp_path / "several/step_000001", older)
    for file in files:
        kept = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match="lacks one of its files"):
            train.main(["--init=resume", f"--out={tmp_path}/several"])
        file.write_bytes(kept)
    train.main(["--init=resume", f"--out={tmp_path}/several"])


@pytest.mark.parametrize("name", [b"", b"\n", b"\xff\xfe", b"step_000099\n", b"../elsewhere\n"])
def test_a_latest_that_names_nothing_leaves_the_newest_state(name, run, capsys):
    (run[0] / "latest").write_bytes(name)
    train.main(["--init=resume", f"--out={run[0]}", "--steps=13"])
    assert "steps 12 to 13" in capsys.readouterr().out


def test_states_of_a_million_steps_and_more_are_found(tmp_path):
    for step in (2, 999_999, 1_000_000):
        (tmp_path / f"step_{step:06d}").mkdir()
    (tmp_path / "step_000003.tmp").mkdir()
    assert [path.name for path in train.state.step_folders(tmp_path)] == ["step_000002", "step_999999", "step_1000000"]
    assert train.state.latest(tmp_path).name == "step_1000000"


def test_a_model_without_states_is_not_replaced_by_auto_resume(run):
    for folder in train.state.step_folders(run[0]):
        shutil.rmtree(folder)
    before = content(run[0])
    with pytest.raises(ValueError, match="already holds a run"):
        train.main([*run[1], "--auto-resume"])
    assert content(run[0]) == before


# ---------------------------------------------------------------------------------------------- one process a run

@pytest.mark.parametrize("start", [[], ["--overwrite"], ["--auto-resume"], ["--init=resume"]])
def test_a_folder_in_which_another_process_trains_is_refused(start, run, tmp_path):
    from test_files import holder
    before = content(run[0])
    other = holder(run[0])
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="run: another process is at work on the run there"):
        train.main([*run[1], *start])
    train.main([*run[1], "--dry-run"])
    other.kill()
    other.communicate(timeout=60)
    (run[0] / ".lock").unlink()
    assert content(run[0]) == before


@pytest.mark.parametrize("mistake", ["--val-data=nowhere", "--lm=nowhere", "--wandb=speech", "--block-size=256"])
def test_a_run_that_cannot_begin_leaves_no_folder(mistake, train_arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((ValueError, OSError)):
        train.main([*train_arguments, mistake])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mistake, words", [
    ("--val-data=nope", "^--val-data=nope: no such folder"), ("--data=nope", "^--data=nope: no such folder"),
    ("--init=wrm", "^--init=wrm: .*The starts are twist, cold, shuffled, resume, and")])
def test_a_path_that_does_not_exist_is_called_by_its_option(mistake, words, train_arguments):
    with pytest.raises(FileNotFoundError, match=words):
        train.main([*train_arguments, mistake])


@pytest.mark.slow
def test_the_first_line_says_what_is_trained_and_validated_on(train_arguments, tiny_world, capsys):
    train.main([*train_arguments, "--dry-run"])
    first, *others = capsys.readouterr().out.splitlines()
    assert f"{tiny_world}/train" in first and f"{tiny_world}/val" in first and not any("warning" in line for line in others)
    train.main(["--dry-run"])
    assert "warning" not in capsys.readouterr().out
    train.main([f"--data={train.files.KINDS['units']}/train", "--dry-run"])
    _, warning, *others = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: only one of --data and --val-data")
    assert sum("Triton" in line for line in others) <= 1


def test_the_environment_of_a_launcher_is_not_needed():
    assert "RANK" not in os.environ


def test_several_corpora_are_mixed_and_a_fraction_is_a_part(tiny_world, train_arguments, tmp_path, capsys):
    both = f"{tiny_world}/train,{tiny_world}/val"
    train.main(["--init=cold", *train_arguments, f"--data={both}", "--data-weights=3,1", "--steps=3"])
    whole = capsys.readouterr().out
    train.main(["--init=cold", *train_arguments, "--data-fraction=0.3", "--steps=3", f"--out={tmp_path}/part"])
    part = capsys.readouterr().out
    ids = [int(re.search(r"([\d,]+) ids of", text)[1].replace(",", "")) for text in (whole, part)]
    assert ids[1] < ids[0] / 2
    for weights in ("1", "a,b", "1,-1"):
        with pytest.raises(ValueError, match="weight|numbers"):
            train.main(["--init=cold", *train_arguments, f"--data={both}", f"--data-weights={weights}", f"--out={tmp_path}/none"])
    assert not (tmp_path / "none").exists()


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(train_arguments, tmp_path, capsys):
    train.main(["--init=twist", *train_arguments, "--dry-run"])
    said = capsys.readouterr().out
    assert "21,344" in said and "activations" in said and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_prompts_are_continued_on_the_way(tmp_path):
    other = shutil.copy("pocket/prompt.wav", tmp_path)  # of the same name
    train.main(["--init=twist", "--steps=2", "--tokens-per-step=64", "--block-size=64", "--eval-rows=1", "--sample-interval=1",
                "--schedule=cooldown", "--threads=1", f"--out={tmp_path}/run", f"--prompts=pocket/prompt.wav,{other}"])
    assert [path.relative_to(tmp_path).as_posix() for path in sorted((tmp_path / "run/samples").rglob("*.wav"))] == [
        f"run/samples/step_00000{step}/prompt_0{number}.wav" for step in (1, 2) for number in ("-2", "")]
    header = list(rows(tmp_path / "run")[1])
    assert header == list(train.logs.COLUMNS)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [["pocket/prompt.wav"], []])
def test_prompts_that_cannot_be_read_are_named_before_the_first_step_and_left_out(prompts, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "noise.wav").write_bytes(b"no audio at all, but many bytes of something else" * 99)
    monkeypatch.chdir(tmp_path)  # from where pocket/prompt.wav is none of ours
    bad = ["empty.wav", "noise.wav", "nowhere.wav"]
    train.main(["--init=twist", "--steps=2", "--tokens-per-step=64", "--block-size=64", "--eval-rows=1", "--sample-interval=1",
                f"--prompts={','.join(bad + prompts)}", "--threads=1", f"--out={tmp_path}/run"])
    said = capsys.readouterr().out
    assert said.count("prompt left out: ") == 3 and all(said.count(name) == 1 for name in bad)
    assert len([*(tmp_path / "run").rglob("*.wav")]) == 2 * len(prompts) and (tmp_path / "run/model/config.json").exists()


@pytest.mark.slow
def test_what_goes_wrong_with_speaking_later_is_a_line_and_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples").write_text("a file where a folder should be made")
    train.main(["--init=twist", "--steps=2", "--tokens-per-step=64", "--block-size=64", "--eval-rows=1", "--sample-interval=1",
                "--threads=1", f"--out={tmp_path}/run"])
    said = capsys.readouterr().out
    assert [line[:8] for line in said.splitlines() if "is not continued: " in line] == ["step 1: ", "step 2: "]
    assert len(rows(tmp_path / "run")) == 3 and train.state.latest(tmp_path / "run").name == "step_000002"


def test_a_gpu_that_is_too_full_to_speak_still_trains(tmp_path, monkeypatch, capsys):
    def generate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train.sample, "generate", generate)
    train.main(["--init=twist", "--steps=2", "--tokens-per-step=64", "--block-size=64", "--eval-rows=1", "--sample-interval=1",
                "--threads=1", f"--out={tmp_path}/run"])
    assert capsys.readouterr().out.count("is not continued: out of memory: ") == 2
    assert train.state.latest(tmp_path / "run").name == "step_000002"


@pytest.mark.parametrize("known", [True, False], ids=["its room is known", "a quota"])
def test_a_full_disk_costs_no_training_until_the_end(train_arguments, tmp_path, monkeypatch, capsys, known):
    if known:
        monkeypatch.setattr(train.state.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    before, how = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if known else 20_000, before[1]))
    try:
        with pytest.raises(OSError, match="no room" if known else "cannot write .*step_000012 .*too large.*; make room"):
            train.main(["--init=twist", *train_arguments])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, how)
    assert known or not [*(tmp_path / "run").glob("step_*")]
    assert capsys.readouterr().out.count("state not saved") == 2  # steps 5 and 10
    assert len(rows(tmp_path / "run")) == 12  # step 12 could not be saved


def test_split_weights_are_not_asked_to_add_up_many_bfloat16_gradients(train_arguments):
    with pytest.raises(ValueError, match="raise --micro-batch"):
        train.main(["--init=cold", *train_arguments, "--optimizer=split", "--tokens-per-step=256", "--micro-batch=1"])


def test_a_job_killed_before_its_first_state_starts_over_when_it_is_restarted(train_arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.csv").write_text("step\n0\n")
    train.main(["--init=cold", *train_arguments, "--auto-resume"])
    assert len(rows(tmp_path / "run")) == 13


def test_what_has_no_effect_is_said_once(tmp_path, capsys):
    argv = ["--vocoder=x", "--data=a", "--data=b", f"--out={tmp_path}/run"]
    train.load_options(argv)
    said = capsys.readouterr()
    assert not said.out and said.err.count("--vocoder has no effect") == said.err.count("--data is given more than once") == 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text("sample_interval = 2\n")
    train.load_options([*argv, "--init=resume"])  # there it has one
    said = capsys.readouterr()
    assert not said.out and "no effect" not in said.err


def test_overwriting_what_is_resumed_is_said(monkeypatch, capsys):
    monkeypatch.setattr(state, "read", lambda out: "found")
    options = train.TrainConfig(out="runs/x", overwrite=True, dry_run=True)
    assert state.claim(options, True, None) == "found"
    assert capsys.readouterr().out == "--overwrite has no effect: runs/x holds a state, from which this goes on\n"
    assert state.claim(dataclasses.replace(options, overwrite=False), True, None) == "found" and not capsys.readouterr().out
