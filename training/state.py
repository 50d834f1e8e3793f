"""The state of a run that a later start goes on from: step_NNNNNN/, whole or absent, for any number of processes.

    step_000400/  shard-00001-model-...safetensors ...   files of each process: its parts of weights and optimizer, by name
                  state.json                             step, what was spent, options, architecture, unit ids, sizes of the files
    latest                                               the name of the newest complete step folder

    model.NAME          a weight             optimizer.NAME.SLOT     AdamW's moments and step count of that weight

What is written is the whole of each tensor in pieces that say where they lie (torch.distributed.checkpoint's safetensors
form), so 8 processes go on where 1, 2 or 64 stopped, under another --parallel. No pickle is written or read. Nothing random is
stored: batches depend on (seed, step) alone, and the network draws nothing.

A folder gets its name when all processes have written their files and these are on the disk; `latest` follows, then old
folders go. A kill at any moment leaves the state before or the state after. A state that was damaged later is refused.
"""
import contextlib
import dataclasses
import json
import math
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as torch_distributed
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from checkpoints.files import locked, open_safetensors, read_json, replace_folder, write_json, write_text
from checkpoints.recognise import check_values
from model import TransformerConfig
from training import logs
from twist import UnitVocab

FILE_BYTES = 2**28  # of the whole tensors that go into one file of each process
NOTHING = {"step": 0, "seconds": 0.0, "row": {}, "units": 0, "process_seconds": 0.0}  # what a run has done before its first step
KINDS = {"step": int, "seconds": float, "units": float, "process_seconds": float,  # of the values in state.json
         **dict.fromkeys(("row", "options", "model", "vocab", "files"), dict)}
FIXED = ("init", "lm", "embedding", "optimizer")  # options of a run that its states are made of
PASSING = ("out", "overwrite", "auto_resume", "dry_run")  # of a start, not of the run


def named(learner):
    """{name: tensor or this process's part of it} of weights and optimizer."""
    tensors = {}
    for name, parameter in learner.model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for slot, value in learner.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{slot}"] = value
    return tensors


