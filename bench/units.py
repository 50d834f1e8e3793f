"""Speech -> units: speed beside transformers, parts of the network, memory of long recordings, what chunking changes.

    python -m bench units                  # in times real time, beside transformers' HubertModel
    python -m bench hubert                 # what the parts of our HuBERT cost on a CPU, and their alternatives
    python -m bench long                   # peak memory of encoding recordings of two minutes and of an hour
    python -m bench chunking long.wav      # units of long recordings in pieces against those of the whole

units: HuBERT base with random weights, at 25 Hz up to layer 11 and at 50 Hz up to layer 9, 500 centres; speech of 10 s alone, and
eight recordings of 1.5 to 10 s, which the peer gets as one padded batch with its attention mask; on a GPU also 128 of 14 to 15 s,
32 at a time for the peer. From samples in memory to units in memory; ours and the peer's take turns; medians. In every precision
that the device has in hardware; the peer's weights are then in float16 or bfloat16. Agreement is the share of frames whose unit
is that of the peer's features of each recording alone, in float32; the difference is the largest that a padded batch makes to a
frame's features, relative to their norm. Then the pocket tokenizer on 16 pocket stories, as its vocoder says them, and on 100
recordings of LibriSpeech, where NANOTWIST_REAL names a folder with them: agreement is with its own units in float32, and of a
batch with those of the same precision alone.

hubert: the 25 Hz network on 10 s: its front end as PyTorch's convolutions, as products of the whole recording and a second at a
time, with plain and with packed weights; the network up to layer 11 with either.

long: hubert_units.py with the pocket tokenizer on the prompt repeated in 44.1 kHz stereo FLAC, in a process of its own.

chunking: the pocket tokenizer on the given recordings, joined and repeated to ten minutes (default: the pocket prompt), encoded
whole and in pieces; the share of frames that get another unit, and the most that differ in any ten seconds.
"""
import functools
import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import hubert_units
from bench.memory import in_own_process, resident
from bench.timing import attempt, chosen, side_by_side
from checkpoints import files
from corpus.shards import UnitShards
from kernels.dtypes import hardware_bfloat16
from kernels.packed import packed
from speech import audio
from speech.encoder import BUDGET_SECONDS, CHUNKINGS, UnitEncoder
from speech.hubert import Hubert, HubertConfig, load_hubert
from speech.precision import PRECISIONS, full_precision
from vocoder import load_vocoder

PEER_BATCH = 32  # recordings that the peer gets at once
RAGGED_SECONDS = (10, 9.4, 8.1, 7, 5.5, 4, 2.6, 1.5)
HUBERTS = {  # name: (transformers' options besides the defaults, which are HuBERT base; layer of the units)
    "mHuBERT base, 25 Hz, layer 11": (dict(conv_dim=(512,) * 8, conv_kernel=(10, 3, 3, 3, 3, 2, 2, 2), num_feat_extract_layers=8,
                                           conv_stride=(5, 2, 2, 2, 2, 2, 2, 2), conv_pos_batch_norm=True), 11),
    "HuBERT base, 50 Hz, layer 9": ({}, 9),
    (POCKET := "pocket"): ({}, 6)}


def precisions(device):
    """Those that it multiplies in hardware."""
    return [*PRECISIONS] if device == "cuda" else ["float32"] + ["bfloat16"] * bool(hardware_bfloat16(device))


def share(units, others):
    return round((torch.cat(units) == torch.cat(others)).float().mean().item(), 5)


def largest_difference(encoder, wavs):
    """Between features in one padded batch and alone, of any frame, relative to its norm."""
    pairs = [(together, encoder.features(wav)) for together, wav in zip(encoder.features_of(wavs), wavs)]
    return float(f"{max(((a - b).norm(dim=1) / b.norm(dim=1)).max().item() for a, b in pairs):.1e}")


def features_of_peer(theirs, layer, wavs, options):
    """The peer's features of recordings, as a padded batch with its mask."""
    weight = next(theirs.parameters())
    wav, mask = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), None
    if len(wavs) > 1:
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(w, dtype=torch.int64) for w in wavs], batch_first=True)
        mask = mask.to(options.device)
    return theirs(wav.to(options.device, weight.dtype), attention_mask=mask, output_hidden_states=True).hidden_states[layer]


