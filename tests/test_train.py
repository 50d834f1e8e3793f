"""train.py: every start trains, resuming is exact to the bit, and a mistake costs nothing."""
import csv
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
import twist
from checkpoints import files
from conftest import TINY
from corpus.loader import UnitLoader
from corpus.shards import UnitShards
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
                    f"--out={tmp_path}/{backend}", "--steps=25", "--tokens-per-step=64", "--block-size=32", "--warmup=2",
                    "--packing=documents", "--eval-interval=25", "--eval-rows=2", "--peak-lr=1e-2", "--threads=1"])
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


@pytest.mark.parametrize("arguments, words", [
    (["--peek-lr=1"], "did you mean --peak-lr"), (["--block-size=256"], "at most 128"),
    *(pytest.param([option], words, marks=pytest.mark.slow) for option, words in {
        "--data=nowhere": "no such file or folder", "--lm=nowhere": "no such file or folder", "--tokens-per-step=100": "multiple",
        "--schedule=sine": "cosine", "--dtype=float8": "bfloat16", "--init=resume": "nothing to resume",
        "--init=nowhere": "no such file or folder"}.items())])
def test_a_mistake_is_one_sentence_exit_code_2_and_no_run_folder(arguments, words, train_arguments, tmp_path):
    result = launch([*train_arguments, *arguments])
    assert result.returncode == 2 and words in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/log.csv").exists()


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


def test_prompts_are_continued_on_the_way(tmp_path):
    other = shutil.copy("pocket/prompt.wav", tmp_path)  # of the same name
    train.main(["--init=twist", "--steps=2", "--tokens-per-step=64", "--block-size=64", "--eval-rows=1", "--sample-interval=1",
                "--schedule=cooldown", "--threads=1", f"--out={tmp_path}/run", f"--prompts=pocket/prompt.wav,{other}"])
    assert [path.relative_to(tmp_path).as_posix() for path in sorted((tmp_path / "run/samples").rglob("*.wav"))] == [
        f"run/samples/step_00000{step}/prompt_0{number}.wav" for step in (1, 2) for number in ("-2", "")]
    header = list(rows(tmp_path / "run")[1])
    assert header == list(train.logs.COLUMNS)


def test_a_full_disk_costs_no_training_until_the_end(train_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.state.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="no room"):
        train.main(["--init=twist", *train_arguments])
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
