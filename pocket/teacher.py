"""A teacher for the pocket HuBERT: what an offline recogniser's encoder makes of every frame, as unit shards.

    recordings --encoder of moonshine (tiny)--> (F, 288) at 25 Hz --three frames, projection--> (F, 64) --k-means--> OUT/k100, ...
                                                          ^                     |
                                                          +---- phones ---------+--> OUT/phones: what the projection reads

The encoder's features hold far more than k-means finds in them: what is phonetic is a small part. The projection is that part,
learnt from aligned phones (phones.tsv) where there are any; where there are none, it is whitening, and the units are poorer.
Recordings of every folder get units; each folder's phones have a head of their own, as their alphabets may differ.

    pip install -e .[factory]
    python -m pocket.teacher --speech=build/people/train,build/speech/train --out=build/units/teacher

A recogniser has learnt from text: what is taught by it is not textless. Shapes: S samples, F frames, N frames of all, K centres.
"""
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional

import config
from checkpoints import files
from corpus.shards import write_shards
from pocket.recordings import FIELD, HOP, Speech, split
from pocket.train_vocoder import numbers
from speech.audio import SAMPLE_RATE
from speech.encoder import deduplicate
from speech.kmeans import fingerprint, fit_kmeans, nearest_centers

PACKAGES = ("moonshine_voice", "onnxruntime")  # of the extra `factory`
WIDTH = 288  # of the encoder's features
STRIDE, SEEN = 64 * 3 * 2, 127 + 6 * 64 + 2 * 192  # samples per encoder frame, and samples that its three convolutions see
PROJECTED = 64
LONGEST = 30  # seconds in one forward of the encoder; longer recordings go in pieces


@dataclass(frozen=True)
class TeacherConfig:
    speech: str = "build/people/train,build/speech/train"  # folders of recordings, each with phones.tsv if it has one
    out: str = "build/units/teacher"  # folder for the shards: k100, k500, ..., phones
    num_units: str = "100,200,500"  # K of each k-means
    steps: int = 6000  # updates of the projection
    batch: int = 1024  # frames an update, half of them from the first folder
    threads: int = 0  # CPU threads, 0: all
    seed: int = 0  # of the projection and of k-means
    RANGES = {"steps": (0, config.MOST), "batch": (2, config.MOST), "threads": (0, 1024)}


class Encoder:
    """The recogniser's encoder: samples -> features at the frames of the pocket HuBERT."""

    def __init__(self, threads=0):
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(f"{' and '.join(missing)} not installed: pip install -e .[factory]", name=missing[0])
        import moonshine_voice
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = Path(moonshine_voice.__file__).parent / "assets/tiny-en/encoder_model.ort"
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, wav):
        """(S,) float32 -> (F, 288) float32: frame f as at the centre of the HuBERT's, sample 640 f + 360."""
        frames = (len(wav) - FIELD) // HOP + 1
        pieces, size = [], LONGEST * SAMPLE_RATE // HOP
        for first in range(0, frames, size):
            count = min(size, frames - first)
            piece = wav[first * HOP:(first + count - 1) * HOP + FIELD]
            piece = functional.pad(piece, (0, max(0, SEEN - len(piece))))  # the encoder's shortest input
            h = self.session.run(None, {"input_values": piece[None].numpy(),
                                        "attention_mask": np.ones((1, len(piece)), np.int64)})[0][0]
            at = np.clip((np.arange(count) * HOP + FIELD / 2 - SEEN / 2) / STRIDE, 0, len(h) - 1)
            low = np.floor(at).astype(int)
            share = (at - low)[:, None].astype(np.float32)
            pieces.append(h[low] * (1 - share) + h[np.minimum(low + 1, len(h) - 1)] * share)
        return torch.from_numpy(np.concatenate(pieces))


class Projection(nn.Module):
    """Three frames of features -> 64 numbers of length 8 -> phones. heads: how many phones each folder has; 0: none known."""

    def __init__(self, mean, std, heads):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.project = nn.Linear(3 * WIDTH, PROJECTED)
        self.heads = nn.ModuleList(nn.Linear(PROJECTED, max(1, count)) for count in heads)

    def forward(self, x):
        """(N, 3, 288) -> (N, 64)"""
        return functional.layer_norm(self.project(((x - self.mean) / self.std).flatten(1)), (PROJECTED,))


