"""Train a speech LM: warm-started from a text LM (TWIST), cold, or resumed.

    shards --loader--> ids, targets (B, T) --Transformer.forward--> loss --backward, clip, AdamW--> --out/

    torchrun train.py --init=twist                                  # the pocket world: a few minutes on two CPU cores
    torchrun --nproc-per-node=8 train.py configs/opt-125m.toml      # a published recipe; more launch lines in scripts/
    torchrun --nproc-per-node=8 train.py --init=twist --lm=FOLDER --data=units/train --val-data=units/val --out=runs/mine
    python train.py --init=resume --out=runs/pocket                 # go on after an interruption, to the same bits
    python train.py configs/llama-7b.toml --dry-run                 # what it would take: data, steps, memory

Under --out: config.toml (resolved options), log.csv (logs.py), report.html (its curves), step_NNNNNN/ (state.py: any number of
processes can go on), samples/ (spoken), model/ (for sample.py and transformers). The batch of step s depends on (seed, s) alone.
A text LM is trained by the same loop: its shards hold bytes in place of units (see pocket/build.py).

Source: TWIST (arXiv 2305.13009) section 3.
"""
import contextlib
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import config
import kernels
import sample
import twist
from checkpoints import files
from corpus.loader import PACKINGS, UnitLoader, mixed
from corpus.shards import UnitShards, check_recipe
from hubert_units import TokenizerOptions
from model import TransformerConfig
from pages.runs import Report
from training import distributed, logs, memory, optimizer, pipeline, state
from training.learner import Learner

MAX_BAD_STEPS = 5  # non-finite steps in a row before giving up
CHOICES = {"schedule": ("cosine", "linear", "inverse_sqrt", "constant", "cooldown"), "dtype": ("auto", "float32", "bfloat16"),
           "embedding": twist.EMBEDDINGS, "packing": PACKINGS, "optimizer": optimizer.KINDS, "parallel": distributed.PARALLEL,
           "recompute": memory.RECOMPUTE, "compile": ("auto", "none", "blocks")}
RANGES = {name: (1, config.MOST) for name in (
    "steps", "tokens_per_step", "block_size", "eval_interval", "save_interval", "log_interval", "keep")} | {
    "data_fraction": (config.ABOVE_0, 1), "min_lr_share": (0, 1), "cooldown": (0, 1), "beta_2": (0, 0.999999),
    "clip": (config.ABOVE_0, config.LARGEST), "threads": (0, 1024)}
NEEDS = dict.fromkeys(("tokenizer", "kmeans", "k", "layer", "frame_rate", "pad", "chunking", "precision", "vocoder", "prompts"),
                      "sample_interval") | {
    "lm": "init=twist|cold|shuffled|resume", "embedding": "init=twist|shuffled|resume", "shard_size": "parallel=hsdp",
    "cooldown": "schedule=cooldown", "min_lr_share": "schedule=cosine|linear|cooldown"}


