"""What a run writes down: log.csv always, TensorBoard and Weights & Biases on request; and what the numbers mean.

    loss             mean cross-entropy of the stream, nats per token: units and the <S> between recordings, at every place of a
                     row, also where little comes before. Not eval.py's, which scores the units of each recording alone
    val_loss         the same over --val-data, at the same rows in every run
    perplexity       exp(loss), likewise of the stream
    grad_norm        before it is clipped; lr, units_per_second: of this update; seconds: of training so far
    bits_per_second  bits per second of speech: loss / ln 2 x units per second of speech; comparable across tokenizers
    memory_gb        most that this process has held, of the GPU or else resident
    hours            hours of speech seen: units seen / units per second of speech of the shards
    mfu              model FLOPs utilisation, %: units per second x FLOPs per unit / peak of all GPUs in dense bfloat16
    FLOPs per unit   6 x parameters outside the tables + 6 x head + 12 x layers x H D x T: products of forward and backward,
                     attention counted as the full square (PaLM, Chowdhery et al. 2022, appendix B; nanoGPT's convention)
"""
import csv
import math
import os

import torch

COLUMNS = ("step", "loss", "val_loss", "lr", "grad_norm", "units_per_second", "seconds", "perplexity", "bits_per_second", "hours",
           "mfu", "memory_gb")
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "B200": 2250, "A10G": 70, "A10": 125, "L40S": 362, "L4": 121,
               "RTX 4090": 165, "RTX 3090": 71}  # dense bfloat16, as the makers state them


def flops_per_unit(model_config, parameters, block_size):
    """Training FLOPs of one unit. parameters: of the whole model."""
    tables = model_config.vocab_size * model_config.embed_dim * (1 if model_config.tie_embeddings else 2)
    if model_config.position == "learned":
        tables += model_config.block_size * model_config.n_embd
    head = model_config.vocab_size * model_config.embed_dim
    attention = 12 * model_config.n_layer * model_config.n_head * model_config.head_dim * block_size
    return 6 * (parameters - tables + head) + attention


def peak_flops(device):
    """Of one GPU, FLOPs per second; None where the card is not in the table, or is none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for card, peak in PEAK_TFLOPS.items() if card in name), None)


def memory_gb(device):
    """Most memory that this process has held, GB: the GPU's, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    for line in open("/proc/self/status") if os.path.exists("/proc/self/status") else ():
        if line.startswith("VmHWM:"):  # not getrusage's: a new process inherits that from who started it
            return int(line.split()[1]) * 1024 / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS, in bytes


def spent(facts, options, step, seconds=0.0, world=1):
    """(units, process-seconds) that the run has taken up to a step, on whatever went before it was resumed: facts.start."""
    start = facts.start
    return (start["units"] + (step - start["step"]) * options.tokens_per_step,
            start["process_seconds"] + (seconds - start["seconds"]) * world)


def derived(row, learner, facts, options):
    """What follows from a row's step, loss and units per second; learner, facts, options: of train.py."""
    per_second, device = facts.units_per_second_of_speech, learner.dist.device
    more = {"perplexity": round(math.exp(min(row["loss"], 50)), 4),
            "bits_per_second": round(row["loss"] / math.log(2) * per_second, 3),
            "hours": round(spent(facts, options, row["step"])[0] / per_second / 3600, 4),
            "memory_gb": round(memory_gb(device), 3)}
    if peak := peak_flops(device):
        flops = flops_per_unit(learner.config, learner.parameters, options.block_size)
        more["mfu"] = round(100 * row["units_per_second"] * flops / (peak * learner.dist.world), 2)
    return more


def summary(steps, val_loss, seconds, memories, dist, facts, options):
    """What a finished run says: its validation loss, what it cost, what it held, what is next. memories: GB of each process."""
    units, process_seconds = spent(facts, options, steps, seconds, dist.world)
    unit = "GPU" if dist.device.type == "cuda" else "process"
    return (f"validation loss {val_loss:.4f} nats per token, stream perplexity {math.exp(val_loss):.3f}, {steps} steps in "
            f"{seconds:.0f} s\ncost: {process_seconds / 3600:.3f} {unit}-hours for {units:,} units, "
            f"{units / facts.units_per_second_of_speech / 3600:.1f} hours of speech\n"
            f"most memory held by the processes, GB: {', '.join(f'{most:.2f}' for most in memories)}\n"
            f"listen: python sample.py pocket/prompt.wav --model={os.path.join(options.out, 'model')}"
            + (f"\nlook: {os.path.join(options.out, 'report.html')}" if options.report else ""))


def services(tensorboard, wandb):
    """What --tensorboard and --wandb need, None for what is not asked for. Raises: ValueError naming the package to install."""
    writer = service = None
    try:
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter as writer  # an extra that most runs do without
        if wandb:
            import wandb as service  # likewise
    except ImportError as error:
        raise ValueError(f"the package {error.name} is not installed; pip install it, or leave out --tensorboard and "
                         "--wandb") from None
    return writer, service


class Log:
    """log.csv in the run folder, one flushed row a step. On resume, rows past the restored step are dropped.

    Args: folder; first: step to go on from; on: whether this process writes; tensorboard: also event files under folder/events;
        wandb: project name, or None; report: called after each validation, and with last=True at the end.
    """

    def __init__(self, folder, first, on, tensorboard=False, wandb=None, options=None, report=None):
        self.file = self.board = self.run = None
        self.report = report
        self.step = first  # of the newest row
        if not on:
            return
        path = folder / "log.csv"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() and first else []
        rows = csv.DictReader(line for line in lines if line.endswith("\n") and "\0" not in line)  # whole ones
        rows = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) <= first]
        self.step = int(rows[-1]["step"]) if rows else -1
        with open(f"{path}.tmp", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(f"{path}.tmp", path)
        self.file = open(path, "a", newline="")
        writer, service = services(tensorboard, wandb)
        if tensorboard:
            self.board = writer(folder / "events", purge_step=first + 1)
        if wandb:
            self.run = service.init(project=wandb, name=folder.name, id=folder.name, resume="allow", config=options)

    def write(self, row):
        if self.file is None:
            return
        csv.DictWriter(self.file, COLUMNS, restval="").writerow(row)
        self.file.flush()
        numbers = {key: value for key, value in row.items() if key != "step" and value != ""}
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, row["step"])
        if self.run:
            self.run.log(numbers, step=row["step"])
        if self.report and "val_loss" in numbers:
            self.report()

    def close(self):
        for part, end in ((self.file, "close"), (self.board, "close"), (self.run, "finish")):
            if part:
                getattr(part, end)()
        if self.file and self.report:
            self.report(last=True)
