"""Audio file <-> mono float32 samples at 16 kHz.

    file --soundfile--> (S', channels) --mean--> (S',) --windowed-sinc resampling--> (S,) float32 in [-1, 1]

Channels are averaged before resampling (one filter pass instead of several; the two commute).

    python -c "from audio import read_wav; print(read_wav('pocket/prompt.wav').shape)"
"""
import math
import os
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F

SAMPLE_RATE = 16_000  # Hz; every encoder and vocoder of this project works at this rate
LOWPASS_ZEROS = 6  # zero crossings of the sinc on each side of its centre
ROLLOFF = 0.99  # cut-off as a share of the lower Nyquist frequency


def resample(samples, source_rate, target_rate=SAMPLE_RATE):
    """Change the sampling rate by band-limited interpolation.

    Args:
        samples: (S,) float tensor at source_rate.
        source_rate, target_rate: positive integers, Hz.
    Returns: (ceil(S * target_rate / source_rate),) tensor of the same dtype.
    Source: a sinc low-pass under a squared-cosine (Hann) window, torchaudio's default filter
    (`sinc_interp_hann`: 6 zero crossings, roll-off 0.99), so units computed here agree with its users'.
    """
    if source_rate <= 0 or target_rate <= 0:
        raise ValueError(f"sampling rates must be positive, got {source_rate} and {target_rate} Hz")
    divisor = math.gcd(source_rate, target_rate)
    source, target = source_rate // divisor, target_rate // divisor
    if source == target or samples.numel() == 0:
        return samples
    cutoff = min(source, target) * ROLLOFF
    width = math.ceil(LOWPASS_ZEROS * source / cutoff)  # input samples on each side
    # One filter per output phase. Built in float64: a float32 kernel is off by up to 1e-5.
    taps = torch.arange(-width, width + source, dtype=torch.float64) / source
    phases = torch.arange(target, dtype=torch.float64) / target
    t = ((taps[None, :] - phases[:, None]) * cutoff).clamp(-LOWPASS_ZEROS, LOWPASS_ZEROS)
    window = torch.cos(t * math.pi / (2 * LOWPASS_ZEROS)) ** 2
    kernel = (torch.sinc(t) * window * (cutoff / source)).to(samples.dtype)  # (target, 2 * width + source)
    padded = F.pad(samples, (width, width + source))
    frames = F.conv1d(padded[None, None], kernel[:, None], stride=source)  # (1, target, n)
    length = math.ceil(target * samples.numel() / source)
    return frames[0].T.reshape(-1)[:length]


def read_wav(path):
    """Read any file that libsndfile opens (wav, flac, ogg, mp3, aiff, ...).

    Returns: (S,) float32 tensor at 16 kHz, channels averaged; integer formats are scaled to [-1, 1).
    Raises: OSError if there is no such file; ValueError if it is no audio, is empty or holds NaN or infinity.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no audio file at {path}; check the path")
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not an audio file; name the files in it")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"cannot read {path} as audio ({error}); give a wav, flac, ogg, mp3 or aiff file") from None
    if len(samples) == 0:
        raise ValueError(f"{path} holds no samples; give a recording of at least 0.05 s")
    samples = torch.from_numpy(samples).mean(dim=1)
    if not torch.isfinite(samples).all():
        raise ValueError(f"{path} holds NaN or infinite samples; export the recording again")
    return resample(samples, rate)


def write_wav(path, samples, rate=SAMPLE_RATE):
    """Write (S,) float samples as 16-bit PCM; values beyond [-1, 1] are clipped. The file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    array = torch.as_tensor(samples).detach().float().clamp(-1, 1).cpu().numpy()
    soundfile.write(temporary, array, rate, subtype="PCM_16", format="WAV")
    os.replace(temporary, path)
