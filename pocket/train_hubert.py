"""HuBERT in miniature, really pretrained: masked prediction of k-means targets, two iterations, then the units.

    waveform -> convolutions -> frames, about half of them masked in spans -> transformer -> cross-entropy with the
    cluster of each masked frame.  Targets of iteration 1: k-means of MFCC (normalised per recording);
    of iteration 2: k-means of a middle layer after iteration 1. Last, k-means (K = 100) of a middle layer gives the units.

    python -m pocket.train_hubert --speech=build/speech/train --val=build/speech/val --out=build/hubert

Differences from the original (Hsu et al. 2021, arXiv 2106.07447, section III): 25 Hz from the start with an eighth
convolution, as the mHuBERT of TWIST has it; a positional convolution after BatchNorm, as there; a linear soft-max head in
place of the cosine one; iteration 2 goes on from the weights of iteration 1 with a new head, which saves hours.
Shapes: B batch, S samples, F frames, C width, K clusters.
"""
import csv
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import soundfile
import torch
import torch.nn as nn
from torch.nn import functional

import config
from checkpoints import files, pretrained
from speech.audio import SAMPLE_RATE
from speech.hubert import Hubert, HubertConfig
from speech.kmeans import fit_kmeans, nearest_centers

SHAPE = HubertConfig(
    conv_dim=(32, 64, 96, 128, 128, 128, 192, 192), conv_kernel=(10, 3, 3, 3, 3, 2, 2, 2),
    conv_stride=(5, 2, 2, 2, 2, 2, 2, 2), n_embd=192, n_layer=5, n_head=4, n_inner=768,
    pos_kernel=32, pos_groups=8, pos_batch_norm=True)
HOP, FIELD = 640, 720  # samples per frame and samples that one frame sees
MASK_SPAN = 5  # frames, 200 ms
MASK_SHARE = 0.8  # span starts are drawn so that this share would be masked if spans never overlapped


@dataclass(frozen=True)
class HubertTrainConfig:
    speech: str = "build/speech/train"  # folder of flac files with phones.tsv
    val: str = "build/speech/val"  # other stories, for the quality report
    out: str = "build/hubert"  # result: config.json, model.safetensors, kmeans.safetensors, quality.json
    num_units: int = 100  # K of the final k-means
    targets_1: int = 100  # clusters of MFCC, iteration 1
    targets_2: int = 200  # clusters of hidden features, iteration 2
    steps_1: int = 3000  # updates of iteration 1
    steps_2: int = 3500  # updates of iteration 2
    target_layer: int = 3  # layer whose features become the targets of iteration 2
    batch: int = 16  # crops per update
    crop_frames: int = 100  # frames per crop (4 s)
    peak_lr: float = 1e-3  # AdamW, linear warm-up over 5 % of the updates, then linear decay
    dtype: str = "float32"  # float32 | bfloat16 (autocast of matrix products and convolutions)
    save_minutes: float = 5.0  # interval of the resumable checkpoint
    threads: int = 0  # CPU threads, 0: PyTorch's default
    seed: int = 0  # of initialisation, crops, masks and k-means
    RANGES = {name: (1, config.MOST) for name in (
        "num_units", "targets_1", "targets_2", "steps_1", "steps_2", "batch", "crop_frames")} | {
        "target_layer": (1, SHAPE.n_layer), "threads": (0, 1024)}
    CHOICES = {"dtype": ("float32", "bfloat16")}


# ---------------------------------------------------------------------------------------------- speech and targets

