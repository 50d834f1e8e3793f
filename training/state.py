"""The state of a run that a later start goes on from: step_NNNNNN/, whole or absent, for any number of processes.

    step_000400/  shard-00001-model-...safetensors ...   files of each process: its parts of weights and optimizer, by name
                  state.json                             step, seconds, options, architecture, unit ids
    latest                                               the name of the newest complete step folder

    model.NAME          a weight             optimizer.NAME.SLOT     AdamW's moments and step count of that weight

What is written is the whole of each tensor in pieces that say where they lie (torch.distributed.checkpoint's safetensors
form), so 8 processes go on where 1, 2 or 64 stopped, under another --parallel. No pickle is written or read. Nothing random is
stored: batches depend on (seed, step) alone, and the network draws nothing.

A folder gets its name when all processes have written their files and these are on the disk; `latest` follows, then old
folders go. A kill at any moment leaves the state before or the state after.
"""
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

from checkpoints.files import replace_folder, write_json, write_text

FILE_BYTES = 2**28  # of the whole tensors that go into one file of each process


def named(learner):
    """{name: tensor or this process's part of it} of weights and optimizer."""
    tensors = {}
    for name, parameter in learner.model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for slot, value in learner.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{slot}"] = value
    return tensors


def files(tensors):
    """{name: number of its file}, from 1. A file is put together in memory before it is written, so a state is several."""
    numbers, size = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.element_size()
    return numbers


def step_folders(out):
    """Complete step folders, oldest first."""
    return [path for path in sorted(Path(out).glob("step_" + "[0-9]" * 6)) if (path / "state.json").is_file()]


def latest(out):
    """The newest complete step folder, None if there is none."""
    out = Path(out)
    if (out / "latest").is_file():
        named_one = out / (out / "latest").read_text().strip()
        if (named_one / "state.json").is_file():
            return named_one
    folders = step_folders(out)
    return folders[-1] if folders else None


def read(out):
    """state.json of the newest state. Raises FileNotFoundError if there is none."""
    folder = latest(out)
    if folder is None:
        raise FileNotFoundError(f"nothing to resume in {out}: it has no step_NNNNNN folder; start with --init=twist")
    return json.loads((folder / "state.json").read_text())


def load(out, learner):
    """Bring the weights and the fresh optimizer of a Learner to the newest state."""
    folder = latest(out)
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    optimizer = learner.optimizer
    for name, parameter in learner.model.named_parameters():
        prefix = f"optimizer.{name}."
        for key in (key for key in stored if key.startswith(prefix)):
            like, dtype = stored[key], stored[key].properties.dtype
            # a fused optimizer keeps its step count beside the weights, others on the CPU
            device = parameter.device if optimizer.defaults.get("fused") else "cpu"
            slot = torch.zeros_like(parameter.detach(), dtype=dtype) if like.size else torch.zeros((), dtype=dtype, device=device)
            optimizer.state[parameter][key.removeprefix(prefix)] = slot
    tensors = named(learner)
    missing = sorted(set(tensors) - set(stored))
    if missing or any(tuple(stored[name].size) != tuple(tensor.shape) for name, tensor in tensors.items()):
        raise ValueError(f"{folder} is of another model (e.g. {(missing or sorted(tensors))[0]}); resume with the --lm it was "
                         "started with")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=learner.dist.world == 1)


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

        Raises: OSError on every process, before anything is written, if the disk has no room for it.
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
        writer = HuggingFaceStorageWriter(str(temporary), fqn_to_index_mapping=files(tensors), save_distributed=True)
        options = dict(storage_writer=writer, no_dist=self.dist.world == 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # true of one process, and meant
            if self.asynchronous:
                self.pending = dcp.async_save(tensors, process_group=self.group, **options), temporary, state
            else:
                dcp.save(tensors, **options)
                self.publish(temporary, state)

    def settle(self, wait=True):
        """Publish what was written in the background; without `wait` only if it is finished."""
        if self.pending and (wait or self.pending[0].done()):
            future, temporary, state = self.pending
            future.result()
            self.pending = None
            self.publish(temporary, state)

    def publish(self, temporary, state):
        """Names for a folder that all processes have written: rank 0's write ends when all others' have."""
        if self.dist.is_main:
            for path in temporary.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            write_json(temporary / "state.json", state)
            final = temporary.with_suffix("")
            replace_folder(temporary, final)
            write_text(self.out / "latest", final.name + "\n")
            for old in step_folders(self.out)[:-self.keep]:
                shutil.rmtree(old)
