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

COLUMNS = ("step", "loss", "val_loss", "lr", "grad_norm", "units_per_second", "seconds")
MAX_BAD_STEPS = 5  # non-finite steps in a row before giving up
CHOICES = {"schedule": ("cosine", "linear", "inverse_sqrt", "constant"), "dtype": ("auto", "float32", "bfloat16"),
           "embedding": ("fresh", "matched", "truncate")}


@dataclass(frozen=True)
class TrainConfig:
    init: str = "twist"  # twist | cold | shuffled | resume | a speech LM's folder to fine-tune
    lm: str = "pocket"  # text LM to start from (cold: its config.json alone): folder, or `pocket`
    embedding: str = "fresh"  # new unit table of a warm start: fresh | matched | truncate (twist.py)
    data: str = "pocket"  # folder of training shards
    val_data: str = "pocket"  # folder of validation shards
    out: str = "runs/pocket"  # run folder
    overwrite: bool = False  # replace a run that is already in --out
    steps: int = 400  # updates
    units_per_step: int = 2048  # ids per update over all processes and micro-batches
    block_size: int = 256  # T, ids per row
    micro_batch: int = 0  # rows per forward on one process; 0: all of them
    peak_lr: float = 1e-3  # AdamW's learning rate after warm-up
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


@torch.no_grad()
def evaluate(model, loader, options, dist):
    """Mean loss over the first rows of the validation stream, in order: the same for every run. All ranks share the work."""
    model.eval()
    rows = min(options.eval_rows or loader.windows, loader.windows)
    total = torch.zeros((), dtype=torch.float64, device=dist.device)
    mine = list(range(dist.rank, rows, dist.world))
    for i in range(0, len(mine), 16):
        ids = torch.stack([loader.window(w) for w in mine[i:i + 16]]).to(dist.device)
        with autocast(options, dist):
            total += model(ids[:, :-1], ids[:, 1:]).double() * len(ids)
    model.train()
    return dist.mean(total) * dist.world / rows


def autocast(options, dist):
    on = options.dtype == "bfloat16" or (options.dtype == "auto" and dist.device.type == "cuda")
    return torch.autocast(dist.device.type, torch.bfloat16, enabled=on)


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


