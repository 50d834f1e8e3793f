"""distributed.py and state.py: the same losses on any number of processes, and no kill that costs more than a step (gloo)."""
import contextlib
import csv
import dataclasses
import functools
import os
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
from corpus.loader import Batch
from training import distributed, state
from training.learner import Learner

ROOT = Path(__file__).parent.parent
WAYS = {"2 x ddp": (2, "--parallel=ddp"), "2 x fsdp": (2, "--parallel=fsdp"),
        "4 x hsdp": (4, "--parallel=hsdp", "--shard-size=2")}


def torchrun(processes, arguments, *launcher):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", *launcher]
    return [*command, "train.py", *arguments]


def launch(processes, arguments, *launcher):
    command = torchrun(processes, arguments, *launcher) if processes > 1 or launcher else [sys.executable, "train.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stdout + result.stderr


def column(folder, name="loss"):
    with open(folder / "log.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def weights(folder):
    return files.read_tensors(folder / "model")


def assert_same_run(folder, expected, tolerance=1e-5):
    assert column(folder) == pytest.approx(column(expected), abs=tolerance)
    assert column(folder, "val_loss") == pytest.approx(column(expected, "val_loss"), abs=tolerance)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(folder)[name], tensor, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def arguments(tiny_world):
    return [f"--lm={tiny_world}/text_lm", f"--data={tiny_world}/train", f"--val-data={tiny_world}/val", "--steps=20",
            "--tokens-per-step=256", "--block-size=32", "--warmup=2", "--eval-interval=10", "--save-interval=7", "--eval-rows=5",
            "--threads=1", "--peak-lr=1e-3", "--init=twist", "--dtype=float32"]  # in which only the order of sums rounds


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The run of one process that all others must equal."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    launch(1, [*arguments, f"--out={folder}"])
    return folder


@pytest.mark.parametrize("way", ["2 x fsdp", *(pytest.param(way, marks=pytest.mark.slow) for way in ("2 x ddp", "4 x hsdp"))])
def test_twenty_steps_give_the_losses_and_weights_of_one_process(way, arguments, alone, tmp_path):
    processes, *options = WAYS[way]
    text = launch(processes, [*arguments, *options, f"--out={tmp_path}/run"])
    assert text.count("validation loss") == 1  # rank 0 alone prints
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize("first, then", [("alone", "4 x hsdp"), ("2 x fsdp", "alone"), ("4 x hsdp", "2 x ddp")])
@pytest.mark.slow
def test_a_state_goes_on_under_any_other_number_of_processes(first, then, arguments, alone, tmp_path):
    ways = {"alone": (1,), **WAYS}
    processes, *options = ways[first]
    full = [f"--out={tmp_path}/run", *options]
    # the first seven steps of the same schedule, then a kill: what is left is the state of step 7
    launch(processes, [*arguments, *full, "--keep=9"])
    for folder in state.step_folders(tmp_path / "run")[1:]:
        shutil.rmtree(folder)
    processes, *options = ways[then]
    text = launch(processes, ["--init=resume", f"--out={tmp_path}/run", *(options or ["--parallel=auto"])])
    assert "steps 7 to 20" in text
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_warm_start_in_parts_is_the_warm_start(arguments, tiny_world, tmp_path):
    launch(2, [*arguments, "--parallel=fsdp", "--steps=1", "--peak-lr=0", f"--out={tmp_path}/run"])
    expected = twist.warm_start(twist.load_text_lm(tiny_world / "text_lm"), twist.UnitVocab(20), seed=0)
    slm, _ = twist.load_speech_lm(tmp_path / "run/model")
    for (name, tensor), other in zip(expected.state_dict().items(), slm.state_dict().values()):
        assert torch.equal(tensor, other), name


@pytest.fixture(scope="module")
def uneven(arguments, tmp_path_factory):
    """(processes, rows of a piece) -> folder of a run whose rows have different numbers of targets: no <S> between documents."""
    folder, vocab = tmp_path_factory.mktemp("uneven"), twist.UnitVocab(20, bos=None)
    twist.save_speech_lm(twist.cold_start(TINY, vocab, 0), vocab, folder / "lm")

    @functools.cache
    def run(processes, micro):
        out = folder / f"{processes}x{micro}"
        launch(processes, [*arguments, f"--init={folder}/lm", "--tokens-per-step=512", f"--micro-batch={micro}", "--steps=3",
                           "--packing=documents", f"--out={out}"])
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("processes, micro", [(1, 4), pytest.param(2, 8, marks=pytest.mark.slow),
                                              pytest.param(4, 4, marks=pytest.mark.slow)])
def test_pieces_of_uneven_documents_give_one_update(processes, micro, uneven):
    """The 16 rows of an update whole, and in pieces one after the other and side by side."""
    whole, other = uneven(1, 16), uneven(processes, micro)
    for name in ("loss", "grad_norm"):
        assert column(other, name) == pytest.approx(column(whole, name), rel=1e-6, abs=1e-6)
    assert_same_run(other, whole, 1e-6)


@pytest.mark.slow
def test_split_weights_in_parts_and_recomputation_train_as_split_weights_whole(arguments, tmp_path):
    """bfloat16 weights with their low bits: whole in one process, in halves in two, kept on the way, resumed."""
    options = ["--optimizer=split", "--dtype=bfloat16", "--peak-lr=1e-3"]
    launch(1, [*arguments, *options, f"--out={tmp_path}/one"])
    launch(2, [*arguments, *options, "--parallel=fsdp", "--recompute=full", "--async-save", f"--out={tmp_path}/two"])
    assert column(tmp_path / "two") == pytest.approx(column(tmp_path / "one"), abs=2e-2)  # sums in another order, in bfloat16
    before = column(tmp_path / "two")
    shutil.rmtree(tmp_path / "two/step_000020")
    assert "steps 14 to 20" in launch(2, ["--init=resume", f"--out={tmp_path}/two"])
    assert column(tmp_path / "two") == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("options", [["--recompute=full"], *(pytest.param(options, marks=pytest.mark.slow) for options in (
    ["--recompute=selective"], ["--async-save"]))])
def test_what_only_saves_memory_or_time_changes_nothing(options, arguments, alone, tmp_path):
    launch(1, [*arguments, *options, f"--out={tmp_path}/run"])
    assert_same_run(tmp_path / "run", alone, 1e-6)
    assert [path.name for path in state.step_folders(tmp_path / "run")] == ["step_000014", "step_000020"]
    assert (tmp_path / "run/latest").read_text() == "step_000020\n"


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or process.poll() is not None:
            process.kill()
            pytest.fail(str(process.communicate(timeout=60)))
        time.sleep(0.02)


def start(command):
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_and_a_restart_goes_on(arguments, alone, tmp_path):
    out = tmp_path / "run"
    process = start(torchrun(2, [*arguments, "--parallel=fsdp", "--save-interval=1", f"--out={out}"]))
    wait_for(lambda: len(state.step_folders(out)) >= 2, process)
    os.kill(children(process)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)  # a hang would end the test here
    assert process.returncode == 1 and "SIGKILL" in errors
    assert state.latest(out) is not None and not (out / "model").exists()
    launch(2, [*arguments, "--parallel=fsdp", "--auto-resume", f"--out={out}"])
    assert_same_run(out, alone)


@pytest.mark.slow
def test_max_restarts_goes_on_by_itself(arguments, alone, tmp_path):
    out = tmp_path / "run"
    process = start(torchrun(2, [*arguments, "--save-interval=1", f"--out={out}"], "--max-restarts=1"))
    wait_for(lambda: len(state.step_folders(out)) >= 2, process)
    os.kill(children(process)[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "twist (resumed)" in output
    assert_same_run(out, alone)


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_launcher(arguments, tmp_path):
    process = start(torchrun(2, [*arguments, "--steps=100000", f"--out={tmp_path}/run"]))
    wait_for(lambda: state.latest(tmp_path / "run") is not None, process)
    workers = children(process)
    process.kill()
    process.wait(timeout=60)
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "workers go on without their launcher"
        time.sleep(0.1)
    process.communicate(timeout=60)


LATE_THREAD = """
import atexit, sys, time

class Last:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)  # lets other threads run once more, after Python has begun to go down

@atexit.register
def keep_python():  # from a thread that waits for it, until Python goes down
    sys.setswitchinterval(1000)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        pass

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from training import distributed

last, dist = Last(), distributed.setup("cpu")
half = distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
half.full_tensor()  # from here on a cache of torch keeps the process group, and its threads, to the very end
if dist.is_main:
    time.sleep(1)
values = torch.zeros(1)
torch.distributed.all_reduce(values, async_op=True)  # process 1's thread ends it a second later, while Python is kept
distributed.leave()
"""


@pytest.mark.slow
def test_a_thread_that_drops_its_tensors_late_does_not_abort_the_job(tmp_path):
    (tmp_path / "late.py").write_text(LATE_THREAD)
    command = [*torchrun(2, [])[:-1], str(tmp_path / "late.py")]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                            timeout=120)
    assert result.returncode == 0, result.stderr


BLOOM = dataclasses.replace(TINY, norm="layernorm", position="alibi", mlp="gelu_tanh", attention_bias=True, out_bias=True,
                            mlp_bias=True, n_inner=128, embed_norm=True, family="bloom")


@pytest.fixture
def group_of_one():
    """What asks for parts in one process makes a group, which must not outlive the test."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("config", [TINY, BLOOM], ids=["rotary", "ALiBi"])
@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
def test_parts_in_bfloat16_train_as_the_whole_does(parallel, config, group_of_one):
    """In a group of one. The residual stream is float32 under autocast, bfloat16 in parts (docs/training.md says why)."""
    config = dataclasses.replace(config, vocab_size=22, init_std=0.02)
    ids = torch.randint(2, 22, (4, 32), generator=torch.Generator().manual_seed(0))
    losses, streams = [], []
    for way in ("auto", parallel):
        options = train.TrainConfig(dtype="bfloat16", parallel=way)
        learner = Learner(config, options, distributed.Dist(0, 1, torch.device("cpu"))).fill(twist.cold_tensors(config))
        learner.model.h[1].register_forward_pre_hook(lambda _, inputs: streams.append((inputs[0].dtype, [
            extra.dtype for extra in inputs[1:] if isinstance(extra, torch.Tensor)])))
        losses += [learner.update(Batch(ids, ids, None), 4, None, 1e-2).read()[0] for _ in range(5)]
    assert learner.parallel == parallel and losses[4] < losses[0] - 0.3
    assert losses[5:] == pytest.approx(losses[:5], abs=1e-2)
    assert {dtype for dtype, _ in streams[:5]} == {torch.float32} and {dtype for dtype, _ in streams[5:]} == {torch.bfloat16}
    assert {kind for _, kinds in streams for kind in kinds} <= {torch.float32}  # ALiBi's slopes, which kernels take so


@pytest.mark.slow
def test_alibi_in_bfloat16_trains_alike_however_it_is_spread(arguments, tmp_path):
    vocab = twist.UnitVocab(20)
    twist.save_speech_lm(twist.cold_start(BLOOM, vocab, 0), vocab, tmp_path / "lm")
    full = [*arguments, f"--init={tmp_path}/lm", "--dtype=bfloat16"]
    launch(1, [*full, f"--out={tmp_path}/one"])
    for way, (processes, *options) in WAYS.items():
        launch(processes, [*full, *options, f"--out={tmp_path}/{way}"])
        assert column(tmp_path / way) == pytest.approx(column(tmp_path / "one"), abs=2e-2), way


@pytest.mark.slow
def test_one_process_that_asks_for_parts_saves_and_resumes_and_ends_like_others(arguments, alone, tmp_path):
    full = [*arguments, "--parallel=fsdp", f"--out={tmp_path}/run", "--async-save", "--keep=9"]
    assert "; fsdp\n" in launch(1, full)
    assert_same_run(tmp_path / "run", alone)
    for folder in state.step_folders(tmp_path / "run")[1:]:
        shutil.rmtree(folder)
    assert "steps 7 to 20" in launch(1, ["--init=resume", f"--out={tmp_path}/run"])
    assert_same_run(tmp_path / "run", alone)


def fresh(units):
    """A Learner of a cold start, on this process alone."""
    config = dataclasses.replace(TINY, vocab_size=twist.UnitVocab(units).size)
    return Learner(config, train.TrainConfig(), distributed.Dist(0, 1, torch.device("cpu"))).fill(twist.cold_tensors(config))


def test_a_state_that_does_not_fit_the_disk_is_refused_before_it_is_written(tmp_path, monkeypatch):
    learner = fresh(20)
    saver = state.Saver(tmp_path, 2, False, learner.dist)
    saver.save(learner, {"step": 1})
    monkeypatch.setattr(state.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="no room"):
        saver.save(learner, {"step": 2})
    assert state.latest(tmp_path).name == "step_000001"


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["locked", "damaged"])
def test_what_rank_0_finds_wrong_ends_all_processes_without_a_launcher_s_help(trouble, arguments, tmp_path):
    """And one of them says it."""
    from test_configs import free_port
    launch(1, [*arguments, "--steps=1", f"--out={tmp_path}/run"])
    if trouble == "damaged":
        (tmp_path / "run/step_000001/state.json").write_text("{")
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with files.locked(tmp_path / "run", "run") if trouble == "locked" else contextlib.nullcontext():
        both = [subprocess.Popen([sys.executable, "train.py", *arguments, "--steps=1", "--auto-resume", f"--out={tmp_path}/run"],
                                 cwd=ROOT, env=os.environ | variables | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
                for rank in range(2)]
        errors = [process.communicate(timeout=120)[1] for process in both]  # a hang would end the test here
    assert [process.returncode for process in both] == [2, 2], errors
    assert {"locked": "another process", "damaged": "is damaged"}[trouble] in errors[0] and "Traceback" not in errors[0]
    assert "error" not in errors[1]


def test_a_state_of_another_model_is_refused_in_a_sentence(tmp_path):
    learner = fresh(20)
    state.Saver(tmp_path, 2, False, learner.dist).save(learner, {"step": 1})
    with pytest.raises(ValueError, match="another model"):
        state.load(tmp_path, fresh(21))
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        state.read(tmp_path / "nowhere")


def test_what_auto_means():
    one, eight = (distributed.Dist(0, world, torch.device("cpu")) for world in (1, 8))
    assert [distributed.choose_parallel(parallel, 7e9, one) for parallel in ("auto", "ddp")] == ["none", "none"]
    assert [distributed.choose_parallel(parallel, 1e6, one) for parallel in ("fsdp", "hsdp")] == ["fsdp", "hsdp"]
    assert distributed.choose_parallel("auto", 1e9, eight) == "ddp"
    assert distributed.choose_parallel("auto", 7e9, eight) == "fsdp"
    assert distributed.choose_parallel("hsdp", 1e6, eight) == "hsdp"
