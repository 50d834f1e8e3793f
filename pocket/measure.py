"""How good are the parts of the pocket world? Numbers for its README, from the bundled files.

    text       the text LM: nats per byte on held-out stories; share of (right, wrong) text pairs it orders rightly
    vocoder    the round trip recording -> units -> speech -> units: units recovered, durations, mel distance,
               beside copy-synthesis (Griffin-Lim on the recording's own 80-band mel spectrogram: a ceiling)

    python -m pocket.measure --what=text
    python -m pocket.measure --what=vocoder        # needs build/speech/val (python -m pocket.build --only=speech)

HuBERT's unit quality is measured when it is trained (pocket/hubert/quality.json).
"""
import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import config
import twist
from checkpoints import files
from corpus.loader import UnitLoader
from corpus.shards import UnitShards
from hubert_units import load_unit_encoder
from pocket.stories import pairs
from pocket.text import encode
from pocket.train_hubert import mel_filters
from speech.audio import read_wav
from speech.encoder import deduplicate
from vocoder import load_vocoder

KINDS = ("agreement", "pronoun", "word_order", "ending", "topic")
BANDS, WINDOW, STEP = 80, 1024, 256  # of the mel spectrogram


@dataclass(frozen=True)
class MeasureConfig:
    what: str = "text"  # text | vocoder
    pairs: int = 400  # text pairs of each kind
    text: str = "build/text/val"  # held-out stories as byte shards, for the text LM's loss
    speech: str = "build/speech/val"  # held-out stories, spoken
    out: str = "results"  # folder for the JSON file
    RANGES = {"pairs": (1, config.MOST)}
    CHOICES = {"what": ("text", "vocoder")}


# ---------------------------------------------------------------------------------------------- text

@torch.inference_mode()
def log_likelihood(model, ids):
    """Mean log-probability per id, given the ones before it: ids (T,) -> float."""
    return -model(ids[None, :-1], ids[None, 1:]).item()


def measure_text(options):
    model, vocab = twist.load_speech_lm(files.KINDS["lm"])  # a text LM of bytes is stored with its vocabulary
    loader = UnitLoader(UnitShards(options.text), vocab, 256, 1, 0)
    with torch.inference_mode():
        windows = [loader.window(w) for w in range(min(loader.windows, 400))]
        losses = [model(window.ids, window.targets).item() for window in windows]
    result = {"nats per byte": sum(losses) / len(losses)}
    for kind in KINDS:
        wins = 0.0
        for pair in pairs(kind, options.pairs):
            right, wrong = (log_likelihood(model, vocab.encode(encode(text), bos=True, eos=True)) for text in pair)
            wins += 0.5 if right == wrong else right > wrong
        result[f"accuracy, {kind} pairs"] = wins / options.pairs
    return result


# ---------------------------------------------------------------------------------------------- speech

def log_mel(wav):
    """(S,) -> (frames, 80) log mel magnitudes."""
    spectrum = torch.stft(wav, WINDOW, STEP, window=torch.hann_window(WINDOW), return_complex=True).abs()
    return (spectrum.T @ mel_filters(BANDS, WINDOW)).clamp(min=1e-2).log()


def griffin_lim(wav, iterations=60):
    """Copy-synthesis: the recording's mel magnitudes with a phase found by projection (Griffin & Lim 1984)."""
    window, filters = torch.hann_window(WINDOW), mel_filters(BANDS, WINDOW)
    spectrum = torch.stft(wav, WINDOW, STEP, window=window, return_complex=True)
    magnitude = (torch.linalg.pinv(filters).T @ (spectrum.abs().T @ filters).T).clamp(min=0)  # (513, frames)
    phase = torch.polar(torch.ones_like(magnitude), 2 * math.pi * torch.rand(magnitude.shape))
    for _ in range(iterations):
        rebuilt = torch.istft(magnitude * phase, WINDOW, STEP, window=window, length=len(wav))
        phase = torch.stft(rebuilt, WINDOW, STEP, window=window, return_complex=True)
        phase = phase / phase.abs().clamp(min=1e-8)
    return torch.istft(magnitude * phase, WINDOW, STEP, window=window, length=len(wav))


def common(a, b):
    """Length of the longest common subsequence of two unit sequences: units that agree after the best alignment."""
    best = np.zeros(len(b) + 1, dtype=np.int64)
    for unit in a:
        here = np.concatenate([[0], np.maximum(best[1:], best[:-1] + (b == unit))])
        best = np.maximum.accumulate(here)
    return int(best[-1])


def measure_vocoder(options):
    torch.manual_seed(0)
    encoder, vocoder = load_unit_encoder(), load_vocoder()
    with open(Path(options.speech) / "phones.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    totals = {}
    voices = {"the vocoder's voice": ("0",), "other voices, two of them never heard": ("3", "6", "10", "11")}
    for group, members in voices.items():
        for row in [row for row in rows if row["voice"] in members][:12]:
            wav = read_wav(Path(options.speech) / row["file"])
            frames = encoder.encode(wav)
            units, runs = deduplicate(frames)
            predicted = vocoder.durations(units)
            versions = {"predicted durations": vocoder(units), "true durations": vocoder(units, runs)}
            edge = (encoder.hubert.receptive_field - encoder.hubert.hop) // 2  # frame f stands for samples from hop f + edge
            cut = wav[edge:edge + len(versions["true durations"])]
            versions["copy-synthesis"] = griffin_lim(wav)
            for name, spoken in versions.items():
                again = deduplicate(encoder.encode(torch.nn.functional.pad(spoken, (edge, edge))
                                                   if name != "copy-synthesis" else spoken))[0]
                sums = totals.setdefault(f"{group}, {name}", {"units": 0, "recovered": 0, "mel": [], "error": [], "length": []})
                sums["units"] += len(units)
                sums["recovered"] += common(units.numpy(), again.numpy())
                if name != "predicted durations":
                    reference = wav if name == "copy-synthesis" else cut
                    sums["mel"].append((log_mel(spoken) - log_mel(reference)).abs().mean().item())
                else:
                    sums["error"].append((predicted - runs).abs().float().mean().item())
                    sums["length"].append((predicted.sum() / runs.sum()).item())
    def mean(values):
        return sum(values) / len(values) if values else None
    return {name: {"units recovered": sums["recovered"] / sums["units"], "mean abs log-mel difference": mean(sums["mel"]),
                   "duration error, frames per unit": mean(sums["error"]), "length predicted / true": mean(sums["length"])}
            for name, sums in totals.items()}


def main(argv=None):
    options = config.load(MeasureConfig, argv)
    measures = {"text": measure_text, "vocoder": measure_vocoder}
    result = measures[options.what](options)
    files.write_json(Path(options.out) / f"pocket_{options.what}.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    config.command(main)
