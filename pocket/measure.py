"""How good are the parts of the pocket world? Numbers for its README, each a command.

    text       the text LM: nats per byte on held-out stories; share of (right, wrong) text pairs it orders rightly
    units      a tokenizer on held-out recordings: purity and PNMI of phones, dependence on the speaker; at any K
    agreement  the same sentence said by several voices, against different sentences: share of the units in common
    vocoder    the round trip recording -> units -> speech -> units: units recovered, durations, mel distance, and what silence
               becomes, beside copy-synthesis (Griffin-Lim on the recording's own 80-band mel spectrogram: a ceiling)
    words      word error of originals, copy-synthesis and re-synthesis, by a recogniser that you name (--recogniser)

    python -m pocket.measure --what=text
    python -m pocket.measure --what=units --num-units=100 --speech=build/people/val,build/speech/val
    python -m pocket.measure --what=vocoder        # needs build/speech/val (python -m pocket.build --only=speech)
    python -m pocket.measure --what=words --speech=build/people/val --recogniser="python transcribe.py"

--recogniser is a command that is given a folder of wav files and prints FILE<TAB>TEXT for each. Recordings without a known text
are held against what it hears in the originals, and called so.
"""
import json
import math
import shlex
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import config
import twist
from checkpoints import files
from corpus.loader import UnitLoader
from corpus.shards import UnitShards
from evaluation.transcripts import word_errors, words_of
from hubert_units import load_unit_encoder
from kernels.packed import packed
from pocket.recordings import QUIET_VOICE, Speech, split
from pocket.speech import VOICES, Espeak
from pocket.stories import pairs
from pocket.text import encode
from pocket.train_hubert import cluster, judged, mel_filters
from speech.audio import SAMPLE_RATE, read_wav, write_wav
from speech.encoder import deduplicate
from vocoder import load_vocoder

APART = 30  # recordings of a voice from which it is told apart
KINDS = ("agreement", "pronoun", "word_order", "ending", "topic")
BANDS, WINDOW, STEP = 80, 1024, 256  # of the mel spectrogram


@dataclass(frozen=True)
class MeasureConfig:
    what: str = "text"  # text | units | agreement | vocoder | words
    pairs: int = 400  # text: pairs of each kind
    text: str = "build/text/val"  # text: held-out stories as byte shards
    speech: str = "build/speech/val"  # folders of held-out recordings, A,B,...
    tokenizer: str = "pocket"  # folder of a tokenizer (config.json, weights, kmeans.safetensors), or `pocket`
    vocoder: str = "pocket"  # of that tokenizer
    speaker: str | None = None  # voice of the vocoder
    num_units: int = 0  # units: K, fitted to --fit-speech; 0: the tokenizer's own k-means
    fit_speech: str = "build/people/train,build/speech/train"  # units: recordings that other k-means are fitted to
    own: tuple[str, ...] = ("0",)  # vocoder: voices of --speech that --speaker is
    limit: int = 24  # agreement, vocoder, words: recordings of each folder or kind
    recogniser: str | None = None  # words: command that is given a folder and prints FILE<TAB>TEXT for each wav in it
    out: str = "results"  # folder for the JSON file
    RANGES = {"pairs": (1, config.MOST), "num_units": (0, config.MOST), "limit": (2, config.MOST)}
    CHOICES = {"what": ("text", "units", "agreement", "vocoder", "words")}


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


# ---------------------------------------------------------------------------------------------- units

@torch.inference_mode()
def measure_units(options):
    encoder, folders = load_unit_encoder(options.tokenizer), split(options.speech)
    with packed(encoder):
        if options.num_units not in (0, encoder.num_units):
            fitted = Speech(*split(options.fit_speech), only=500)
            features = [encoder.features(fitted.wave(i)) for i in config.progress(range(len(fitted.names)), desc="fitting")]
            encoder.centers = cluster(torch.cat(features), options.num_units, 0)
        speech = Speech(*folders)
        units = torch.cat([encoder.quantize(encoder.features(speech.wave(i)))
                           for i in config.progress(range(len(speech.names)), desc="encoding")])
    return {"tokenizer": options.tokenizer, "layer": encoder.layer, "K": len(encoder.centers),
            **judged(units, speech, folders, APART)}


def share_in_common(a, b):
    """Units that agree after the best alignment, as a share of the longer sequence."""
    return common(a, b) / max(len(a), len(b))


@torch.inference_mode()
def measure_agreement(options):
    """Sentences whose words are known are said again by three voices of espeak-ng; every pair of voices is compared."""
    encoder, engine, said = load_unit_encoder(options.tokenizer), Espeak(), defaultdict(dict)
    speech = Speech(*split(options.speech), only=options.limit)
    rows = [(i, text) for i, text in enumerate(speech.texts) if text][:options.limit]
    if len(rows) < 2:
        raise ValueError(f"--speech={options.speech} has no sentences with a text; their phones.tsv needs the column `text`")
    with packed(encoder):
        for i, text in config.progress(rows, desc="sentences"):
            said[text]["recording"] = encoder.encode(speech.wave(i))
            for voice in VOICES["val"][::5]:
                said[text][voice[0]] = encoder.encode(engine.say(text, *voice)[0])
    said = {text: {voice: deduplicate(units)[0].numpy() for voice, units in each.items()} for text, each in said.items()}
    result, texts = {}, list(said)
    for kind in ("recordings and machines", "machines"):
        same, different = [], []
        for text, other in zip(texts, texts[1:] + texts[:1]):
            for a, b in combinations(said[text], 2):
                if ("recording" in (a, b)) == (kind == "recordings and machines"):
                    same.append(share_in_common(said[text][a], said[text][b]))
                    different.append(share_in_common(said[text][a], said[other][b]))
        result[kind] = {"same sentence": float(np.mean(same)), "different sentences": float(np.mean(different))}
    return {"tokenizer": options.tokenizer, "sentences": len(said), **result}


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


