"""HuBERT: 16 kHz samples -> features, the network behind hubert_units.py.

    wav (B, S) --7 or 8 strided convolutions--> (B, F, conv width) --norm, projection--> (B, F, C)
      --+ positional convolution--> --transformer layers 1..k--> (B, F, C)

Everything between is time first, channels last, so that a strided convolution is a linear layer on overlapping patches: a patch
holds the `kernel` steps of all channels that one output step sees, and the next patch begins `stride` steps later.

The first convolution is followed by a group norm that has one group a channel and runs over TIME: every sample of a
recording touches every frame. Its statistics need no pass over the (F, conv width) outputs. An output is y = w . u for a
window u of 10 samples, so over all windows of a recording

    mean(y) = w . mean(u)        var(y) = w' cov(u) w

and the norm is a scale and a shift of w that each recording has for itself. Ten means and a 10 x 10 covariance, in float64,
over a recording's own windows: a padded batch gives what each recording gives alone, and an hour is done in pieces.

Sources: HuBERT, Hsu et al. 2021 (arXiv 2106.07447), sections II-III; the front end, wav2vec 2.0, Baevski et al. 2020, section
2; the 25 Hz variant, TWIST (arXiv 2305.13009), section 3. Shapes: B batch, S samples, F frames, C width.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional

from checkpoints import pretrained
from checkpoints.fill import fill
from speech.audio import SAMPLE_RATE
from speech.precision import full_precision


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


class Moments(NamedTuple):
    """Sums over the windows of each recording that the first convolution sees, float64. Those of pieces add up."""

    count: torch.Tensor  # (B,) windows
    first: torch.Tensor  # (B, kernel) sum of u
    second: torch.Tensor  # (B, kernel, kernel) sum of u u'


def frames_of(length, kernel, stride):
    """Output steps of a convolution without padding, for an int or a tensor of input steps; at least 0."""
    frames = (length - kernel) // stride + 1
    return frames.clamp(min=0) if isinstance(frames, torch.Tensor) else max(0, frames)


class StridedConv(nn.Module):
    """A convolution without padding and bias, (B, T, C) -> (B, T', N): a linear layer on the patches of each output step."""

    def __init__(self, channels, width, kernel, stride):
        super().__init__()
        self.kernel, self.stride, self.bias = kernel, stride, None
        self.weight = nn.Parameter(torch.empty(width, kernel, channels))
        nn.init.kaiming_uniform_(self.weight.flatten(1), a=math.sqrt(5))  # as nn.Conv1d's and nn.Linear's

    def product(self, x):
        return functional.linear(x, self.weight.flatten(1))

    def forward(self, x):
        patches = x.unfold(1, self.kernel, self.stride).transpose(2, 3).flatten(2)  # (B, T', kernel * C), a view
        return self.product(patches.contiguous())


class EncoderLayer(nn.Module):
    """Post-norm transformer layer: x = LN(x + attention(x)); x = LN(x + feed-forward(x))."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.ln_1 = nn.LayerNorm(C, config.norm_eps)
        self.up, self.down = nn.Linear(C, config.n_inner), nn.Linear(config.n_inner, C)
        self.ln_2 = nn.LayerNorm(C, config.norm_eps)

    def forward(self, x, keys=None):
        """keys: (B, 1, 1, F) bool, the frames that exist; None: all. Every frame sees every frame."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, F, D)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        x = self.ln_1(x + self.out(y.transpose(1, 2).reshape(B, T, C)))
        return self.ln_2(x + self.down(functional.gelu(self.up(x))))


class Hubert(nn.Module):
    """The HuBERT network up to its transformer features; no prediction head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = (1, *config.conv_dim)
        self.convs = nn.ModuleList(
            StridedConv(widths[i], widths[i + 1], kernel, stride)
            for i, (kernel, stride) in enumerate(zip(config.conv_kernel, config.conv_stride)))
        self.group_norm = nn.GroupNorm(config.conv_dim[0], config.conv_dim[0], eps=1e-5)
        self.feature_norm = nn.LayerNorm(config.conv_dim[-1], config.norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.n_embd)
        self.pos_norm = nn.BatchNorm1d(config.n_embd) if config.pos_batch_norm else nn.Identity()
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
        """floor((S - receptive field) / hop) + 1, and 0 below one receptive field; for an int or a tensor."""
        return frames_of(num_samples, self.receptive_field, self.hop)

    def windows(self, wav):
        """(B, S) -> (B, F0, kernel): what each output step of the first convolution sees."""
        return wav.unfold(1, self.config.conv_kernel[0], self.config.conv_stride[0])

    def moments(self, wav, lengths=None):
        """Statistics for the group norm: Moments of wav (B, S), of each row its first `lengths` samples only."""
        u = self.windows(wav).double()
        count = torch.full((len(wav),), u.shape[1], dtype=torch.float64, device=wav.device)
        if lengths is not None:
            frames = frames_of(lengths, self.config.conv_kernel[0], self.config.conv_stride[0])
            u, count = u * (torch.arange(u.shape[1], device=wav.device) < frames[:, None])[..., None], frames.double()
        return Moments(count, u.sum(1), u.transpose(1, 2) @ u)

    def front_end(self, wav, moments):
        """(B, S) -> (B, F, conv width), the strided convolutions."""
        first = self.first_layer(moments).to(wav.dtype)
        frames, hop = self.num_frames(wav.shape[1]), self.hop
        if torch.is_grad_enabled() or wav.is_cuda:
            return self.convolve(wav, first)
        # With the statistics known, any stretch of frames can be computed alone. A second at a time stays in the cache and
        # needs little memory; on a CPU it also saves time (python -m bench hubert).
        step = max(1, round(SAMPLE_RATE / hop / len(wav)))
        return torch.cat([self.convolve(wav[:, i * hop:(min(i + step, frames) - 1) * hop + self.receptive_field], first)
                          for i in range(0, frames, step)], dim=1)

    def first_layer(self, moments):
        """First convolution and group norm as one float64 matrix a recording, (B, kernel + 1, conv width); last row: shift."""
        w, norm = self.convs[0].weight[:, :, 0].double(), self.group_norm
        mean = moments.first / moments.count[:, None]
        covariance = moments.second / moments.count[:, None, None] - mean[:, :, None] * mean[:, None, :]
        variance = torch.einsum("ck,bkl,cl->bc", w, covariance, w).clamp(min=0)  # 0 may come out as -1e-20
        gain = norm.weight * torch.rsqrt(variance + norm.eps)  # (B, conv width)
        shift = norm.bias - (mean @ w.T) * gain
        return torch.cat([gain[:, :, None] * w, shift[:, :, None]], dim=2).transpose(1, 2)

    def convolve(self, wav, first):
        """(B, S) -> (B, F, conv width) with the first layer as first_layer gives it."""
        u = self.windows(wav)
        with nullcontext() if torch.is_grad_enabled() else full_precision(wav.device.type):  # whatever the layers above have
            x = torch.cat([u, u.new_ones(*u.shape[:2], 1)], dim=2) @ first
        if torch.is_autocast_enabled(kind := x.device.type):
            x = x.to(torch.get_autocast_dtype(kind))  # before it is cut into patches, some of which overlap
        x = functional.gelu(x)
        for conv in self.convs[1:]:
            x = functional.gelu(conv(x))
        return x

    def forward(self, wav, layer=None, lengths=None, mask=None, moments=None):
        """Features after `layer` transformer layers (all by default; counted as in fairseq: 1 is the first).

        Args:
            wav: (B, S) float32 at 16 kHz.
            lengths: (B,) int64, samples of each recording, the rest being padding; None: all of S. A recording in a padded
                batch has the features that it has alone, in its first num_frames(length) frames; the frames after are waste.
            mask: (B, F) bool, frames replaced by the mask embedding (pretraining only).
            moments: of the whole recordings of which wav is a piece, already normalised if the config says so; None: of wav;
                False: of wav, which is normalised already.
        Returns: (B, F, C) float.
        """
        if lengths is not None:
            wav = wav * (torch.arange(wav.shape[1], device=wav.device) < lengths[:, None])
        if moments is None:
            wav = normalized(wav, lengths) if self.config.normalize else wav
        moments = moments or self.moments(wav, lengths)
        x = self.projection(self.feature_norm(self.front_end(wav, moments).float())).float()  # (B, F, C), and so float32 stays
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_embedding.to(x.dtype), x)
        position, keys = self.pos_norm(x.transpose(1, 2)), None
        if lengths is not None:
            valid = torch.arange(x.shape[1], device=x.device) < self.num_frames(lengths)[:, None]  # (B, F)
            # after the batch norm, which would turn zeros into something else; alone, a recording ends in zeros here
            position, keys = position * valid[:, None], valid[:, None, None]
        position = self.pos_conv(position)[:, :, :x.shape[1]]  # an even kernel, padded on both sides, gives a frame too many
        x = self.ln_in(x + functional.gelu(position).transpose(1, 2))
        for block in self.layers[:layer]:
            x = block(x, keys)
        return x


def normalized(wav, lengths=None):
    """Every recording at zero mean and unit variance over its own samples (fairseq's task.normalize)."""
    if lengths is None:
        return functional.layer_norm(wav, wav.shape[-1:])
    valid = torch.arange(wav.shape[1], device=wav.device) < lengths[:, None]
    mean = (wav * valid).sum(1, keepdim=True) / lengths[:, None]
    variance = ((wav - mean) * valid).square().sum(1, keepdim=True) / lengths[:, None]
    return (wav - mean) * torch.rsqrt(variance + 1e-5) * valid


def load_hubert(path):
    """A Hugging Face HuBERT folder (config.json + weights) or a fairseq .pt file -> Hubert in eval mode, float32."""
    options, tensors = pretrained.read_hubert(path)
    with torch.device("meta"):
        hubert = Hubert(HubertConfig(**options))
    return fill(hubert.to_empty(device="cpu"), tensors.items(), path).eval().requires_grad_(False)
