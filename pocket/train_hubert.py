"""HuBERT in miniature, really pretrained, then its units. Two roads lead there.

    label-free   waveform -> convolutions -> frames, half of them masked in spans -> transformer -> cross-entropy with the
                 cluster of each masked frame. Targets of iteration 1: k-means of MFCC (normalised per recording); of iteration 2:
                 k-means of a middle layer after iteration 1.
    taught       the same network; targets are units that lie in shard folders (--targets, as pocket.teacher writes them), of
                 every frame, seen or masked. Crops are changed as other voices, rooms and microphones would (augment.py), layers
                 are dropped, weights averaged; what is kept is what does best on recordings that are held out.

Units are the nearest centres of a layer's features on both roads. Without labels the centres are k-means (K = 100) of the layer
that is best on held-out recordings; a taught network has learnt its centres with its last layer: a head's logit is the distance
to a centre. (k-means of that layer finds less: .45 where the learnt centres reach a PNMI of .57.)

    python -m pocket.train_hubert --speech=build/speech/train --val=build/speech/val --out=build/hubert
    python -m pocket.train_hubert --speech=build/people/train,build/speech/train --val=build/people/val,build/speech/val \\
        --targets=build/units/teacher/k100,build/units/teacher/phones --out=build/hubert

Differences from the original (Hsu et al. 2021, arXiv 2106.07447, section III): 25 Hz from the start with an eighth
convolution, as the mHuBERT of TWIST has it; a positional convolution after BatchNorm, as there; a linear soft-max head in place
of the cosine one, and of distances where it is taught; iteration 2 goes on from the weights of iteration 1 with a new head,
which saves hours.
Shapes: B batch, S samples, F frames, N frames of all, C width, K clusters.
"""
import copy
import csv
import math
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional

import config
from checkpoints import files, pretrained
from corpus.shards import UnitShards
from pocket import augment
from pocket.recordings import FIELD, HOP, QUIET_VOICE, Speech, split
from speech.audio import SAMPLE_RATE
from speech.encoder import UnitEncoder
from speech.hubert import Hubert, HubertConfig
from speech.kmeans import fit_kmeans, nearest_centers

SHAPE = HubertConfig(
    conv_dim=(32, 64, 96, 128, 128, 128, 192, 192), conv_kernel=(10, 3, 3, 3, 3, 2, 2, 2),
    conv_stride=(5, 2, 2, 2, 2, 2, 2, 2), n_embd=192, n_layer=5, n_head=4, n_inner=768,
    pos_kernel=32, pos_groups=8, pos_batch_norm=True)
FILE_BYTES = 8_000_000  # of weights in one file: repositories like theirs small
MASK_SPAN = 5  # frames, 200 ms
SHORTEST = 20  # frames of a recording that is learnt from
UNKNOWN = -100  # label of a frame that is not there, or has none


@dataclass(frozen=True)
class HubertTrainConfig:
    speech: str = "build/speech/train"  # folders of recordings, A,B,...; crops come from each alike
    val: str = "build/speech/val"  # folders of other recordings, for the quality reports; phones.tsv in them says their phones
    targets: tuple[str, ...] = ()  # shard folders with the unit of every frame of --speech, a head for each: the first makes the
    #                                tokenizer, the others help. None: label-free
    out: str = "build/hubert"  # result: config.json, model.safetensors, kmeans.safetensors, quality.json
    num_units: int = 100  # label-free: K of the final k-means
    targets_1: int = 100  # label-free: clusters of MFCC, iteration 1
    targets_2: int = 200  # label-free: clusters of hidden features, iteration 2
    steps_1: int = 3000  # label-free: updates of iteration 1
    steps_2: int = 3500  # label-free: updates of iteration 2
    target_layer: int = 3  # label-free: layer whose features become the targets of iteration 2
    steps: int = 20_000  # taught: updates
    dropout: float = 0.1  # taught: of what each part of a layer adds, and of the frames that enter the transformer
    layer_drop: float = 0.05  # taught: chance of a whole layer to be passed over
    mask_share: float = 0.8  # of the frames that would be masked if spans never overlapped
    average: float = 0.999  # taught: what the averaged weights, which are kept, keep of themselves at each update; 0: none
    width: int = 192  # of the transformer
    layers: int = 5  # of the transformer; label-free: the best of them, by the report, is the tokenizer's
    batch: int = 16  # crops per update
    crop_frames: int = 100  # frames per crop (4 s)
    peak_lr: float = 1e-3  # AdamW, linear warm-up over 5 % of the updates, then linear decay
    weight_decay: float = 0.01  # AdamW's, of matrices and vectors alike
    dtype: str = "float32"  # float32 | bfloat16 (autocast of matrix products and convolutions)
    eval_interval: int = 1000  # taught: updates between two reports on the held-out recordings
    save_minutes: float = 5.0  # interval of the resumable checkpoint
    threads: int = 0  # CPU threads, 0: PyTorch's default
    seed: int = 0  # of initialisation, crops, masks and k-means
    RANGES = {name: (1, config.MOST) for name in (
        "num_units", "targets_1", "targets_2", "steps_1", "steps_2", "steps", "batch", "crop_frames", "layers", "eval_interval",
        "target_layer")} | {
        "threads": (0, 1024), "width": (64, 4096), "dropout": (0, 0.9), "layer_drop": (0, 0.9), "average": (0, 0.99999),
        "mask_share": (0, 4), "weight_decay": (0, 10)}
    CHOICES = {"dtype": ("float32", "bfloat16")}


