"""What the loop of train.py trains: a model that is spread over the processes, and its optimizer.

    TransformerConfig --twist.empty--> a model without memory --deal_out--> each process's part of it --fill--> weights
    rows of a batch --forward--> mean loss --backward, clip, step--> new weights, numbers that are read late

Each process has whole copies of the weights (ddp) or a part of each (fsdp, hsdp); the loop need not know. Nothing is held twice:
a tensor is read or drawn when its turn comes, and each process keeps its own part of it.
"""
import torch
from torch.nn.parallel import DistributedDataParallel

import twist
from checkpoints.fill import fill
from kernels.dtypes import DTYPES, hardware_bfloat16, training_dtype
from training import distributed, sharding
from training.optimizer import low_bits, make_optimizer, master_weights
from training.pipeline import Late

EVAL_ROWS = 16  # of one forward of a validation


class Learner:
    """A model and its optimizer on all processes of a run; every process calls every method.

    Args: model_config: TransformerConfig. options: TrainConfig, of which those about precision, layout and optimizer count.
    Attributes: config; parallel (none | ddp | fsdp | hsdp); parameters (of the whole model); dtype (of matrix products), why;
        model (Transformer, whose parameters are whole or this process's parts); optimizer, once it is filled.
    """

    def __init__(self, model_config, options, dist):
        self.config, self.options, self.dist, self.on_gpu = model_config, options, dist, dist.device.type == "cuda"
        if options.optimizer == "split" and options.dtype == "float32":
            raise ValueError("--optimizer=split multiplies in bfloat16, as its weights are, not in float32; leave --dtype out")
        asked = "bfloat16" if options.dtype == "auto" and options.optimizer == "split" else options.dtype  # as its weights are
        hardware = hardware_bfloat16(dist.device)
        name, self.why = training_dtype(asked, "" if dist.any(not hardware) else hardware)  # on all, or on none
        self.dtype = DTYPES[name]
        model = twist.empty(model_config).train()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.parallel = distributed.choose_parallel(options.parallel, self.parameters, dist)
        if compiled := options.compile == "blocks" or options.compile == "auto" and self.on_gpu:
            torch.compiler.reset()  # graphs of another Learner of this process would count towards the limit of ours
        for block in model.h:
            block.recompute = options.recompute
            if compiled:
                block.compile(fullgraph=True, dynamic=False)  # rows never change: one graph for training, one for validation
        self.model = model.bfloat16() if options.optimizer == "split" else model
        if self.parallel in ("fsdp", "hsdp"):
            sharding.deal_out(self.model, self.parallel, dist, self.dtype, options.shard_size, options.reshard)
        self.parts = sharding.shards(next(self.model.parameters()))

    def fill(self, tensors):
        """Weights from (name, whole tensor) pairs, and a fresh optimizer; None: a state (state.py) will bring the numbers."""
        self.model.to_empty(device=self.dist.device)
        lows = {}  # of --optimizer=split: this process's part of the bits that bfloat16 loses
        if tensors is not None:
            fill(self.model, self.rounded(tensors, lows) if self.options.optimizer == "split" else tensors, "the start",
                 sharding.copy_part)
        self.replica = self.model  # what forward calls: under ddp its backward averages gradients
        if self.parallel == "ddp":
            self.replica = DistributedDataParallel(
                self.model, device_ids=[self.dist.device.index] if self.on_gpu else None,
                gradient_as_bucket_view=True)  # not a second copy of the gradients
        self.optimizer = make_optimizer(self.model, self.options, lows)
        return self

    def rounded(self, tensors, lows):
        for name, tensor in tensors:
            high, low = low_bits(tensor.float())
            lows[name] = sharding.part_of(low, self.model.get_parameter(name))
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
        ids, targets, starts = batch.to(self.dist.device)
        if self.parallel == "ddp":
            self.replica.require_backward_grad_sync = last
        with self.autocast():
            return self.replica(ids, targets, document_starts=starts)

    def update(self, batch, micro, targets, lr, stopping=False):
        """One update, in which nobody waits for a GPU. If loss or norm is not finite, it changes neither weights nor optimizer.

        Args: batch: this process's rows, on the CPU. micro: rows of a forward. targets: that count in the rows of all processes;
            None: not known here. stopping: whether this process was told to stop.
        Returns: Late numbers, the same on all processes: mean loss over all targets, norm of the gradients before they are
            clipped, how many processes were told to stop.
        """
        dist, loss = self.dist, 0.0
        counts = [piece.count for piece in batch.split(micro)]  # while the rows are on the host
        if targets is None:
            targets = float(sum(counts))
            if dist.world > 1:
                targets = dist.totals(torch.full((), targets, device=dist.device))[0].float()
        pieces = batch.to(dist.device).split(micro)
        for piece, count in zip(pieces, counts):
            # a piece counts by its share of the targets of all processes, over which backward averages
            share = self.forward(piece, last=piece is pieces[-1]) * (count * dist.world / targets)
            share.backward()
            loss = loss + share.detach()
        norm, stopping = self.norm(), torch.full_like(loss, float(stopping))
        if dist.world > 1:
            loss, square, stopping = dist.totals(loss, norm.double().square(), stopping)
            loss, norm = loss / dist.world, (square * self.parts / dist.world).sqrt().float()
        self.step(lr, norm, (~(loss.isfinite() & norm.isfinite())).float())
        return Late(torch.stack([loss, norm.to(loss.dtype), stopping]))

    def norm(self):
        """Norm of this process's part of the gradients, () float32."""
        gradients = [sharding.part(p.grad) for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(  # for those in bfloat16 stand their norms, in float32
            g if g.dtype == torch.float32 else torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients if g.numel())

    def step(self, lr, norm, skip):
        """AdamW on all weights, with gradients scaled down to --clip. skip: () float32, 1: nothing changes.

        A CPU looks, and leaves gradients that are small; on a GPU the optimizer's kernel divides them. Apple's cannot skip.
        """
        if self.on_gpu:
            self.optimizer.grad_scale = ((norm + 1e-6) / self.options.clip).clamp(min=1)
        elif not norm <= self.options.clip:  # NaN too
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.options.clip, norm)
        self.optimizer.found_inf = skip
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.dist.device.type != "mps" or not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, loader, rows):
        """Mean loss over the first rows of a loader (0: all), in order: the same for every run. The processes share the work.

        All do the same number of forwards (under FSDP each gathers weights from all) of the same number of rows (for which blocks
        are compiled); a row too many counts nothing.
        """
        self.model.eval()
        dist, rows = self.dist, min(rows or loader.windows, loader.windows)
        losses, counts = [], []
        mine, each = list(range(dist.rank, rows, dist.world)), -(-rows // dist.world)
        for i in range(0, each, size := min(EVAL_ROWS, each)):
            some = mine[i:i + size]
            batch = loader.window(*some, *[0] * (size - len(some)))
            batch.targets[len(some):] = -100
            losses.append(self.forward(batch))
            counts.append(batch.count)
        self.model.train()
        losses = torch.stack(losses).tolist()
        total = sum(loss * count for loss, count in zip(losses, counts) if count)  # a mean of nothing is NaN
        total, targets = dist.sum(total, sum(counts))
        return total / targets

    def weights(self):
        """{name: whole float32 tensor on the CPU} on rank 0, {} elsewhere."""
        return sharding.gathered(master_weights(self.model, self.optimizer), self.dist)
