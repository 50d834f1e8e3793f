"""What a listener gets to hear of a generation: every system's speech as wavs, with the units that are said in it.

    held-out document --its beginning--> prompt --+--> continuation by the model, by versus --vocoder--> spoken/model/NAME.wav
                                                  +--> what really follows, as long         --vocoder--> spoken/held-out_speech/
    the whole document --vocoder--> spoken/re-synthesis/;  its recording, where it is at hand --> spoken/original/

All but the originals have the vocoder's voice, so they differ in their units alone. The prompt keeps its own timing, and the
rest has predicted durations; re-synthesis has predicted ones throughout, as in sample.py --resynth. Units of a model of frames
say themselves how long they last.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from evaluation.likelihood import surprisal
from speech.audio import read_wav
from speech.encoder import deduplicate
from speech.spoken import faded, record_of, timed, write_spoken

HELD_OUT, WHOLE, ORIGINAL = "held-out speech", "re-synthesis", "original"  # systems beside the models
VOICE, SAMPLING = ("vocoder", "speaker", "style"), ("seed", "temperature", "top_k", "top_p")  # told in the wavs


@dataclass(frozen=True)
class Spoken:
    system: str  # model, versus, or one of those above
    name: str  # of the document
    units: torch.Tensor  # (T,) int64, what is said
    runs: torch.Tensor  # (T,) int64, frames of each
    prompt: int  # how many of the units were given; 0 of whole documents
    path: Path  # the wav
    samples: int  # S of it, at 16 kHz


def speak(evaluation, vocoder, documents, sequences, prompt, whole, originals):
    """Write the wavs of all systems -> list of Spoken.

    Args: documents: {name: (source, units (T,), runs (T,))}, source: the recording's path where `originals`.
        sequences: {system: what follows the first `prompt` units of each document, a list of (n,)}.
        whole: names of the documents that are spoken whole, too, and, where `originals`, copied from their recordings.
    """
    options, dedup = evaluation.options, evaluation.main.vocab.dedup
    jobs = [(system, name, torch.cat([torch.as_tensor(units[:prompt]), torch.as_tensor(more)]), prompt)
            for system, each in sequences.items() for (name, (_, units, _)), more in zip(documents.items(), each)]
    for system in (WHOLE, ORIGINAL)[:1 + originals]:
        every = ((name, torch.as_tensor(documents[name][1])) for name in whole)
        jobs += [(system, name, units, len(units) * (system == ORIGINAL)) for name, units in every]
    found = []
    for system, name, units, kept in config.progress(jobs, desc="speaking", unit="recording"):
        source, _, recorded = documents[name]
        given = 0 if system not in sequences else kept if dedup else len(deduplicate(units[:kept])[0])
        units, runs = timed(units, torch.as_tensor(recorded[:kept]), vocoder, dedup)
        wav = read_wav(source) if system == ORIGINAL else vocoder(units, runs, options.speaker, options.style).cpu()
        if system in sequences:
            wav = faded(wav)
        told = VOICE * (system != ORIGINAL) + (system, *SAMPLING) * (system in evaluation.lms)
        path, = write_spoken(Path(options.out, "spoken", system.replace(" ", "_")), {name: wav},
                             record_of(source, options, told, (units, runs, len(wav))))
        found.append(Spoken(system, name, units, runs, given, path, len(wav)))
    return found


def show(evaluation, spoken, frame):
    """Put what is spoken on the evaluation's page, a document's systems together. frame: seconds.

    The units of models, and of held-out speech, have what they cost a model beside them; held-out speech: the first model.
    """
    groups = {}
    for each in spoken if evaluation.page else ():
        lm = evaluation.lms.get("model" if each.system == HELD_OUT else each.system)
        bits = surprisal(lm.model, lm.vocab, each.units, each.runs) if lm else None
        groups.setdefault(each.name, []).append(
            (each.system, read_wav(each.path), each.path, each.units, each.runs * frame, each.prompt, bits))
    for name, clips in groups.items():
        evaluation.page.add(name, clips)