def learn(features, near, labels, folder_of, heads, options):
    """The projection, from frames whose phones are known. labels (N,), -1: unknown; near (N, 3): rows of a frame and of both
    its neighbours."""
    projection = Projection(features.float().mean(0), features.float().std(0), heads)
    optimizer = torch.optim.AdamW(projection.parameters(), lr=2e-3, weight_decay=0.01)
    known = [((labels >= 0) & (folder_of == number)).nonzero().flatten() for number in range(len(heads))]
    parts = [number for number, rows in enumerate(known) if len(rows)]
    for step in config.progress(range(options.steps), desc="projection"):
        loss = 0.0
        for number in parts:
            rows = known[number][torch.randint(len(known[number]), (options.batch // len(parts),))]
            z = functional.dropout(projection(features[near[rows]].float()), 0.1)
            loss = loss + functional.cross_entropy(projection.heads[number](z), labels[rows], label_smoothing=0.05) / len(parts)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / options.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return projection.eval()


@torch.inference_mode()
def main(argv=None):
    options = config.load(TeacherConfig, argv)
    folders = split(options.speech)
    sizes = numbers(options, "num_units")
    for name in [*(f"k{k}" for k in sizes), "phones"]:
        files.refuse_existing(Path(options.out, name, "meta.json"), remedy="delete the folder, or give another --out")
    torch.manual_seed(options.seed)
    encoder = Encoder(options.threads)
    speech = Speech(*folders)
    features = torch.cat([encoder(speech.wave(i)).half() for i in config.progress(range(len(speech.names)), desc="features")])
    labels, phones = speech.phone_labels()
    frames = torch.arange(len(features))
    first = speech.frame_starts.repeat_interleave(speech.frames)
    last = first + speech.frames.repeat_interleave(speech.frames) - 1
    near = torch.stack([torch.maximum(frames - 1, first), frames, torch.minimum(frames + 1, last)], 1)
    folder_of = torch.tensor(speech.folder_of).repeat_interleave(speech.frames)
    if (labels >= 0).any():
        counts = [len(phones) if (folder_of[labels >= 0] == number).any() else 0 for number in range(len(folders))]
        with torch.inference_mode(False), torch.enable_grad():
            projection = learn(features.clone(), near, labels, folder_of, counts, options)
        z = torch.cat([projection(features[rows].float()) for rows in near.split(10_000)])
        read = torch.cat([torch.stack([head(z[i:i + 10_000]) if count else torch.zeros(len(z[i:i + 10_000]), len(phones))
                                       for head, count in zip(projection.heads, counts)])
                          [folder_of[i:i + 10_000], torch.arange(len(z[i:i + 10_000]))].argmax(1)
                          for i in range(0, len(z), 10_000)])
        for number, folder in enumerate(folders):
            mine = (folder_of == number) & (labels >= 0)
            print(f"{folder}: {100 * (read[mine] == labels[mine]).float().mean():.1f} % of the frames' phones are read rightly")
    else:
        print("no phones.tsv in these folders: the features are whitened, and the units know less of phones")
        whole = features.float()
        values, vectors = torch.linalg.eigh(torch.cov(whole.T))
        z, read = (whole - whole.mean(0)) @ vectors[:, -PROJECTED:] / values[-PROJECTED:].clamp(min=1e-8).sqrt(), None
    generator = torch.Generator().manual_seed(options.seed)
    few = balanced(folder_of, 200_000, generator)
    for k in sizes:
        centers = fit_kmeans(z[few], k, generator)[0]
        write(Path(options.out, f"k{k}"), speech, nearest_centers(z, centers)[1], k, fingerprint(centers))
    if read is not None:
        write(Path(options.out, "phones"), speech, torch.where(labels >= 0, labels, read), len(phones), "phones")


def balanced(folder_of, size, generator):
    """Rows of about `size` frames, as many of each folder as there are: people must not drown in what a machine spoke."""
    each = [(folder_of == number).nonzero().flatten() for number in folder_of.unique().tolist()]
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:size // len(each)]] for rows in each])


def write(out, speech, units, k, centers):
    recipe = {"kind": "teacher", "model": "moonshine-tiny-en", "num_units": k, "frame_rate": SAMPLE_RATE / HOP,
              "centers": centers, "dedup": True}
    parts = units.split(speech.frames.tolist())
    write_shards(out, recipe, ((name, *map(torch.Tensor.numpy, deduplicate(part)), len(part) * HOP / SAMPLE_RATE)
                               for name, part in zip(speech.names, parts)))
    print(f"wrote {out}")


if __name__ == "__main__":
    config.command(main)