# ---------------------------------------------------------------------------------------------- targets

def read_targets(folder, speech):
    """Labels (N,) int64 of every frame from unit shards, and how many kinds there are."""
    shards = UnitShards(folder)
    if shards.recipe.get("frame_rate") != SAMPLE_RATE / HOP:
        raise ValueError(f"--targets={folder} holds {shards.recipe.get('frame_rate')} units a second, expected "
                         f"{SAMPLE_RATE / HOP:g}: one a frame of this HuBERT")
    found = {os.path.normpath(name): i for i, name in enumerate(shards.names)}
    labels = []
    for name, frames in zip(speech.names, speech.frames.tolist()):
        i = found.get(os.path.normpath(name))
        if i is None:
            raise ValueError(f"--targets={folder} has no units of {name}; make them from the same --speech")
        units, runs = map(torch.from_numpy, shards.document(i))
        if runs.sum() != frames:
            raise ValueError(f"--targets={folder}: {int(runs.sum())} frames of units for {name}, expected {frames}; "
                             "make the units of this recording again")
        labels.append(units.repeat_interleave(runs))
    return torch.cat(labels), int(shards.recipe["num_units"])


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
    recordings = range(len(speech.names)) if recordings is None else recordings
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
    """Of units (N,): purity and PNMI = I(phone; unit) / H(phone) where phones (N,) are known, not -1; NMI of units and voices
    (N,), 2 I / (H + H), where there are several; how many units occur."""
    result, known = {}, phones >= 0
    if known.any():
        joint = torch.zeros(int(units.max()) + 1, int(phones.max()) + 1)
        joint.index_put_((units[known], phones[known]), torch.ones(int(known.sum())), accumulate=True)
        shared, h_phone, _ = information(phones[known], units[known])
        result = {"purity": joint.max(1).values.sum().item() / int(known.sum()), "pnmi": shared / h_phone}
    speaker, h_voice, h_unit = information(voices, units)
    if h_voice > 0:
        result["speaker_nmi"] = 2 * speaker / (h_voice + h_unit)
    return result | {"used": len(units.unique())}


def judged(units, speech, folders, apart=math.inf):
    """{folder: quality of the units (N,) of what is said in it}; voices of at least `apart` recordings by themselves, too, and
    then the folder's other voices."""
    phones, voices, groups = speech.phone_labels()[0], speech.voice_labels(), {}
    for number, folder in enumerate(folders):
        said = [(i, voice) for i, (of, voice) in enumerate(zip(speech.folder_of, speech.voices))
                if of == number and voice != QUIET_VOICE]
        many = [voice for voice, count in Counter(voice for _, voice in said).items() if count >= apart]
        groups[folder] = [i for i, _ in said]
        groups |= {f"{folder}, {voice}": [i for i, other in said if other == voice] for voice in many}
        if many:
            groups[f"{folder}, other voices"] = [i for i, voice in said if voice not in many]
    result = {}
    for name, rows in groups.items():
        mine = torch.zeros(len(speech.names), dtype=torch.bool)
        mine[rows] = True
        mine = mine.repeat_interleave(speech.frames)
        if mine.any():
            result[name] = quality(units[mine], phones[mine], voices[mine])
    return result