class Speech:
    """All recordings of a folder as one int16 tensor, with phoneme and voice of every frame."""

    def __init__(self, folder):
        with open(Path(folder) / "phones.tsv", newline="") as file:
            self.rows = list(csv.DictReader(file, delimiter="\t"))
        waves = [torch.from_numpy(soundfile.read(Path(folder) / row["file"], dtype="int16")[0]) for row in self.rows]
        self.samples = torch.cat(waves)
        lengths = torch.tensor([len(wave) for wave in waves])
        self.starts = lengths.cumsum(0) - lengths
        self.frames = (lengths - FIELD) // HOP + 1
        self.frame_starts = self.frames.cumsum(0) - self.frames  # row of a recording's frame 0 in per-frame tensors

    def wave(self, i, first_frame=0, frames=None):
        """Samples that exactly `frames` frames of recording i see, float32."""
        frames = int(self.frames[i]) - first_frame if frames is None else frames
        start = int(self.starts[i]) + first_frame * HOP
        return self.samples[start:start + (frames - 1) * HOP + FIELD].float() / 32768

    def labels(self):
        """phone (N,), voice (N,) int64 of every frame: the phoneme sounding at the frame's centre."""
        names, phones, voices = {}, [], []
        for row, frames in zip(self.rows, self.frames.tolist()):
            events = [event.partition(":") for event in row["phones"].split(" ")]
            starts = torch.tensor([float(start) for start, _, _ in events])
            ids = torch.tensor([names.setdefault(phone.strip("',%=_|") or "pause", len(names)) for _, _, phone in events])
            centers = (torch.arange(frames) * HOP + FIELD / 2) / SAMPLE_RATE
            phones.append(ids[(torch.searchsorted(starts, centers, right=True) - 1).clamp(min=0)])
            voices.append(torch.full((frames,), int(row["voice"])))
        return torch.cat(phones), torch.cat(voices)


