"""What training takes: a plan of every process's memory before anything is allocated.

    weights      4 bytes a parameter (adamw), 2 (split); under fsdp and hsdp a process's share of each tensor's rows
    gradients    as the weights; ddp's buckets are the gradients themselves
    optimizer    8 bytes a parameter (adamw), 10 (split); shared as the weights are
    copies       fsdp, hsdp: gathered blocks, and gradients on their way to the processes that own them
                 otherwise in bfloat16 from float32 weights: autocast's bfloat16 copy of every matrix
    activations  what backward needs of all blocks
    working      what comes and goes: logits, loss, backward through one block

Activations and working memory come from no formula that could fall behind the code: model.py itself runs forward and backward on
fake tensors, which have shapes and lifetimes and no numbers, with two blocks and with three. The difference of the two peaks is
what a block keeps, whatever --recompute says, and the rest is the working memory; L blocks are a straight line through both.

The peak of an update is the start of the last backward (all activations, and gradients of the forwards before it) or, when one
forward is the whole update, its end (all gradients) if that is more. Not counted: the libraries themselves (CUDA, NCCL), what the
allocator loses in gaps, buffers inside operators, and masks that PyTorch's attention makes of ALiBi and documents where our
kernels do not run. On the other side a compiled block keeps less than an eager one, and our fused loss on GPUs never holds all
logits, which matters for vocabularies of text alone.

Source: ZeRO, Rajbhandari et al. 2020 (arXiv 1910.02054), section 3: where the memory goes.
"""
import dataclasses
import functools
import weakref
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import twist
from model import Transformer
from training import sharding

RECOMPUTE = ("none", "selective", "full")
UNITS = 500  # of the paper's tokenizer
NO_DATA = f": none of it is here, so this plans for {UNITS} units"
STATES = {"adamw": (4, 4, 8), "split": (2, 2, 10)}  # bytes a parameter: weight, gradient, optimizer; see optimizer.py