def speeds(encoder, theirs, wavs, reference, options):
    """The columns of one row; reference: the units in float32 of each recording alone."""
    def peer():
        with full_precision(options.device, encoder.precision if encoder.precision == "tf32" else "float32"):
            for begin in range(0, len(wavs), PEER_BATCH):
                found = features_of_peer(theirs, encoder.layer, wavs[begin:begin + PEER_BATCH], options)
                encoder.quantize(found.flatten(0, 1)).cpu()

    seconds = side_by_side({"ours": functools.partial(encoder.encode_batch, wavs), "peer": peer}, options.repeats, options.device)
    length = sum(map(len, wavs)) / audio.SAMPLE_RATE
    return {"ours_x_real_time": round(length / seconds["ours"], 2), "peer_x_real_time": round(length / seconds["peer"], 2),
            "ours_over_peer": round(seconds["peer"] / seconds["ours"], 2),
            "agreement": share(encoder.encode_batch(wavs), reference), "batch_difference": largest_difference(encoder, wavs[:8])}


def recordings(device):
    """{what they are: recordings} for the pocket tokenizer."""
    shards, speak = UnitShards(files.POCKET / "units/val"), load_vocoder().to(device)
    found = {"pocket stories": [speak(*map(torch.from_numpy, shards.document(i))).cpu() for i in range(16)]}
    real = sorted(Path(os.environ.get("NANOTWIST_REAL") or "absent").glob("speech/librispeech/**/*.flac"))[:100]
    return found | ({"LibriSpeech": [audio.read_wav(file) for file in real]} if real else {})


def agreements(options):
    """Yields rows of the pocket tokenizer: how far its units agree with those in float32."""
    encoder = hubert_units.load_unit_encoder().to(options.device)
    encoder.budget = BUDGET_SECONDS[options.device]
    for what, wavs in recordings(options.device).items():
        exact = [encoder.encode(wav) for wav in wavs]
        for encoder.precision in precisions(options.device):
            with packed(encoder):
                seconds = side_by_side({"ours": functools.partial(encoder.encode_batch, wavs)}, 1, options.device)["ours"]
                together, alone = encoder.encode_batch(wavs), [encoder.encode(wav) for wav in wavs]
            yield {"network": POCKET, "input": what, "precision": encoder.precision,
                   "ours_x_real_time": round(sum(map(len, wavs)) / audio.SAMPLE_RATE / seconds, 2),
                   "agreement": share(together, exact), "batch_agreement": share(together, alone)}
        encoder.precision = "float32"


def bench_units(options):
    """Yields rows of (network, input, precision, ours and the peer in times real time, their ratio, agreement of units)."""
    import transformers  # the peer
    speech = audio.read_wav(files.POCKET / "prompt.wav").repeat(4)
    inputs = {"10 s alone": [speech[:160_000]], "ragged batch of 8": [speech[:int(s * 16_000)] for s in RAGGED_SECONDS]}
    if options.device == "cuda":
        inputs["128 of 14 to 15 s"] = [speech[:int((15 - i / 128) * 16_000)] for i in range(128)]
    for name, (extra, layer) in chosen(options, HUBERTS).items():
        if name == POCKET:
            yield from agreements(options)
            continue
        torch.manual_seed(0)
        theirs = transformers.HubertModel(transformers.HubertConfig(**extra)).eval()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            hubert = load_hubert(folder)
        theirs.to(options.device)
        with torch.inference_mode(), full_precision(options.device):
            expected = {key: [features_of_peer(theirs, layer, [wav], options)[0] for wav in wavs] for key, wavs in inputs.items()}
        frames = torch.cat(expected["ragged batch of 8"])
        encoder = UnitEncoder(hubert, frames[torch.randperm(len(frames))[:500]].clone(), layer).to(options.device).eval()
        encoder.budget = BUDGET_SECONDS[options.device]
        for encoder.precision in precisions(options.device):
            theirs.to(PRECISIONS[encoder.precision] or torch.float32)
            for key, wavs in inputs.items():
                reference = [encoder.quantize(features).cpu() for features in expected[key]]
                with packed(encoder), torch.inference_mode():
                    found, why = attempt(speeds, (encoder, theirs, wavs, reference, options))
                yield {"network": name, "input": key, "precision": encoder.precision, **(found or {"note": why})}