def mel_filters(bands, fft, low=20.0, high=7600.0, dtype=torch.float32):
    """(fft // 2 + 1, bands) float32 triangles, equally spaced on the mel scale 2595 log10(1 + f / 700); dtype: computed in."""
    def mel(f):
        return 2595 * math.log10(1 + f / 700)
    edges = 700 * (10 ** (torch.linspace(mel(low), mel(high), bands + 2, dtype=dtype) / 2595) - 1)
    f = torch.linspace(0, SAMPLE_RATE / 2, fft // 2 + 1, dtype=dtype)[:, None]
    rising = (f - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - f) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def mfcc(wave, normalize):
    """13 cepstra and their differences, at the HuBERT frames: (S,) -> (F, 39).

    Computed every 10 ms over 25 ms windows, then averaged over the 40 ms of a frame. normalize: zero mean and unit
    variance over the recording, which takes most of the speaker's colour out.
    """
    frames = (len(wave) - FIELD) // HOP + 1
    window = torch.hann_window(400)
    power = torch.stft(wave, 512, 160, 400, window, center=True, return_complex=True).abs().square()  # (257, n)
    log_mel = (power.T @ mel_filters(40, 512) + 1e-6).log()
    n = torch.arange(40) + 0.5
    cosine = torch.cos(torch.pi / 40 * n[:, None] * torch.arange(13)) * math.sqrt(2 / 40)  # DCT-II
    cepstra = log_mel @ cosine  # (n, 13)

    def difference(x):
        padded = functional.pad(x.T[None], (2, 2), mode="replicate")[0].T
        return (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10
    features = torch.cat([cepstra, difference(cepstra), difference(difference(cepstra))], dim=1)
    # centre of frame f is sample 640 f + 360; spectra are centred at multiples of 160: average 4 of them
    start = torch.arange(frames) * 4 + 1
    pooled = torch.stack([features[start + i] for i in range(4)]).mean(0)
    if normalize:
        pooled = (pooled - pooled.mean(0)) / (pooled.std(0) + 1e-5)
    return pooled


def cluster(features, k, seed, sample=80_000):
    """k-means centres (k, C) of (N, C) features, fitted on a random sample of rows."""
    generator = torch.Generator().manual_seed(seed)
    return fit_kmeans(features[torch.randperm(len(features), generator=generator)[:sample]], k, generator)[0]


@torch.inference_mode()
def hidden(model, speech, layers, recordings=None):
    """{layer: (N, C) features of every frame}, each recording encoded alone."""
    model.eval()
    result = {layer: [] for layer in layers}
    recordings = range(len(speech.rows)) if recordings is None else recordings
    for i in config.progress(recordings, desc="features"):
        x = model(speech.wave(i)[None], 0)
        for layer, block in enumerate(model.layers[:max(layers)], start=1):
            x = block(x)
            if layer in layers:
                result[layer].append(x[0])
    return {layer: torch.cat(parts) for layer, parts in result.items()}


# ---------------------------------------------------------------------------------------------- quality

def information(a, b):
    """Mutual information of two label sequences, and both entropies, in nats."""
    joint = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    joint.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    def entropy(p):
        return -(p[p > 0] * p[p > 0].log()).sum().item()
    h_a, h_b = entropy(joint.sum(1)), entropy(joint.sum(0))
    return h_a + h_b - entropy(joint.flatten()), h_a, h_b


def quality(units, phones, voices):
    """Purity, PNMI = I(phone; unit) / H(phone), and NMI of units and voices (2 I / (H + H))."""
    joint = torch.zeros(int(units.max()) + 1, int(phones.max()) + 1)
    joint.index_put_((units, phones), torch.ones(len(units)), accumulate=True)
    shared, h_phone, _ = information(phones, units)
    speaker, h_voice, h_unit = information(voices, units)
    return {"purity": joint.max(1).values.sum().item() / len(units), "pnmi": shared / h_phone,
            "speaker_nmi": 2 * speaker / (h_voice + h_unit), "used": int((joint.sum(1) > 0).sum())}


# ---------------------------------------------------------------------------------------------- masked prediction

def span_mask(batch, frames, generator):
    """(B, F) bool: spans of MASK_SPAN frames at random starts; they may overlap."""
    starts = torch.rand(batch, frames, generator=generator) < MASK_SHARE / MASK_SPAN
    mask = starts.clone()
    for shift in range(1, MASK_SPAN):
        mask[:, shift:] |= starts[:, :-shift]
    return mask


def pretrain(model, head, speech, targets, steps, options, name, report):
    """Train model and head in place; resumes from the checkpoint that an interrupted run left."""
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    file, first = Path(options.out) / f"{name}.pt", 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        head.load_state_dict(saved["head"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]

    def save(step):
        state = {"model": model.state_dict(), "head": head.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, f"{file}.tmp")
        os.replace(f"{file}.tmp", file)

    model.train()
    long_enough = (speech.frames >= options.crop_frames).nonzero().flatten()
    saved_at, losses, hits = time.time(), [], []
    bar = config.progress(range(first, steps), initial=first, total=steps, desc=name)
    for step in bar:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)  # crops and masks of this step
        picks = long_enough[torch.randint(len(long_enough), (options.batch,), generator=generator)]
        waves, labels = [], []
        for i in picks.tolist():
            begin = int(torch.randint(int(speech.frames[i]) - options.crop_frames + 1, (1,), generator=generator))
            waves.append(speech.wave(i, begin, options.crop_frames))
            row = int(speech.frame_starts[i]) + begin
            labels.append(targets[row:row + options.crop_frames])
        mask = span_mask(options.batch, options.crop_frames, generator)
        labels = torch.stack(labels)[mask]
        progress = (step + 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = options.peak_lr * min(progress / 0.05, (1 - progress) / 0.95 + 0.02)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            logits = head(model(torch.stack(waves), mask=mask)[mask])
        loss = functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        losses.append(loss.item())
        hits.append((logits.argmax(1) == labels).float().mean().item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            row = [name, step + 1, sum(losses) / len(losses), sum(hits) / len(hits)]
            report(row)
            bar.set_postfix(loss=f"{row[2]:.3f}", masked_accuracy=f"{row[3]:.3f}")
            losses, hits = [], []
        if time.time() - saved_at > 60 * options.save_minutes:
            save(step + 1)
            saved_at = time.time()
    save(steps)


def main(argv=None):
    options = config.load(HubertTrainConfig, argv)
    with files.locked(options.out, "run"):
        build(options)


def build(options):
    """From recordings to the tokenizer in --out."""
    torch.set_flush_denormal(True)
    if options.threads:
        torch.set_num_threads(options.threads)
    out = Path(options.out)
    files.refuse_existing(out / "quality.json", remedy="a finished tokenizer; delete the folder, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    speech, val = Speech(options.speech), Speech(options.val)
    print(f"{len(speech.rows)} recordings, {len(speech.samples) / SAMPLE_RATE / 3600:.2f} h; "
          f"validation {len(val.samples) / SAMPLE_RATE / 3600:.2f} h")

    def report(row):
        with open(out / "log.csv", "a", newline="") as file:
            csv.writer(file).writerow([*row, int(time.time())])

    # The baseline that HuBERT has to beat, and the targets of iteration 1.
    phones, voices = val.labels()
    results = {}
    for normalize in (False, True):
        features = torch.cat([mfcc(speech.wave(i), normalize) for i in range(len(speech.rows))])
        centers = cluster(features, options.targets_1, options.seed)
        targets = nearest_centers(features, centers)[1]  # those of the second pass, normalised, are kept
        units = nearest_centers(torch.cat([mfcc(val.wave(i), normalize) for i in range(len(val.rows))]), centers)[1]
        results["mfcc normalised per recording" if normalize else "mfcc"] = quality(units, phones, voices)
    print(results, flush=True)

    model = Hubert(SHAPE)
    nn.init.normal_(model.mask_embedding, std=0.1)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    pretrain(model, nn.Linear(SHAPE.n_embd, options.targets_1), speech, targets, options.steps_1, options, "iteration_1",
             report)
    features = hidden(model, speech, [options.target_layer])[options.target_layer]
    targets = nearest_centers(features, cluster(features, options.targets_2, options.seed))[1]
    del features
    results.update({f"iteration 1 {name}": result for name, (_, result) in score(model, speech, val, options).items()})
    torch.manual_seed(options.seed + 1)
    pretrain(model, nn.Linear(SHAPE.n_embd, options.targets_2), speech, targets, options.steps_2, options, "iteration_2",
             report)
    # Store at half precision, as most published weights are, and fit k-means on what a reader will compute.
    model.load_state_dict({name: tensor.half().float() if tensor.is_floating_point() else tensor
                           for name, tensor in model.state_dict().items()})
    layers = score(model, speech, val, options)
    results.update({f"iteration 2 {name}": result for name, (_, result) in layers.items()})
    best = max(layers, key=lambda name: layers[name][1]["pnmi"] - layers[name][1]["speaker_nmi"])
    centers, layer = layers[best][0], int(best.split()[-1])
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    settings, tensors = pretrained.write_hubert(asdict(SHAPE), half)
    files.write_tensors(out / "model.safetensors", tensors)
    files.write_json(out / "config.json", settings)
    files.write_tensors(out / "kmeans.safetensors", {"centers": centers}, {"layer": str(layer)})
    files.write_json(out / "quality.json", {"layer": layer, "results": results})
    print(f"units: layer {layer}, K = {options.num_units}; wrote {out}")


def score(model, speech, val, options):
    """{"layer n": (k-means centres fitted on the training stories, quality of the units on validation)}."""
    layers = range(1, SHAPE.n_layer + 1)
    few = range(0, len(speech.rows), max(1, len(speech.rows) // 500))
    fitted, held_out = hidden(model, speech, layers, few), hidden(model, val, layers)
    phones, voices = val.labels()
    results = {}
    for layer in layers:
        centers = cluster(fitted[layer], options.num_units, options.seed)
        results[f"layer {layer}"] = centers, quality(nearest_centers(held_out[layer], centers)[1], phones, voices)
        print(f"layer {layer}", results[f"layer {layer}"][1], flush=True)
    return results


if __name__ == "__main__":
    config.command(main)