@torch.inference_mode()
def measure_vocoder(options):
    torch.manual_seed(0)
    encoder, vocoder = load_unit_encoder(options.tokenizer), load_vocoder(options.vocoder)
    speech, totals = Speech(*split(options.speech)), {}
    edge = (encoder.hubert.receptive_field - encoder.hubert.hop) // 2  # frame f stands for samples from hop f + edge
    groups = {"the vocoder's voice": [i for i, voice in enumerate(speech.voices) if voice in options.own],
              "other voices": [i for i, voice in enumerate(speech.voices) if voice not in (*options.own, QUIET_VOICE)]}
    with packed(encoder):
        for group, rows in groups.items():
            for i in config.progress(rows[::max(1, len(rows) // options.limit)], desc=group):
                wav = read_wav(speech.names[i])
                units, runs = deduplicate(encoder.encode(wav))
                predicted = vocoder.durations(units)
                versions = {"predicted durations": vocoder(units, None, options.speaker),
                            "true durations": vocoder(units, runs, options.speaker), "copy-synthesis": griffin_lim(wav)}
                for name, spoken in versions.items():
                    again = deduplicate(encoder.encode(torch.nn.functional.pad(spoken, (edge, edge))
                                                       if name != "copy-synthesis" else spoken))[0]
                    sums = totals.setdefault(f"{group}, {name}", {"units": 0, "recovered": 0, "mel": [], "error": [],
                                                                  "frames": []})
                    sums["units"] += len(units)
                    sums["recovered"] += common(units.numpy(), again.numpy())
                    if name != "predicted durations":
                        reference = wav if name == "copy-synthesis" else wav[edge:edge + len(spoken)]
                        sums["mel"].append((log_mel(spoken) - log_mel(reference)).abs().mean().item())
                    else:
                        sums["error"].append((predicted - runs).abs().float().mean().item())
                        sums["frames"].append((int(predicted.sum()), int(runs.sum())))
        quiet = {"digital silence": torch.zeros(3 * SAMPLE_RATE), "faint noise": 1e-3 * torch.randn(3 * SAMPLE_RATE)}
        silence = {name: vocoder(deduplicate(encoder.encode(wav))[0], None, options.speaker).square().mean().sqrt().item()
                   for name, wav in quiet.items()}

    def mean(values):
        return sum(values) / len(values) if values else None

    return {"level of": silence, **{name: {
        "units recovered": sums["recovered"] / sums["units"], "mean abs log-mel difference": mean(sums["mel"]),
        "duration error, frames per unit": mean(sums["error"]),
        "length predicted / true": np.divide(*np.sum(sums["frames"], axis=0)).item() if sums["frames"] else None}
        for name, sums in totals.items()}}


# ---------------------------------------------------------------------------------------------- words

def recognised(command, folder):
    """{stem: text} of the wav files in a folder."""
    done = subprocess.run([*shlex.split(command), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--recogniser={command} failed: {done.stderr.strip()[-500:]}")
    rows = [line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line]
    return {Path(name).stem: text for name, text in rows}


@torch.inference_mode()
def measure_words(options):
    """Word error of the recordings, of copy-synthesis and of re-synthesis with predicted and true durations."""
    if not options.recogniser:
        raise ValueError('give --recogniser="COMMAND": it is given a folder of wav files and prints FILE<TAB>TEXT for each')
    encoder, vocoder, result = load_unit_encoder(options.tokenizer), load_vocoder(options.vocoder), {}
    for folder in split(options.speech):
        speech = Speech(folder, only=options.limit)
        groups = defaultdict(list)  # those whose words are known apart from the others
        for i, text in enumerate(speech.texts[:options.limit]):
            if speech.frames[i] > 0:
                groups["said" if text else "heard in the originals"].append(i)
        with tempfile.TemporaryDirectory() as place, packed(encoder):
            ways = ("original", "copy-synthesis", "re-synthesis", "re-synthesis, true durations")
            for i in config.progress([i for rows in groups.values() for i in rows], desc="speaking"):
                wav = read_wav(speech.names[i])
                units, runs = deduplicate(encoder.encode(wav))
                spoken = (wav, griffin_lim(wav), vocoder(units, None, options.speaker), vocoder(units, runs, options.speaker))
                for way, samples in zip(ways, spoken):
                    write_wav(Path(place, way, f"{i}.wav"), samples.clamp(-1, 1))
            heard = {way: recognised(options.recogniser, Path(place, way)) for way in ways}
        for group, rows in groups.items():
            reference = {i: words_of(speech.texts[i] or heard["original"].get(str(i), "")) for i in rows}
            total = sum(map(len, reference.values()))
            result[f"{folder}, against what was {group}"] = {"recordings": len(rows), "words": total} | {
                way: sum(sum(word_errors(reference[i], words_of(texts.get(str(i), "")))) for i in rows) / max(1, total)
                for way, texts in heard.items()}
    return {"tokenizer": options.tokenizer, "vocoder": options.vocoder, **result}


def main(argv=None):
    options = config.load(MeasureConfig, argv)
    measures = {"text": measure_text, "units": measure_units, "agreement": measure_agreement, "vocoder": measure_vocoder,
                "words": measure_words}
    result = measures[options.what](options)
    files.write_json(Path(options.out) / f"pocket_{options.what}.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    config.command(main)
