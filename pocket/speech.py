"""Text -> speech with espeak-ng, with the time of every phoneme: the studio of the pocket world.

    text, voice --libespeak-ng--> 22.05 kHz samples + phoneme events --resample--> 16 kHz flac + phones.tsv

Only the factory needs espeak-ng (`apt install espeak-ng`); nothing else in the project does. The library is called
through ctypes rather than the command because only the library reports phoneme times, and to skip a process a story.

    python -m pocket.speech --out=build/speech --count=4000 --first-story=0 --voices=train
    python -m pocket.speech --out=build/german --count=880 --language=de
"""
import csv
import ctypes
import ctypes.util
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

import config
from checkpoints.files import refuse_existing
from pocket.text import STORIES
from speech.audio import SAMPLE_RATE, resample

# (espeak voice, words per minute, pitch 0-99). The first is the voice of the vocoder.
TRAIN_VOICES = (
    ("en-us", 165, 45), ("en-us+m3", 155, 35), ("en-us+f2", 170, 60), ("en-us+m1", 160, 40), ("en-us+f4", 165, 65),
    ("en-us+m7", 175, 50), ("en-gb-x-rp+m1", 150, 45), ("en-us+f5", 180, 55), ("en-gb-x-rp+f2", 170, 55),
    ("en-us+m5", 155, 30),
)
HELD_OUT_VOICES = (("en-us+m2", 160, 42), ("en-us+f3", 168, 62))
VOICES = {"train": TRAIN_VOICES, "val": TRAIN_VOICES + HELD_OUT_VOICES, "held_out": HELD_OUT_VOICES, "vocoder": TRAIN_VOICES[:1]}

# constants and structures of speak_lib.h
SYNCHRONOUS, PHONEME_EVENTS, UTF8, PHONEME_INPUT = 2, 1, 1, 0x100  # input: [[k'eIk]] is spoken as these phonemes
EVENT_END, EVENT_PHONEME, EVENT_MSG_TERMINATED = 0, 7, 6
RATE, PITCH = 1, 3


class EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class Event(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
                ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
                ("user_data", ctypes.c_void_p), ("id", EventId)]


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))


class Espeak:
    """One espeak-ng engine (the library allows one a process)."""

    def __init__(self):
        name = ctypes.util.find_library("espeak-ng")
        if name is None:
            raise OSError("libespeak-ng is not installed; `apt install espeak-ng` (only the pocket factory needs it)")
        self.library = ctypes.CDLL(name)
        self.rate = self.library.espeak_Initialize(SYNCHRONOUS, 0, None, PHONEME_EVENTS)
        self.callback = CALLBACK(self._receive)  # kept: ctypes would free it while the library holds the pointer
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count, events):
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        i = 0
        while events[i].type not in (EVENT_END, EVENT_MSG_TERMINATED):
            if events[i].type == EVENT_PHONEME:
                self.phones.append((events[i].audio_position / 1000, events[i].id.string.decode()))
            i += 1
        return 0

    def _choose(self, voice):
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}; `espeak-ng --voices` lists them")

    def _speak(self, text, voice, words_per_minute, pitch):
        """Returns (S,) int16 at the engine's own rate and [(start in seconds, phoneme), ...]. No PyTorch: forks run it too."""
        self.chunks, self.phones = [], []
        self._choose(voice)
        self.library.espeak_SetParameter(RATE, words_per_minute, 0)
        self.library.espeak_SetParameter(PITCH, pitch, 0)
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, len(data), 0, 1, 0, UTF8 | PHONEME_INPUT, None, None)
        return np.concatenate(self.chunks), self.phones

    def _resampled(self, samples):
        return resample(torch.from_numpy(samples.astype(np.float32) / 32768), self.rate)

    def say(self, text, voice, words_per_minute, pitch):
        """Returns (S,) float32 at 16 kHz and [(start in seconds, phoneme), ...] in order of time."""
        samples, phones = self._speak(text, voice, words_per_minute, pitch)
        return self._resampled(samples), phones

    def say_afresh(self, *arguments):
        """As say(), by an engine that has never spoken: the same words give the same samples, whatever was said before.

        The engine carries the phase of the voice over from one text to the next and has no way to forget it; a fork has
        the memory of this process, whose engine must not speak itself.
        """
        fork = multiprocessing.get_context("fork")
        here, there = fork.Pipe(duplex=False)
        child = fork.Process(target=lambda: there.send(self._speak(*arguments)))
        child.start()
        there.close()
        if not here.poll(60):
            child.kill()
            raise OSError("espeak-ng did not finish within a minute")
        samples, phones = here.recv()
        child.join(60)
        return self._resampled(samples), phones

    def phonemes(self, word, voice):
        """A word -> its phonemes as espeak-ng writes them, a stress mark before its vowel: cake -> ("k", "'eI", "k")."""
        self._choose(voice)
        text = ctypes.c_char_p(word.encode())
        self.library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        return tuple(self.library.espeak_TextToPhonemes(ctypes.byref(text), UTF8, ord("_") << 8).decode().split("_"))


def voices_of(language, part):
    """((espeak voice, words per minute, pitch), ...) of "en" or "de": German has the variants, rates and pitches of English."""
    if language == "en":
        return VOICES[part]
    return tuple((f"{language}+{voice.partition('+')[2]}".rstrip("+"), *how) for voice, *how in VOICES[part])


@dataclass(frozen=True)
class SpeechConfig:
    out: str = "build/speech"  # folder for the flac files and phones.tsv
    count: int = 100  # number of stories
    first_story: int = 0  # seed of the first story; keep clear of the seeds that the text LM reads
    voices: str = "train"  # train | val | held_out | vocoder: which table of voices; story i takes voice i modulo their number
    language: str = "en"  # English: en | German: de, in its own stories and by espeak-ng's German voices
    RANGES = {"count": (1, config.MOST)}
    CHOICES = {"voices": tuple(VOICES), "language": tuple(STORIES)}


def main(argv=None):
    options = config.load(SpeechConfig, argv)
    voices, story = voices_of(options.language, options.voices), STORIES[options.language]
    out = Path(options.out)
    refuse_existing(out / "phones.tsv", remedy="delete the folder, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    engine, seconds = Espeak(), 0.0
    with open(out / "phones.tsv.tmp", "w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["file", "voice", "text", "phones"])
        for i in config.progress(range(options.count), desc="speaking"):
            voice = i % len(voices)
            text = story(options.first_story + i)
            samples, phones = engine.say(text, *voices[voice])
            name = f"story_{options.first_story + i:07d}_{options.voices}{voice}.flac"
            soundfile.write(out / name, samples.numpy(), SAMPLE_RATE, subtype="PCM_16")
            table.writerow([name, voice, text, " ".join(f"{start:.3f}:{phone}" for start, phone in phones)])
            seconds += len(samples) / SAMPLE_RATE
    os.replace(out / "phones.tsv.tmp", out / "phones.tsv")
    print(f"{options.count} stories, {seconds / 3600:.2f} hours in {out}")


if __name__ == "__main__":
    config.command(main)