@dataclass(frozen=True)
class Plan:
    """Bytes of one process."""

    parameters: int  # of the whole model, not bytes
    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    working: int
    pieces: int  # forwards an update

    @property
    def total(self):
        """At the peak of an update."""
        growing = self.activations + self.gradients if self.pieces > 1 else max(self.activations, self.gradients)
        return self.weights + self.optimizer + self.copies + self.working + growing


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make while it is on, as long as each lives: `most` is the peak."""

    def __init__(self, *before):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in before}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()  # lives as long as the memory does, however many tensors look at it
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        return result

    def release(self, key, size):
        self.known.discard(key)
        self.now -= size


def simulate(config, rows, T, weights, compute, recompute):
    """Peak bytes of forward and backward beside weights and gradients, of a model of that many blocks on fake tensors.

    Args: rows: B. weights: dtype of the weights; compute: of matrix products, by autocast where it is another.
    """
    with FakeTensorMode():
        model = Transformer(config).train()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(weights)
            parameter.grad = torch.zeros_like(parameter)
        for block in model.h:
            block.recompute = recompute
        ids = torch.zeros(rows, T, dtype=torch.int64)
        held = Held(ids, *model.parameters(), *(parameter.grad for parameter in model.parameters()))
        with held, torch.autocast("cpu", compute, enabled=compute != weights):
            logits = model(ids)
            # kernels.linear_cross_entropy looks at the targets' values, which fake ones do not have
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
            del logits
            loss.backward()
        return held.most


@functools.lru_cache(maxsize=256)
def activations(config, rows, T, weights, compute, recompute):
    """(bytes that a block keeps, bytes of working memory) for rows of T ids; dtypes as in simulate()."""
    position = "learned" if config.position == "alibi" else config.position  # ALiBi keeps no more, with our kernels
    config = dataclasses.replace(config, block_size=T, position=position)
    two, three = (simulate(dataclasses.replace(config, n_layer=blocks), rows, T, weights, compute, recompute)
                  for blocks in (2, 3))
    return three - two, two - 2 * (three - two)


def count(modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def plan(config, *, parallel, shard, micro_rows, block_size, dtype, optimizer, recompute, reshard=True, pieces=1):
    """The Plan of a run.

    Args:
        config: TransformerConfig.
        parallel: none | ddp | fsdp | hsdp. shard: processes that share one copy of the model; 1 unless fsdp or hsdp.
        micro_rows: rows of block_size ids in one forward of one process; pieces: such forwards in an update.
        dtype: torch.float32 or torch.bfloat16, of matrix products. optimizer: adamw | split. recompute: none | selective | full.
        reshard: fsdp, hsdp: a block's gathered weights are freed after its forward.
    """
    model = twist.empty(config)
    parameters, block = count([model]), count([model.h[0]])
    # FSDP deals out rows of each tensor, so the first process has a rounded-up part
    mine = sum(-(-len(parameter) // shard) * parameter[0].numel() for parameter in model.parameters())
    weight, gradient, state = STATES[optimizer]
    shared = parallel in ("fsdp", "hsdp")
    weights = dtype if shared else {4: torch.float32, 2: torch.bfloat16}[weight]
    compute = dtype if weights == torch.float32 else weights
    kept, working = activations(config, micro_rows, block_size, weights, compute, recompute)
    copies = 0
    if shared:
        copies = gathered(parameters, block, config.n_layer, dtype.itemsize, reshard)
    elif weights != compute:  # autocast's copies live as long as a forward and its backward
        cast = [2 * count(m for m in module.modules() if isinstance(m, nn.Linear)) for module in (model.h[0], model)]
        head = 2 * model.wte.weight.numel() if model.lm_head is None else 0
        kept, working = kept - cast[0], working - (cast[1] - config.n_layer * cast[0]) - head
        copies += cast[1] + head
    return Plan(parameters, weight * mine, gradient * mine, state * mine, copies, config.n_layer * kept, working, pieces)


def gathered(parameters, block, blocks, size, reshard):
    """Bytes that FSDP2 holds of other processes' shares; size: bytes a number of the gathered weights."""
    outside = parameters - blocks * block  # tables, last norm, head: gathered from the first forward to the last backward
    together = 2 if reshard else blocks  # the block at work and the next, which is already on its way
    weights = size * (outside + (together + 1) * block)  # + 1: it travels in one piece and is copied out of that
    return weights + (size + 4) * block  # the whole gradient of a block, and the float32 copy that is summed over the processes


def table(config, options, parallel, world, micro_rows, dtype):
    """The plan as text, for each way of recomputing; options: those of train.py; dtype: of matrix products."""
    shard = {"fsdp": world, "hsdp": options.shard_size or min(8, world)}.get(parallel, 1)
    pieces = options.tokens_per_step // (world * micro_rows * options.block_size)
    lines = [f"memory of a process in GB (10^9 bytes): {options.optimizer}, {str(dtype).removeprefix('torch.')}, {micro_rows} x "
             f"{options.block_size} ids a forward, {pieces} an update, a copy of the model on {shard}"]
    names = ("weights", "gradients", "optimizer", "copies", "activations", "working", "total")
    lines.append("  ".join(["recompute ", *names]))
    for recompute in RECOMPUTE:
        made = plan(config, parallel=parallel, shard=shard, micro_rows=micro_rows, block_size=options.block_size, dtype=dtype,
                    optimizer=options.optimizer, recompute=recompute, reshard=options.reshard, pieces=pieces)
        row = "  ".join(f"{getattr(made, name) / 1e9:>{len(name)}.2f}" for name in names)
        lines.append(f"{recompute:<10}  {row}{'  <- --recompute' if recompute == options.recompute else ''}")
    return "\n".join(lines)


def plan_of(learner, options, micro_rows):
    """How many of a Learner's parameters each process holds, and its plan, as text; all call it. options: those of train.py."""
    mine = learner.dist.each(sum(sharding.part(parameter).numel() for parameter in learner.model.parameters()))
    return (f"parameters in each process: {', '.join(f'{count:,.0f}' for count in mine)}\n"
            + table(learner.config, options, learner.parallel, learner.dist.world, micro_rows, learner.dtype))
