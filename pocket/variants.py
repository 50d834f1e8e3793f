"""Variants of the pocket's speech, for experiments: stories of a second language, and its own stories by other tokenizers.

    seed --python -m pocket.speech--> recordings --python hubert_units.py--> unit shards
    pocket/benchmarks --python -m pocket.pairs --recordings--> recordings --python hubert_units.py--> units/ beside pairs.csv

    python -m experiments languages tokenizers

German: espeak's German voices have the variants, rates and pitches of the English ones; validation is by two that were never
trained on. The tokenizer has heard English alone: what English lacks (the vowels of schön and grün, the consonants of ich and
ach) falls to the nearest of its 200 centres, for every start alike. Another voice repeats 66 % of the units of the same German
sentence (88 % of an English one) and 19 % of another's (tests measure it): endings, which carry agreement, may be lost.

Other tokenizers: the pocket's HuBERT at half, once and twice its frame rate, and centres that k-means finds in its last layer.
The bundle's own were learnt with the network and are better (results/README.md); no cell has them.
"""
import re
import time
from pathlib import Path

from checkpoints import files
from corpus.shards import read_meta
from pocket.build import SPOKEN, SPOKEN_VAL, run

COUNTS = {"de": {"train": 880, "val": 60}, "en": {"train": 440, "val": 60}}  # stories: eight hours, four, half of one
SPEAKING = {"train": ("train", SPOKEN), "val": ("held_out", SPOKEN_VAL)}  # voices of pocket/speech.py, seed of the first story
LAYER = 6  # the last, from which the bundle's units are
ENCODING = "encoding.json"  # beside train/: {"seconds_an_hour": of computing, for an hour of speech}


def recordings(folder, language, part):
    """Folder of spoken stories. Raises: subprocess.CalledProcessError where espeak-ng is not installed, as the command says."""
    place = Path(folder, "recordings", language, part).absolute()
    if not (place / "phones.tsv").exists():  # written last
        voices, first = SPEAKING[part]
        run("-m", "pocket.speech", f"--out={place}", f"--language={language}", f"--voices={voices}",
            f"--count={COUNTS[language][part]}", f"--first-story={first}")
    return place


def units(folder, language, out, *tokenizer):
    """A folder with train/ and val/ of unit shards, made once."""
    for part in COUNTS[language]:
        if not read_meta(out / part):  # written last; what an interruption left is gone on with
            spoken, fresh, began = recordings(folder, language, part), not (out / part).exists(), time.perf_counter()
            run("hubert_units.py", spoken, f"--out={out / part}", *tokenizer)
            if part == "train" and fresh:
                hours = read_meta(out / part)["hours"]
                files.write_json(out / ENCODING, {"seconds_an_hour": (time.perf_counter() - began) / hours})
    return out


def german(folder):
    return units(folder, "de", Path(folder, "units/german").absolute())


def other_tokenizer(folder, rate, centres):
    """Folder with train/, val/ and benchmarks/ of so many centres, kmeans.safetensors, at a frame rate, Hz."""
    out = Path(folder, f"units/{rate:g}hz-k{centres}").absolute()
    kmeans = out / "kmeans.safetensors"
    if not kmeans.exists():
        run("hubert_units.py", recordings(folder, "en", "train"), f"--fit={centres}", f"--layer={LAYER}",
            f"--frame-rate={rate:g}", f"--out={kmeans}")
    spoken = Path(folder, "recordings/benchmarks").absolute()
    run("-m", "pocket.pairs", f"--recordings={spoken}")  # what is there is passed by
    for source in sorted(spoken.glob("*/pairs.csv")):
        place = out / "benchmarks" / source.parent.name
        if not (place / "pairs.csv").exists():
            run("hubert_units.py", source.parent, f"--out={place / 'units'}", f"--kmeans={kmeans}")
            named = re.sub(r"([^,\n]+\.flac)", rf"{source.parent}/\1", source.read_text())  # shards name recordings by paths
            files.write_text(place / "pairs.csv", named)
    return units(folder, "en", out, f"--kmeans={kmeans}")
