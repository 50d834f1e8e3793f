"""audio.py: files of many kinds become the same float32 mono samples at 16 kHz."""
import math

import numpy as np
import pytest
import soundfile
import torch

from audio import SAMPLE_RATE, read_wav, resample, write_wav


def tone(rate, seconds=0.5, frequency=440.0):
    return torch.sin(2 * math.pi * frequency * torch.arange(int(rate * seconds)) / rate)


def test_write_then_read_returns_the_samples_to_16_bits(tmp_path):
    samples = 0.5 * tone(SAMPLE_RATE)
    write_wav(tmp_path / "a.wav", samples)
    assert (read_wav(tmp_path / "a.wav") - samples).abs().max() < 1 / 32767
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]  # no temporary file is left


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000])
def test_resampling_keeps_a_tone_and_rounds_the_length_up(rate):
    source = tone(rate)
    result = resample(source, rate)
    assert len(result) == math.ceil(len(source) * SAMPLE_RATE / rate)
    middle = slice(2000, 6000)  # away from the edges, where the filter sees silence
    assert (result[middle] - tone(SAMPLE_RATE)[middle]).abs().max() < 2e-3


def test_resampling_agrees_with_a_direct_float64_sum_of_windowed_sincs():
    rng = np.random.default_rng(0)
    source, rate = rng.standard_normal(300), 22050
    cutoff = SAMPLE_RATE * 0.99  # Hz, twice the cut-off of the low-pass
    expected = []
    for n in range(math.ceil(len(source) * SAMPLE_RATE / rate)):
        t = np.clip((np.arange(len(source)) / rate - n / SAMPLE_RATE) * cutoff, -6, 6)
        expected.append(np.sum(source * np.sinc(t) * np.cos(t * np.pi / 12) ** 2) * cutoff / rate)
    result = resample(torch.from_numpy(source).float(), rate)
    assert np.abs(result.numpy() - np.array(expected)).max() < 1e-5


@pytest.mark.parametrize("suffix, subtype", [("wav", "PCM_24"), ("flac", "PCM_16"), ("ogg", "VORBIS"), ("mp3", None),
                                             ("aiff", "PCM_16")])
def test_every_format_channel_count_and_rate_becomes_mono_16_khz(tmp_path, suffix, subtype):
    source = 0.4 * tone(44100)
    stereo = torch.stack([source, 0.5 * source], dim=1).numpy()
    soundfile.write(tmp_path / f"a.{suffix}", stereo, 44100, subtype=subtype)
    samples = read_wav(tmp_path / f"a.{suffix}")
    assert samples.dtype == torch.float32 and samples.ndim == 1
    assert abs(len(samples) - 8000) < 600  # lossy formats pad
    assert 0.25 < samples[2000:6000].abs().max() < 0.35  # (0.4 + 0.2) / 2


def test_files_that_are_no_recordings_get_a_clear_error(tmp_path):
    (tmp_path / "text.wav").write_text("this is not audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    for name, words in (("text.wav", "as audio"), ("empty.wav", "no samples"), ("nan.wav", "NaN")):
        with pytest.raises(ValueError, match=words):
            read_wav(tmp_path / name)
    with pytest.raises(ValueError, match="directory"):
        read_wav(tmp_path)
    with pytest.raises(FileNotFoundError, match="no audio file"):
        read_wav(tmp_path / "missing.wav")