@contextlib.contextmanager
def written(folder):
    """Makes one sentence of what PyTorch says if a state cannot be written; nothing of it is left."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = next(iter(error.failures.values()))[0]
        reason = getattr(reason, "strerror", None) or reason
        raise OSError(f"cannot write {folder.with_suffix('')} ({reason}); make room, and go on with --init=resume") from None


def files(tensors):
    """{name: number of its file}, from 1. A file is put together in memory before it is written, so a state is several."""
    numbers, size = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.element_size()
    return numbers


def step_folders(out):
    """Step folders, oldest first. They have their names because they are complete."""
    return sorted((path for path in Path(out).glob("step_*") if path.name[5:].isdigit()), key=lambda path: int(path.name[5:]))


def latest(out):
    """The step folder that `latest` names, or else the newest; None if there is none."""
    folders, file = step_folders(out), Path(out) / "latest"
    name = file.read_text(errors="replace").strip() if file.is_file() else ""
    return next((folder for folder in folders if folder.name == name), folders[-1] if folders else None)


def read(out):
    """state.json of the newest state, with all keys of NOTHING. Raises FileNotFoundError, or ValueError if it is damaged."""
    folder = latest(out)
    if folder is None:
        raise FileNotFoundError(f"nothing to resume in {out}: it has no step_NNNNNN folder; start with --init=twist")
    try:
        found = read_json(folder / "state.json")
        if missing := {"step", "seconds", "row", "options", "model", "vocab"} - {key for key in found if found[key] is not None}:
            raise ValueError(f"state.json has no `{min(missing)}`")
        check_values(found, KINDS, "state.json")
        if found["step"] != int(folder.name[5:]):
            raise ValueError(f"state.json is of step {found['step']}")
        for key, kind in (("model", TransformerConfig), ("vocab", UnitVocab)):
            try:
                kind(**found[key])
            except TypeError:
                raise ValueError(f"state.json: {key} lacks settings, or has unknown ones") from None
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        for name, size in found.get("files", {}).items():  # older states do not list them
            if sizes.get(name) != size:
                raise ValueError(f"{name} has {sizes.get(name, 0)} bytes, {size} were written")
        for path in folder.glob("*.safetensors"):
            open_safetensors(path)
    except (ValueError, OSError) as error:
        before = [other.name for other in step_folders(out) if int(other.name[5:]) < int(folder.name[5:])]
        remedy = (f"delete it and repeat the command: training goes on from the state before it, {before[-1]}" if before else
                  f"there is no state before it: delete {out} and begin again")
        raise ValueError(f"{folder} is damaged ({error}); {remedy}") from None
    return {"units": found["step"] * found["options"].get("tokens_per_step", 0), "process_seconds": found["seconds"]} | found


def claim(options, resuming, stack):
    """On one process, before anything is written: what there is to go on from (read, or NOTHING), in a run folder that is ours.

    stack: ExitStack, which holds the folder's lock from here on. Raises: ValueError if another process trains there, if a run
    would be replaced, or for a package that is not installed.
    """
    logs.services(options.tensorboard, options.wandb)
    if not options.dry_run:
        stack.enter_context(locked(options.out, "run"))
        if (Path(options.out) / "log.csv").exists() and not (resuming or options.overwrite):
            raise ValueError(f"{options.out} already holds a run; go on with --init=resume, give another --out, or --overwrite")
    if resuming and options.overwrite:
        print(f"--overwrite has no effect: {options.out} holds a state, from which this goes on")
    return read(options.out) if resuming else NOTHING


def changes(found, options, recipe):
    """What the options of a start change of the run that a state is of, in words. recipe: of the units to train on.

    Raises: ValueError where they contradict the state.
    """
    before, now = found["options"], json.loads(json.dumps(dataclasses.asdict(options)))
    differ = [name for name in now if name not in PASSING and before.get(name, now[name]) != now[name]]
    for name in differ:
        if name in FIXED and os.path.realpath(before[name]) != os.path.realpath(now[name]):
            raise ValueError(f"{options.out} holds a run of --{name}={before[name]}, which cannot go on with --{name}="
                             f"{now[name]}; leave that option as it was, or give another --out")
    if options.steps < found["step"]:
        raise ValueError(f"--steps={options.steps}: the run in {options.out} has done {found['step']} steps already")
    model = (found["vocab"].get("recipe") or {}).get("model", recipe.get("model"))
    if model != recipe.get("model"):
        raise ValueError(f"--data={','.join(options.data)}: units of another tokenizer (model is {recipe.get('model')}, the "
                         f"run has {model}); go on with units of the same, or begin another run with --init={options.out}/model")
    return ", ".join(f"--{name.replace('_', '-')} {before[name]} -> {now[name]}" for name in differ)


def load(out, learner):
    """Bring the weights and the fresh optimizer of a Learner to the newest state."""
    folder = latest(out)
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    optimizer = learner.optimizer
    for name, parameter in learner.model.named_parameters():
        prefix = f"optimizer.{name}."
        for key in (key for key in stored if key.startswith(prefix)):
            like, dtype = stored[key], stored[key].properties.dtype
            slot = (torch.zeros_like(parameter.detach(), dtype=dtype) if like.size else
                    torch.zeros((), dtype=dtype, device=parameter.device))
            optimizer.state[parameter][key.removeprefix(prefix)] = slot
    tensors = named(learner)
    wrong = [name for name, tensor in tensors.items() if name not in stored or tuple(stored[name].size) != tuple(tensor.shape)]
    slots = [set(optimizer.state.get(parameter, ())) for parameter in learner.model.parameters()]
    if wrong or any(each != slots[0] for each in slots):
        raise ValueError(f"{folder} is of another model, or lacks one of its files{f' (e.g. {wrong[0]})' if wrong else ''}; "
                         "delete it and repeat the command: training goes on from the state before")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=learner.dist.world == 1)


class Writer(HuggingFaceStorageWriter):
    """Its thread works with this process's GPU: that of a new thread is GPU 0, where every process would open a context."""

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs):  # called first, in the thread that writes
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)