def main(argv=None):
    options, resuming = load_options(argv)
    dist = distributed.setup(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # denormal second moments of AdamW are many times slower on CPUs
    say = print if dist.is_main else lambda *_: None
    out = Path(options.out)
    if (out / "log.csv").exists() and not (resuming or options.overwrite):
        raise ValueError(f"{out} already holds a run; go on with --init=resume, or give another --out, or --overwrite=true")

    # data
    train_shards, val_shards = shards_of(options.data, "train"), shards_of(options.val_data, "val")
    data.check_recipe(val_shards.recipe, train_shards.recipe, f"--val-data={options.val_data}")
    model, vocab = build_model(options, train_shards.recipe)
    if options.block_size > model.config.block_size:
        raise ValueError(f"--block-size={options.block_size}: the model was made for at most {model.config.block_size}")
    rows, remainder = divmod(options.units_per_step, options.block_size * dist.world)
    if remainder or not rows:
        raise ValueError(f"--units-per-step={options.units_per_step} must be a multiple of block size x processes "
                         f"= {options.block_size} x {dist.world}")
    micro = options.micro_batch or rows
    if rows % micro:
        raise ValueError(f"--micro-batch={micro} must divide the {rows} rows that each process takes per update")
    loader = data.UnitLoader(train_shards, vocab, options.block_size, rows * dist.world, options.seed)
    val_loader = data.UnitLoader(val_shards, vocab, options.block_size, 1, 0)

    # model and optimizer
    model = distributed.wrap(model.to(dist.device).train(), dist)
    optimizer = build_optimizer(model, options)
    first, trained_seconds = 0, 0.0
    if resuming:
        state = distributed.load_state(out, model, optimizer, dist)
        first, trained_seconds = state["step"], state["seconds"]
    elif dist.is_main:
        out.mkdir(parents=True, exist_ok=True)
        for old in distributed.step_folders(out):
            distributed.remove(old)
        checkpoint.write_text(out / "config.toml", config.to_toml(options))
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{options.init}{' (resumed)' if resuming else ''}: {parameters:,} parameters, {loader.windows * loader.T:,} ids in "
        f"{len(train_shards)} documents; steps {first} to {options.steps}, {options.units_per_step} ids each = "
        f"{dist.world} processes x {rows // micro} x {micro} x {options.block_size}")
    say(kernels.explain(dist.device.type))

    # SIGTERM (a cluster's warning) and Ctrl-C end the run after the step in progress, with everything saved
    stop = []
    handlers = {number: signal.signal(number, lambda *_: stop.append(1)) for number in (signal.SIGTERM, signal.SIGINT)}
    log = Log(out / "log.csv", first, dist.is_main)
    bar = tqdm(total=options.steps, initial=first, unit="step", disable=None if dist.is_main else True)
    started, bad, val_loss = time.perf_counter() - trained_seconds, 0, None

    def save(step):
        state = {"step": step, "seconds": time.perf_counter() - started, "options": dataclasses.asdict(options)}
        distributed.save_state(out, model, optimizer, state, dist, options.keep)

    step = first
    if first == 0:
        val_loss = evaluate(model, val_loader, options, dist)
        log.write(step=0, val_loss=val_loss)
    while step < options.steps and not dist.any(stop):
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, options)
        ids = loader.rows(step, dist.rank * rows, rows).to(dist.device)  # (rows, T + 1)
        total = torch.zeros((), device=dist.device)
        pieces = ids.split(micro)
        for i, piece in enumerate(pieces):  # every piece has the same number of targets: the mean of means is the mean
            with distributed.sync_gradients(model, on=i + 1 == len(pieces)), autocast(options, dist):
                loss = model(piece[:, :-1], piece[:, 1:]) / len(pieces)
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        mean_loss = dist.mean(total)
        if math.isfinite(mean_loss) and torch.isfinite(norm):
            optimizer.step()
            bad = 0
        else:
            bad += 1
            say(f"step {step + 1}: loss {mean_loss} or gradient not finite, update skipped")
            if bad == MAX_BAD_STEPS:
                raise ValueError(f"{bad} updates in a row were not finite; lower --peak-lr and resume from the last state")
        optimizer.zero_grad(set_to_none=True)
        step += 1
        last = step == options.steps
        if step % options.save_interval == 0 or last:
            save(step)  # before the evaluation, which may run out of memory
        row = dict(step=step, loss=mean_loss, lr=lr_at(step - 1, options), grad_norm=norm.item(),
                   units_per_second=round(options.units_per_step / (time.perf_counter() - begin)))
        if step % options.eval_interval == 0 or last:
            row["val_loss"] = val_loss = evaluate(model, val_loader, options, dist)
        if step % options.log_interval == 0 or "val_loss" in row:
            log.write(**row, seconds=round(time.perf_counter() - started, 3))
        bar.set_postfix(loss=f"{mean_loss:.3f}", val=f"{val_loss:.3f}" if val_loss else "-")
        bar.update()
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if step < options.steps:
        save(step)
        say(f"stopped at step {step} of {options.steps}; go on with: python train.py --init=resume --out={out}")
    else:
        if val_loss is None:  # resumed a run that was complete
            val_loss = evaluate(model, val_loader, options, dist)
        if dist.is_main:
            twist.save_speech_lm(distributed.unwrap(model), vocab, out / "model")
        dist.barrier()
        say(f"validation loss {val_loss:.4f} nats per unit, perplexity {math.exp(val_loss):.3f}, "
            f"{step} steps in {time.perf_counter() - started:.0f} s")
        say(f"listen: python sample.py pocket/prompt.wav --model={out / 'model'}")
    distributed.cleanup()


if __name__ == "__main__":
    config.command(main)
