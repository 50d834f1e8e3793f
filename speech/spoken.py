"""Speech that a command makes: wav files that say what they were made of, and that no other speech replaces.

    prompt_0.wav --the same command--> prompt_0.wav again;  --another seed, model, prompt, ...--> prompt_0-2.wav beside it

Their headers have a comment (`soundfile.SoundFile(path).comment`): a fingerprint of what is spoken, then the options as JSON.
"""
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

import torch

from checkpoints import files
from speech.audio import SAMPLE_RATE, soundfile, write_wav
from speech.encoder import deduplicate

FADE = 0.1  # seconds at the end of speech that is cut somewhere
LONGEST = 1900  # characters of a comment: libsndfile reads no longer ones


def faded(wav):
    """(S,) -> (S,): the last tenth of a second falls to nothing, along a cosine. Speech that stops because no more units are
    allowed would end in a click."""
    samples = min(len(wav), round(FADE * SAMPLE_RATE))
    end = wav[len(wav) - samples:] * (1 + torch.cos(torch.pi * torch.arange(1, samples + 1) / max(1, samples))) / 2
    return torch.cat([wav[:len(wav) - samples], end])


def timed(units, runs, vocoder, dedup):
    """How prompt and continuation are spoken in one pass, so that there is no seam -> units (T,), runs (T,).

    Args: units: of both. runs: of the prompt alone, which keeps its own timing; the vocoder predicts that of the rest.
        dedup: False for units of a model of frames, which has said how long each lasts: the runs are counted instead.
    """
    if not dedup:
        return deduplicate(units)
    timing = vocoder.durations(units).cpu()
    timing[:len(runs)] = runs
    return units, timing


def record_of(source, options, names, spoken):
    """The comment of all files of one sampling.

    Args: source: path or name of what is spoken. names: of the options that are told. spoken: units, how long each lasts, ... as
        tensors, lists or numbers.
    """
    text = json.dumps({"source": str(source), **{name: getattr(options, name) for name in names}})
    content = b"".join(torch.as_tensor(part).cpu().numpy().tobytes() for part in spoken)
    return f"{hashlib.sha256(text.encode() + content).hexdigest()[:16]} {text}"[:LONGEST]


def comment_of(path):
    try:
        with soundfile.SoundFile(os.fsencode(path)) as sound:
            return sound.comment
    except soundfile.LibsndfileError:  # no sound file
        return None


def write_spoken(folder, wavs, record, failures=None):
    """Write {name: samples (S,)} as folder/NAME.wav, files of one sampling; returns their paths.

    A file that is there is replaced only if its comment is this record. Else all get a number, the first free one from 2 on.

    failures: a list that gets the OSError of a file that cannot be written, which is then told on screen; None: it is raised.
    """
    with files.alone(folder):
        for number in itertools.count(1):
            paths = [Path(folder, f"{name}{'' if number == 1 else f'-{number}'}.wav") for name in wavs]
            if all(not os.path.exists(path) or comment_of(path) == record for path in paths):  # of too long a name, too
                break
        try:
            for path, wav in zip(paths, wavs.values()):
                write_wav(path, wav, comment=record)
        except OSError as error:
            if failures is None:
                raise
            failures.append(error)
            print(f"error: {error}", file=sys.stderr)
    return paths
