"""Speech and its units -> a small unit vocoder: the last station of the pocket factory.

    unit shards (units, runs, names of recordings) + recordings --> crops: frame units (B, F), samples (B, S = F hop)
      generator:           frame units --Vocoder.decode--> samples'; |log spectra(samples) - log spectra(samples')|
      duration predictor:  units (B, T) --> log(1 + runs); squared error, in the same step
      adversaries (last part of the run): several views of samples and samples' --> real or made?

The first stage asks for the right spectrum only, which settles what is said and how loud; the phase that comes out is
buzzy. The second adds discriminators, for which a wave must look right period by period and at several scales.
Several voices, each with its own shards, have a table of speakers. How long a unit lasts is learnt from the first, whose
rhythm the others share.
The result is a folder (config.json + model.safetensors) that vocoder.py opens like any published unit HiFi-GAN.

    python -m pocket.train_vocoder --units=build/units/vocoder --out=pocket/vocoder --minutes=45
    python -m pocket.train_vocoder --units=units/anna,units/ben --speakers=anna,ben --out=voices

Stopped or killed, the same command goes on from the last state in --run; batches, dropout and weights are those of an
unbroken run when --steps fixes the schedule. Shapes: B batch, T units, F frames, S samples, C width.
Sources: losses and discriminators, Kong et al. 2020 (HiFi-GAN, arXiv 2010.05646) sections 2.3 and 2.4, made small;
spectra at several resolutions, Yamamoto et al. 2020 (Parallel WaveGAN, arXiv 1910.11480) section 2.2.
"""
import csv
import dataclasses
import math
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional

import config
from checkpoints import files
from corpus.shards import UnitShards, check_recipe
from kernels.dtypes import hardware_bfloat16, training_dtype
from pocket.recordings import integers
from pocket.train_hubert import mel_filters
from speech.audio import SAMPLE_RATE, read_wav
from vocoder import SLOPE, DurationConfig, Vocoder, VocoderConfig

# A HuBERT frame sees 80 samples more than its hop (720 at hop 640, 400 at hop 320), 40 on each side. So unit f stands
# in the middle of samples [hop f, hop f + hop + 80), and the samples it must speak are [hop f + 40, hop f + hop + 40):
# [640 f + 40, 640 f + 680) at 25 Hz.
EDGE = 40
SPECTRA = ((256, 64, 20), (512, 128, 40), (1024, 256, 80))  # (window, hop, mel bands): sharp in time ... in frequency
FLOOR = 1e-2  # magnitude below which spectra count as silent, 88 dB under a full-scale tone; about 16-bit noise
PERIODS = (2, 3, 5, 7, 11)  # samples per row of the folded wave, one discriminator each; primes overlap least
SCALES = (1, 2)  # averaged down by this factor, one discriminator each
LONGEST_RUN = 25  # frames: how long silence lasts cannot be told from its unit, and must not lengthen the others
TALKING = 8  # units of a recording in which something is said: durations are learnt from these, of the first voice
SEGMENT = 16  # units of each crop that the discriminators hear; a wave repeats itself sooner than words do
ADVERSARIAL_WEIGHT, FEATURE_WEIGHT = 1 / 45, 2 / 45  # against 1 for the spectral loss: HiFi-GAN's proportions


@dataclass(frozen=True)
class TrainVocoderConfig:
    units: tuple[str, ...] = ("build/units/vocoder",)  # shard folder of each voice; the names in it are paths of the recordings
    speakers: tuple[str, ...] = ()  # names of the voices, where --units are several; the first is the default
    audio: str = ""  # folder that those paths are relative to; empty = as they are
    out: str = "pocket/vocoder"  # finished vocoder: config.json and model.safetensors
    run: str = "build/vocoder"  # log.csv and the resumable state
    minutes: float = 45.0  # time budget of the whole run, over which the learning rate falls
    steps: int = 0  # a fixed number of steps instead (reproducible); 0 = as many as --minutes allows
    adversarial: float = 0.33  # last part of the run that has discriminators; 0 = none
    batch: int = 4  # crops per step
    crop: int = 32  # units per crop
    duration_window: int = 128  # most units of one row of the duration loss
    lr: float = 2e-3  # peak learning rate of the generator, falls to 5 % along a cosine
    adversary_lr: float = 1e-3  # of the discriminators, scaled by the same cosine
    clip: float = 10.0  # largest gradient norm
    rates: str = "5,4,4,4,2"  # upsample rates; their product is the hop
    kernels: str = "11,8,8,8,4"  # taps of the transposed convolutions
    width: int = 192  # channels before the first upsampling; each stage halves them
    block_kernels: str = "7"  # taps of the residual blocks of each stage; their outputs are averaged
    embedding: int = 128  # width of a unit's embedding
    bf16: bool | None = None  # convolutions in bfloat16 (the rest stays float32); none: where the processor multiplies it
    half: bool = True  # store the finished weights in float16
    threads: int = 1  # CPU threads
    seed: int = 0  # of weights, batches and dropout
    held_out: int = 8  # documents of each voice, kept for validation
    save_minutes: float = 5.0  # between states on disk and validations
    log_interval: int = 50  # steps per row of log.csv
    RANGES = {name: (1, config.MOST) for name in (
        "batch", "crop", "duration_window", "width", "embedding", "held_out", "log_interval")} | {
        "minutes": (config.ABOVE_0, config.LARGEST), "adversarial": (0, 1), "clip": (config.ABOVE_0, config.LARGEST),
        "threads": (1, 1024)}


