"""An update of train.py: read late, skipped exactly, never waited for; and the batches that are made ahead."""
import contextlib
import csv
import dataclasses
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import config
import kernels
import train
import twist
from conftest import TINY
from corpus.loader import Batch, Mixture, UnitLoader
from corpus.shards import UnitShards
from model import alibi_slopes
from training import distributed, pipeline, sharding, state
from training.learner import Learner

SMALL = dataclasses.replace(TINY, vocab_size=22)
ALONE = distributed.Dist(0, 1, torch.device("cpu"))


def learner(optimizer="adamw", dist=ALONE, **options):
    made = Learner(SMALL, train.TrainConfig(optimizer=optimizer, dtype="bfloat16" if optimizer == "split" else "float32",
                                            **options), dist)
    return made.fill(twist.cold_tensors(SMALL))


def batch(seed=0, rows=4):
    ids = torch.randint(2, 22, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:], None)


def rows(folder):
    with open(Path(folder) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def kept(ours):
    """Copies of everything that an update may change, as a state holds it."""
    return {name: sharding.part(tensor).clone() for name, tensor in state.named(ours).items()}


def same(first, second):
    return first.keys() == second.keys() and all(tensor.equal(second[name]) for name, tensor in first.items())


@pytest.fixture
def group_of_one():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------- read late

@pytest.mark.parametrize("bos, more", [(0, ["--micro-batch=2", "--clip=0.5"]), (0, ["--packing=documents", "--log-interval=4"]),
                                       (None, ["--packing=documents", "--micro-batch=1"]),
                                       (0, ["--save-interval=1", "--eval-interval=3", "--optimizer=split", "--dtype=bfloat16"])])
def test_runs_are_those_of_a_loop_that_reads_each_loss_at_once(bos, more, train_arguments, tiny_world, tmp_path):
    """To the bit: rows, their order, and the weights. The loop here is written out, with PyTorch's own clipping. Without a token
    between documents rows have different numbers of targets."""
    start = "twist" if bos == 0 else str(tmp_path / "start")
    if bos is None:
        vocab = twist.UnitVocab(20, bos=None)
        twist.save_speech_lm(twist.cold_start(twist.load_lm_config(tiny_world / "text_lm"), vocab, 0), vocab, start)
    arguments = [f"--init={start}", *train_arguments, *more]
    train.main(arguments)
    options = config.load(train.TrainConfig, arguments, quiet=True)
    shards = [UnitShards(tiny_world / name) for name in ("train", "val")]
    model_config, vocab, tensors = twist.open_start(start, str(tiny_world / "text_lm"), shards[0].recipe, 0, "fresh")
    loader = UnitLoader(shards[0], vocab, 32, 4, 0, packing=options.packing)
    val_loader = UnitLoader(shards[1], vocab, 32, 1, 0, packing=options.packing)
    ours = Learner(model_config, options, ALONE).fill(tensors)
    expected = [{"step": 0, "val_loss": ours.evaluate(val_loader, 4)}]
    for step in range(12):
        lr, loss = train.lr_at(step, options), 0.0
        whole = loader.rows(step, 0, 4)
        for piece in whole.split(options.micro_batch or 4):
            share = ours.forward(piece) * (piece.count / whole.count)
            share.backward()
            loss += share.detach()
        norms = [p.grad for p in ours.model.parameters()]
        norm = torch.nn.utils.get_total_norm(norms if options.optimizer == "adamw" else [g.float().norm() for g in norms]).item()
        if norm > options.clip:
            torch.nn.utils.clip_grads_with_norm_(ours.model.parameters(), options.clip, torch.tensor(norm))
        for group in ours.optimizer.param_groups:
            group["lr"] = lr
        ours.optimizer.step()
        ours.optimizer.zero_grad()
        row = {"step": step + 1, "loss": loss.item(), "lr": lr, "grad_norm": norm}
        if (step + 1) % options.eval_interval == 0:
            row["val_loss"] = ours.evaluate(val_loader, 4)
        if (step + 1) % options.log_interval == 0 or "val_loss" in row:
            expected.append(row)
    found = rows(tmp_path / "run")
    assert [{key: row[key] for key in ("step", "loss", "val_loss", "lr", "grad_norm") if row[key]} for row in found] == [
        {key: str(value) for key, value in row.items()} for row in expected]
    trained, _ = twist.load_speech_lm(tmp_path / "run/model")
    assert same(dict(trained.state_dict()), ours.weights())


def test_each_is_read_when_the_next_is_launched_or_at_once_where_it_is_due():
    said = []

    def launch():
        for number in range(1, 7):
            said.append(f"launch {number}")
            yield number, "lr"

    for number, _ in pipeline.one_late(launch(), lambda number, _: number in (3, 6)):
        said.append(f"read {number}")
    assert " ".join(said) == "launch 1 launch 2 read 1 launch 3 read 2 read 3 launch 4 launch 5 read 4 launch 6 read 5 read 6"


@pytest.mark.parametrize("stop_at", [1, 4, 11])
def test_a_run_that_is_told_to_stop_saves_the_update_that_it_was_in(stop_at, train_arguments, tmp_path, monkeypatch):
    update, calls = Learner.update, []

    def told(self, *arguments):
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), 15)
        return update(self, *arguments)

    monkeypatch.setattr(Learner, "update", told)
    train.main(["--init=twist", *train_arguments])
    assert state.latest(tmp_path / "run").name == f"step_{stop_at:06d}" and len(calls) == stop_at
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == list(range(stop_at + 1))


