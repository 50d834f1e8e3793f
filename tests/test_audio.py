"""audio.py: files of many kinds become the same float32 mono samples at 16 kHz, whole or in blocks."""
import io
import math
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speech.audio import SAMPLE_RATE, Resampler, duration, read_blocks, read_wav, resample, write_wav
from speech.spoken import comment_of, write_spoken

ROOT = Path(__file__).parent.parent
USUAL = [8000, 11025, 22050, 24000, 44100, 48000]
ODD = [16001, 12345, 44101]
WAV_SUBTYPES = [name for name in soundfile.available_subtypes("WAV") if name != "MPEG_LAYER_III"]  # that one is read only
KINDS = [*(("WAV", subtype) for subtype in WAV_SUBTYPES), ("WAVEX", "PCM_16"), ("RF64", "PCM_16"), ("W64", "PCM_16"),
         ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
         ("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("AU", "PCM_16"), ("CAF", "PCM_16")]
each_kind = pytest.mark.parametrize("format, subtype", KINDS, ids=lambda kind: kind)


def tone(rate, seconds=0.5, frequency=440.0):
    return torch.sin(2 * math.pi * frequency * torch.arange(int(rate * seconds)) / rate)


def noise(n, seed=0):
    return 2 * torch.rand(n, generator=torch.Generator().manual_seed(seed)) - 1


def write(path, samples, rate, format, subtype):
    """Write (S,) samples on two channels, the second at half the volume, or on one where the coder takes one only."""
    stereo = np.stack([samples, 0.5 * samples], axis=1)
    try:
        soundfile.write(path, stereo, rate, format=format, subtype=subtype)
    except soundfile.LibsndfileError:
        soundfile.write(path, 0.75 * samples, rate, format=format, subtype=subtype)
    return path


def in_pieces(samples, rate, sizes):
    resampler, pieces, at = Resampler(rate), [], 0
    for size in sizes:
        pieces.append(resampler.feed(samples[at:at + size]))
        at += size
    return torch.cat([*pieces, resampler.feed(samples[at:]), resampler.finish()])


# ---------------------------------------------------------------------------------------------- resampling

@pytest.mark.parametrize("rate", USUAL)
def test_resampling_keeps_a_tone_and_rounds_the_length_up(rate):
    source = tone(rate)
    result = resample(source, rate)
    assert len(result) == math.ceil(len(source) * SAMPLE_RATE / rate)
    middle = slice(2000, 6000)  # away from the edges, where the filter sees silence
    assert (result[middle] - tone(SAMPLE_RATE)[middle]).abs().max() < 2e-3


@pytest.mark.parametrize("rate", [*USUAL, *ODD])
def test_resampling_agrees_with_a_direct_float64_sum_of_windowed_sincs(rate):
    rng = np.random.default_rng(0)
    source = rng.uniform(-1, 1, 700)  # short: a good part of the output sees an edge
    cutoff = min(rate, SAMPLE_RATE) * 0.99  # Hz, twice the cut-off of the low-pass
    expected = []
    for n in range(math.ceil(len(source) * SAMPLE_RATE / rate)):
        t = np.clip((np.arange(len(source)) / rate - n / SAMPLE_RATE) * cutoff, -6, 6)
        expected.append(np.sum(source * np.sinc(t) * np.cos(t * np.pi / 12) ** 2) * cutoff / rate)
    result = resample(torch.from_numpy(source).float(), rate)
    assert result.shape == (len(expected),) and np.abs(result.numpy() - np.array(expected)).max() < 1e-5
    exact = resample(torch.from_numpy(source), rate)
    assert exact.dtype == torch.float64 and np.abs(exact.numpy() - np.array(expected)).max() < 1e-12


def torchaudio_resample(samples, rate):
    """torchaudio's sinc_interp_hann with its default settings, from its definition: one dense kernel per phase, strided."""
    g = math.gcd(rate, SAMPLE_RATE)
    orig, new = rate // g, SAMPLE_RATE // g
    base = min(orig, new) * 0.99
    width = math.ceil(6 * orig / base)
    padded = np.concatenate([np.zeros(width), samples, np.zeros(width + orig)])
    phases = []
    for i in range(new):
        t = np.clip((-i / new + np.arange(-width, width + orig) / orig) * base, -6, 6)
        kernel = np.sinc(t) * np.cos(t * np.pi / 12) ** 2 * base / orig
        phases.append(np.lib.stride_tricks.sliding_window_view(padded, len(kernel))[::orig] @ kernel)
    return np.stack(phases, axis=1).reshape(-1)[:math.ceil(new * len(samples) / orig)]


@pytest.mark.parametrize("rate", USUAL)
@pytest.mark.parametrize("n", [1, 440, 441, 442, 3000])
def test_resampling_agrees_with_the_published_definition_of_torchaudio(rate, n):
    source = noise(n)
    expected = torchaudio_resample(source.double().numpy(), rate)
    result = resample(source, rate)
    assert result.shape == expected.shape and np.abs(result.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("rate", [*USUAL, *ODD, SAMPLE_RATE])
@pytest.mark.parametrize("size", [1, 7, 160, 441, 1000])
def test_pieces_of_any_size_give_the_samples_of_the_whole(rate, size):
    source = noise(60 * size if size < 100 else 5000)
    whole = resample(source, rate)
    pieces = in_pieces(source, rate, [size] * (len(source) // size))
    assert len(whole) == -(-len(source) * SAMPLE_RATE // rate)
    assert torch.equal(pieces, whole)  # to the bit, which is more than any use of them asks


@settings(deadline=None, max_examples=40)
@given(rate=st.sampled_from([*USUAL, *ODD, SAMPLE_RATE]) | st.integers(1, 100_000), n=st.integers(0, 3000),
       sizes=st.lists(st.integers(0, 900), max_size=12))
def test_random_pieces_at_any_rate_give_the_samples_of_the_whole(rate, n, sizes):
    n = min(n, rate // 4)  # a few Hz would become a million samples
    source = noise(n)
    pieces = in_pieces(source, rate, sizes)
    assert len(pieces) == -(-n * SAMPLE_RATE // rate)
    torch.testing.assert_close(pieces, resample(source, rate), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [*USUAL, *ODD])
def test_the_resampler_keeps_less_than_a_frame_of_input_and_its_filter(rate):
    resampler = Resampler(rate)
    for _ in range(20):
        resampler.feed(noise(3000))
        assert len(resampler.pending) <= resampler.source + 2 * resampler.width
    assert resampler.kernel.size < 200 * SAMPLE_RATE  # also where rates share no divisor


def test_rates_that_are_not_positive_are_refused():
    for rates in ((0, 16000), (16000, -1)):
        with pytest.raises(ValueError, match="must be positive"):
            resample(torch.zeros(5), *rates)


# ---------------------------------------------------------------------------------------------- files

def test_write_then_read_returns_the_samples_to_16_bits(tmp_path):
    samples = 0.5 * tone(SAMPLE_RATE)
    write_wav(tmp_path / "a.wav", samples)
    assert (read_wav(tmp_path / "a.wav") - samples).abs().max() < 1 / 32767
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]  # no temporary file is left


@each_kind
def test_every_kind_of_file_becomes_mono_16_khz_and_tells_its_duration(tmp_path, format, subtype):
    rate = 48000 if subtype == "OPUS" else 44100
    path = write(tmp_path / "a", (0.4 * tone(rate, 2)).numpy(), rate, format, subtype)
    samples = read_wav(path)
    assert samples.dtype == torch.float32 and samples.ndim == 1
    assert abs(len(samples) - 32000) < 600  # some coders pad
    assert 0.25 < samples[2000:6000].abs().max() < 0.35  # (0.4 + 0.2) / 2
    assert (samples[2000:6000] - 0.3 * tone(SAMPLE_RATE)[2000:6000]).abs().mean() < 0.05
    assert duration(path) == pytest.approx(len(samples) / SAMPLE_RATE, rel=0.01)
    assert duration(path) == pytest.approx(2, rel=0.02)


@each_kind
def test_read_wav_is_the_blocks_joined_to_the_bit(tmp_path, format, subtype):
    rate = 12000  # the coders' rates differ; all know this one
    samples = 0.5 * noise(int(10.4 * rate)).numpy()  # more than one block of the default length
    path = write(tmp_path / "a", samples, rate, format, subtype)
    blocks = list(read_blocks(path))
    whole = read_wav(path)
    assert len(blocks) == 3 and abs(len(blocks[0]) - 160_000) < 500  # two of the file, one that the filter held back
    assert torch.equal(torch.cat(blocks), whole)
    decoded, _ = soundfile.read(path, dtype="float32", always_2d=True)  # at once: decoders must not notice the blocks
    expected = resample(torch.from_numpy(decoded).mean(dim=1), rate)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6 if format == "MP3" else 0)  # soundfile seeks in an mp3
    assert torch.equal(torch.cat(list(read_blocks(path, seconds=0.37))), whole)


def test_a_block_is_counted_in_samples_of_the_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(40_000).numpy(), SAMPLE_RATE)
    assert [len(block) for block in read_blocks(tmp_path / "a.wav", seconds=1)] == [16_000, 16_000, 8000, 0]


@pytest.mark.parametrize("rate", [8000, SAMPLE_RATE, 44100])
@pytest.mark.parametrize("n", [1, 2, 50])
def test_silence_and_the_shortest_files_are_read(tmp_path, rate, n):
    soundfile.write(tmp_path / "a.wav", np.zeros(n), rate)
    samples = read_wav(tmp_path / "a.wav")
    assert torch.equal(samples, torch.zeros(-(-n * SAMPLE_RATE // rate)))


@pytest.mark.slow
def test_a_long_recording_needs_no_more_memory_than_a_short_one(tmp_path):
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 48000, 2, "PCM_16") as file:  # silence: small on disk
        for _ in range(60):
            file.write(np.zeros((480_000, 2), dtype=np.int16))
    soundfile.write(tmp_path / "short.flac", np.zeros((480_000, 2)), 48000)
    program = ("import resource, sys; from speech.audio import read_blocks\n"
               "for name in sys.argv[1:]:\n"
               "    print(sum(len(block) for block in read_blocks(name)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path / "short.flac"), str(tmp_path / "long.flac")],
                            cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (short, before), (long, after) = (map(int, line.split()) for line in result.stdout.splitlines())
    kib = 1 if sys.platform == "linux" else 1024  # ru_maxrss counts bytes on a Mac
    assert (short, long) == (160_000, 9_600_000)
    assert (after - before) / kib < 40 * 1024  # the decoded file would take 230 MB, its mono half of that


# ---------------------------------------------------------------------------------------------- damage

def test_files_that_are_no_recordings_get_a_clear_error(tmp_path):
    (tmp_path / "text.wav").write_text("this is not audio")
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "headerless.raw").write_bytes(bytes(1000))
    (tmp_path / "stump.wav").write_bytes(b"RIFF\0\0\0\0WAVEdata")
    (tmp_path / "pointer.wav").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "zeros.mp3").write_bytes(bytes(5000))
    os.mkfifo(tmp_path / "pipe.wav")  # would wait for ever
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "inf.wav", np.array([[0.0, 0.0], [0.0, np.inf]]), 44100, subtype="DOUBLE")
    for name, words in (("text.wav", "as audio"), ("nothing.wav", "is empty"), ("pointer.wav", "git lfs pull"),
                        ("zeros.mp3", "holds no MPEG audio"), ("pipe.wav", "is a pipe"), ("headerless.raw", "as audio"),
                        ("stump.wav", "as audio"), ("empty.wav", "no samples"), ("nan.wav", "NaN"), ("inf.wav", "NaN")):
        with pytest.raises(ValueError, match=words):
            read_wav(tmp_path / name)
        if name not in ("empty.wav", "nan.wav", "inf.wav"):
            with pytest.raises(ValueError, match=words):
                duration(tmp_path / name)
    for read in (read_wav, duration, lambda path: list(read_blocks(path))):
        with pytest.raises(ValueError, match="directory"):
            read(tmp_path)
        with pytest.raises(FileNotFoundError, match="no audio file"):
            read(tmp_path / "missing.wav")


def test_a_sampling_rate_that_no_recording_has_is_taken_for_damage(tmp_path):
    for rate in (1, 999, 1_000_003):
        soundfile.write(tmp_path / "a.wav", np.zeros(100), rate)
        for read in (read_wav, duration):
            with pytest.raises(ValueError, match=f"claims {rate} samples"):
                read(tmp_path / "a.wav")


def test_nan_in_the_second_block_stops_there(tmp_path):
    samples = noise(20_000).numpy()
    samples[15_000] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    blocks = read_blocks(tmp_path / "a.wav", seconds=0.625)
    assert np.array_equal(next(blocks).numpy(), samples[:10_000])
    with pytest.raises(ValueError, match="NaN"):
        next(blocks)


@pytest.mark.parametrize("share", [0.95, 0.5, 0.1])
@pytest.mark.parametrize("format, subtype", [kind for kind in KINDS if kind[0] != "OGG"], ids=lambda kind: kind)
def test_a_file_whose_end_is_missing_is_refused(tmp_path, format, subtype, share):
    path = write(tmp_path / "a", 0.5 * noise(3 * 44100).numpy(), 44100, format, subtype)
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match="cut short|as audio"):
        read_wav(path)
    if format in ("WAV", "AIFF", "W64", "AU"):  # the header shows it
        with pytest.raises(ValueError, match="header promises"):
            duration(path)


def test_an_ogg_file_whose_end_is_missing_is_read_up_to_there_or_refused(tmp_path):
    for subtype in ("VORBIS", "OPUS"):
        path = write(tmp_path / "a.ogg", 0.5 * noise(5 * 48000).numpy(), 48000, "OGG", subtype)
        whole, content = read_wav(path), path.read_bytes()
        path.write_bytes(content[:int(0.9 * len(content))])
        samples = read_wav(path)
        assert 0.7 * len(whole) < len(samples) < len(whole)
        path.write_bytes(content[:100])
        with pytest.raises(ValueError, match="as audio"):
            read_wav(path)


def flac_frames(content):
    """Where the frames of a flac of fixed block size begin: sync word, block size and rate as in the first, next number."""
    at, starts = content.index(b"\xff\xf8"), []
    start = content[at:at + 4]
    while (at := content.find(start + bytes([len(starts)]), at)) >= 0 and len(starts) < 128:
        starts.append(at)
    return starts


def test_a_flac_that_ends_between_two_frames_is_refused_unless_its_length_is_unknown(tmp_path):
    path = write(tmp_path / "a.flac", 0.5 * noise(44100).numpy(), 44100, "FLAC", "PCM_16")
    content = bytearray(path.read_bytes())
    starts = flac_frames(content)
    assert len(starts) >= 10
    path.write_bytes(content[:starts[5]])
    with pytest.raises(ValueError, match=f"ends after {5 * 4096 / 44100:.2f} s"):
        read_wav(path)
    whole = write(tmp_path / "b.flac", 0.5 * noise(44100).numpy(), 44100, "FLAC", "PCM_16")
    content[21] &= 0xF0  # STREAMINFO's 36 bits of length: 0 is what an encoder writes into a pipe
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert torch.equal(read_wav(path), read_wav(whole)) and duration(path) == pytest.approx(1)
    path.write_bytes(content[:starts[5] + 50])  # within a frame: the decoder notices
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_wav(path)
    path.write_bytes(content[:starts[5]])
    assert len(read_wav(path)) == math.ceil(5 * 4096 * SAMPLE_RATE / 44100)


def test_a_damaged_flac_is_refused_where_the_damage_is(tmp_path):
    path = write(tmp_path / "a.flac", 0.5 * noise(5 * 44100).numpy(), 44100, "FLAC", "PCM_16")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    blocks = read_blocks(path, seconds=1)
    assert len(next(blocks)) + len(next(blocks)) > 31_000
    with pytest.raises(ValueError, match="damaged or cut short after 2.00 s"):
        list(blocks)


def without_index(content):
    """An mp3 without its first MPEG frame, which holds the length; 44.1 kHz."""
    kbps = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320][content[2] >> 4]
    return content[144_000 * kbps // 44100 + (content[2] >> 1 & 1):]


def test_an_mp3_is_held_to_its_length_only_if_it_tells_it(tmp_path):
    path = write(tmp_path / "a.mp3", 0.5 * noise(3 * 44100).numpy(), 44100, "MP3", "MPEG_LAYER_III")
    content = path.read_bytes()
    assert b"Xing" in content[:64] and b"Xing" not in without_index(content)[:64]
    id3 = b"ID3\x04\0\0" + bytes([0, 0, 2, 44]) + bytes(300)  # 2 * 128 + 44 bytes
    whole = read_wav(path)
    path.write_bytes(id3 + content)
    assert torch.equal(read_wav(path), whole)
    path.write_bytes((id3 + content)[:len(content) // 2])
    with pytest.raises(ValueError, match="cut short"):
        read_wav(path)
    # Noise after silence: from the first, small frame libsndfile guesses a low constant bit rate, thus too long a recording.
    samples = 0.5 * noise(3 * 44100).numpy()
    samples[:44100] = 0
    content = write(path, samples, 44100, "MP3", "MPEG_LAYER_III").read_bytes()
    path.write_bytes(without_index(content))
    assert duration(path) == pytest.approx(3, abs=0.05) and abs(len(read_wav(path)) - len(whole)) < 1000


STREAMED = [(0, 0), (36, 0), (8, 0), (0xFFFFFFFF, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF - 36),
            (0x7FFFF024, 0x7FFFF000), (0x80000024, 0x80000000)]  # of the file, of the samples


@pytest.mark.parametrize("riff, data", STREAMED, ids=str)
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "ULAW"])
def test_a_wav_written_into_a_pipe_is_read_to_its_end(tmp_path, riff, data, subtype):
    path = write(tmp_path / "a.wav", 0.5 * noise(44100).numpy(), 44100, "WAV", subtype)
    whole, content = read_wav(path), bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[4:8], content[at:at + 4] = struct.pack("<I", riff), struct.pack("<I", data)
    path.write_bytes(content)
    assert torch.equal(read_wav(path), whole) and duration(path) == 1
    assert path.read_bytes() == content  # the file itself is left as it was


def test_an_empty_wav_with_a_title_behind_the_samples_is_empty(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16000)
    content = bytearray((tmp_path / "a.wav").read_bytes() + b"LIST\x04\0\0\0INFO")
    content[4:8] = struct.pack("<I", len(content) - 8)
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match="no samples"):
        read_wav(tmp_path / "a.wav")


@pytest.mark.parametrize("format, size", [("AU", b"\xff\xff\xff\xff"), ("AIFF", b"\x7f\0\0\x08")])
def test_an_au_or_aiff_written_into_a_pipe_is_read_to_its_end(tmp_path, format, size):
    path = write(tmp_path / "a", 0.5 * noise(44100).numpy(), 44100, format, "PCM_16")
    whole, content = read_wav(path), bytearray(path.read_bytes())
    at = content.index(b"SSND") + 4 if format == "AIFF" else 8
    content[at:at + 4] = size
    path.write_bytes(content)
    assert torch.equal(read_wav(path), whole) and duration(path) == 1


# ---------------------------------------------------------------------------------------------- the real end

LENGTHS = {"WAV": (b"data", "<I", 4), "WAVEX": (b"data", "<I", 4), "AIFF": (b"SSND", ">I", 4), "SVX": (b"BODY", ">I", 4),
           "AU": (b".snd", ">I", 8), "CAF": (b"data", ">q", 4), "RF64": (b"ds64", "<Q", 16), "W64": (b"data", "<Q", 16)}


def content_of(samples, rate, format, subtype=None, endian="FILE"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype, endian=endian)
    return file.getvalue()


def read_bytes(tmp_path, content, name="a"):
    """The samples of a file with that content, outside and inside a zip; its duration is theirs."""
    path = tmp_path / name
    path.write_bytes(content)
    samples = read_wav(path)
    assert duration(path) == pytest.approx(len(samples) / SAMPLE_RATE, abs=0.0001)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, name)
    assert torch.equal(read_wav(tmp_path / "a.zip" / name), samples)
    return samples


@pytest.mark.parametrize("error", [-16_000, -2, 1, 2, 44, 45, 4000, "nothing", "unknown"])
@pytest.mark.parametrize("format", LENGTHS)
def test_a_wrong_length_in_a_header_costs_no_samples(tmp_path, format, error):
    content = bytearray(content_of(0.5 * noise(16_000).numpy(), SAMPLE_RATE, format))
    whole = read_bytes(tmp_path, content)
    name, packing, at = LENGTHS[format]
    at += content.index(name)
    right, = struct.unpack_from(packing, content, at)
    wrong = {"nothing": 0, "unknown": -1 if format == "CAF" else 256**struct.calcsize(packing) - 1}.get(error)
    struct.pack_into(packing, content, at, right + error if wrong is None else wrong)
    if error in (45, 4000):
        assert format == "CAF" or struct.unpack_from(packing, content, at)[0] > right
        (tmp_path / "a").write_bytes(content)
        for read in (read_wav, duration):
            with pytest.raises(ValueError, match="cut short: its header promises"):
                read(tmp_path / "a")
    else:
        assert torch.equal(read_bytes(tmp_path, content), whole)


def chunk(name, text, pad=True):
    return name + struct.pack("<I", len(text)) + text + bytes(len(text) % 2 if pad else 0)


TITLE = b"INFOICMT" + struct.pack("<I", 14) + b"data of a test"


@pytest.mark.parametrize("size", ["right", "nothing", "wrong"])
@pytest.mark.parametrize("before", [b"", chunk(b"LIST", TITLE), chunk(b"LIST", b"INFOdata" + bytes(5)),
                                    chunk(b"JUNK", b"data" * 7), chunk(b"LIST", TITLE + b"!", pad=False)],
                         ids=["none", "title", "odd", "junk", "no pad"])
def test_the_chunks_of_a_wav_are_walked(tmp_path, before, size):
    content = content_of(0.5 * noise(5000).numpy(), SAMPLE_RATE, "WAV")
    whole = read_bytes(tmp_path, content)
    length = struct.pack("<I", {"right": 10_000, "nothing": 0, "wrong": 10_044}[size])
    assert torch.equal(read_bytes(tmp_path, content[:36] + before + b"data" + length + content[44:]), whole)


@pytest.mark.parametrize("behind", [chunk(b"LIST", TITLE), chunk(b"id3 ", b"ID3" + bytes(30)), b"ID3\4\0\0\0\0\0\x10" + bytes(16),
                                    chunk(b"LIST", TITLE) + b"TAG" + bytes(125), chunk(b"LIST", TITLE)[:-6], b"\0"],
                         ids=["LIST", "id3 chunk", "ID3", "LIST and TAG", "half a LIST", "pad"])
@pytest.mark.parametrize("n", [5000, 5001])
def test_what_stands_behind_the_samples_of_a_wav_becomes_none(tmp_path, behind, n):
    content = content_of((127 * noise(n)).byte().numpy().astype(np.int16), SAMPLE_RATE, "WAV", "PCM_U8")[:44 + n]
    whole = read_bytes(tmp_path, content)
    for pad in {0, n % 2}:  # some writers forget it
        assert torch.equal(read_bytes(tmp_path, content + bytes(pad) + behind), whole)


def test_a_wav_of_over_4_gib_is_read_by_the_size_of_the_file(tmp_path):
    content = bytearray(content_of(np.zeros(100), SAMPLE_RATE, "WAV"))
    size = 2**32 + 2 * SAMPLE_RATE  # of the samples; the header holds what is left of it in 32 bits
    content[40:44] = struct.pack("<I", 2 * SAMPLE_RATE)
    with open(tmp_path / "a.wav", "wb") as file:
        file.write(content[:44])
        file.truncate(44 + size)
    assert duration(tmp_path / "a.wav") == size / 2 / SAMPLE_RATE
    assert torch.equal(next(read_blocks(tmp_path / "a.wav", seconds=0.1)), torch.zeros(1600))


@pytest.mark.parametrize("other", [SAMPLE_RATE, 44_100, 22_050])
@pytest.mark.parametrize("format, subtype", [
    ("WAV", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("RF64", "PCM_16"), ("W64", "PCM_16"),
    ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("OGG", "FLAC"), ("MP3", "MPEG_LAYER_III")], ids=lambda kind: kind)
def test_files_that_were_joined_are_read_one_after_the_other(tmp_path, format, subtype, other):
    if subtype == "OPUS":
        other = {SAMPLE_RATE: SAMPLE_RATE, 44_100: 48_000, 22_050: 24_000}[other]
    elif subtype == "FLAC" and "OGG" == format and subtype not in soundfile.available_subtypes("OGG"):
        pytest.skip("this libsndfile writes no flac in ogg")
    first = content_of(0.5 * noise(16_000).numpy(), SAMPLE_RATE, format, subtype)
    second = content_of(0.5 * noise(30_000, seed=1).view(-1, 2).numpy(), other, format, subtype)
    pieces = [read_bytes(tmp_path, content) for content in (first, second)]
    joined = read_bytes(tmp_path, first + second)
    assert len(joined) == pytest.approx(sum(map(len, pieces)), abs=1)
    if other != SAMPLE_RATE:  # the resampler goes on where the rate does
        assert torch.equal(joined, torch.cat(pieces))
    torch.testing.assert_close(joined[:15_990], pieces[0][:15_990])
    assert len(read_bytes(tmp_path, first + first)) == 2 * len(pieces[0])  # ogg: the same serial number twice


def mp3_of(samples, rate=44_100):
    """An mp3 without its first frame; of a variable bit rate, as silence and noise come in turns."""
    samples = samples * (torch.arange(len(samples)) // rate % 2)
    return without_index(content_of(samples.numpy(), rate, "MP3")) if rate == 44_100 else content_of(samples.numpy(), rate, "MP3")


ID3 = b"ID3\4\0\0\0\0\x27\x10" + b"\xff\xfb\x90\x64" * 1252  # 39 * 128 + 16 bytes of a picture, full of what frames begin with
APE = b"APETAGEX" + struct.pack("<III", 2000, 500, 1) + bytes(12) + b"\xff\xfb\x90\x64" * 125


def test_an_mp3_without_an_index_is_read_to_its_end(tmp_path):
    content = mp3_of(0.5 * noise(4 * 44_100))
    (tmp_path / "a.mp3").write_bytes(content)
    assert soundfile.info(tmp_path / "a.mp3").duration > 5  # guessed, too long
    whole = read_bytes(tmp_path, content, "a.mp3")
    assert len(whole) == pytest.approx(4 * SAMPLE_RATE, abs=2000)
    turned = content[len(content) // 2:]  # begins within a frame, and with noise: the guess would be too short
    (tmp_path / "a.mp3").write_bytes(turned)
    half = read_bytes(tmp_path, turned, "a.mp3")
    assert 1.5 < len(half) / SAMPLE_RATE < 3
    assert float(half[-SAMPLE_RATE:].std()) == pytest.approx(float(whole[-SAMPLE_RATE:].std()), rel=0.01)
    for behind in (b"TAG" + bytes(125), APE + b"TAG" + bytes(125), content[:100], bytes(3000)):
        assert torch.equal(read_bytes(tmp_path, ID3 + content + behind, "a.mp3"), whole)


def test_an_mp3_of_noise_before_silence_is_read_to_its_end(tmp_path):
    samples = 0.5 * noise(4 * 44_100)
    samples[22_050:-44_100] = 0
    content = without_index(content_of(samples.numpy(), 44_100, "MP3"))
    (tmp_path / "a.mp3").write_bytes(content)
    assert soundfile.info(tmp_path / "a.mp3").duration < 3  # guessed, too short
    assert len(read_bytes(tmp_path, content, "a.mp3")) == pytest.approx(4 * SAMPLE_RATE, abs=2000)


@pytest.mark.parametrize("between", [b"", ID3, b"TAG" + bytes(125), APE + b"TAG" + bytes(125) + ID3,
                                     b"\xff\xfb\x90\x64" + bytes(200)],
                         ids=["nothing", "ID3v2", "ID3v1", "all tags", "a frame cut off"])
def test_mp3s_that_were_joined_are_read_with_tags_between_them(tmp_path, between):
    first, second = (0.3 * noise(2 * 44_100, seed) for seed in range(2))
    first, second = (content_of(samples.numpy(), 44_100, "MP3") for samples in (first, second))
    pieces = [read_bytes(tmp_path, content, "a.mp3") for content in (first, second)]
    joined = read_bytes(tmp_path, first + between + second, "a.mp3")
    assert len(joined) == pytest.approx(sum(map(len, pieces)), abs=1)
    bare = [without_index(content) for content in (first, second)]
    assert len(read_bytes(tmp_path, bare[0] + between + bare[1], "a.mp3")) > sum(map(len, pieces))  # with the encoder's delay


def test_an_mp3_and_a_file_of_another_kind_that_were_joined_are_both_read(tmp_path):
    sound = mp3_of(0.3 * noise(2 * SAMPLE_RATE, 0), SAMPLE_RATE)
    for format in ("WAV", "FLAC", "AU"):
        other = content_of(0.3 * noise(SAMPLE_RATE, 1).numpy(), SAMPLE_RATE, format)
        first, second = (read_bytes(tmp_path, content, "a.mp3") for content in (sound, other))
        assert torch.equal(read_bytes(tmp_path, sound + other, "a.mp3"), torch.cat([first, second])), format
    other = content_of(0.3 * noise(SAMPLE_RATE, 1).numpy(), SAMPLE_RATE, "WAV")
    assert torch.equal(read_bytes(tmp_path, other + sound, "a.wav")[:SAMPLE_RATE], read_bytes(tmp_path, other, "a.wav"))
    assert len(read_bytes(tmp_path, other + sound, "a.wav")) == SAMPLE_RATE + len(first)


@pytest.mark.parametrize("behind", [b"TAG" + bytes(125), bytes(5000) + b"APETAGEX" + struct.pack("<IIIIQ", 1000, 5032, 1, 0, 0),
                                    bytes(5000) + b"005000LYRICS200" + b"TAG" + bytes(125)], ids=["ID3v1", "APE", "Lyrics3"])
def test_titles_behind_an_mp3_or_a_flac_of_unknown_length_are_no_sound(tmp_path, behind):
    content = mp3_of(0.3 * noise(2 * SAMPLE_RATE), SAMPLE_RATE)
    assert torch.equal(read_bytes(tmp_path, content + behind, "a.mp3"), read_bytes(tmp_path, content, "a.mp3"))
    content = bytearray(content_of(0.3 * noise(SAMPLE_RATE).numpy(), SAMPLE_RATE, "FLAC"))
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])  # as a stream begins
    assert len(read_bytes(tmp_path, content + behind, "a.flac")) == SAMPLE_RATE


def test_a_name_that_is_not_utf_8_is_read_and_recognised(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    write_spoken(tmp_path, {path.stem: 0.3 * noise(4000)}, record := "0123 {}")
    assert len(read_wav(path)) == 4000 and duration(path) == 0.25 and comment_of(path) == record


def test_a_hole_in_an_mp3_and_one_of_free_format_are_refused(tmp_path):
    content = mp3_of(0.5 * noise(4 * 44_100))
    half = len(content) // 2
    for damaged, words in ((content[:half] + bytes(10_000) + content[half:], "damaged: 10... of its bytes"),
                           (content[:half] + bytes(6000) + content[half + 6000:], "damaged"),
                           (content[:half] + bytes(10_000), "damaged: [0-9]* of its bytes"),  # a download that was not finished
                           (content[:2] + bytes([content[2] & 15]) + content[3:], "free format")):
        (tmp_path / "a.mp3").write_bytes(damaged)
        for read in (read_wav, duration):
            with pytest.raises(ValueError, match=f"a.mp3 is .*{words}"):
                read(tmp_path / "a.mp3")
    (tmp_path / "a.mp3").write_bytes(content[:half] + bytes(50) + content[half:])  # less than a frame: decoders find on
    assert len(read_wav(tmp_path / "a.mp3")) == pytest.approx(4 * SAMPLE_RATE, abs=3000)


def test_a_flac_is_read_beyond_what_its_header_says_but_not_into_what_is_no_sound(tmp_path):
    content = bytearray(content_of(0.5 * noise(44_100).numpy(), 44_100, "FLAC"))
    whole = read_bytes(tmp_path, content)
    assert torch.equal(read_bytes(tmp_path, content + b"TAG" + bytes(125)), whole)
    content[22:26] = struct.pack(">I", 20_000)
    (tmp_path / "a.flac").write_bytes(content)
    assert torch.equal(read_wav(tmp_path / "a.flac"), whole)


def test_a_sphere_file_is_held_to_its_length(tmp_path):
    content = content_of(0.5 * noise(16_000).numpy(), SAMPLE_RATE, "NIST")
    assert len(read_bytes(tmp_path, content)) == 16_000
    (tmp_path / "a").write_bytes(content[:-2000])
    with pytest.raises(ValueError, match="cut short"):
        read_wav(tmp_path / "a")


# ---------------------------------------------------------------------------------------------- recordings in a zip

def test_a_path_may_lead_into_a_zip(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (3000, 2))
    names = {"a.wav": 16_000, "deep/b.flac": 44_100, "c.mp3": 16_000}
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, rate in names.items():
            soundfile.write(tmp_path / Path(name).name, noise, rate)
            archive.write(tmp_path / Path(name).name, name)
        archive.writestr("broken.wav", b"RIFF")
    for name in names:
        inside, outside = tmp_path / "set.zip" / name, tmp_path / Path(name).name
        assert torch.equal(read_wav(inside), read_wav(outside))
        assert duration(str(inside)) == duration(outside)
    with pytest.raises(FileNotFoundError, match="no d.wav in .*set.zip"):
        read_wav(tmp_path / "set.zip/d.wav")
    with pytest.raises(ValueError, match="broken.wav"):
        read_wav(tmp_path / "set.zip/broken.wav")
    (tmp_path / "no.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot read a.wav in .*no.zip"):
        read_wav(tmp_path / "no.zip/a.wav")


def test_a_damaged_member_of_a_zip_is_one_sentence(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 3000), 16_000)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.write(tmp_path / "a.wav", "a.wav")
    content = bytearray((tmp_path / "set.zip").read_bytes())
    content[3000] ^= 0xFF
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(ValueError, match="cannot read a.wav in .*set.zip .*CRC"):
        read_wav(tmp_path / "set.zip/a.wav")
