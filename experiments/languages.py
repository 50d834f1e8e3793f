"""A second language: German stories as bytes to read and as units of speech, beside English ones; text LMs of either and of both.

    seed --pocket/german.py--> text --bytes--> shards --train.py--> text LM of English ("en"), German ("de"), or both ("both")
                                 +--espeak-ng's German voices--> samples --pocket tokenizer--> unit shards for every start

The three text LMs read equally many bytes in equally many updates, so the one of both languages has half as much of each. The
German voices have the variants, rates and pitches of the English ones (pocket/speech.py); validation is by variants that were
never trained on. No story is both read and spoken, or both trained on and validated on.

The tokenizer has heard English alone: what English lacks (the vowels of schön and grün, the consonants of ich and ach) falls to
the nearest of its 200 centres. That is the same for every start, but may leave too little of a language to learn: another voice
repeats 66 % of the units of the same German sentence (88 % of an English one) and 19 % of another's (tests measure it), so
sentences are told apart; single endings, which carry the agreement, may not be. What is made is made once and found again.
"""
import functools
from pathlib import Path

import numpy as np

import config
import pocket.german
import pocket.stories
from corpus.shards import names_in, write_shards
from experiments.text_lms import trained
from hubert_units import load_unit_encoder
from pocket.build import SPOKEN, SPOKEN_VAL, TEXT, TEXT_LM_SHAPE, TEXT_VAL
from pocket.speech import HELD_OUT_VOICES, TRAIN_VOICES, Espeak
from pocket.text import RECIPE
from speech.audio import SAMPLE_RATE
from speech.encoder import deduplicate

STORIES = {"en": pocket.stories.story, "de": pocket.german.story}
LANGUAGES = {"en": ("en",), "de": ("de",), "both": ("en", "de")}
FIRST = {"text": {"train": TEXT, "val": TEXT_VAL}, "speech": {"train": SPOKEN, "val": SPOKEN_VAL}}  # seeds of the first stories
VOICES = {"train": TRAIN_VOICES, "val": HELD_OUT_VOICES}  # (espeak voice, words per minute, pitch)
STORY_BYTES = 500  # of a story, about
BLOCK = 20  # stories that are encoded together and become one shard: what an interruption may cost
COUNTS = {"train": 220, "val": 30}  # spoken stories: two hours, and a quarter of one


def voices_of(language, part):
    """((espeak voice, words per minute, pitch), ...) of "en" or "de", for "train" or "val"."""
    german = tuple((f"de+{voice.partition('+')[2]}".rstrip("+"), *how) for voice, *how in VOICES[part])
    return german if language == "de" else VOICES[part]


def text(folder, language, part, count):
    """Folder of byte shards, of as many bytes as `count` stories (500 each), of "en", "de", or "both": half of them each."""
    out = Path(folder) / f"text/{language}_{count}/{part}"

    def documents():
        left = dict.fromkeys(LANGUAGES[language], count * STORY_BYTES / len(LANGUAGES[language]))  # bytes
        seeds = dict.fromkeys(left, FIRST["text"][part])
        with config.progress(total=count * STORY_BYTES, desc=f"text of {language}", unit="byte") as bar:
            while left[which := max(left, key=left.get)] > 0:
                units = np.frombuffer(STORIES[which](seeds[which]).encode(), dtype=np.uint8).astype(np.int64)  # UTF-8
                yield f"{which} {seeds[which]}", units, np.ones_like(units), 0.0
                left[which], seeds[which] = left[which] - len(units), seeds[which] + 1
                bar.update(len(units))

    if not (out / "meta.json").exists():
        write_shards(out, RECIPE, documents())
    return out


def text_lm(folder, language, steps):
    """A byte-level text LM of the pocket's shape after `steps` updates of 4,096 bytes, each read once: a folder for --lm."""
    return trained(Path(folder, f"text_lm/{language}_{steps}"), TEXT_LM_SHAPE, lambda: text(folder, language, "train", 9 * steps),
                   lambda: text(folder, language, "val", 400), steps, "2e-3")


@functools.cache
def engine():
    """The one engine that the library allows a process."""
    return Espeak()


def speech_units(folder, language, part, count=None):
    """Folder of unit shards of `count` spoken stories (0 or None: COUNTS), each by the voice that its seed is due to.

    It goes on where it was interrupted, and adds what is missing to a folder that holds fewer.
    Raises: OSError if espeak-ng is not installed; ValueError if the folder holds units of another tokenizer.
    """
    out, voices = Path(folder) / f"units/{language}/{part}", voices_of(language, part)
    inside = set(names_in(out))
    seeds = range(FIRST["speech"][part], FIRST["speech"][part] + (count or COUNTS[part]))
    left = [(seed, voices[seed % len(voices)]) for seed in seeds if f"{language} {seed}" not in inside]
    encoder = load_unit_encoder("pocket") if left else None
    for begin in config.progress(range(0, len(left), BLOCK), desc=f"speech of {language}", unit="shard"):
        block = left[begin:begin + BLOCK]
        wavs = [engine().say_afresh(STORIES[language](seed), *voice)[0] for seed, voice in block]
        write_shards(out, {**encoder.recipe, "dedup": True}, [
            (f"{language} {seed}", *deduplicate(frames), len(wav) / SAMPLE_RATE)
            for (seed, _), wav, frames in zip(block, wavs, encoder.encode_batch(wavs))])
    return out
