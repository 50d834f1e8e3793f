"""Speech to look at and to listen to: a player over its spectrogram, its units, and what surprised the language model.

    Clip --figure--> HTML: <audio>, then one SVG along time
                       mel spectrogram                    log power of 64 bands, darkest 60 dB below the loudest
                       strip: a box a unit                width = duration, colour = unit, prompt paler than continuation
                       line: bits the model needed        -log2 p(unit | those before), drawn over the unit's whole length

A box knows its time by where it stands, PIXELS a second; the script (listening.js) plays it when it is clicked, and arrow keys
step through them. Shapes: S samples, T units, F frames.
"""
import itertools
import math
from dataclasses import dataclass, replace

import torch

from pages.html import address, data_address, escape, player, png, sound
from speech.audio import SAMPLE_RATE

PIXELS = 100  # a second
MOST_SECONDS = 60  # that are drawn
HOP, WINDOW, BANDS = 320, 640, 64  # samples between columns of the spectrogram and in each of them; mel bands
RANGE = 6.0  # log10 of power between white and black
LEVELS = 48  # colours of the spectrogram: more would only make the file larger
PICTURE, STRIP, LINE = 96, 22, 56  # heights: spectrogram, units, surprisal
MOST_BITS = 16.0  # at the top of the line; what is above it is drawn there
# The colour map, dark to light: an own ramp of rising lightness, so that it can be read in grey, too.
RAMP = ((13, 12, 34), (60, 28, 98), (137, 45, 104), (214, 81, 76), (245, 156, 66), (252, 238, 170))


@dataclass(frozen=True)
class Clip:
    """One piece of speech. units (T,), seconds (T,): how long each lasts; heard: how many of them are the prompt."""

    label: str  # what it is: original, re-synthesis, continuation 1, ...
    wav: torch.Tensor  # (S,)
    path: str | None = None  # the file that holds it
    units: object = ()
    seconds: object = ()
    heard: int = 0
    bits: object = None  # surprisal (T,), NaN where there is none