@dataclass(frozen=True)
class TrainConfig(TokenizerOptions):
    init: str = "twist"  # twist | cold | shuffled | resume | a speech LM's folder to fine-tune
    lm: str = "pocket"  # text LM to start from (cold: its config.json alone): folder, `pocket`, or a hub name (facebook/opt-125m)
    embedding: str = "fresh"  # new unit table of a warm start: fresh | matched | truncate (twist.py)
    data: tuple[str, ...] = ("pocket",)  # folders of training shards, comma separated
    data_weights: tuple[str, ...] = ()  # shares of several folders in every batch, one number each; none: by their sizes
    data_fraction: float = 1.0  # share of the units to train on, in whole recordings; a smaller share lies inside a larger one
    val_data: str = "pocket"  # folder of validation shards
    packing: str = "stream"  # stream: a row sees all of its ids | documents: only those of the same recording
    out: str = "runs/pocket"  # run folder
    overwrite: bool = False  # replace a run that is already in --out
    auto_resume: bool = False  # go on if --out holds a state, with the options given here (restarted jobs do so anyway)
    steps: int = 400  # updates
    tokens_per_step: int = 2048  # ids per update, units and <S>, over all processes and micro-batches
    block_size: int = 256  # T, ids per row
    micro_batch: int = 0  # rows per forward on one process; 0: all of them
    peak_lr: float = 2e-3  # AdamW's learning rate after warm-up
    min_lr_share: float = 0.1  # final learning rate as a share of the peak (cosine, linear, cooldown)
    warmup: int = 20  # updates of linear warm-up
    schedule: str = "cosine"  # cosine | linear | inverse_sqrt | constant | cooldown: constant, then linear
    cooldown: float = 0.2  # share of the updates over which the last of these falls
    weight_decay: float = 0.1  # on matrices and tables; none on norms and biases
    beta_2: float = 0.95  # AdamW's second-moment decay (the first is 0.9)
    clip: float = 1.0  # largest gradient norm
    seed: int = 0  # of the new table or the cold weights, and of the order of the data
    eval_interval: int = 100  # updates between validations; the last update always validates
    eval_rows: int = 64  # validation rows of block_size ids, the same ones in every run; 0: all
    save_interval: int = 100  # updates between resumable states
    async_save: bool = False  # write states while training goes on, from a copy in CPU memory
    keep: int = 2  # resumable states kept
    log_interval: int = 1  # updates between rows of log.csv
    sample_interval: int = 0  # updates between spoken continuations of --prompts; 0: none
    prompts: tuple[str, ...] = ("pocket/prompt.wav",)  # recordings that are continued
    vocoder: str = "pocket"  # for the continuations: folder or weight file, `pocket`, or a known name (mhubert-base-25hz)
    tensorboard: bool = False  # also event files under --out/events (pip install tensorboard)
    report: bool = True  # keep --out/report.html current: curves and samples of the run (python -m pages compares several)
    wandb: str | None = None  # also to this Weights & Biases project (pip install wandb)
    dtype: str = "auto"  # auto | float32 | bfloat16: of products; weights stay float32; auto: bfloat16 if hardware multiplies it
    optimizer: str = "adamw"  # adamw | split: bfloat16 weights and their low 16 bits, 14 bytes a parameter, same updates
    parallel: str = "auto"  # auto | ddp | fsdp | hsdp (distributed.py); auto: ddp up to 2 billion parameters, none alone
    shard_size: int = 0  # hsdp: processes that share one copy; 0: those of a node
    reshard: bool = True  # fsdp, hsdp: free a block's gathered weights after its forward
    recompute: str = "none"  # none | selective | full: activations that backward computes again instead of keeping
    compile: str = "auto"  # auto | none | blocks: torch.compile of each block; auto: on GPUs
    dry_run: bool = False  # say what would be trained and what memory it takes, and stop; weights and data may be missing
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps (never auto's choice)
    threads: int = 0  # CPU threads a process; 0: PyTorch's choice (torchrun sets 1 when there are several processes)
    RENAMED = {"units_per_step": "tokens_per_step", "min_lr": "min_lr_share"}
    ALONE = {"compile": "blocks"}
    CHOICES, RANGES, NEEDS = CHOICES, RANGES, NEEDS


def lr_at(step, options):
    """Learning rate of update `step` (0-based): linear warm-up, then the schedule."""
    if step < options.warmup:
        return options.peak_lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, options.steps - 1 - options.warmup)  # 0 .. 1
    low = options.min_lr_share
    left = (options.steps - 1 - step) / max(1, options.cooldown * options.steps)  # of the cool-down; above 1 before it
    factor = {"cosine": low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)),
              "linear": low + (1 - low) * (1 - progress),
              "inverse_sqrt": math.sqrt(max(options.warmup, 1) / (step + 1)),
              "constant": 1.0,
              "cooldown": low + (1 - low) * min(1.0, left)}
    return options.peak_lr * factor[options.schedule]


# ------------------------------------------------------------------------------------------------ what is trained on what