@torch.inference_mode()
def bench_hubert(options):
    """Rows of (part, way, seconds for 10 s of audio)."""
    torch.manual_seed(0)
    plain, other = (Hubert(HubertConfig(pos_batch_norm=True)).eval().requires_grad_(False) for _ in range(2))
    other.load_state_dict(plain.state_dict())
    wav = audio.read_wav(files.POCKET / "prompt.wav").repeat(2)[None, :160_000]

    def convolutions():
        x = wav[:, None]
        for i, conv in enumerate(plain.convs):
            x = F.conv1d(x, conv.weight.transpose(1, 2), stride=conv.stride)
            x = F.gelu(plain.group_norm(x) if i == 0 else x)
        return x

    def whole(network):
        return network.convolve(wav, network.first_layer(network.moments(wav)).float())

    def by_the_second(network):
        return network.front_end(wav, network.moments(wav))

    ways = {("front end", "PyTorch's convolutions"): convolutions}
    for name, network in (("plain", plain), ("packed", other)):
        ways |= {("front end", f"whole, {name} weights"): functools.partial(whole, network),
                 ("front end", f"by the second, {name} weights"): functools.partial(by_the_second, network),
                 ("up to layer 11", f"{name} weights"): functools.partial(network, wav, 11)}
    with packed(other):
        seconds = side_by_side(ways, options.repeats, "cpu")
    return [{"part": part, "way": way, "seconds": round(seconds[part, way], 3)} for part, way in sorted(ways)]


# ---------------------------------------------------------------------------------------------- long recordings

def peak_of_encoding(path, out):
    """Highest resident memory of this process, bytes, after the command has encoded one recording."""
    hubert_units.main([str(path), f"--out={out}", "--device=cpu"])
    return resident("VmHWM")


def bench_long(options):
    """Rows of (minutes of audio, peak memory in MB, of the whole process)."""
    import soundfile  # here, because the kernels' benchmarks run without it
    prompt, rows = audio.read_wav(files.POCKET / "prompt.wav").repeat_interleave(3).numpy(), []
    with tempfile.TemporaryDirectory() as folder:
        for minutes in (2, 60):
            path, left = Path(folder) / f"{minutes}.flac", minutes * 60 * 44_100
            with soundfile.SoundFile(path, "w", 44_100, 2) as file:
                while left:
                    part = prompt[:left]
                    file.write(part[:, None].repeat(2, axis=1))
                    left -= len(part)
            peak = in_own_process(peak_of_encoding, path, Path(folder) / f"units{minutes}")
            rows.append({"minutes": minutes, "peak_mb": round(peak / 1e6)})
    return rows


# ---------------------------------------------------------------------------------------------- chunking

WAYS = {"60 s + 5 s each side (default)": ("overlap", (60, 5)), "60 s + 10 s": ("overlap", (60, 10)),
        "60 s + 2 s": ("overlap", (60, 2)), "60 s + 0 s": ("overlap", (60, 0)), "30 s + 5 s": ("overlap", (30, 5)),
        "100 s, independent (textless)": ("textless", (100, 0))}


def bench_chunking(options):
    """Rows of (way, share of frames with another unit than in the encoding of the whole, most of them in ten seconds)."""
    wav = torch.cat([audio.read_wav(path) for path in options.what[1:] or [files.POCKET / "prompt.wav"]])
    wav, encoder, rows = wav.repeat(600 * audio.SAMPLE_RATE // len(wav) + 1), hubert_units.load_unit_encoder(), []
    saved = dict(CHUNKINGS)
    try:
        CHUNKINGS["overlap"] = (len(wav), 0)
        whole = encoder.encode(wav)
        for name, (chunking, seconds) in WAYS.items():
            CHUNKINGS[chunking], encoder.chunking = seconds, chunking
            units = encoder.encode(wav)
            # independent pieces lose their last frames, and those after them stand earlier; compared piece by piece
            piece = int(seconds[0] * encoder.native_rate)
            lost = 1 if chunking == "textless" else 0
            same = torch.cat([a[:piece - lost][:len(b)] == b[:len(a[:piece - lost])] for a, b in zip(
                whole.split(piece), units.split(piece - lost))])
            worst = max((~part).float().mean().item() for part in same.split(10 * int(encoder.native_rate)))
            rows.append({"way": name, "frames": len(same), "lost": len(whole) - len(units),
                         "differ": round((~same).float().mean().item(), 5), "most_in_10_s": round(worst, 4)})
    finally:
        CHUNKINGS.update(saved)
    return rows