# ---------------------------------------------------------------------------------------------- masked prediction

class Centers(nn.Module):
    """The head: logits of K units from how near their centres are, -|x - c|^2 / 2 without |x|^2 / 2, which they share.

    So the likeliest unit is the nearest centre, which is what a tokenizer looks for.
    """

    def __init__(self, count, width):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(count, width) / math.sqrt(width))

    def forward(self, x):
        """(..., C) -> (..., K)"""
        return functional.linear(x, self.centers, -self.centers.square().sum(1) / 2)


class Crops:
    """What a step learns from. targets: (T, N) labels of every frame, T targets."""

    def __init__(self, speech, targets, options):
        self.speech, self.targets, self.options = speech, targets, options
        self.usable = (speech.frames >= min(SHORTEST, options.crop_frames)).nonzero().flatten()
        weights, folders = speech.frames[self.usable].double(), torch.tensor(speech.folder_of)[self.usable]
        for folder in folders.unique():  # each folder alike, in it each frame
            weights[folders == folder] /= weights[folders == folder].sum()
        self.weights = weights

    def draw(self, step):
        """waves (B, S), lengths (B,) or None, labels (T, B, F), mask (B, F). Nothing but the step decides them."""
        options, speech = self.options, self.speech
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        picks = self.usable[torch.multinomial(self.weights, 2 * options.batch, replacement=True, generator=generator)].tolist()
        waves, labels = [], torch.full((len(self.targets), options.batch, options.crop_frames), UNKNOWN)
        for row, (i, other) in enumerate(zip(picks[:options.batch], picks[options.batch:])):
            rate = augment.uniform(augment.SLOWEST, augment.FASTEST, generator) if options.targets else 1.0
            frames = min(options.crop_frames, int((speech.frames[i] - 1) / rate))  # after the change of speed
            span = min(int(speech.frames[i]), math.ceil(frames * rate) + 1)  # before it
            begin = int(torch.randint(int(speech.frames[i]) - span + 1, (1,), generator=generator))
            wave, at = speech.wave(i, begin, span), torch.arange(frames)
            if options.targets:
                wave = augment.resampled(wave, rate, (frames - 1) * HOP + FIELD)
                wave = augment.changed(wave, speech.wave(other, 0, min(int(speech.frames[other]), frames)), generator)
                at = (((at * HOP + FIELD / 2) * rate - FIELD / 2) / HOP).round().long().clamp(0, span - 1)
            waves.append(wave[:(frames - 1) * HOP + FIELD])
            labels[:, row, :frames] = self.targets[:, int(speech.frame_starts[i]) + begin + at]
        lengths = torch.tensor([len(wave) for wave in waves])
        starts = torch.rand(options.batch, options.crop_frames, generator=generator) < options.mask_share / MASK_SPAN
        mask = starts.clone()
        for shift in range(1, MASK_SPAN):  # spans may overlap
            mask[:, shift:] |= starts[:, :-shift]
        frames = (int(lengths.max()) - FIELD) // HOP + 1
        return (nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths if len(lengths.unique()) > 1 else None,
                labels[..., :frames], mask[:, :frames])


def regularize(model, options):
    """Dropout of what each part of a layer adds, and layers that are passed over, while the model trains."""
    def dropped(module, inputs, output):
        return functional.dropout(output, options.dropout, module.training)

    def passed(module, inputs, output):
        return inputs[0] if module.training and torch.rand(()) < options.layer_drop else output

    for part in [model.projection, *(part for layer in model.layers for part in (layer.out, layer.up, layer.down))]:
        part.register_forward_hook(dropped)
    for layer in model.layers:
        layer.register_forward_hook(passed)