def load_options(argv):
    """(options, whether to go on from a state).

    --init=resume takes the options of the interrupted run, and what is given beside it; a job that was restarted and
    --auto-resume repeat the whole command, so its options hold.
    """
    options = config.load(TrainConfig, argv, quiet=True)  # what has no effect depends on what is resumed, and is said below
    out, saved = Path(options.out), Path(options.out) / "config.toml"
    if options.init == "resume":
        if not saved.is_file():
            raise FileNotFoundError(f"nothing to resume in {out}: it has no config.toml; start with --init=twist")
        before = config.read_toml(TrainConfig, saved)
        given = config.load(TrainConfig, argv, base=before)
        return dataclasses.replace(given, init=before.get("init", TrainConfig.init), out=options.out), True
    options = config.load(TrainConfig, argv)
    if options.auto_resume or distributed.attempt() > 0:
        found = state.latest(out) is not None
        new = not found and not (out / "model").exists()  # a job that was killed before its first state starts over
        return dataclasses.replace(options, overwrite=options.overwrite or new), found
    return options, False


def shards_of(option, name, split):
    folder = files.KINDS["units"] / split if name == "pocket" else Path(name)
    if not folder.exists():
        raise FileNotFoundError(f"--{option}={name}: no such folder; give one of unit shards, or `pocket`")
    return UnitShards(folder)


