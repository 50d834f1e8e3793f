"""Audio file <-> mono float32 samples at 16 kHz, whole or block after block.

    file --soundfile--> (n', channels) --mean--> (n',) --Resampler.feed--> (n,) float32 in [-1, 1], again and again

Channels are averaged before resampling (one filter pass instead of several; the two commute). Many hours need no more
memory than ten seconds: read_blocks holds one block, and the resampler the few samples its filter still needs.
Where a recording really ends is looked up first (containers.py). A path may lead on into a zip archive,
archive.zip/folder/a.wav: the member is read in place, nothing is unpacked.

    python -c "from speech.audio import read_wav; print(read_wav('pocket/prompt.wav').shape)"
"""
import contextlib
import io
import math
import os
from pathlib import Path

import numpy as np
import torch

from checkpoints import archive, files
from checkpoints.recognise import recognise
from speech import containers
from speech.containers import AGAIN

SAMPLE_RATE = 16_000  # Hz; every encoder and vocoder of this project works at this rate
LOWPASS_ZEROS = 6  # zero crossings of the sinc on each side of its centre
ROLLOFF = 0.99  # cut-off as a share of the lower Nyquist frequency
UNKNOWN_FRAMES = 2**62  # libsndfile announces more than this for a flac without a length
MP3_SLACK = 2 * 1152  # samples: two MPEG frames; encoders do not agree what to count