class Saver:
    """Writes the states of a run.

    Args: out: the run folder. keep: step folders that stay. asynchronous: write while training goes on, from a copy.
    """

    def __init__(self, out, keep, asynchronous, dist):
        self.out, self.keep, self.asynchronous, self.dist = Path(out), keep, asynchronous, dist
        self.pending = None  # (future, temporary folder, state) of a write that goes on
        if dist.is_main:  # what a kill left
            for path in [*self.out.glob("step_*.tmp"), *self.out.glob("step_*.old")]:
                shutil.rmtree(path)
        dist.barrier()
        # Collectives of the writing thread must not meet those of training: they have a group of their own.
        self.group = torch_distributed.new_group(backend="gloo") if asynchronous and dist.world > 1 else None

    def remove_all(self):
        """All states of a run that is replaced."""
        if self.dist.is_main:
            (self.out / "latest").unlink(missing_ok=True)
            for path in self.out.glob("step_" + "[0-9]" * 6 + "*"):
                shutil.rmtree(path)
        self.dist.barrier()

    def save(self, learner, state):
        """Write step_NNNNNN of state["step"]. state: what json can hold.

        Raises: OSError on every process if it cannot be written, before anything is where the disk has no room for it.
        """
        self.settle()
        tensors = named(learner)
        temporary = self.out / f"step_{state['step']:06d}.tmp"
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        room = math.inf
        if self.dist.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            room = shutil.disk_usage(temporary).free
        if self.dist.any(needed > room):
            raise OSError(f"no room for {temporary}: a state of this model takes {needed / 2**30:.2f} GiB; free some space (or "
                          "lower --keep) and go on with --init=resume")
        writer = Writer(str(temporary), fqn_to_index_mapping=files(tensors), save_distributed=True)
        writer.device = self.dist.device
        options = dict(storage_writer=writer, no_dist=self.dist.world == 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # true of one process, and meant
            if self.asynchronous:
                self.pending = dcp.async_save(tensors, process_group=self.group, **options), temporary, state
            else:
                with written(temporary):
                    dcp.save(tensors, **options)
                self.publish(temporary, state)

    def settle(self, wait=True):
        """Publish what was written in the background; without `wait` only if it is finished."""
        if self.pending and (wait or self.pending[0].done()):
            future, temporary, state = self.pending
            self.pending = None
            with written(temporary):
                future.result()
            self.publish(temporary, state)

    def publish(self, temporary, state):
        """Names for a folder that all processes have written: rank 0's write ends when all others' have."""
        if self.dist.is_main:
            for path in temporary.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
            write_json(temporary / "state.json", state | {"files": sizes})
            final = temporary.with_suffix("")
            replace_folder(temporary, final)
            write_text(self.out / "latest", final.name + "\n")
            past = [folder for folder in step_folders(self.out) if int(folder.name[5:]) <= state["step"]]
            for old in past[:-self.keep]:
                shutil.rmtree(old)


def save(saver, learner, row, facts, options, say, needed):
    """The state after a step, and its row of the log. Without room for it the run goes on, unless it is `needed`."""
    units, process_seconds = logs.spent(facts, options, row["step"], row["seconds"], learner.dist.world)
    settings = {"step": row["step"], "seconds": row["seconds"], "units": units, "process_seconds": process_seconds,
                "row": dict(row), "options": dataclasses.asdict(options), "model": dataclasses.asdict(learner.config),
                "vocab": dataclasses.asdict(facts.vocab)}
    try:
        saver.save(learner, settings)
    except OSError as error:
        if needed:
            raise
        say(f"step {row['step']}: state not saved: {error}")
