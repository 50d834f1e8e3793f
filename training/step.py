"""One update of a model, and one validation: the same numbers on any number of processes.

    Batch --split into micro-batches--> forward, backward of each --clip--> AdamW
    validation rows --shared out over the processes--> mean loss
"""
import math

import torch

from training import distributed


def compute_dtype(options, dist):
    """Of matrix products: what --dtype says, bfloat16 on GPUs if it says nothing."""
    on = options.dtype == "bfloat16" or (options.dtype == "auto" and dist.device.type == "cuda")
    return torch.bfloat16 if on else torch.float32


def forward(model, batch, dist):
    """Mean loss over the targets of a batch."""
    ids, targets, document_starts = (part if part is None else part.to(dist.device, non_blocking=True) for part in batch)
    return model(ids, targets, document_starts=document_starts)


def update(model, optimizer, batch, micro, options, dist):
    """One update from this process's rows; returns (mean loss over all processes, gradient norm, was it applied?).

    The loss is the mean over all targets of the step: a piece counts by its share of them, and gradients are averaged over
    the processes, hence the factor of their number.
    """
    total, targets = torch.zeros((), device=dist.device), dist.sum(batch.count)
    pieces = batch.split(micro)
    for i, piece in enumerate(pieces):
        distributed_context = distributed.sync_gradients(model, on=i + 1 == len(pieces))
        with distributed_context, distributed.autocast(model, dist, compute_dtype(options, dist)):
            loss = forward(model, piece, dist) * (piece.count * dist.world / targets)
            loss.backward()
        total += loss.detach()
    norm = distributed.clip_gradients(model, options.clip)
    mean_loss = dist.mean(total)
    finite = math.isfinite(mean_loss) and math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, norm, finite


@torch.no_grad()
def evaluate(model, loader, options, dist):
    """Mean loss over the first rows of the validation stream, in order: the same for every run. All ranks share the work.

    All do the same number of forwards, because under FSDP each gathers weights from all; a row too many counts nothing.
    """
    model.eval()
    rows = min(options.eval_rows or loader.windows, loader.windows)
    total, targets = torch.zeros((), dtype=torch.float64, device=dist.device), 0
    mine = list(range(dist.rank, rows, dist.world))
    for i in range(0, -(-rows // dist.world), 16):
        batch = loader.window(*(mine[i:i + 16] or [0]))
        count = batch.count if mine[i:i + 16] else 0
        with distributed.autocast(model, dist, compute_dtype(options, dist)):
            total += forward(model, batch, dist).double() * count
        targets += count
    model.train()
    total, targets = dist.sum(total, targets)
    return total / targets