# -------------------------------------------------------------------------------------------------- speech

class Corpus:
    """All recordings in memory as 16-bit integers, with the unit of every frame.

    A row is (units (T,), runs (T,), frame units (F,), samples (S,), number of the voice).
    """

    def __init__(self, options, hop):
        self.hop, self.recipe, self.rows, self.held_out, self.weights = hop, None, [], [], []
        for voice, folder in enumerate(options.units):
            shards = UnitShards(folder)
            self.recipe = self.recipe or shards.recipe
            check_recipe(self.recipe, shards.recipe, f"--units={folder}")
            if SAMPLE_RATE != hop * shards.recipe["frame_rate"]:
                raise ValueError(f"--rates={options.rates} make {hop} samples a unit, but {folder} holds "
                                 f"{shards.recipe['frame_rate']} units a second; their product must be {SAMPLE_RATE}")
            rows = [(*self.read(Path(options.audio, name), *shards.document(i)), voice)
                    for i, name in enumerate(config.progress(shards.names, desc="reading"))]
            if len(rows) <= options.held_out:
                raise ValueError(f"{len(rows)} recordings in {folder}; give more than --held-out={options.held_out}")
            apart = {len(rows) * (2 * i + 1) // (2 * options.held_out) for i in range(options.held_out)}  # spread over them
            self.held_out += [rows[i] for i in sorted(apart)]
            rows = [row for i, row in enumerate(rows) if i not in apart and len(row[2]) >= options.crop]
            if not rows:
                raise ValueError(f"no recording in {folder} is --crop={options.crop} units long; give longer ones, or less")
            lengths = np.array([len(row[2]) for row in rows], dtype=float)
            self.rows += rows
            self.weights += [*(lengths / lengths.sum() / len(options.units))]  # each voice alike
        first = [row for row in self.rows if row[4] == 0]
        self.talking = [row for row in first if len(row[0]) >= TALKING] or first

    def read(self, name, units, runs):
        wav, frames = read_wav(name), np.repeat(units, runs)
        expected = (len(wav) - 2 * EDGE) // self.hop  # = floor((S - receptive field) / hop) + 1
        if len(frames) != expected:
            raise ValueError(f"{name}: {len(frames)} frames of units for {len(wav)} samples, expected {expected} of "
                             f"{self.hop} samples; encode this recording again (pieces must be shorter than 100 s)")
        return units, runs, frames, integers(wav)

    def samples(self, row, start=0, count=None):
        """Samples that `count` units from `start` stand for: (count * hop,) float32."""
        count = len(row[2]) - start if count is None else count
        return row[3][start * self.hop + EDGE:(start + count) * self.hop + EDGE].float() / 2**15

    def batch(self, options, step):
        """Step number -> frame units (B, F), samples (B, S), voices (B, 1), units (B, T), runs (B, T); no more decides it."""
        draw = np.random.default_rng((options.seed, step))
        rows = [self.rows[i] for i in draw.choice(len(self.rows), options.batch, p=self.weights)]
        starts = [int(draw.integers(len(row[2]) - options.crop + 1)) for row in rows]
        frames = torch.stack([torch.from_numpy(row[2][s:s + options.crop]) for row, s in zip(rows, starts)])
        samples = torch.stack([self.samples(row, s, options.crop) for row, s in zip(rows, starts)])
        # One window length for the whole batch: no padding, so nothing has to be masked.
        talking = [self.talking[i] for i in draw.integers(len(self.talking), size=options.batch)]
        window = min(options.duration_window, *(len(row[0]) for row in talking))
        starts = [int(draw.integers(len(row[0]) - window + 1)) for row in talking]
        units, runs = (torch.stack([torch.from_numpy(row[k][s:s + window]) for row, s in zip(talking, starts)])
                       for k in (0, 1))
        return frames, samples, torch.tensor([[row[4]] for row in rows]), units, runs


# -------------------------------------------------------------------------------------------------- spectra

class Spectra(nn.Module):
    """Samples (B, S) -> for each resolution (log magnitudes, log mel), both (B, bands, frames) float32."""

    def __init__(self, resolutions=SPECTRA):
        super().__init__()
        self.parts = [(window, hop, torch.hann_window(window), mel_filters(bands, window, 0, SAMPLE_RATE / 2, torch.float64))
                      for window, hop, bands in resolutions]

    def forward(self, samples):
        views = []
        for size, hop, window, filters in self.parts:
            z = torch.stft(samples, size, hop, window=window, return_complex=True)
            power = z.real.square() + z.imag.square()
            magnitude = power.clamp(min=1e-8).sqrt()  # the clamp keeps the root's gradient finite at zero
            mel = filters.T @ magnitude
            views.append((magnitude.clamp(min=FLOOR).log(), mel.clamp(min=FLOOR).log()))
        return views


def spectral_loss(made, real):
    """Mean absolute difference of log mel and log magnitude, over resolutions."""
    loss = 0.0
    for (log_made, mel_made), (log_real, mel_real) in zip(made, real):
        loss = loss + functional.l1_loss(mel_made, mel_real) + 0.5 * functional.l1_loss(log_made, log_real)
    return loss / len(made)


# -------------------------------------------------------------------------------------------------- adversaries

class Discriminator(nn.Module):
    """A wave folded into rows of `period` samples, or averaged down by `scale`, through strided convolutions.

    A convolution over every p-th sample sees the periodic structure that an average over neighbours washes out.
    """

    def __init__(self, period=1, scale=1):
        super().__init__()
        self.period, self.scale = period, scale
        kernel, stride = (5, 3) if period > 1 else (15, 4)
        widths = (1, 8, 32, 64, 64)
        self.convs = nn.ModuleList(
            nn.Conv1d(widths[i], widths[i + 1], kernel, stride, padding=kernel // 2) for i in range(4))
        self.last = nn.Conv1d(widths[-1], 1, 3, padding=1)

    def forward(self, samples):
        """(B, S) -> every layer's output, the verdict (1 = real) last."""
        x = samples[:, None]
        if self.scale > 1:
            x = functional.avg_pool1d(x, self.scale)
        if self.period > 1:  # every column of the folded wave is a row of the batch
            x = x[..., :x.shape[-1] // self.period * self.period]
            x = x.reshape(len(x), -1, self.period).transpose(1, 2).reshape(len(x) * self.period, 1, -1)
        outputs = []
        for conv in self.convs:
            x = functional.leaky_relu(conv(x), SLOPE)
            outputs.append(x)
        return [*outputs, self.last(x)]


class Discriminators(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([*(Discriminator(period=period) for period in PERIODS),
                                    *(Discriminator(scale=scale) for scale in SCALES)])

    def forward(self, samples):
        return [part(samples) for part in self.parts]


def discriminator_loss(real, made):
    """Least squares: real -> 1, made -> 0."""
    return sum((1 - r[-1].float()).square().mean() + m[-1].float().square().mean() for r, m in zip(real, made))


def adversarial_loss(real, made):
    """(made -> 1, distance of the discriminators' inner features)."""
    verdict = sum((1 - m[-1].float()).square().mean() for m in made)
    features = sum(functional.l1_loss(a.float(), b.float().detach())
                   for m, r in zip(made, real) for a, b in zip(m[:-1], r[:-1]))
    return verdict, features


# -------------------------------------------------------------------------------------------------- one step

class Run:
    """Everything that a step changes, and its way to disk and back."""

    def __init__(self, options, vocoder):
        self.path = Path(options.run) / "state.safetensors"
        self.vocoder, self.adversaries = vocoder, Discriminators()
        self.modules = {"vocoder": self.vocoder, "adversaries": self.adversaries}
        self.optimizers = {name: torch.optim.Adam(module.parameters(), lr=0.0, betas=(0.8, 0.99), fused=True)
                           for name, module in self.modules.items()}
        self.step, self.skipped, self.seconds = 0, 0, 0.0

    def save(self):
        tensors = {"progress": torch.tensor([self.step, self.skipped, self.seconds], dtype=torch.float64)}
        for name, module in self.modules.items():
            tensors |= {f"{name}.weight.{key}": tensor for key, tensor in module.state_dict().items()}
            for i, moments in self.optimizers[name].state_dict()["state"].items():
                tensors |= {f"{name}.moment.{i}.{key}": tensor for key, tensor in moments.items()}
        files.write_tensors(self.path, tensors)  # one file: a kill between two could pair unlike halves

    def load(self):
        tensors = files.read_tensors(self.path)
        step, skipped, self.seconds = tensors.pop("progress").tolist()
        self.step, self.skipped = int(step), int(skipped)
        for name, module in self.modules.items():
            weights, moments = f"{name}.weight.", f"{name}.moment."
            module.load_state_dict({key.removeprefix(weights): tensor for key, tensor in tensors.items()
                                    if key.startswith(weights)})
            state = {}
            for key, tensor in tensors.items():
                if key.startswith(moments):
                    i, moment = key.removeprefix(moments).split(".")
                    state.setdefault(int(i), {})[moment] = tensor
            groups = self.optimizers[name].state_dict()["param_groups"]
            self.optimizers[name].load_state_dict({"state": state, "param_groups": groups})


def bfloat16(options):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16)


def keep_narrow_in_float32(vocoder):
    """Take transposed convolutions to 16 channels or fewer out of autocast.

    Their gradient with respect to the input is a strided convolution, and oneDNN (seen with torch 2.13, AMX) returns
    wrong numbers for that in bfloat16: 8 taps, stride 4, 12 channels gives a cosine of 0.2 to the true gradient.
    """
    def outside(forward):
        def in_float32(x):
            with torch.autocast("cpu", enabled=False):
                return forward(x.float())
        return in_float32
    for up in vocoder.ups:
        if up.out_channels <= 16:
            up.forward = outside(up.forward)


def check_bfloat16(vocoder, corpus, options):
    """Compare a bfloat16 gradient with a float32 one: a wrong kernel would train badly without any error."""
    frames, samples, voices, _, _ = corpus.batch(options, 0)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            made = vocoder.decode(frames, voices)
        weights = [vocoder.conv_pre.weight, *(up.weight for up in vocoder.ups)]
        gradients.append(torch.autograd.grad((made * samples).sum(), weights))
    agreement = min(functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in zip(*gradients))
    if not agreement > 0.9:
        raise ValueError(f"bfloat16 gradients are wrong on this machine (cosine {agreement:.2f} to float32); "
                         "use --bf16=false")


def learning_scale(progress, step):
    """Linear over the first 200 steps, then a cosine from 1 to 0.05 over the run."""
    return min(1.0, (step + 1) / 200) * (0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def train_step(run, corpus, spectra, options, progress):
    """One update of generator, duration predictor and, late in the run, discriminators. Returns the row of log.csv."""
    frames, samples, voices, units, runs = corpus.batch(options, run.step)
    torch.manual_seed(options.seed * 1_000_003 + run.step)  # dropout depends on the step only: a resumed run agrees
    scale = learning_scale(progress, run.step)
    with bfloat16(options):
        made = run.vocoder.decode(frames, voices)
    wave = made.detach().requires_grad_()  # losses meet here, and one gradient goes back through the generator
    spectral = spectral_loss(spectra(wave), spectra(samples))
    loss, row = spectral, {"spectral": spectral.item()}
    if progress >= 1 - options.adversarial:
        # One pass of the discriminators serves both sides: their own loss goes to their weights, ours to the wave.
        length = min(SEGMENT, options.crop) * corpus.hop
        first = int(torch.randint(samples.shape[1] - length + 1, ()))
        with bfloat16(options):
            real, fake = (run.adversaries(x[:, first:first + length]) for x in (samples, wave))
        discrimination = discriminator_loss(real, fake)
        weights = list(run.adversaries.parameters())
        discrimination.backward(inputs=weights, retain_graph=True)
        verdict, features = adversarial_loss(real, fake)
        loss = loss + ADVERSARIAL_WEIGHT * verdict + FEATURE_WEIGHT * features
        row |= {"verdict": verdict.item(), "features": features.item(), "discrimination": discrimination.item()}
    loss.backward(inputs=[wave])
    made.backward(wave.grad)
    true = torch.log1p(runs.clamp(max=LONGEST_RUN).float())
    duration = functional.mse_loss(run.vocoder.dur_predictor(run.vocoder.dict(units)), true)
    duration.backward()
    row |= {"duration": duration.item(), "lr": scale * options.lr}
    row["norm"], finite = update(run, scale, options)
    run.skipped += not finite
    return row


def update(run, scale, options):
    """Clip and apply both gradients; a step with any that is not finite is dropped whole. Returns (norm, finite)."""
    norms = [nn.utils.clip_grad_norm_(module.parameters(), options.clip) for module in run.modules.values()]
    finite = all(math.isfinite(norm) for norm in norms)
    for optimizer, lr in zip(run.optimizers.values(), (options.lr, options.adversary_lr)):
        optimizer.param_groups[0]["lr"] = lr * scale
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return float(norms[0]), finite


# -------------------------------------------------------------------------------------------------- the run

@torch.no_grad()
def validate(vocoder, corpus):
    """Held-out recordings: log-mel distance with true timing; of the first voice frames of error per unit, ratio of lengths."""
    vocoder.eval()
    spectra, distance, error, predicted, total, frames, count = Spectra(SPECTRA[-1:]), 0.0, 0, 0, 0, 0, 0
    for row in corpus.held_out:
        units, runs, frame_units, _, voice = row
        made, real = (spectra(wav[None])[0][1] for wav in (vocoder(units, runs, voice), corpus.samples(row)))
        distance, frames = distance + (made - real).abs().mean().item() * len(frame_units), frames + len(frame_units)
        if voice == 0:
            guess, true = vocoder.durations(torch.from_numpy(units)), torch.from_numpy(runs).clamp(max=LONGEST_RUN)
            error, predicted = error + int((guess - true).abs().sum()), predicted + int(guess.sum())
            total, count = total + int(true.sum()), count + len(units)
    vocoder.train()
    return {"valid_mel": distance / frames, "valid_frames": error / count, "valid_length": predicted / total}


@torch.no_grad()
def match_total_length(vocoder, corpus, documents=100):
    """Shift the predictor's bias so that the predicted lengths of the first voice's speech add up to the true ones.

    Squared error in the logarithm aims at a geometric mean, and the rounding drops what lies below one and a half
    frames, so the plain prediction speaks several percent too fast.
    """
    vocoder.eval()
    rows = corpus.talking[::max(1, len(corpus.talking) // documents)]
    bias, total = vocoder.dur_predictor.proj.bias, sum(int(row[1].clip(max=LONGEST_RUN).sum()) for row in rows)
    plain, low, high = bias.clone(), -0.5, 0.5
    for _ in range(12):  # halving: the total grows with the bias
        bias.copy_(plain + (low + high) / 2)
        predicted = sum(int(vocoder.durations(torch.from_numpy(row[0])).sum()) for row in rows)
        low, high = (low, (low + high) / 2) if predicted > total else ((low + high) / 2, high)


def numbers(options, name):
    """The whole numbers of an option like --rates."""
    text = getattr(options, name)
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", text):
        raise ValueError(f"--{name.replace('_', '-')}={text}: expected whole numbers above 0, divided by commas")
    return [int(number) for number in text.split(",")]


def network(options, num_units):
    """The options as a published-style config."""
    rates, taps, blocks = (numbers(options, name) for name in ("rates", "kernels", "block_kernels"))
    several = len(options.units) > 1  # voices
    return VocoderConfig(
        upsample_rates=tuple(rates), upsample_kernel_sizes=tuple(taps), upsample_initial_channel=options.width,
        resblock_kernel_sizes=tuple(blocks), resblock_dilation_sizes=((1, 3, 5),) * len(blocks),
        num_embeddings=num_units, embedding_dim=options.embedding, num_speakers=several * len(options.units),
        model_in_dim=options.embedding * (1 + several),
        code_hop_size=math.prod(rates),
        dur_predictor_params=DurationConfig(options.embedding, options.embedding))


def export(vocoder, recipe, options):
    dtype = torch.float16 if options.half else torch.float32
    tensors = {name: tensor.to(dtype) for name, tensor in vocoder.state_dict().items()}
    settings = {**dataclasses.asdict(vocoder.config), "tokenizer": recipe, "multispkr": bool(vocoder.config.num_speakers)}
    files.write_model(options.out, settings, tensors)
    if options.speakers:
        files.write_text(Path(options.out) / "speakers.txt", "".join(f"{name}\n" for name in options.speakers))


COLUMNS = ("step", "minutes", "spectral", "duration", "verdict", "features", "discrimination", "lr", "norm", "skipped",
           "valid_mel", "valid_frames", "valid_length")


class Log:
    """log.csv: a row of means every --log-interval steps, a row at every validation."""

    def __init__(self, path, step):
        rows = []
        if path.exists() and step:  # after a kill the file may be ahead of the state
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) <= step]
        self.file = open(path, "w", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(rows)

    def write(self, run, values):
        row = {"step": run.step, "minutes": round(run.seconds / 60, 2), "skipped": run.skipped}
        self.writer.writerow(row | {key: f"{value:.5g}" for key, value in values.items()})
        self.file.flush()


def train(run, corpus, options):
    """Steps until the schedule ends or a signal comes; at the end the finished vocoder."""
    log, spectra, rows, stop = Log(Path(options.run) / "log.csv", run.step), Spectra(), [], []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(1))  # finish the step, save, leave
    began, saved = time.monotonic() - run.seconds, run.seconds

    def progress():
        return run.step / options.steps if options.steps else run.seconds / 60 / options.minutes
    with config.progress(total=100, desc="training", unit="%") as bar:
        while progress() < 1 and not stop:
            rows.append(train_step(run, corpus, spectra, options, progress()))
            run.step, run.seconds = run.step + 1, time.monotonic() - began
            bar.update(int(100 * progress()) - bar.n)
            if run.step % options.log_interval == 0:
                log.write(run, {key: np.mean([row[key] for row in rows if key in row]) for key in rows[-1]})
                rows.clear()
            if run.seconds - saved > 60 * options.save_minutes:
                run.save()
                log.write(run, validate(run.vocoder, corpus))
                saved = run.seconds
    run.save()
    if stop:
        print(f"stopped after step {run.step}; the same command goes on from here")
        return
    match_total_length(run.vocoder, corpus)
    values = validate(run.vocoder, corpus)
    log.write(run, values)
    export(run.vocoder, corpus.recipe, options)
    print(f"{run.step} steps, {run.skipped} skipped; mel distance {values['valid_mel']:.3f}, duration error "
          f"{values['valid_frames']:.3f} frames a unit, length ratio {values['valid_length']:.3f}; {options.out}")


def main(argv=None):
    options = config.load(TrainVocoderConfig, argv)
    if options.bf16 is None:
        dtype, why = training_dtype("auto", hardware_bfloat16("cpu"))
        options = dataclasses.replace(options, bf16=dtype == "bfloat16")
        print(why)
    files.refuse_existing(options.out, remedy="delete it, or give another --out")
    if options.speakers and len(options.speakers) != len(options.units):
        raise ValueError(f"{len(options.speakers)} --speakers for {len(options.units)} folders of --units; name one for each")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # tiny numbers after the leaky ReLUs are slow on a CPU and inaudible
    torch.manual_seed(options.seed)
    folder, hop = Path(options.run), math.prod(numbers(options, "rates"))
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(options, hop)
    run = Run(options, Vocoder(network(options, corpus.recipe["num_units"])))
    if run.path.exists():
        before = config.load(TrainVocoderConfig, [str(folder / "config.toml")])
        changed = [name for name, value in dataclasses.asdict(options).items()
                   if value != getattr(before, name) and name not in ("out", "threads", "save_minutes", "log_interval")]
        if changed:
            raise ValueError(f"{folder} holds a run with another --{changed[0].replace('_', '-')}="
                             f"{getattr(before, changed[0])}; repeat it, choose another --run or delete the folder")
        run.load()
        print(f"going on from step {run.step}")
    (folder / "config.toml").write_text(config.to_toml(options))
    size = sum(parameter.numel() for parameter in run.vocoder.parameters())
    print(f"{size / 1e6:.2f} M parameters, {len(corpus.rows)} recordings, {len(corpus.held_out)} held out")
    if options.bf16:
        keep_narrow_in_float32(run.vocoder)
        check_bfloat16(run.vocoder, corpus, options)
    with files.locked(folder, "run"):
        train(run, corpus, options)


if __name__ == "__main__":
    config.command(main)
