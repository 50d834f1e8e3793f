"""Speech -> discrete units: HuBERT features, their nearest k-means centre, repeats removed.

    wav (S,) --7 or 8 strided convolutions--> (F, conv width) --projection--> (F, C) --positional convolution-->
    --transformer layers 1..k--> (F, C) --argmin distance to K centres--> frame units (F,) --deduplicate--> units (T,), runs (T,)

One frame is 320 samples (50 Hz) in the original HuBERT and 640 samples (25 Hz) in the mHuBERT that TWIST uses.
Run as a command it turns any tree of audio into unit shards:

    python hubert_units.py recordings/ more.flac --out=units/mine
    torchrun --nproc-per-node=2 hubert_units.py recordings/ --out=units/mine      # files divided over the processes

Sources: HuBERT, Hsu et al. 2021 (arXiv 2106.07447) sections II-III; the 25 Hz variant and deduplication, TWIST
(arXiv 2305.13009) section 3; shapes B batch, S samples, F frames, C width, K centres, T units.
"""
import glob
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import config
import data
import distributed
import download
import pretrained
from audio import SAMPLE_RATE, read_wav

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64"}
CHUNK_SECONDS = 100  # longer recordings are encoded in independent pieces of this length, as published units were


@dataclass(frozen=True)
class HubertConfig:
    conv_dim: tuple[int, ...] = (512,) * 8  # channels after each convolution of the front end
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2, 2)  # taps of each
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2, 2)  # their product is the samples per frame (640 = 25 Hz)
    n_embd: int = 768  # C, width of the transformer
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 3072  # hidden width of the feed-forward network
    pos_kernel: int = 128  # taps of the positional convolution, in frames
    pos_groups: int = 16  # channel groups of the positional convolution
    pos_batch_norm: bool = False  # a BatchNorm before it (25 Hz mHuBERT) instead of weight norm, which loading folds away
    norm_eps: float = 1e-5
    normalize: bool = False  # zero mean and unit variance of the whole waveform first


