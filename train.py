"""Train a speech LM: warm-started from a text LM (TWIST), cold, or resumed.

    shards --loader--> ids, targets (B, T) --Transformer.forward--> loss --backward, clip, AdamW--> --out/

    torchrun train.py --init=twist                                  # the pocket world: a few minutes on two CPU cores
    torchrun --nproc-per-node=8 train.py --init=twist --lm=FOLDER --data=units/train --val-data=units/val --out=runs/mine
    python train.py --init=resume --out=runs/pocket                 # go on after an interruption, to the same bits

Under --out: config.toml (resolved options), log.csv (a row a step), step_NNNNNN/ (resumable state), model/ (what
sample.py and transformers open). The batch of step s depends on (seed, s) alone, not on the number of processes.
A text LM is trained by the same loop: its shards hold bytes in place of units (see pocket/build.py).

Source: TWIST (arXiv 2305.13009) section 3.
"""
import csv
import dataclasses
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import config
import data
import distributed
import kernels
import twist
from loader import PACKINGS, UnitLoader

COLUMNS = ("step", "loss", "val_loss", "lr", "grad_norm", "units_per_second", "seconds")
MAX_BAD_STEPS = 5  # non-finite steps in a row before giving up
CHOICES = {"schedule": ("cosine", "linear", "inverse_sqrt", "constant"), "dtype": ("auto", "float32", "bfloat16"),
           "embedding": ("fresh", "matched", "truncate"), "packing": PACKINGS}


@dataclass(frozen=True)
class TrainConfig:
    init: str = "twist"  # twist | cold | shuffled | resume | a speech LM's folder to fine-tune
    lm: str = "pocket"  # text LM to start from (cold: its config.json alone): folder, `pocket`, or a hub name (facebook/opt-125m)
    embedding: str = "fresh"  # new unit table of a warm start: fresh | matched | truncate (twist.py)
    data: str = "pocket"  # folder of training shards
    val_data: str = "pocket"  # folder of validation shards
    packing: str = "stream"  # stream: a row sees all of its ids | documents: only those of the same recording
    out: str = "runs/pocket"  # run folder
    overwrite: bool = False  # replace a run that is already in --out
    steps: int = 400  # updates
    units_per_step: int = 2048  # ids per update over all processes and micro-batches
    block_size: int = 256  # T, ids per row
    micro_batch: int = 0  # rows per forward on one process; 0: all of them
    peak_lr: float = 2e-3  # AdamW's learning rate after warm-up
    min_lr: float = 0.1  # final learning rate as a share of the peak (cosine and linear)
    warmup: int = 20  # updates of linear warm-up
    schedule: str = "cosine"  # cosine | linear | inverse_sqrt | constant
    weight_decay: float = 0.1  # on matrices and tables; none on norms and biases
    beta_2: float = 0.95  # AdamW's second-moment decay (the first is 0.9)
    clip: float = 1.0  # largest gradient norm
    seed: int = 0  # of the new table or the cold weights, and of the order of the data
    eval_interval: int = 100  # updates between validations; the last update always validates
    eval_rows: int = 64  # validation rows of block_size ids, the same ones in every run; 0: all
    save_interval: int = 100  # updates between resumable states
    keep: int = 2  # resumable states kept
    log_interval: int = 1  # updates between rows of log.csv
    dtype: str = "auto"  # auto | float32 | bfloat16: of matrix products (master weights stay float32); auto: bfloat16 on GPUs
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # CPU threads a process; 0: PyTorch's choice (torchrun sets 1 when there are several processes)

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name}={getattr(self, name)}: expected one of {', '.join(known)}")
        for name in ("steps", "units_per_step", "block_size", "eval_interval", "save_interval", "log_interval", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}={getattr(self, name)}: expected at least 1")


def lr_at(step, options):
    """Learning rate of update `step` (0-based): linear warm-up, then the schedule."""
    if step < options.warmup:
        return options.peak_lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, options.steps - 1 - options.warmup)  # 0 .. 1
    low = options.min_lr
    factor = {"cosine": low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)),
              "linear": low + (1 - low) * (1 - progress),
              "inverse_sqrt": math.sqrt(max(options.warmup, 1) / (step + 1)),
              "constant": 1.0}
    return options.peak_lr * factor[options.schedule]