def test_what_another_process_was_told_ends_the_run_one_update_later(train_arguments, tmp_path, monkeypatch):
    update, calls = Learner.update, []

    def told(self, *arguments):
        late = update(self, *arguments)
        calls.append(1)
        late.numbers[2] = len(calls) == 4
        return late

    monkeypatch.setattr(Learner, "update", told)
    train.main(["--init=twist", *train_arguments, "--save-interval=100", "--eval-interval=100"])
    assert state.latest(tmp_path / "run").name == "step_000005" and len(rows(tmp_path / "run")) == 6


def test_speed_is_that_of_updates_and_of_nothing_else(train_arguments, tmp_path, monkeypatch):
    """By a clock on which an update takes a second, a validation a hundred and all else nothing."""
    clock, forward = [0.0], Learner.forward

    def timed(self, *arguments, **named):
        clock[0] += 1 if self.model.training else 100
        return forward(self, *arguments, **named)

    monkeypatch.setattr(Learner, "forward", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    train.main(["--init=cold", *train_arguments])
    found = rows(tmp_path / "run")[1:]
    assert {row["units_per_second"] for row in found} == {"128"}
    assert [float(row["seconds"]) for row in found] == [100 + step + 100 * (step > 6) for step in range(1, 13)]


class Numbers:
    """What a GPU gives: a tensor whose copy on the host is there when the event behind it says so."""

    is_cuda = True

    def __init__(self, said):
        self.said = said

    def to(self, device, non_blocking):
        self.said.append(("to", device, non_blocking))
        return self

    def tolist(self):
        self.said.append("tolist")
        return [1.0, 2.0, 0.0]


def test_numbers_of_a_gpu_are_copied_behind_their_update_and_read_after_it(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: type("Event", (), {
        "record": lambda _: said.append("record"), "synchronize": lambda _: said.append("synchronize")})())
    late = pipeline.Late(Numbers(said))
    assert said == [("to", "cpu", True), "record"]
    assert late.read() == [1.0, 2.0, 0.0] and said[2:] == ["synchronize", "tolist"]


# ---------------------------------------------------------------------------------------------- nothing is waited for

class Reads(TorchDispatchMode):
    """What would make a host wait for a GPU: values that Python asks for, and results whose shape depends on them."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __enter__(self):
        self.found, self.patch = [], pytest.MonkeyPatch()
        self.patch.setattr(kernels, "check_loss", lambda *_: None)  # looks at targets on CPUs alone
        for name in ("tolist", "cpu"):
            method = getattr(torch.Tensor, name)
            self.patch.setattr(torch.Tensor, name, lambda x, *more, name=name, method=method: (
                self.found.append(name), method(x, *more))[1])
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.found += [name] * (name in self.NAMES)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parallel", ["auto", "fsdp"])
@pytest.mark.parametrize("optimizer", ["adamw", "split"])
def test_no_number_is_asked_for_within_an_update(optimizer, parallel, group_of_one):
    """On the CPU, but as on a GPU; and the weights are those of the CPU's way, which may look at the norm."""
    ways = [learner(optimizer, parallel=parallel, clip=0.1) for _ in range(2)]
    ways[1].on_gpu = True
    for ours in ways:
        ours.update(batch(), 2, None, 1e-2).read()  # what only the first does
        with Reads() as reads:
            late = ours.update(batch(1), 2, None, 1e-2)
        loss, norm, _ = late.read()
        assert reads.found == [] if ours.on_gpu else reads.found == ["_local_scalar_dense"]  # whether it is to clip
        assert loss > 0 and norm > 0.1
    for name, tensor in kept(ways[0]).items():  # split clips bfloat16 gradients there, which rounds them
        if not name.endswith(".low"):
            tolerance = 5e-3 if optimizer == "split" else 1e-5
            torch.testing.assert_close(kept(ways[1])[name], tensor, rtol=tolerance, atol=tolerance * tensor.abs().max().item())


def test_a_validation_is_read_once_however_many_forwards_it_takes(tiny_world):
    ours = learner()
    loader = UnitLoader(UnitShards(tiny_world / "train"), twist.UnitVocab(20), 16, 1, 0)
    assert loader.windows > 32
    with Reads() as reads:
        ours.evaluate(loader, 0)
    assert reads.found == ["tolist"]


def test_alibi_needs_no_copy_from_the_host(monkeypatch):
    expected = torch.tensor([2 ** (-i / 2) for i in range(1, 17)])
    monkeypatch.delattr(torch, "tensor")
    assert alibi_slopes(16, torch.device("cpu")).equal(expected)


@pytest.mark.parametrize("packing, bos, known", [("stream", 0, True), ("stream", None, True), ("documents", 0, True),
                                                 ("documents", None, False)])
def test_how_many_targets_count_is_known_without_a_look_at_them(packing, bos, known, tiny_world):
    vocab = twist.UnitVocab(20) if bos == 0 else twist.UnitVocab(20, bos=None)
    loaders = [UnitLoader(UnitShards(tiny_world / name), vocab, 16, 6, 0, packing=packing) for name in ("train", "val")]
    for loader in (loaders[0], Mixture(loaders, [1, 1])):
        assert (loader.targets == loader.rows(3, 0, 6).count) if known else loader.targets is None


# ---------------------------------------------------------------------------------------------- skipped exactly

def spoilt(ours, number):
    """The same learner, whose next losses have gradients that are not finite."""
    ours.forward = lambda *arguments, **named: Learner.forward(ours, *arguments, **named) * number
    return ours


@pytest.mark.parametrize("optimizer, parallel, on_gpu", [
    ("adamw", "auto", False), ("adamw", "auto", True), ("split", "auto", True), ("adamw", "fsdp", True),
    ("split", "fsdp", False)])
def test_an_update_that_is_not_finite_changes_nothing(optimizer, parallel, on_gpu, group_of_one):
    """Not the step counts either: the next one is that of a run without it."""
    ours, twin = (learner(optimizer, parallel=parallel) for _ in range(2))
    ours.on_gpu = twin.on_gpu = on_gpu
    for one in (ours, twin):
        one.update(batch(), 4, None, 1e-2)
    before = kept(ours)
    for number in (float("nan"), float("inf")):
        loss, norm, _ = spoilt(ours, number).update(batch(1), 4, None, 1e-2).read()
        assert not torch.tensor(loss).isfinite() and same(before, kept(ours))
    del ours.forward
    for one in (ours, twin):
        one.update(batch(2), 4, None, 1e-2)
    assert same(kept(ours), kept(twin)) and not same(before, kept(ours))
    assert {int(tensor) for name, tensor in kept(ours).items() if name.endswith(".step")} == {2}


def test_the_first_update_can_be_the_one_that_is_skipped():
    ours = learner()
    before = {name: tensor.detach().clone() for name, tensor in ours.model.named_parameters()}
    spoilt(ours, float("nan")).update(batch(), 4, None, 1e-2)
    assert all(tensor.equal(before[name]) for name, tensor in ours.model.named_parameters())
    assert {state["step"].item() for state in ours.optimizer.state.values()} == {0}


def skip_in_a_group(rank, folder, world):
    """In a process of its own: one of two is not finite, both skip, and the numbers are the same on both."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    dist = distributed.Dist(rank, world, torch.device("cpu"))
    for optimizer, parallel in (("adamw", "ddp"), ("adamw", "fsdp"), ("split", "fsdp")):
        ours = learner(optimizer, dist, parallel=parallel)
        ours.on_gpu = parallel == "fsdp"
        ours.update(batch(rank), 2, 2 * 64, 1e-2)
        before = kept(ours)
        numbers = spoilt(ours, float("nan") if rank else 1.0).update(batch(rank), 2, None, 1e-2, stopping=rank == 1).read()
        assert same(before, kept(ours)) and numbers[2] == 1 and numbers[0] != numbers[0], (optimizer, parallel)
        del ours.forward
        with Reads() as reads:
            late = ours.update(batch(rank), 2, None, 1e-2)
        numbers = late.read()
        assert reads.found == ["_local_scalar_dense"] * (parallel == "ddp") and not same(before, kept(ours))
        assert dist.each(numbers[0]) == [numbers[0]] * 2 and dist.each(numbers[1]) == [numbers[1]] * 2
    distributed.leave()


@pytest.mark.slow
def test_processes_skip_together_and_none_waits(tmp_path):
    torch.multiprocessing.spawn(skip_in_a_group, (str(tmp_path), 2), nprocs=2, daemon=True)


# ---------------------------------------------------------------------------------------------- batches ahead

def threads():
    """Those that make batches: other tests may have left threads of libraries."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_next_batch_is_made_while_this_one_is_used_and_no_thread_stays():
    made, ready = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        if step == 1:
            ready.set()
        return step

    batches = pipeline.in_thread(make, range(4))
    assert next(batches) == 0 and ready.wait(60)  # without a further call
    assert list(batches) == [1, 2, 3] and made == [(step, False) for step in range(4)] and not threads()
    batches = pipeline.in_thread(make, range(4))
    next(batches)
    batches.close()  # as when a run is told to stop
    assert not threads() and list(pipeline.in_thread(make, range(0))) == []


def test_what_the_loader_refuses_comes_when_its_turn_does():
    def make(step):
        if step == 2:
            raise ValueError("units 0 .. 7: expected 0 .. 4")
        return step

    seen = []
    with pytest.raises(ValueError, match="^units 0 .. 7: expected 0 .. 4$"):
        for step in pipeline.in_thread(make, range(9)):
            seen.append(step)
    assert seen == [0, 1] and not threads()


def test_only_a_gpu_gets_its_batches_from_a_thread_and_from_pinned_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: (calls.append(device), contextlib.nullcontext())[1])
    monkeypatch.setattr(Batch, "pinned", lambda self: (calls.append(threading.current_thread().name), self)[1])
    on_cpu = pipeline.ahead(batch, range(3), torch.device("cpu"))
    assert next(on_cpu).ids.equal(batch(0).ids) and not threads() and not calls
    there = list(pipeline.ahead(batch, range(2), torch.device("cuda", 3)))
    assert [one.ids.tolist() for one in there] == [batch(step).ids.tolist() for step in range(2)]
    assert calls[0] == calls[2] == torch.device("cuda", 3) and calls[1].startswith("batches")


def test_a_run_from_batches_of_a_thread_is_the_same_run(train_arguments, tmp_path, monkeypatch):
    """Interrupted in the middle, too."""
    train.main(["--init=twist", *train_arguments])
    monkeypatch.setattr(pipeline, "ahead", lambda make, steps, device: pipeline.in_thread(make, steps))
    train.main(["--init=twist", *train_arguments, f"--out={tmp_path}/ahead"])
    shutil.rmtree(tmp_path / "ahead/step_000012")
    train.main(["--init=resume", f"--out={tmp_path}/ahead"])
    assert same(*(train.files.read_tensors(tmp_path / name / "model") for name in ("run", "ahead"))) and not threads()


def test_one_copy_a_tensor_brings_the_rows_of_an_update_to_the_device(monkeypatch):
    """Its pieces are cut there."""
    ours, copies, to = learner(), [], Batch.to
    monkeypatch.setattr(Batch, "to", lambda self, device: (copies.append(len(self.ids)), to(self, device))[1])
    ours.update(batch(rows=8), 2, None, 1e-3)
    assert copies[0] == 8 and copies[1:] == [2] * 4  # where a piece already is, `to` copies nothing