class EncoderLayer(nn.Module):
    """Post-norm transformer layer: x = LN(x + attention(x)); x = LN(x + feed-forward(x))."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.q, self.k, self.v, self.out = (nn.Linear(C, C) for _ in range(4))
        self.ln_1 = nn.LayerNorm(C, config.norm_eps)
        self.up, self.down = nn.Linear(C, config.n_inner), nn.Linear(config.n_inner, C)
        self.ln_2 = nn.LayerNorm(C, config.norm_eps)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (linear(x).view(B, T, self.n_head, -1).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)  # (B, H, F, D); every frame sees every frame
        x = self.ln_1(x + self.out(y.transpose(1, 2).reshape(B, T, C)))
        return self.ln_2(x + self.down(F.gelu(self.up(x))))


class Hubert(nn.Module):
    """The HuBERT network up to its transformer features; no prediction head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = (1, *config.conv_dim)
        self.convs = nn.ModuleList(
            nn.Conv1d(widths[i], widths[i + 1], kernel, stride, bias=False)
            for i, (kernel, stride) in enumerate(zip(config.conv_kernel, config.conv_stride)))
        # One group a channel: each channel is normalised over TIME, so every sample touches every frame.
        self.group_norm = nn.GroupNorm(config.conv_dim[0], config.conv_dim[0], eps=1e-5)
        self.feature_norm = nn.LayerNorm(config.conv_dim[-1], config.norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.n_embd)
        self.pos_norm = nn.BatchNorm1d(config.n_embd) if config.pos_batch_norm else None
        self.pos_conv = nn.Conv1d(config.n_embd, config.n_embd, config.pos_kernel,
                                  padding=config.pos_kernel // 2, groups=config.pos_groups)
        self.ln_in = nn.LayerNorm(config.n_embd, config.norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layer))
        self.mask_embedding = nn.Parameter(torch.zeros(config.n_embd))  # stands in for masked frames in pretraining

    @property
    def hop(self):
        """Samples per frame."""
        return math.prod(self.config.conv_stride)

    @property
    def receptive_field(self):
        """Samples that one frame sees in the front end, and the shortest input: 400 at 50 Hz, 720 at 25 Hz."""
        field, stride = 1, 1
        for k, s in zip(self.config.conv_kernel, self.config.conv_stride):
            field, stride = field + (k - 1) * stride, stride * s
        return field

    def num_frames(self, num_samples):
        """floor((S - receptive field) / hop) + 1, and 0 below one receptive field."""
        return max(0, (num_samples - self.receptive_field) // self.hop + 1)

    def forward(self, wav, layer=None, mask=None):
        """Features after `layer` transformer layers (all by default; counted as in fairseq: 1 is the first).

        Args:
            wav: (B, S) float32 at 16 kHz, recordings of EQUAL length (padding would change every frame).
            mask: (B, F) bool, frames replaced by the mask embedding (pretraining only).
        Returns: (B, F, C) float.
        """
        if self.config.normalize:
            wav = F.layer_norm(wav, wav.shape[-1:])
        x = self.convs[0](wav[:, None])
        x = F.gelu(self.group_norm(x))
        for conv in self.convs[1:]:
            x = F.gelu(conv(x))
        x = self.projection(self.feature_norm(x.transpose(1, 2)))  # (B, F, C)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_embedding.to(x.dtype), x)
        position = x.transpose(1, 2)
        if self.pos_norm is not None:
            position = self.pos_norm(position)
        position = self.pos_conv(position)
        if self.config.pos_kernel % 2 == 0:
            position = position[:, :, :-1]  # an even kernel with symmetric padding yields one frame too many
        x = self.ln_in(x + F.gelu(position).transpose(1, 2))
        for block in self.layers[:layer]:
            x = block(x)
        return x


class UnitEncoder(nn.Module):
    """HuBERT up to one layer, and k-means: samples -> frame units.

    Attributes: num_units (K), frame_rate (Hz), recipe (what identifies the units; stored beside every shard).
    """

    def __init__(self, hubert, centers, layer, name="hubert"):
        super().__init__()
        if not 1 <= layer <= hubert.config.n_layer:
            raise ValueError(f"layer {layer}: this HuBERT has layers 1 to {hubert.config.n_layer}")
        if centers.ndim != 2 or centers.shape[1] != hubert.config.n_embd:
            raise ValueError(f"k-means centres of shape {tuple(centers.shape)} do not fit features of width "
                             f"{hubert.config.n_embd}; k-means and HuBERT belong to different models")
        self.hubert, self.layer = hubert, layer
        self.register_buffer("centers", centers.float())
        self.num_units = len(centers)
        self.frame_rate = SAMPLE_RATE / hubert.hop
        self.recipe = {"kind": "hubert", "model": name, "layer": layer, "num_units": self.num_units,
                       "frame_rate": self.frame_rate, "centers": data.fingerprint(centers.float())}

    @torch.inference_mode()
    def features(self, wav):
        """(S,) float32 at 16 kHz -> (F, C) float32. Raises ValueError below one receptive field."""
        wav = torch.as_tensor(wav, dtype=torch.float32, device=self.centers.device)
        shortest = self.hubert.receptive_field
        if wav.ndim != 1:
            raise ValueError(f"expected one mono recording of shape (S,), got {tuple(wav.shape)}")
        if len(wav) < shortest:
            raise ValueError(f"{len(wav)} samples are shorter than one frame ({shortest} samples, "
                             f"{1000 * shortest / SAMPLE_RATE:.0f} ms at 16 kHz); give a longer recording")
        chunks = [chunk for chunk in wav.split(CHUNK_SECONDS * SAMPLE_RATE) if len(chunk) >= shortest]
        return torch.cat([self.hubert(chunk[None], self.layer)[0] for chunk in chunks])

    def quantize(self, features):
        """(F, C) -> (F,) int64, the nearest centre; ties go to the lowest index. float32 throughout."""
        scores = self.centers.square().sum(1) - 2 * features.float() @ self.centers.T  # |x - c|^2 less |x|^2
        return scores.argmin(1)

    def encode(self, wav):
        """(S,) float32 at 16 kHz -> (F,) int64 frame units (repeats not yet removed)."""
        return self.quantize(self.features(wav))

    def encode_batch(self, wavs):
        """List of (S_i,) -> list of (F_i,). One at a time: padding would change the units through the group norm."""
        return [self.encode(wav) for wav in wavs]


def deduplicate(frame_units):
    """Collapse runs: (F,) -> units (T,), runs (T,), both int64. [5 5 5 2 2 5] -> [5 2 5], [3 2 1]."""
    frame_units = torch.as_tensor(frame_units)
    if frame_units.numel() == 0:
        empty = torch.zeros(0, dtype=torch.int64)
        return empty, empty.clone()
    return torch.unique_consecutive(frame_units, return_counts=True)


def fit_kmeans(features, k, generator, iterations=25):
    """Lloyd's k-means with k-means++ seeding (Arthur & Vassilvitskii 2007).

    Args: features (N, C) float32; generator: torch.Generator.
    Returns: centres (k, C) float32, mean squared distance to the nearest centre (float).
    """
    if len(features) < k:
        raise ValueError(f"{len(features)} frames cannot be divided into {k} clusters; give more audio")
    energy = features.square().sum(1)
    pick = int(torch.randint(len(features), (1,), generator=generator))
    centers, distance = features[pick][None], torch.full((len(features),), math.inf)
    for _ in range(1, k):  # each new seed is drawn with probability proportional to its squared distance
        last = centers[-1]
        distance = torch.minimum(distance, (energy - 2 * features @ last + last.square().sum()).clamp(min=0))
        total = distance.double().cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * total[-1]
        pick = int(torch.searchsorted(total, draw).clamp(max=len(features) - 1))
        centers = torch.cat([centers, features[pick][None]])
    for _ in range(iterations):
        nearest, labels = (centers.square().sum(1) - 2 * features @ centers.T).min(1)
        inertia = (nearest + energy).clamp(min=0).mean().item()
        counts = torch.bincount(labels, minlength=k)
        centers = torch.zeros_like(centers).index_add_(0, labels, features) / counts.clamp(min=1)[:, None]
        for dead in (counts == 0).nonzero().flatten().tolist():  # re-seed on a random frame
            centers[dead] = features[int(torch.randint(len(features), (1,), generator=generator))]
    return centers, inertia


def load_hubert(path):
    """A Hugging Face HuBERT folder (config.json + weights) or a fairseq .pt file -> Hubert in eval mode, float32."""
    options, tensors = pretrained.read_hubert(path)
    with torch.device("meta"):
        hubert = Hubert(HubertConfig(**options))
    pretrained.check_shapes(hubert.state_dict(), tensors, path)
    hubert.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True, assign=True)
    return hubert.eval().requires_grad_(False)