def build_optimizer(model, options):
    """AdamW, decaying matrices and tables only."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.peak_lr, betas=(0.9, options.beta_2), eps=1e-8, fused=True)


def build_model(options, recipe):
    """The start that --init names: (Transformer, UnitVocab)."""
    vocab = twist.UnitVocab(recipe["num_units"], recipe=recipe)
    if options.init == "cold":
        return twist.cold_start(twist.load_lm_config(options.lm), vocab, options.seed), vocab
    if options.init in ("twist", "shuffled"):
        start = twist.warm_start if options.init == "twist" else twist.shuffled_start
        return start(twist.load_text_lm(options.lm), vocab, options.seed, options.embedding), vocab
    model, vocab = twist.load_speech_lm(options.init)
    if vocab.recipe is not None:
        data.check_recipe(recipe, vocab.recipe, f"--data={options.data}")
    return model, vocab


def load_options(argv):
    """The command line; with --init=resume, on top of the options that the interrupted run was started with."""
    options = config.load(TrainConfig, argv)
    if options.init != "resume":
        return options, False
    saved = Path(options.out) / "config.toml"
    if not saved.is_file():
        raise FileNotFoundError(f"nothing to resume in {options.out}: it has no config.toml; start with --init=twist")
    argv = [a for a in (sys.argv[1:] if argv is None else argv) if a.startswith("--") and not a.startswith("--init=")]
    return config.load(TrainConfig, [str(saved), *argv]), True


def shards_of(name, split):
    folder = checkpoint.find(name, "units")
    return data.UnitShards(folder / split if name == "pocket" else folder)


def forward(model, batch, dist):
    """Mean loss over the targets of a batch."""
    ids, targets, document_starts = (part if part is None else part.to(dist.device) for part in batch)
    return model(ids, targets, document_starts=document_starts)


@torch.no_grad()
def evaluate(model, loader, options, dist):
    """Mean loss over the first rows of the validation stream, in order: the same for every run. All ranks share the work."""
    model.eval()
    rows = min(options.eval_rows or loader.windows, loader.windows)
    total, targets = torch.zeros((), dtype=torch.float64, device=dist.device), 0
    mine = list(range(dist.rank, rows, dist.world))
    for i in range(0, len(mine), 16):
        batch = loader.window(*mine[i:i + 16])
        with autocast(options, dist):
            total += forward(model, batch, dist).double() * batch.count
        targets += batch.count
    model.train()
    return dist.sum(total) / dist.sum(targets)


def compute_dtype(options, dist):
    """Of matrix products."""
    on = options.dtype == "bfloat16" or (options.dtype == "auto" and dist.device.type == "cuda")
    return torch.bfloat16 if on else torch.float32


def autocast(options, dist):
    return torch.autocast(dist.device.type, torch.bfloat16, enabled=compute_dtype(options, dist) == torch.bfloat16)


class Log:
    """log.csv: one flushed row a step. On resume, rows past the restored step are dropped."""

    def __init__(self, path, first, on):
        self.file = None
        if on:
            rows = list(csv.reader(open(path)))[1:] if path.exists() and first else []
            with open(f"{path}.tmp", "w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *(row for row in rows if int(row[0]) <= first)])
            os.replace(f"{path}.tmp", path)
            self.file = open(path, "a", newline="")

    def write(self, **row):
        if self.file:
            csv.writer(self.file).writerow([row.get(column, "") for column in COLUMNS])
            self.file.flush()


def split_batch(options, dist):
    """Rows of one update on each process, and rows of one forward: the user states ids per update, the rest follows."""
    rows, remainder = divmod(options.units_per_step, options.block_size * dist.world)
    if remainder or not rows:
        raise ValueError(f"--units-per-step={options.units_per_step} must be a multiple of block size x processes "
                         f"= {options.block_size} x {dist.world}")
    micro = options.micro_batch or rows
    if rows % micro:
        raise ValueError(f"--micro-batch={micro} must divide the {rows} rows that each process takes per update")
    return rows, micro


def update(model, optimizer, batch, micro, options, dist):
    """One update from this process's rows; returns (mean loss over all processes, gradient norm, was it applied?).

    The loss is the mean over all targets of the step: a piece counts by its share of them, and gradients are averaged over
    the processes, hence the factor of their number.
    """
    total, targets = torch.zeros((), device=dist.device), dist.sum(batch.count)
    pieces = batch.split(micro)
    for i, piece in enumerate(pieces):
        with distributed.sync_gradients(model, on=i + 1 == len(pieces)), autocast(options, dist):
            loss = forward(model, piece, dist) * (piece.count * dist.world / targets)
            loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip).item()
    mean_loss = dist.mean(total)
    finite = math.isfinite(mean_loss) and math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, norm, finite


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


def train(model, optimizer, loader, val_loader, rows, micro, first, seconds, options, dist, say):
    """The loop, from step `first`; returns (steps done, last validation loss, seconds of training so far)."""
    out = Path(options.out)
    log = Log(out / "log.csv", first, dist.is_main)
    bar = tqdm(total=options.steps, initial=first, unit="step", disable=None if dist.is_main else True)
    started, bad, step = time.perf_counter() - seconds, 0, first

    def save():
        state = {"step": step, "seconds": time.perf_counter() - started, "options": dataclasses.asdict(options)}
        distributed.save_state(out, model, optimizer, state, dist, options.keep)

    val_loss = evaluate(model, val_loader, options, dist)
    if first == 0:
        log.write(step=0, val_loss=val_loss)
    with stop_signals() as stop:
        while step < options.steps and not dist.any(stop):
            begin = time.perf_counter()
            lr = lr_at(step, options)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = loader.rows(step, dist.rank * rows, rows)
            loss, norm, applied = update(model, optimizer, batch, micro, options, dist)
            step += 1
            bad = 0 if applied else bad + 1
            if not applied:
                say(f"step {step}: loss {loss} or gradient norm {norm} not finite, update skipped")
            if bad == MAX_BAD_STEPS:
                raise ValueError(f"{bad} updates in a row were not finite; lower --peak-lr and resume from the last state")
            last = step == options.steps
            row = dict(step=step, loss=loss, lr=lr, grad_norm=norm,
                       units_per_second=round(options.units_per_step / (time.perf_counter() - begin)))
            if step % options.save_interval == 0 or last:
                save()  # before the evaluation, which may run out of memory
            if step % options.eval_interval == 0 or last:
                row["val_loss"] = val_loss = evaluate(model, val_loader, options, dist)
            if step % options.log_interval == 0 or "val_loss" in row:
                log.write(**row, seconds=round(time.perf_counter() - started, 3))
            bar.set_postfix(loss=f"{loss:.3f}", val=f"{val_loss:.3f}")
            bar.update()
        if step < options.steps:
            save()
    bar.close()
    return step, val_loss, time.perf_counter() - started


def main(argv=None):
    options, resuming = load_options(argv)
    dist = distributed.setup(options.device)
    say = print if dist.is_main else lambda *_: None
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # denormal second moments of AdamW are many times slower on CPUs
    out = Path(options.out)
    if (out / "log.csv").exists() and not (resuming or options.overwrite):
        raise ValueError(f"{out} already holds a run; go on with --init=resume, or give another --out, or --overwrite=true")

    train_shards, val_shards = shards_of(options.data, "train"), shards_of(options.val_data, "val")
    data.check_recipe(val_shards.recipe, train_shards.recipe, f"--val-data={options.val_data}")
    model, vocab = build_model(options, train_shards.recipe)
    if options.block_size > model.config.block_size:
        raise ValueError(f"--block-size={options.block_size}: the model was made for at most {model.config.block_size}")
    rows, micro = split_batch(options, dist)
    loader = UnitLoader(train_shards, vocab, options.block_size, rows * dist.world, options.seed,
                        packing=options.packing)
    val_loader = UnitLoader(val_shards, vocab, options.block_size, 1, 0, packing=options.packing)

    model = distributed.wrap(model.to(dist.device).train(), dist)
    optimizer = build_optimizer(model, options)
    first, seconds = 0, 0.0
    if resuming:
        state = distributed.load_state(out, model, optimizer, dist)
        first, seconds = state["step"], state["seconds"]
    elif dist.is_main:
        distributed.remove_steps(out)  # of a run that --overwrite replaces
        checkpoint.write_text(out / "config.toml", config.to_toml(options))
    dist.barrier()
    say(f"{options.init}{' (resumed)' if resuming else ''}: {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{loader.windows * loader.T:,} ids in {len(train_shards)} documents; steps {first} to {options.steps}, "
        f"{options.units_per_step} ids each = {dist.world} processes x {rows // micro} x {micro} x {options.block_size}")
    say(kernels.explain(dist.device.type, compute_dtype(options, dist), distributed.unwrap(model).config.head_dim))

    step, val_loss, seconds = train(model, optimizer, loader, val_loader, rows, micro, first, seconds, options, dist, say)
    if step < options.steps:
        say(f"stopped at step {step} of {options.steps}; go on with: python train.py --init=resume --out={out}")
    else:
        if dist.is_main:
            twist.save_speech_lm(distributed.unwrap(model), vocab, out / "model")
        dist.barrier()
        say(f"validation loss {val_loss:.4f} nats per unit, perplexity {math.exp(val_loss):.3f}, {step} steps in {seconds:.0f} s")
        say(f"listen: python sample.py pocket/prompt.wav --model={out / 'model'}")
    distributed.cleanup()


if __name__ == "__main__":
    config.command(main)
