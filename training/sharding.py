"""A model whose weights are divided over the processes (FSDP2), and their parts.

    a model on the meta device --deal_out--> its layout, no memory yet --part_of each whole tensor--> this process's part of it

learner.py fills a model one tensor at a time: each process keeps its part and drops the rest, so that a process never holds more
than its share and one tensor.

Apart from distributed.py, which every command imports: PyTorch takes a third of a second to load what stands here.

Sources: ZeRO, Rajbhandari et al. 2020 (stage 3); FSDP, Zhao et al. 2023, sections 3.2 and 3.3 (hybrid sharding).
"""
import torch
import torch.distributed as torch_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training import distributed


def make_mesh(parallel, shard_size, dist):
    """(processes,) for fsdp; (copies, processes that share a copy) for hsdp."""
    kind = dist.device.type
    if not torch_distributed.is_initialized():  # one process that was asked to do as each of many does
        distributed.join(dist, torch_distributed.HashStore())
    if parallel == "fsdp":
        return init_device_mesh(kind, (dist.world,), mesh_dim_names=("shard",))
    shard_size = shard_size or distributed.local_world(dist)
    if dist.world % shard_size:
        raise ValueError(f"--shard-size={shard_size} must divide the {dist.world} processes")
    return init_device_mesh(kind, (dist.world // shard_size, shard_size), mesh_dim_names=("copies", "shard"))


def deal_out(model, parallel, dist, compute_dtype, shard_size=0, reshard=True):
    """A model on the meta device, its weights divided over the processes block by block; model.to_empty() gives each its memory.

    Args:
        parallel: fsdp | hsdp. compute_dtype: of matrix products; weights stay as they are.
        shard_size: hsdp: processes that share one copy; 0: those of a node.
        reshard: free a block's gathered weights after its forward, and gather them again for backward.
    """
    # What enters a block stays as it is: x comes in compute_dtype from the table, and ALiBi's slopes are float32 for the kernels.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layout = dict(mesh=make_mesh(parallel, shard_size, dist), mp_policy=policy, reshard_after_forward=reshard)
    for block in model.h:
        fully_shard(block, **layout)
    return fully_shard(model, **layout)


def shards(tensor):
    """Processes among which a tensor is divided."""
    return tensor.device_mesh.size(-1) if isinstance(tensor, DTensor) else 1


def part(tensor):
    """This process's part of a tensor, as a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor, like):
    """The part of a whole tensor that belongs where `like` lies; nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None).to_local()


def copy_part(parameter, tensor):
    """Copy of a whole tensor what this process keeps of it."""
    part(parameter).copy_(part_of(tensor, parameter))


def gathered(tensors, dist):
    """(name, tensor or parts of it) pairs -> {name: whole tensor on the CPU} on rank 0, {} elsewhere; all processes call it."""
    found = {}
    for name, tensor in tensors:  # one after the other, so that no process holds two whole ones on its device
        tensor = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        if dist.is_main:
            found[name] = tensor.cpu()
    return found