class Resampler:
    """Changes the sampling rate of a recording that arrives in pieces, by band-limited interpolation.

    However it is cut, the pieces joined are the same to the bit: ceil(S * target_rate / source_rate) samples from S.
    Source: a sinc low-pass under a squared-cosine (Hann) window, torchaudio's default filter
    (`sinc_interp_hann`: 6 zero crossings, roll-off 0.99), so units computed here agree with its users'.
    """

    def __init__(self, source_rate, target_rate=SAMPLE_RATE, dtype=torch.float32):
        if source_rate <= 0 or target_rate <= 0:
            raise ValueError(f"sampling rates must be positive, got {source_rate} and {target_rate} Hz")
        self.rate = source_rate
        divisor = math.gcd(source_rate, target_rate)
        self.source, self.target = source_rate // divisor, target_rate // divisor
        cutoff = min(self.source, self.target) * ROLLOFF
        self.width = math.ceil(LOWPASS_ZEROS * self.source / cutoff)  # input samples on each side
        # `source` inputs last as long as `target` outputs. Output i of such a frame lies at input i * source / target:
        position = torch.arange(self.target) * self.source
        self.start = (position // self.target).numpy()  # its whole part, and below the rest in [0, 1)
        rest = (position % self.target).double() / self.target
        # One row of weights per neighbour. Built in float64: a float32 kernel is off by up to 1e-5.
        lags = torch.arange(-self.width, self.width + 2, dtype=torch.float64)
        t = ((lags[:, None] - rest) * (cutoff / self.source)).clamp(-LOWPASS_ZEROS, LOWPASS_ZEROS)
        window = torch.cos(t * math.pi / (2 * LOWPASS_ZEROS)) ** 2
        self.kernel = (torch.sinc(t) * window * (cutoff / self.source)).to(dtype).numpy()  # (2 * width + 2, target)
        self.pending = torch.zeros(self.width, dtype=dtype)  # input still needed; there is silence before the first sample
        self.taken = self.given = 0  # samples so far

    def feed(self, samples):
        """The output (m,) that the input up to and with samples (n,) allows; m may be 0."""
        if self.source == self.target:
            return samples
        self.taken += len(samples)
        samples = torch.cat([self.pending, samples])
        span = self.source + 2 * self.width + 1  # inputs that one frame of outputs looks at
        n = max(0, (len(samples) - span) // self.source + 1)
        self.pending = samples[n * self.source:].clone()
        self.given += n * self.target
        if n == 0:
            return samples[:0]
        frames = samples.unfold(0, span, self.source).T.numpy()  # (span, n), a view
        output = np.zeros((self.target, n), frames.dtype)
        # Tap after tap, not by convolution: the order of the sum, thus its rounding, does not depend on the block's size.
        # By NumPy: threads that share out such short sums wait longer for each other than they add.
        for lag, weights in enumerate(self.kernel):
            output += weights[:, None] * frames[self.start + lag]
        return torch.from_numpy(output.T.reshape(-1))

    def finish(self):
        """The output that is left, with silence after the last sample."""
        left = -(-self.target * self.taken // self.source) - self.given  # rounded up
        return self.feed(self.pending.new_zeros(self.source + self.width + 1))[:left]


def resample(samples, source_rate, target_rate=SAMPLE_RATE):
    """A whole recording (S,) -> (ceil(S * target_rate / source_rate),) of the same dtype; rates in whole Hz. See Resampler."""
    resampler = Resampler(source_rate, target_rate, samples.dtype)
    return torch.cat([resampler.feed(samples), resampler.finish()])


class _Soundfile:
    """The package soundfile, imported when audio is first met: what needs no audio runs on machines without it."""

    def __getattr__(self, name):
        try:
            import soundfile
        except (ImportError, OSError) as error:  # cffi or libsndfile may be what is missing
            raise ValueError(f"audio needs the package soundfile, which does not work here ({error}); pip install it") from None
        return getattr(soundfile, name)


soundfile = _Soundfile()


@contextlib.contextmanager
def _sounds(path):
    """The recordings in a file, opened one after the other: yields an iterator of (sound file, its Part).

    There is more than one where files were joined, or where an ogg stream or the rate changes.
    """
    if not path.exists() and archive.zip_of(path) == (None, None):
        raise FileNotFoundError(f"no audio file at {path}; check the path")
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not an audio file; name the files in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or a device; write the recording to a file, and name that")
    with archive.open_file(path) as file:
        try:
            parts = containers.parts(file, path.name)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
        whole = parts in ([], [containers.Part([(0, file.seek(0, io.SEEK_END))])])
        source = io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else os.fsencode(path)  # a name need not be UTF-8
        yield (_opened(path, source if whole else containers.View(file, part), part) for part in parts or [containers.Part([])])


def _opened(path, source, part):
    """(sound file, part), the sound file with its header checked. source: a path or an open file."""
    try:
        sound = soundfile.SoundFile(source)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a .raw file, which has no header
        said = recognise(path)  # a pointer of Git LFS, a web page, ...
        raise ValueError(f"cannot read {path} as audio" + (f": it {said}" if said and not said.startswith("is a recording") else (
            f" ({getattr(error, 'error_string', error)}); give a wav, flac, ogg, mp3 or aiff file"))) from None
    if not 1000 <= sound.samplerate <= 1_000_000:  # Hz; beyond, a filter could fill the memory
        raise ValueError(f"{path} is damaged: its header claims {sound.samplerate} samples a second; {AGAIN}")
    sound.seekable = lambda: False  # else it seeks after every read; so files of unknown length are decoded straight on
    return sound, part


def read_blocks(path, seconds=10.0):
    """Read any file that libsndfile opens (wav, flac, ogg, mp3, aiff, ...), block after block, to its real end.

    What lies behind the announced end is read too: samples that a header does not count, further mp3, flac, ogg, wav, ...
    files in the same one, at other rates and channel counts too.

    Args:
        seconds: of the file per block.
    Yields: (n,) float32 tensors at 16 kHz, n may be 0; channels averaged; integer formats are scaled to [-1, 1).
    Raises: OSError if there is no such file; ValueError, at the latest where the damage is met, if it is no audio, is empty,
        holds NaN or infinity, or is cut short. A missing end is noticed in wav, aiff, au, w64, rf64, caf and NIST (by the header;
        up to 44 bytes are taken for a header that was counted; one that a stream began with 0 or about 2 or 4 GiB promises
        nothing), in flac, and beyond 2 frames in mp3 with a Xing or Info header; a hole of over 4 kB in any mp3. It cannot be
        noticed in ogg and other mp3, nor in a flac of unknown length that ends between frames.
    """
    path, resampler, heard = Path(path), None, 0.0
    with _sounds(path) as sounds:
        for sound, part in sounds:
            with sound:
                rate, total = sound.samplerate, 0
                promised = part.frames or (sound.frames if sound.frames < UNKNOWN_FRAMES else 0)
                if resampler is None or resampler.rate != rate:
                    if resampler:
                        yield resampler.finish()
                    resampler = Resampler(rate)
                most = max(1, min(round(seconds * rate), sound.frames))
                while True:
                    # a flac's announced end ends a block: behind it, what is no sound does no harm
                    size = min(most, promised - total) if sound.format == "FLAC" and total < promised else most
                    try:
                        block = sound.read(size, dtype="float32", always_2d=True)  # (n', channels)
                    except soundfile.LibsndfileError as error:
                        if sound.format == "FLAC" and 0 < promised <= total:
                            break
                        raise ValueError(f"{path} is damaged or cut short after {heard + total / rate:.2f} s "
                                         f"({error.error_string}); {AGAIN}") from None
                    if len(block) == 0:
                        break
                    total += len(block)
                    samples = torch.from_numpy(block).mean(dim=1) if block.shape[1] > 1 else torch.from_numpy(block[:, 0])
                    if not np.isfinite(samples.numpy()).all():  # by NumPy: many threads decode, and have no need of more
                        raise ValueError(f"{path} holds NaN or infinite samples; export the recording again")
                    yield resampler.feed(samples)
                heard += total / rate
                if total < promised - (MP3_SLACK if sound.format == "MP3" else 0):
                    raise ValueError(f"{path} is cut short: it ends after {heard:.2f} s; {AGAIN}")
    if not heard:
        raise ValueError(f"{path} holds no samples; give a recording of at least 0.05 s")
    yield resampler.finish()


def read_wav(path):
    """The blocks of read_blocks joined: (S,) float32 tensor at 16 kHz. Raises the same."""
    return torch.cat(list(read_blocks(path)))


def duration(path):
    """Seconds that the file lasts, by its headers and the walk over its frames. Raises as read_blocks for what these show."""
    path, total = Path(path), 0.0
    with _sounds(path) as sounds:
        for sound, part in sounds:
            with sound:
                frames = part.frames or sound.frames
                if frames > UNKNOWN_FRAMES:
                    return sum(len(block) for block in read_blocks(path)) / SAMPLE_RATE
                total += frames / sound.samplerate
    return total


def wav_bytes(samples, rate=SAMPLE_RATE, comment=""):
    """(S,) float samples as a wav file of 16-bit PCM; values beyond [-1, 1] are clipped. comment: a text for its header."""
    array = torch.as_tensor(samples).detach().float().clamp(-1, 1).cpu().numpy()
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", rate, 1, "PCM_16", format="WAV") as sound:
        if comment:
            sound.comment = comment
        sound.write(array)
    return content.getvalue()


def write_wav(path, samples, rate=SAMPLE_RATE, comment=""):
    """The same as a file, which appears whole or not at all (OSError)."""
    files.write_bytes(path, wav_bytes(samples, rate, comment))