def find_kmeans(path):
    """The k-means file that belongs to a tokenizer on disk: kmeans.* in its folder, or HUBERT_L11_km500.bin beside HUBERT.pt."""
    folder = path if path.is_dir() else path.parent
    beside = [] if path.is_dir() else sorted(folder.glob(f"{glob.escape(path.stem)}*_km*"))
    for file in (*(folder / f"kmeans.{ending}" for ending in ("safetensors", "bin", "pt")), *beside):
        if file.is_file():
            return file
    raise FileNotFoundError(f"no k-means centres at {folder / 'kmeans.safetensors'}; name a file with --kmeans, or one of "
                            + ", ".join(download.KNOWN["kmeans"]))


def load_unit_encoder(folder_or_file_or_name="pocket", kmeans=None, layer=None):
    """Load HuBERT and its k-means.

    Args:
        folder_or_file_or_name: Hugging Face folder, fairseq .pt file, `pocket`, or a known name (mhubert-base-25hz).
        kmeans: file or known name; a safetensors file with `centers` (K, C), or scikit-learn's estimator as joblib wrote it.
            Default: the one that belongs to the known name, or stands beside the tokenizer's file.
        layer: transformer layer of the features, 1 is the first; default: what the k-means file or its name says.
    """
    name = str(folder_or_file_or_name)
    path = checkpoint.find(name, "tokenizer")
    if kmeans is None and name in download.KNOWN["tokenizer"]:
        kmeans = download.KNOWN["tokenizer"][name].kmeans
    file = checkpoint.find(str(kmeans), "kmeans") if kmeans else find_kmeans(path)
    centers, layer_in_file = checkpoint.read_kmeans(file)
    if layer is None:
        layer = layer_in_file
    if layer is None and kmeans in download.KNOWN["kmeans"]:
        layer = download.KNOWN["kmeans"][kmeans].layer
    layer_in_name = re.search(r"_L(\d+)_km", file.name)  # as published: ..._L11_km500.bin
    if layer is None and layer_in_name:
        layer = int(layer_in_name.group(1))
    if layer is None:
        raise ValueError(f"{file} does not say which layer it belongs to; give --layer")
    own = name != "pocket" and Path(name).exists()
    return UnitEncoder(load_hubert(path), centers, layer, path.name.removesuffix(".pt") if own else name).eval()


