"""Stories as training data of the text LM: bytes in the unit-shard format, so that train.py trains the text LM too.

    story (UTF-8) --bytes--> "units" 0..255 --> shards; in the LM the id of byte b is b + 2, pad 0, begin = end = 1

    python -m pocket.text --out=build/text/train --count=60000
    python -m pocket.text --out=build/text/german --language=de
"""
from dataclasses import dataclass

import numpy as np

import config
from corpus.shards import names_in, write_shards
from pocket import german, stories

RECIPE = {"kind": "bytes", "num_units": 256}
STORIES = {"en": stories.story, "de": german.story}  # language -> function: seed -> text


def encode(text):
    """Text -> (T,) int64 byte values."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


@dataclass(frozen=True)
class TextConfig:
    out: str = "build/text/train"  # folder for the shards; other stories that it holds stay
    count: int = 60_000  # stories, about 480 bytes each
    first_story: int = 0  # seed of the first; the spoken stories have other seeds
    language: str = "en"  # English: en | German: de (pocket/german.py)
    RANGES = {"count": (1, config.MOST)}
    CHOICES = {"language": tuple(STORIES)}


def main(argv=None):
    options = config.load(TextConfig, argv)
    inside = set(names_in(options.out))
    seeds = config.progress(range(options.first_story, options.first_story + options.count), desc="writing")
    kind = "story" if options.language == "en" else f"{options.language} story"
    texts = ((f"{kind} {seed}", encode(STORIES[options.language](seed))) for seed in seeds if f"{kind} {seed}" not in inside)
    meta = write_shards(options.out, RECIPE, ((name, units, np.ones_like(units), 0.0) for name, units in texts))
    print(f"{meta['units']:,} bytes in {options.out}")


if __name__ == "__main__":
    config.command(main)
