"""Byte-pair merges over units: frequent neighbours become one unit, so that a unit is more like a word.

    units/train --fit--> merges (M, 2): row m joins its two units to unit num_units + m
    shards --merge--> shards of merged units, runs added up, seconds as before

    python -m experiments words
    python eval.py --task=swuggy --norm=sum --data=OUT/benchmarks --train-data=OUT/train --model=runs/words/model

Merges are made within recordings, in the order in which they were found, from left to right. The next pair is the one that
stands in the most places (x x x is two places of x x), of equals the one with the lower numbers.

Scores: a mean per unit means something else when units differ in length, and favours whichever side falls into longer ones; sums
compare (--norm=sum), with those of plain units, too. Bits per second of speech compare as well; those of merged units are at most
too high, because a model gives some probability to other divisions of the same recording.
Source: Gage 1994; of words in text, Sennrich et al. 2016 (arXiv 1508.07909). Shapes: T units of a document, N of all.
"""
import hashlib
import json
from pathlib import Path

import numpy as np

import config
from checkpoints import files
from corpus.shards import UnitShards, read_meta, write_shards

BETWEEN = -1  # stands after every document


def stream(shards):
    """(N,) int64: the units of all documents, BETWEEN after each."""
    return np.concatenate([part for _, units, _ in shards for part in (units, [BETWEEN])])


def join(units, pair, new):
    """(N,) -> the same with `new` in place of every `pair`, from left to right."""
    places = np.flatnonzero((units[:-1] == pair[0]) & (units[1:] == pair[1]))
    if pair[0] == pair[1]:  # of x x x, the second place begins within the first
        first = np.maximum.accumulate(np.where(np.diff(places, prepend=-2) > 1, np.arange(len(places)), 0))
        places = places[(np.arange(len(places)) - first) % 2 == 0]
    joined = units.copy()
    joined[places] = new
    return np.delete(joined, places + 1)


def fit(shards, vocabulary):
    """The merges that make `vocabulary` units out of those of UnitShards: (vocabulary - num_units, 2) int64.

    Raises: ValueError if there are as many units already, or no pair is left that stands in two places.
    """
    units, first, merges = stream(shards), shards.recipe["num_units"], []
    if not first < vocabulary <= 2**16:
        raise ValueError(f"a vocabulary of {vocabulary}: expected more than the {first} units that there are, and at most 65536")
    for new in config.progress(range(first, vocabulary), desc="merging", unit="pair"):
        codes = (units[:-1] + 1) * (new + 1) + units[1:] + 1  # a pair as one number; row and column 0 are of BETWEEN
        counts = np.bincount(codes, minlength=(new + 1)**2).reshape(new + 1, new + 1)[1:, 1:]
        best = int(counts.argmax())  # the first of equals
        if counts.flat[best] < 2:
            raise ValueError(f"{shards.folder} has pairs for a vocabulary of {new}, not {vocabulary}; ask for fewer")
        merges.append(divmod(best, new))
        units = join(units, merges[-1], new)
    return np.array(merges, np.int64)


def spellings(merges, num_units):
    """The units that every merged unit stands for: a list of (n,) int64."""
    spelt = list(np.arange(num_units)[:, None])
    for left, right in merges:
        spelt.append(np.concatenate([spelt[left], spelt[right]]))
    return spelt


def merge(shards, merges, out):
    """UnitShards -> a folder `out` of merged units, made once, with the same names and seconds; returns it."""
    hashed, first = hashlib.sha256(np.asarray(merges, "<i8").tobytes()).hexdigest()[:16], shards.recipe["num_units"]
    recipe = {**shards.recipe, "num_units": first + len(merges),
              "centers": f"{shards.recipe.get('centers')}+{hashed}"}  # which all commands compare, so that units are never mixed
    if (read_meta(out) or {"recipe": None})["recipe"] == recipe:
        return out
    units, lengths, documents = stream(shards), np.array([*map(len, spellings(merges, first))]), []
    for new, pair in enumerate(merges, start=first):
        units = join(units, pair, new)
    parts = np.split(units, np.flatnonzero(units == BETWEEN) + 1)  # an empty one behind the last
    for file, part, (name, _, runs) in zip(shards.each_file(), parts, shards):
        begins = np.append(0, lengths[part[:-1]].cumsum())[:-1]
        documents.append((name, part[:-1], np.add.reduceat(runs, begins) if len(begins) else runs, file["seconds"]))
    write_shards(out, recipe, documents, overwrite=True)
    return out


def merged_units(folder, vocabulary, units=files.KINDS["units"], benchmarks=files.POCKET / "benchmarks"):
    """A folder with train/, val/ and benchmarks/ of merged units, made once; merges are fitted to units/train."""
    place, train = Path(folder, "merged_units", str(vocabulary)).absolute(), UnitShards(units / "train")
    known = files.read_json(place / "merges.json") if (place / "merges.json").exists() else {}
    if known.get("recipe") != train.recipe:  # the tokenizer was replaced
        known = {"recipe": train.recipe, "merges": fit(train, vocabulary).tolist()}
        files.write_text(place / "merges.json", json.dumps(known) + "\n")
    for part in ("train", "val"):
        merge(UnitShards(units / part), known["merges"], place / part)
    for table in benchmarks.glob("*/pairs.csv"):
        copy = place / "benchmarks" / table.parent.name
        merge(UnitShards(table.parent / "units"), known["merges"], copy / "units")
        files.write_bytes(copy / "pairs.csv", table.read_bytes())  # last: without it eval.py passes the folder by
    return place
