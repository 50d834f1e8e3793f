"""Everything that knows a rank: process group, DDP, reductions, and the step folders that a run resumes from.

    python train.py                             one process
    torchrun --nproc-per-node=2 train.py        data parallel; gloo on CPU, NCCL on GPUs

A resumable state is a folder step_NNNNNN/ of plain tensors and JSON, whole or absent:

    model.safetensors  optimizer.safetensors  state.json (step, losses, options)
"""
import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as torch_distributed
from torch.nn.parallel import DistributedDataParallel

import checkpoint


@dataclass(frozen=True)
class Dist:
    rank: int  # this process, 0 is the one that prints and writes
    world: int  # number of processes
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def barrier(self):
        if self.world > 1:
            torch_distributed.barrier()

    def mean(self, value):
        """Mean over the processes of a number or scalar tensor, as float."""
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device).clone()
        if self.world > 1:
            torch_distributed.all_reduce(total)
        return total.item() / self.world

    def sum(self, array):
        """Sum over the processes of a float64 NumPy array, on every process."""
        if self.world == 1:
            return array
        total = torch.from_numpy(array).to(self.device)
        torch_distributed.all_reduce(total)
        return total.cpu().numpy()

    def any(self, flag):
        """True if the flag is set on any process: a signal reaches all, but not at the same moment."""
        return self.mean(float(bool(flag))) > 0


def setup(device="auto", timeout=None):
    """Join the process group that torchrun describes in the environment, or be a single process.

    timeout: timedelta that processes wait for each other before they give up; None: PyTorch's choice, minutes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device={device}: expected auto, cpu or cuda")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device=cuda, but PyTorch sees no GPU; use --device=cpu")
        local = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if world > 1 and not torch_distributed.is_initialized():
        torch_distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timeout)
    return Dist(rank, world, torch.device(device))


def cleanup():
    if torch_distributed.is_initialized():
        torch_distributed.destroy_process_group()


def wrap(model, dist):
    """The model whose backward averages gradients over the processes."""
    if dist.world == 1:
        return model
    return DistributedDataParallel(model, device_ids=[dist.device.index] if dist.device.type == "cuda" else None)


def unwrap(model):
    return model.module if isinstance(model, DistributedDataParallel) else model


def sync_gradients(model, on):
    """Context of one micro-batch; only the last of a step needs its gradients averaged over the processes."""
    return nullcontext() if on or not isinstance(model, DistributedDataParallel) else model.no_sync()


def save_state(folder, model, optimizer, state, dist, keep=2):
    """Write step_NNNNNN under `folder` (rank 0; all ranks wait) and drop all but the newest `keep`.

    Args: state: JSON-able dictionary with the key `step`.
    """
    if dist.is_main:
        final = Path(folder) / f"step_{state['step']:06d}"
        temporary = final.with_name(final.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model, tensors = unwrap(model), {}
        checkpoint.write_tensors(temporary / "model.safetensors", model.state_dict())
        names = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                tensors[f"{names[parameter]}.{slot}"] = torch.as_tensor(value)
        checkpoint.write_tensors(temporary / "optimizer.safetensors", tensors)
        checkpoint.write_json(temporary / "state.json", state)
        checkpoint.replace_folder(temporary, final)
        for old in step_folders(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def remove_steps(folder):
    for path in step_folders(folder):
        shutil.rmtree(path)


def step_folders(folder):
    """Complete step folders, oldest first."""
    return [path for path in sorted(Path(folder).glob("step_" + "[0-9]" * 6)) if (path / "state.json").is_file()]


def load_state(folder, model, optimizer, dist):
    """Restore the newest step folder into model and optimizer; returns its state dictionary."""
    found = step_folders(folder)
    if not found:
        raise FileNotFoundError(f"nothing to resume in {folder}: it has no step_NNNNNN folder; start with --init=twist")
    model = unwrap(model)
    model.load_state_dict(checkpoint.read_file(found[-1] / "model.safetensors"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    numbered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    slots = {}
    for name, value in checkpoint.read_file(found[-1] / "optimizer.safetensors").items():
        name, _, slot = name.rpartition(".")
        slots.setdefault(numbered.index(name), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((found[-1] / "state.json").read_text())