def split_batch(options, dist):
    """Rows of one update on each process, and rows of one forward: the user states tokens per update, the rest follows."""
    rows, remainder = divmod(options.tokens_per_step, options.block_size * dist.world)
    if remainder or not rows:
        raise ValueError(f"--tokens-per-step={options.tokens_per_step} must be a multiple of block size x processes "
                         f"= {options.block_size} x {dist.world}")
    micro = options.micro_batch or rows
    if rows % micro:
        raise ValueError(f"--micro-batch={micro} must divide the {rows} rows that each process takes per update")
    optimizer.check_pieces(options.optimizer, rows // micro)
    return rows, micro


# ------------------------------------------------------------------------------------------------ what else a run does

def listen(options, vocab, dist, say):
    """(vocoder, {prompt: its units and runs}), before the first step. A prompt that cannot be read is said and left out."""
    encoder, vocoder = sample.load_voice(options, vocab, dist.device)
    own = {prompt: files.POCKET.parent / prompt for prompt in options.prompts}  # pocket/prompt.wav, in whatever folder we are
    prompts = [place if place.exists() and not Path(prompt).exists() else prompt for prompt, place in own.items()]
    heard, errors = dist.from_main(sample.hear, sample.recordings(prompts), encoder, vocab.dedup)
    for error in errors:
        say(f"prompt left out: {error}")
    return vocoder, heard


@torch.no_grad()
def speak(voice, learner, step, options, vocab, say):
    """Spoken continuations of --prompts into --out/samples; all processes call it, because under FSDP all have a part."""
    out = str(Path(options.out) / "samples" / f"step_{step:06d}")
    spoken = sample.SampleConfig(out=out, seed=options.seed, model=out, dtype=str(learner.dtype).removeprefix("torch."))
    survived = (ValueError, OSError) + (torch.OutOfMemoryError,) * (learner.dist.world == 1)  # in a group the others would wait
    learner.model.eval()
    for prompt, heard in voice[1].items():
        try:
            sample.continue_prompt(prompt, spoken, None, voice[0], learner.model, vocab, learner.dist.is_main, heard,
                                   learner.autocast)
        except survived as error:
            say(f"step {step}: {prompt} is not continued: {config.sentence(error)}")
    learner.model.train()


# ------------------------------------------------------------------------------------------------ the loop

@dataclass(frozen=True)
class Facts:
    """What the loop must know about a run."""

    vocab: twist.UnitVocab
    start: dict  # what there is to go on from: the keys of state.NOTHING, row being that of the log
    rows: int  # of one update on one process
    micro: int  # rows of one forward
    units_per_second_of_speech: float  # of the training shards


def train(learner, loader, val_loader, saver, log, voice, facts, options, say):
    """Updates from facts.start on; returns (steps done, last validation loss, seconds of training so far)."""
    dist, step, bad = learner.dist, facts.start["step"], 0
    began = time.perf_counter() - facts.start["seconds"]
    bar = config.progress(total=options.steps, initial=step, unit="step", shown=dist.is_main)
    val_loss = learner.evaluate(val_loader, options.eval_rows)
    row = {"step": step, "seconds": facts.start["seconds"]} | facts.start["row"]
    if log.step < step or step == 0:  # a kill between state and log leaves the row to us
        log.write(row | ({"val_loss": val_loss} if step % options.eval_interval == 0 else {}))
    intervals = [options.save_interval, options.eval_interval, *[options.sample_interval] * bool(voice)]
    batches = pipeline.ahead(lambda step: loader.rows(step, dist.rank * facts.rows, facts.rows),  # this process's part of them
                             range(step, options.steps), dist.device)

    def due(step, *_):  # something follows that a later update would spoil
        return step == options.steps or not all(step % interval for interval in intervals)

    def launch():
        for number, batch in enumerate(batches, start=facts.start["step"] + 1):
            lr = lr_at(number - 1, options)
            yield number, lr, learner.update(batch, facts.micro, loader.targets, lr, bool(stop))
            if agreed:
                return

    with distributed.stop_signals() as stop, contextlib.closing(batches):
        agreed, before = stop if dist.world == 1 else [], time.perf_counter()  # several must stop after the same update
        for step, lr, update in pipeline.one_late(launch(), due):  # is read when the next is launched: a GPU never waits for us
            loss, norm, stopping = update.read()
            agreed += [step] * bool(stopping)
            bad = 0 if math.isfinite(loss) and math.isfinite(norm) else bad + 1
            if bad:
                say(f"step {step}: loss {loss} or gradient norm {norm} not finite, update skipped")
            if bad == MAX_BAD_STEPS:
                raise ValueError(f"{bad} updates in a row were not finite; lower --peak-lr and resume from the last state")
            row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "seconds": round(update.at - began, 3),
                   "units_per_second": round(options.tokens_per_step / (update.at - before))}
            row |= logs.derived(row, learner, facts, options)
            saver.settle(wait=False)
            done = step == options.steps
            if step % options.save_interval == 0 or done:  # before the evaluation, which may run out of memory
                state.save(saver, learner, row, facts, options, say, needed=done)
            if step % options.eval_interval == 0 or done:
                row["val_loss"] = val_loss = learner.evaluate(val_loader, options.eval_rows)
            if voice and (step % options.sample_interval == 0 or done):
                speak(voice, learner, step, options, facts.vocab, say)
            if step % options.log_interval == 0 or "val_loss" in row:
                log.write(row)
            before = time.perf_counter() if due(step) else update.at
            bar.set_postfix(loss=f"{loss:.3f}", val=f"{val_loss:.3f}")
            bar.update()
        if step < options.steps:
            state.save(saver, learner, row, facts, options, say, needed=True)
    saver.settle()
    bar.close()
    return step, val_loss, time.perf_counter() - began


# ------------------------------------------------------------------------------------------------ a run

def open_shards(options):
    """(Training shards of --data, validation shards of --val-data, recipe of all); of a dry run without them ([], None, ...)."""
    if options.dry_run and not any(name == "pocket" or Path(name).exists() for name in (*options.data, options.val_data)):
        return [], None, {"num_units": memory.UNITS}
    train_shards = [shards_of("data", name, "train") for name in options.data]
    val_shards = shards_of("val-data", options.val_data, "val")
    for shards, where in [*((shards, f"--data={name}") for shards, name in zip(train_shards, options.data)),
                          (val_shards, f"--val-data={options.val_data}")]:
        check_recipe(shards.recipe, train_shards[0].recipe, where)
    return train_shards, val_shards, train_shards[0].recipe


