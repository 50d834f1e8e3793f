"""A crop of a recording as other voices, rooms, microphones and streets would have given it, its frames' labels kept.

    wave (S,) --speed and pitch--> --room--> --equaliser--> --noise or another voice--> (S',)

All of it is drawn from one generator, so a step's crops are the same whenever it is taken again.
Sources: speed, Ko et al. 2015; noise and rooms, Snyder et al. 2018 (x-vectors); mixing, Chen et al. 2022 (WavLM, arXiv
2110.13900), section 3. Shapes: S samples.
"""
import math

import torch
from torch.nn import functional

from speech.audio import SAMPLE_RATE

SLOWEST, FASTEST = 0.84, 1.19  # change of speed, and with it of pitch and of the size of the mouth
EQUALISER_DB = 9.0  # most that a band is raised or lowered
BANDS = 8  # of the equaliser, equally spaced in log frequency from 80 Hz
NOISE_DB = (0.0, 30.0)  # of the speech over the noise
VOICE_DB = (3.0, 15.0)  # of the speech over another voice
ROOM_SECONDS = (0.1, 0.7)  # until the reverberation has fallen by 60 dB


def uniform(low, high, generator):
    return low + (high - low) * float(torch.rand((), generator=generator))


def resampled(wave, rate, samples):
    """wave (S,), `rate` times as fast -> (samples,), by linear interpolation."""
    at = torch.arange(samples) * rate
    low = at.long().clamp(max=len(wave) - 2)
    return torch.lerp(wave[low], wave[low + 1], (at - low).float())


def noise(samples, generator):
    """(samples,) of unit power, its spectrum falling with f ** -slope: white, pink, brown and between."""
    size = 2 ** math.ceil(math.log2(samples))
    frequency = torch.linspace(1, size // 2, size // 2 + 1)
    spectrum = torch.view_as_complex(torch.randn(size // 2 + 1, 2, generator=generator)) * frequency ** -uniform(0, 1, generator)
    made = torch.fft.irfft(spectrum)[:samples]
    return made / made.square().mean().sqrt().clamp(min=1e-12)


def at_level(wave, other, decibel):
    """wave with `other` added, `decibel` below it."""
    power = wave.square().mean().sqrt() / other.square().mean().sqrt().clamp(min=1e-9)
    return wave + other * (power * 10 ** (-decibel / 20))


def filtered(wave, generator, room, equaliser):
    """Through a room (direct sound and a decaying tail) and an equaliser with smooth random bands."""
    size = 2 ** math.ceil(math.log2(len(wave) + SAMPLE_RATE // 2))
    spectrum = torch.fft.rfft(wave, size)
    if room:
        samples = SAMPLE_RATE // 2
        decay = torch.exp(torch.arange(samples) * (-6.9 / (uniform(*ROOM_SECONDS, generator) * SAMPLE_RATE)))
        tail = torch.randn(samples, generator=generator) * decay
        tail[:32] = 0
        impulse = tail * (uniform(0.1, 0.7, generator) / tail.square().sum().sqrt())
        impulse[0] = 1
        spectrum = spectrum * torch.fft.rfft(impulse, size)
    if equaliser:
        octaves = torch.log2(torch.linspace(0, SAMPLE_RATE / 2, size // 2 + 1).clamp(min=80) / 80)
        at = octaves / octaves[-1] * (BANDS - 1)
        low = at.long().clamp(max=BANDS - 2)
        gains = (2 * torch.rand(BANDS, generator=generator) - 1) * EQUALISER_DB
        spectrum = spectrum * 10 ** (torch.lerp(gains[low], gains[low + 1], at - low) / 20)
    return torch.fft.irfft(spectrum, size)[:len(wave)]


def changed(wave, other, generator):
    """A crop (S,) as somebody else might have recorded it; other (S2,): another recording, which may be heard behind it."""
    chance = torch.rand(4, generator=generator)
    if chance[0] < 0.7:
        wave = filtered(wave, generator, room=bool(chance[0] < 0.35), equaliser=True)
    if chance[1] < 0.15:
        behind = functional.pad(other, (0, max(0, len(wave) - len(other))))[:len(wave)]
        wave = at_level(wave, behind, uniform(*VOICE_DB, generator))
    elif chance[1] < 0.6:
        wave = at_level(wave, noise(len(wave), generator), uniform(*NOISE_DB, generator))
    return wave * 10 ** (uniform(-20, 6, generator) / 20)
