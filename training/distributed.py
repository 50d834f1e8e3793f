"""The processes of a run: their group, sums over them, signals that stop them.

    python train.py                                             one process
    torchrun --nproc-per-node=8 train.py --parallel=ddp         a whole copy each, gradients averaged
    torchrun --nproc-per-node=8 train.py --parallel=fsdp        weights, gradients and optimizer in eighths (FSDP2)
    torchrun --nnodes=4 --nproc-per-node=8 ... --parallel=hsdp  in eighths within a node, copies between nodes

    process   ddp                 fsdp, 2 processes             hsdp, 2 nodes of 2
    0         [all weights]       [half 0] gathers a block      node 0: [half 0] [half 1]
    1         [all weights]       [half 1] when it is needed    node 1: [half 0] [half 1]   gradients are averaged down

How weights are divided stands in sharding.py. Gloo on CPUs, NCCL on GPUs.
"""
import ctypes
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as torch_distributed
from torch.distributed.rendezvous import rendezvous

import config

PARALLEL = ("auto", "ddp", "fsdp", "hsdp")
DDP_LARGEST = 2e9  # parameters: up to here all states of a copy (16 bytes each) fit a 40 GB GPU
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


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

    def sum(self, *values):
        """Sums over the processes of numbers or scalar tensors, as floats; one number for one value."""
        total = [float(value) for value in values]
        if self.world > 1:
            summed = torch.tensor(total, dtype=torch.float64, device=self.device)
            torch_distributed.all_reduce(summed)
            total = summed.tolist()
        return total[0] if len(values) == 1 else total

    def totals(self, *values):
        """Sums over the processes of scalar tensors, which stay on the device: nobody waits. Of several processes in float64."""
        if self.world == 1:
            return values
        torch_distributed.all_reduce(summed := torch.stack([value.double() for value in values]))
        return summed.unbind()

    def each(self, value):
        """The values of all processes, as a list of floats."""
        return self.sum(*(value if rank == self.rank else 0 for rank in range(self.world))) if self.world > 1 else [float(value)]

    def sum_array(self, array):
        """Sum over the processes of a float64 NumPy array, on every process."""
        if self.world == 1:
            return array
        total = torch.from_numpy(array).to(self.device)
        torch_distributed.all_reduce(total)
        return total.cpu().numpy()

    def any(self, flag):
        """True if the flag is set on any process: a signal reaches all, but not at the same moment."""
        return self.sum(float(bool(flag))) > 0

    def from_main(self, function, *arguments):
        """What function(*arguments) returns on rank 0, on every process. Its ValueError or OSError ends all of them."""
        box, error = [None, False], None
        if self.is_main:
            try:
                box[0] = function(*arguments)
            except (ValueError, OSError) as raised:
                box[1], error = True, raised
        if self.world > 1:
            torch_distributed.broadcast_object_list(box, 0, device=self.device)
        if box[1]:
            raise error or SystemExit(2)
        return box[0]


def setup(device="auto", timeout=None):
    """Join the process group that torchrun describes in the environment, or be a single process.

    timeout: timedelta that processes wait for each other before they give up; None: PyTorch's choice, minutes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise ValueError(f"RANK={rank} of WORLD_SIZE={world}, as the environment says: start with torchrun, or unset RANK")
    device = config.choose_device(device)
    if world > 1 and device not in ("cpu", "cuda"):
        raise ValueError(f"--device={device} is one device for {world} processes; with --device=cuda each has its own GPU")
    if device == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local} of this machine has no GPU, there are {gpus}: start fewer, or give --device=cpu")
        device = f"cuda:{local}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":  # a torchrun that is killed must not leave us behind
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)
    dist = Dist(rank, world, torch.device(device))
    if world > 1 and not torch_distributed.is_initialized():
        store, _, _ = next(rendezvous("env://", **({} if timeout is None else {"timeout": timeout})))
        # torchrun keeps its store over restarts: without a name for each attempt the new processes would read the old ones' keys
        join(dist, torch_distributed.PrefixStore(f"attempt_{attempt()}", store), timeout)
    return dist


def join(dist, store, timeout=None):
    """The process group, on gloo and for GPUs on NCCL; gloo there too, for what is saved from CPU memory."""
    backend = "cpu:gloo,cuda:nccl" if dist.device.type == "cuda" else "gloo"
    torch_distributed.init_process_group(backend, store=store, rank=dist.rank, world_size=dist.world, timeout=timeout)


def attempt():
    """How often torchrun --max-restarts or Slurm's requeue has started this job again; 0 the first time."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) + int(os.environ.get("SLURM_RESTART_COUNT", 0))


def leave():
    """The last call of a command: leave the process group, if there is one, and then the process, with exit code 0.

    Threads of gloo drop the tensors of the last collective some time after it, and need Python for that. One that asks while
    Python is being taken down would abort a run that has succeeded, so it is not taken down: the children of multiprocessing
    end in the same way.
    """
    if torch_distributed.is_initialized():
        alone = torch_distributed.get_world_size() == 1
        torch_distributed.destroy_process_group()
        if not alone:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


@contextmanager
def stop_signals():
    """Yields a list that is filled when SIGTERM (a cluster's warning) or Ctrl-C arrives; the loop looks at it between steps."""
    stop = []
    handlers = {number: signal.signal(number, lambda *_: stop.append(1)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ how a model is spread

def choose_parallel(parallel, parameters, dist):
    """What --parallel=auto means: none for one process, whole copies while they fit, else parts (within nodes, if several)."""
    if dist.world == 1 and parallel in ("auto", "ddp"):
        return "none"
    if parallel != "auto":
        return parallel
    if parameters <= DDP_LARGEST:
        return "ddp"
    return "hsdp" if dist.world > local_world(dist) else "fsdp"


def local_world(dist):
    """Processes of a node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.world))