# ---------------------------------------------------------------------------------------------- the command

@dataclass(frozen=True)
class UnitsConfig:
    audio: tuple[str, ...] = ()  # files and folders (searched recursively)
    out: str = "units/mine"  # folder for the shards
    tokenizer: str = "pocket"  # HuBERT: folder or .pt file, `pocket`, or a known name (mhubert-base-25hz)
    kmeans: str | None = None  # k-means file or known name; default the one that belongs to the tokenizer
    layer: int | None = None  # transformer layer of the features, default the k-means file's
    dedup: bool = True  # collapse runs of equal units (false keeps every frame)
    device: str = "auto"  # auto | cpu | cuda


def find_audio(paths):
    """Files as given, folders searched recursively; sorted, so that every process sees the same order."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            files += [file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES]
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"no audio file or folder at {path}; check the path")
    if not files:
        raise ValueError(f"no audio found in {', '.join(map(str, paths)) or 'nothing'}; "
                         "give files or folders: python hubert_units.py recordings/ --out=units/mine")
    return sorted(set(files))


def main(argv=None):
    options = config.load(UnitsConfig, argv, positional="audio")
    dist = distributed.setup(options.device)
    files = find_audio(options.audio)[dist.rank::dist.world]
    encoder = load_unit_encoder(options.tokenizer, options.kmeans, options.layer).to(dist.device)
    recipe = {**encoder.recipe, "dedup": options.dedup}
    # Each process writes its own shard; a reader joins all shards of a folder.
    writer = data.ShardWriter(options.out, recipe, shard=dist.rank)
    failures, seconds = [], 0.0
    for file in tqdm(files, desc="encoding", unit="file", disable=None if dist.rank == 0 else True):
        try:
            wav = read_wav(file)
            frames = encoder.encode(wav).cpu()
        except (ValueError, OSError) as error:
            failures.append((str(file), str(error)))
            continue
        units, runs = deduplicate(frames) if options.dedup else (frames, torch.ones_like(frames))
        writer.add(units.numpy(), runs.numpy(), str(file), len(wav) / SAMPLE_RATE)
        seconds += len(wav) / SAMPLE_RATE
    writer.close(failures)
    dist.barrier()
    if dist.rank == 0:
        meta = data.merge_meta(options.out, dist.world)
        print(f"{meta['files']} files, {meta['hours']:.3f} h, {meta['units']} units "
              f"({meta['units'] / max(meta['hours'] * 3600, 1e-9):.1f} per second) in {options.out}; "
              f"{meta['failures']} failures" + (f", listed in {options.out}/failures.csv" if meta["failures"] else ""))
        if meta["files"] == 0:
            raise ValueError(f"none of the {meta['failures']} files could be encoded; see {options.out}/failures.csv")
    distributed.cleanup()


if __name__ == "__main__":
    config.command(main)