def run(options, resuming, found, dist):
    """From options to a run folder: data, the weights of the start or of the state that was found, the loop, the model."""
    say = print if dist.is_main else lambda *_: None
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # denormal second moments of AdamW are many times slower on CPUs
    out = Path(options.out)
    train_shards, val_shards, recipe = open_shards(options)
    say(f"training on {', '.join(options.data)}, validation on {options.val_data}" + memory.NO_DATA * (not train_shards))
    if (options.data == TrainConfig.data) != (options.val_data == TrainConfig.val_data):
        say("warning: only one of --data and --val-data was given; the other is the pocket world's")
    if resuming:
        model_config, vocab, tensors = TransformerConfig(**found["model"]), twist.UnitVocab(**found["vocab"]), None
    else:
        model_config, vocab, tensors = twist.open_start(options.init, options.lm, recipe, options.seed, options.embedding,
                                                        weights=not options.dry_run)
    if options.block_size > model_config.block_size:
        raise ValueError(f"--block-size={options.block_size}: the model was made for at most {model_config.block_size}")
    rows, micro = split_batch(options, dist)
    if not train_shards:
        return say(memory.plan_of(Learner(model_config, options, dist), options, micro))
    check_recipe(recipe, vocab.expected(recipe), f"--data={options.data[0]}")
    if resuming and (changes := state.changes(found, options, recipe)):
        say(f"from step {found['step']} on with other options: {changes}")
    loader = mixed([UnitLoader(shards, vocab, options.block_size, rows * dist.world, options.seed, packing=options.packing,
                               fraction=options.data_fraction) for shards in train_shards], options.data_weights)
    val_loader = UnitLoader(val_shards, vocab, options.block_size, 1, 0, packing=options.packing)
    hours = sum(shards.meta["hours"] for shards in train_shards)
    facts = Facts(vocab, found, rows, micro, sum(shards.meta["units"] for shards in train_shards) / max(3600 * hours, 1e-9))

    learner = Learner(model_config, options, dist)
    say(f"{options.init}{' (resumed)' if resuming else ''}: {learner.parameters:,} parameters; "
        f"{loader.windows * loader.T:,} ids of {hours:.1f} h in an epoch; steps {found['step']} to {options.steps}, "
        f"{options.tokens_per_step} ids each = {dist.world} processes x {rows // micro} x {micro} x {options.block_size}; "
        f"{learner.parallel if learner.parallel != 'none' else 'one process'}")
    say(f"{learner.why}\n{kernels.explain(dist.device.type, learner.dtype, model_config.head_dim, brief=True)}")
    if options.dry_run:
        return say(memory.plan_of(learner, options, micro))
    voice = listen(options, vocab, dist, say) if options.sample_interval else None
    learner.fill(tensors)
    saver = state.Saver(out, options.keep, options.async_save, dist)
    if resuming:
        state.load(out, learner)
    else:
        saver.remove_all()  # of a run that --overwrite replaces
    if dist.is_main:
        files.write_text(out / "config.toml", config.to_toml(dataclasses.replace(options, overwrite=False)))
    log = logs.Log(out, found["step"], dist.is_main, options.tensorboard, options.wandb, dataclasses.asdict(options),
                   Report(out, say) if options.report else None)

    step, val_loss, seconds = train(learner, loader, val_loader, saver, log, voice, facts, options, say)
    log.close()
    memories = dist.each(logs.memory_gb(dist.device))  # before rank 0 collects the whole model
    if step < options.steps:
        say(f"stopped at step {step} of {options.steps}; go on with: python train.py --init=resume --out={out}")
        return
    weights = learner.weights()
    if dist.is_main:
        twist.save_tensors(model_config, weights, vocab, out / "model")
    dist.barrier()
    say(logs.summary(step, val_loss, seconds, memories, dist, facts, options))


def main(argv=None):
    options, resuming = load_options(argv)
    dist = distributed.setup(options.device)
    with contextlib.ExitStack() as stack:
        found = dist.from_main(state.claim, options, resuming, stack)
        run(options, resuming, found, dist)  # a model that outlived the process group would wait for it forever
    distributed.leave()


if __name__ == "__main__":
    config.command(main)