def mel(wav):
    """Samples (S,) -> log10 power (BANDS, F), F = S // HOP + 1. Bands are triangles, equal on the mel scale up to 8 kHz."""
    window = torch.hann_window(WINDOW)
    power = torch.stft(torch.nn.functional.pad(wav.float().cpu(), (0, max(0, WINDOW - len(wav)))), WINDOW, HOP, window=window,
                       pad_mode="constant", return_complex=True).abs() ** 2
    ends = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), BANDS + 2) / 2595) - 1)  # Hz
    bins = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    rising = (bins - ends[:-2, None]) / (ends[1:-1] - ends[:-2])[:, None]
    falling = (ends[2:, None] - bins) / (ends[2:] - ends[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp(min=0)
    return (filters @ power + 1e-10).log10()


def ramp(levels=LEVELS):
    """The colour map (levels, 3) uint8."""
    stops, at = torch.tensor(RAMP, dtype=torch.float32), torch.linspace(0, len(RAMP) - 1, levels)
    low = at.long().clamp(max=len(RAMP) - 2)
    return torch.lerp(stops[low], stops[low + 1], (at - low)[:, None]).round().to(torch.uint8)


def spectrogram(wav):
    """Samples (S,) -> an address that holds the picture of their mel spectrogram, high bands at the top."""
    power = mel(wav)
    level = ((power - power.max()) / RANGE + 1).clamp(0, 1)
    return data_address("image/png", png((level * (LEVELS - 1)).round().to(torch.uint8).flip(0), ramp()))


def colour(unit):
    """Of a unit: neighbours in number are far apart in hue, and three lightnesses tell more of them apart."""
    return f"hsl({int(unit) * 137.508 % 360:.0f} 62% {(42, 54, 66)[int(unit) % 3]}%)"


def boxes(clip, top, height):
    """The strip of units as SVG, without their surprisal."""
    found, begin = [], 0.0
    bits = [math.nan] * len(clip.units) if clip.bits is None else clip.bits
    for i, (unit, seconds, surprise) in enumerate(zip(clip.units, clip.seconds, bits)):
        said = (f"unit {int(unit)}, {begin:.2f} s, {1000 * float(seconds):.0f} ms"
                + ("" if math.isnan(surprise) else f", {float(surprise):.1f} bits") + (", prompt" if i < clip.heard else ""))
        found.append(f'<rect x="{begin * PIXELS:.1f}" y="{top}" width="{float(seconds) * PIXELS:.1f}" height="{height}" '
                     f'fill="{colour(unit)}"{" class=heard" if i < clip.heard else ""}><title>{said}</title></rect>')
        begin += float(seconds)
    return "".join(found)


def line(clip, top, height):
    """Surprisal as SVG: a step as long as each unit lasts."""
    ends = [0.0]
    for seconds in clip.seconds:
        ends.append(ends[-1] + float(seconds))
    steps = [f"{'L' if i and not math.isnan(clip.bits[i - 1]) else 'M'}{ends[i] * PIXELS:.1f} {y:.1f}H{ends[i + 1] * PIXELS:.1f}"
             for i, bits in enumerate(clip.bits) if not math.isnan(bits)
             for y in [top + height * (1 - min(float(bits), MOST_BITS) / MOST_BITS)]]
    marks = "".join(f'<line class="grid" x1="0" x2="100%" y1="{y:.0f}" y2="{y:.0f}"/>'
                    f'<text x="2" y="{y - 2:.0f}">{bits} bits</text>'
                    for bits in (0, 8) for y in [top + height * (1 - bits / MOST_BITS)])
    return f'{marks}<path class="bits" d="{"".join(steps)}"/>'


def figure(clip, folder, name, inline=False):
    """A clip as HTML, for a page in `folder`.

    name: that of its prompt, as a screen reader says it. inline: the sound inside the page. Of a long one the first MOST_SECONDS
    are drawn.
    """
    source = sound(clip.wav) if inline or clip.path is None else address(clip.path, folder)
    seconds, units = len(clip.wav) / SAMPLE_RATE, len(clip.units)
    drawn = min(max(seconds, sum(map(float, clip.seconds))), MOST_SECONDS)
    some = sum(end < drawn for end in itertools.accumulate(map(float, clip.seconds))) + 1
    clip = replace(clip, units=clip.units[:some], seconds=clip.seconds[:some],
                   bits=None if clip.bits is None else clip.bits[:some])
    height = PICTURE + bool(units) * (4 + STRIP) + (clip.bits is not None) * (4 + LINE)
    parts = [f'<image href="{spectrogram(clip.wav[:MOST_SECONDS * SAMPLE_RATE])}" height="{PICTURE}" '
             f'width="{min(seconds, drawn) * PIXELS:.1f}" preserveAspectRatio="none"/>']
    if units:
        parts.append(boxes(clip, PICTURE + 4, STRIP))
    if clip.bits is not None:
        parts.append(line(clip, PICTURE + STRIP + 8, LINE))
    if 0 < clip.heard < units:
        end = sum(map(float, clip.seconds[:clip.heard])) * PIXELS
        parts.append(f'<line class="seam" x1="{end:.1f}" x2="{end:.1f}" y1="0" y2="{PICTURE + 4 + STRIP}"/>'
                     f'<text class="seam" x="{end + 4:.1f}" y="12">the model goes on</text>')
    about = (f"{seconds:.1f} s" + f", {units} units" * bool(units) + f", the first {drawn} s drawn" * (drawn < seconds)
             + ", red: bits that each cost the model" * (clip.bits is not None))
    return (f'<figure class="clip"><figcaption>{escape(clip.label)} <small>{about}</small></figcaption>'
            f'{player(source, f"{clip.label} of {name}")}<div class="along"><svg role="img" tabindex="0" '
            f'width="{drawn * PIXELS:.0f}" height="{height}" aria-label="{escape(f"{clip.label} of {name}")}: spectrogram'
            f'{" and units; arrow keys step through the units and play them" if units else ""}">{"".join(parts)}'
            f'<line class="cursor" x1="-9" x2="-9" y1="0" y2="{height}"/></svg></div>'
            f'<output class="unit" aria-live="polite"></output></figure>')
