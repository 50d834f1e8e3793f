"""The vocoder beside the same network of PyTorch's own layers with weight norm kept, as published code runs it.

    python -m bench vocoder

One utterance of 30 and of 150 units with predicted durations, and a batch of 8 of 100 frames; the pocket's vocoder and one of the
published size (512 channels, random weights). `over_plain` is the plain network's time over ours; medians of rounds in turn.
"""
import copy
import statistics
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils.parametrizations import weight_norm

from bench.timing import take_turns
from speech import channels_last
from vocoder import DurationConfig, Vocoder, VocoderConfig, load_vocoder

FULL = VocoderConfig(upsample_rates=(5, 4, 4, 4, 2), upsample_kernel_sizes=(11, 8, 8, 8, 4), code_hop_size=640,
                     dur_predictor_params=DurationConfig())


def full():
    torch.manual_seed(0)
    model = Vocoder(FULL)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    nn.init.constant_(model.dur_predictor.proj.bias, 1.2)  # runs of two frames
    return channels_last.lay_out(model.eval().requires_grad_(False))


def plain(vocoder):
    """A copy of PyTorch's layers."""
    vocoder = copy.deepcopy(vocoder)
    for layer in list(vocoder.modules()):
        for own, theirs in ((channels_last.Conv1d, nn.Conv1d), (channels_last.ConvTranspose1d, nn.ConvTranspose1d)):
            if isinstance(layer, own):
                layer.weight.data = layer.weight.data.contiguous()
                layer.__class__ = theirs
                weight_norm(layer)
    return vocoder


@torch.inference_mode()
def bench_vocoder(options):
    """Yields rows of (vocoder, what, ms of ours and plain, ratio, spread, largest difference of samples)."""
    for name, ours in (("pocket", load_vocoder()), ("512 channels", full())):
        theirs, K = plain(ours), ours.config.num_embeddings
        draw = torch.Generator().manual_seed(0)
        frames = torch.randint(0, K, (8, 100), generator=draw)
        short, long = (torch.randint(0, K, (count,), generator=draw) for count in (30, 150))
        for what, given in (("30 units", short), ("150 units", long), ("8 x 100 frames", frames)):
            speak = Vocoder.decode if given.ndim == 2 else Vocoder.forward
            apart = (speak(ours, given) - speak(theirs, given)).abs().max().item()
            ways = {"ours": partial(speak, ours, given), "plain": partial(speak, theirs, given)}
            rounds, _ = take_turns(ways, options.repeats, "cpu")
            ms = {way: 1000 * statistics.median(seconds) for way, seconds in rounds.items()}
            quarters = np.percentile(rounds["ours"], (25, 75)) * 1000
            yield {"vocoder": name, "what": what, **{f"{way}_ms": round(value, 1) for way, value in ms.items()},
                   "over_plain": round(ms["plain"] / ms["ours"], 2), "spread": round((quarters[1] - quarters[0]) / ms["ours"], 3),
                   "differ_by": f"{apart:.1e}"}
