"""What the loop of train.py trains: a model that is spread over the processes, and its optimizer.

    TransformerConfig --twist.empty--> a model without memory --deal_out--> each process's part of it --fill--> weights
    rows of a batch --forward--> mean loss --backward, clip, step--> new weights

Each process has whole copies of the weights (ddp) or a part of each (fsdp, hsdp); the loop need not know. Nothing is held twice:
a tensor is read or drawn when its turn comes, and each process keeps its own part of it.
"""
import torch
from torch.nn.parallel import DistributedDataParallel

import twist
from checkpoints.fill import fill
from kernels.dtypes import DTYPES, hardware_bfloat16, training_dtype
from training import distributed
from training.optimizer import low_bits, make_optimizer, master_weights

EVAL_ROWS = 16  # of one forward of a validation


class Learner:
    """A model and its optimizer on all processes of a run; every process calls every method.

    Args: model_config: TransformerConfig. options: TrainConfig, of which those about precision, layout and optimizer count.
    Attributes: config; parallel (none | ddp | fsdp | hsdp); parameters (of the whole model); dtype (of matrix products), why;
        model (Transformer, whose parameters are whole or this process's parts); optimizer, once it is filled.
    """

    def __init__(self, model_config, options, dist):
        self.config, self.options, self.dist = model_config, options, dist
        on_gpu = dist.device.type == "cuda"
        if options.optimizer == "split" and options.dtype == "float32":
            raise ValueError("--optimizer=split multiplies in bfloat16, as its weights are, not in float32; leave --dtype out")
        asked = "bfloat16" if options.dtype == "auto" and options.optimizer == "split" else options.dtype  # as its weights are
        hardware = hardware_bfloat16(dist.device)
        name, self.why = training_dtype(asked, "" if dist.any(not hardware) else hardware)  # on all, or on none
        self.dtype = DTYPES[name]
        model = twist.empty(model_config).train()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.parallel = distributed.choose_parallel(options.parallel, self.parameters, dist)
        if compiled := options.compile == "blocks" or options.compile == "auto" and on_gpu:
            torch.compiler.reset()  # graphs of another Learner of this process would count towards the limit of ours
        for block in model.h:
            block.recompute = options.recompute
            if compiled:
                block.compile(fullgraph=True, dynamic=False)  # rows never change: one graph for training, one for validation
        self.model = model.bfloat16() if options.optimizer == "split" else model
        if self.parallel in ("fsdp", "hsdp"):
            distributed.deal_out(self.model, self.parallel, dist, self.dtype, options.shard_size, options.reshard)

    def fill(self, tensors):
        """Weights from (name, whole tensor) pairs, and a fresh optimizer; None: a state (state.py) will bring the numbers."""
        self.model.to_empty(device=self.dist.device)
        lows = {}  # of --optimizer=split: this process's part of the bits that bfloat16 loses
        if tensors is not None:
            fill(self.model, self.rounded(tensors, lows) if self.options.optimizer == "split" else tensors, "the start",
                 distributed.copy_part)
        self.replica = self.model  # what forward calls: under ddp its backward averages gradients
        if self.parallel == "ddp":
            self.replica = DistributedDataParallel(
                self.model, device_ids=[self.dist.device.index] if self.dist.device.type == "cuda" else None,
                gradient_as_bucket_view=True)  # not a second copy of the gradients
        self.optimizer = make_optimizer(self.model, self.options, lows)
        return self

    def rounded(self, tensors, lows):
        for name, tensor in tensors:
            high, low = low_bits(tensor.float())
            lows[name] = distributed.part_of(low, self.model.get_parameter(name))
            yield name, high

    def autocast(self):
        """Matrix products in self.dtype; under FSDP the gathered weights already are."""
        on = self.dtype != torch.float32 and self.parallel not in ("fsdp", "hsdp")
        return torch.autocast(self.dist.device.type, self.dtype, enabled=on)

    def forward(self, batch, last=True):
        """Mean loss over the targets of this process's rows, () float32.

        last: whether this is the last forward of an update. Under ddp the gradients of the others wait for it; fsdp averages
        those of each, since gradients that wait would wait whole, 4 bytes for every parameter of the model.
        """
        device, on_gpu = self.dist.device, self.dist.device.type == "cuda"
        ids, targets, starts = (part if part is None else part.to(device, non_blocking=on_gpu) for part in batch)
        if self.parallel == "ddp":
            self.replica.require_backward_grad_sync = last
        with self.autocast():
            return self.replica(ids, targets, document_starts=starts)

    def clip(self, largest):
        """Scale all gradients down to a norm of at most `largest`; returns the norm before, the same on all processes.

        Gradients that are small enough are not even read again, where clip_grad_norm_ would multiply them by 1.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(  # for those in bfloat16 stand their norms, in float32
            g if g.dtype == torch.float32 else torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients)
        value = distributed.whole(norm).item()
        if not value <= largest:  # NaN too
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), largest, norm)
        return value

    def step(self, lr):
        """AdamW on all weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, loader, rows):
        """Mean loss over the first rows of a loader (0: all), in order: the same for every run. The processes share the work.

        All do the same number of forwards (under FSDP each gathers weights from all) of the same number of rows (for which blocks
        are compiled); a row too many counts nothing.
        """
        self.model.eval()
        dist, rows = self.dist, min(rows or loader.windows, loader.windows)
        total, targets = 0.0, 0
        mine, each = list(range(dist.rank, rows, dist.world)), -(-rows // dist.world)
        for i in range(0, each, size := min(EVAL_ROWS, each)):
            some = mine[i:i + size]
            batch = loader.window(*some, *[0] * (size - len(some)))
            batch.targets[len(some):] = -100
            loss, targets = self.forward(batch), targets + batch.count
            total += loss.item() * batch.count if batch.count else 0.0  # a mean of nothing is NaN
        self.model.train()
        total, targets = dist.sum(total, targets)
        return total / targets

    def weights(self):
        """{name: whole float32 tensor on the CPU} on rank 0, {} elsewhere."""
        return distributed.gathered(master_weights(self.model, self.optimizer), self.dist)