def pretrain(model, heads, crops, steps, options, name, report, judge=None):
    """Train model and heads in place, those of the averaged weights if there are any; goes on where an interrupted run was.

    judge(model, heads, step): called at every --eval-interval with what would be kept.
    """
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.peak_lr, betas=(0.9, 0.98), weight_decay=options.weight_decay)
    both, taught = nn.ModuleList([model, heads]), bool(options.targets)
    average = copy.deepcopy(both) if taught and options.average else both
    file, first = Path(options.out) / f"{name}.pt", 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        both.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    if taught:
        regularize(model, options)

    def save(step):
        state = {"model": both.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, f"{file}.tmp")
        os.replace(f"{file}.tmp", file)

    saved_at, losses, hits = time.time(), [], []
    bar = config.progress(range(first, steps), initial=first, total=steps, desc=name)
    for step in bar:
        both.train()
        torch.manual_seed(options.seed * 1_000_003 + step)  # of dropout
        waves, lengths, labels, mask = crops.draw(step)
        counted = labels if taught else labels.masked_fill(~mask, UNKNOWN)
        progress = (step + 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = options.peak_lr * min(progress / 0.05, (1 - progress) / 0.95 + 0.02)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            x = model(waves, lengths=lengths, mask=mask)
            logits = [head(x) for head in heads]
        loss = sum(functional.cross_entropy(each.float().flatten(0, 1), right.flatten(), ignore_index=UNKNOWN,
                                            label_smoothing=0.05 * taught) for each, right in zip(logits, counted)) / len(heads)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        if average is not both:
            keep = min(options.average, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(both.parameters()), 1 - keep)
            for mean, buffer in zip(average.buffers(), both.buffers()):
                mean.copy_(buffer)
        losses.append(loss.item())
        known = counted[0] != UNKNOWN
        hits.append((logits[0].argmax(2) == counted[0])[known].float().mean().item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            row = [name, step + 1, sum(losses) / len(losses), sum(hits) / len(hits)]
            report(row)
            bar.set_postfix(loss=f"{row[2]:.3f}", accuracy=f"{row[3]:.3f}")
            losses, hits = [], []
        if judge and ((step + 1) % options.eval_interval == 0 or step + 1 == steps):
            judge(*average, step + 1)
        if time.time() - saved_at > 60 * options.save_minutes:
            save(step + 1)
            saved_at = time.time()
    save(steps)
    both.load_state_dict(average.state_dict())


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
    shape = replace(SHAPE, n_embd=options.width, n_inner=4 * options.width, n_layer=options.layers)
    speech, val = Speech(*split(options.speech)), Speech(*split(options.val))
    print(f"{len(speech.names)} recordings, {speech.hours:.2f} h; held out {len(val.names)}, {val.hours:.2f} h")

    def report(row):
        with open(out / "log.csv", "a", newline="") as file:
            csv.writer(file).writerow([*row, int(time.time())])

    model = Hubert(shape)
    nn.init.normal_(model.mask_embedding, std=0.1)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    results = {}
    learnt = (taught if options.targets else label_free)(model, speech, val, options, report, results)
    # Store at half precision, as most published weights are, and judge (or fit) centres on what a reader will compute.
    model.load_state_dict({name: tensor.half().float() if tensor.is_floating_point() else tensor
                           for name, tensor in model.state_dict().items()})
    layers = chosen(model, learnt, val, options) if learnt else score(model, speech, val, options)
    results |= {f"final {name}": result for name, (_, _, result) in layers.items()}
    best = next(iter(layers)) if learnt else max(layers, key=lambda name: worth(layers[name][2]))
    layer = layers[best][1]
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    settings, tensors = pretrained.write_hubert(asdict(shape), half)
    files.write_model(out / "network", settings, tensors, FILE_BYTES)
    for path in (out / "network").iterdir():
        os.replace(path, out / path.name)
    (out / "network").rmdir()
    for name, (centers, of, _) in layers.items() if learnt else [(best, layers[best])]:
        ending, about = "" if name == best else f"-{name}", {"layer": str(of)}
        if learnt:
            about["certainty"] = f"{doubtful(model, centers, of, val):.3f}"
        files.write_tensors(out / f"kmeans{ending}.safetensors", {"centers": centers}, about)
    files.write_json(out / "quality.json", {"layer": layer, "results": results})
    print(f"units: layer {layer}, K = {len(layers[best][0])}; wrote {out}")


def worth(found):
    """What a layer is chosen by: PNMI less dependence on the speaker, a mean over the folders of --val; without phones, less
    dependence alone."""
    return sum(each.get("pnmi", 0.0) - each.get("speaker_nmi", 0.0) for each in found.values()) / len(found)


def taught(model, speech, val, options, report, results):
    """Learn the units of --targets; what did best on the held-out recordings is in the model at the end.

    Returns: {name of the shard folder: centres (K, C) of its units}.
    """
    found = [read_targets(folder, speech) for folder in options.targets]
    heads = nn.ModuleList(Centers(count, options.width) for _, count in found)
    best, folders = Path(options.out) / "best.pt", split(options.val)

    @torch.inference_mode()
    def judge(model, heads, step):
        model.eval()
        units = torch.cat([heads[0](model(val.wave(i)[None])[0]).argmax(1) for i in range(len(val.names))])
        quality = judged(units, val, folders)
        before = torch.load(best, weights_only=True)["worth"] if best.exists() else -math.inf
        report(["held out", step, *(f"{key} {value:.4f}" for each in quality.values() for key, value in each.items())])
        print(f"{step}: {quality}", flush=True)
        if worth(quality) > before:
            kept = {"worth": worth(quality), "step": step, "model": model.state_dict(), "heads": heads.state_dict()}
            torch.save(kept, f"{best}.tmp")
            os.replace(f"{best}.tmp", best)

    pretrain(model, heads, Crops(speech, torch.stack([labels for labels, _ in found]), options), options.steps, options, "taught",
             report, judge)
    kept = torch.load(best, weights_only=True)
    model.load_state_dict(kept["model"])
    heads.load_state_dict(kept["heads"])
    print(f"kept: update {kept['step']}, which did best on held-out recordings")
    return {Path(folder).name: head.centers.detach() for folder, head in zip(options.targets, heads)}


def chosen(model, learnt, val, options):
    """{name: (centres, their layer, quality of their units on the held-out recordings)} of learnt centres."""
    features = hidden(model, val, [options.layers])[options.layers]
    return {name: (centers, options.layers, judged(nearest_centers(features, centers)[1], val, split(options.val)))
            for name, centers in learnt.items()}


@torch.inference_mode()
def doubtful(model, centers, layer, val):
    """The certainty (UnitEncoder.certainty) below which a recording is hardly speech: four fifths of what nineteen of twenty
    held-out recordings reach."""
    encoder = UnitEncoder(model.eval(), centers, layer)
    each = [encoder.certainty(encoder.features(val.wave(i))) for i in range(len(val.names)) if val.frames[i] > 0]
    return 0.8 * float(torch.tensor(each).quantile(0.05))


def label_free(model, speech, val, options, report, results):
    """Two iterations of masked prediction."""
    # The baseline that HuBERT has to beat, and the targets of iteration 1.
    for normalize in (False, True):
        features = torch.cat([mfcc(speech.wave(i), normalize) for i in range(len(speech.names))])
        centers = cluster(features, options.targets_1, options.seed)
        targets = nearest_centers(features, centers)[1]  # those of the second pass, normalised, are kept
        units = nearest_centers(torch.cat([mfcc(val.wave(i), normalize) for i in range(len(val.names))]), centers)[1]
        results["mfcc normalised per recording" if normalize else "mfcc"] = judged(units, val, split(options.val))
    print(results, flush=True)
    pretrain(model, nn.ModuleList([nn.Linear(options.width, options.targets_1)]), Crops(speech, targets[None], options),
             options.steps_1, options, "iteration_1", report)
    layer = min(options.target_layer, options.layers)
    features = hidden(model, speech, [layer])[layer]
    targets = nearest_centers(features, cluster(features, options.targets_2, options.seed))[1]
    del features
    results |= {f"iteration 1 {name}": result for name, (_, _, result) in score(model, speech, val, options).items()}
    torch.manual_seed(options.seed + 1)
    pretrain(model, nn.ModuleList([nn.Linear(options.width, options.targets_2)]), Crops(speech, targets[None], options),
             options.steps_2, options, "iteration_2", report)


def score(model, speech, val, options):
    """{"layer n": (k-means centres fitted on the training recordings, n, quality of the units on the held-out ones)}."""
    layers, few, folder_of = range(1, options.layers + 1), [], torch.tensor(speech.folder_of)
    for folder in folder_of.unique():  # as many of each
        mine = (folder_of == folder).nonzero().flatten()
        few += mine[::max(1, len(mine) // 500)].tolist()
    fitted, held_out = hidden(model, speech, layers, few), hidden(model, val, layers)
    results = {}
    for layer in layers:
        centers = cluster(fitted[layer], options.num_units, options.seed)
        units = nearest_centers(held_out[layer], centers)[1]
        results[f"layer {layer}"] = centers, layer, judged(units, val, split(options.val))
        print(f"layer {layer}", results[f"layer {layer}"][2], flush=True)
    return results


if __name__ == "__main__":
    config.command(main)
