"""Unit files of other projects -> unit shards, and back; what is in a folder of shards.

    .jsonl, or .tsv and .km --foreign.read--> documents --shards.write_shards--> folder --foreign.write_jsonl--> .jsonl

    python -m corpus units/mine                       # what is in a folder: hours, frequencies, entropy, run lengths
    python -m corpus units/mine --jsonl=mine.jsonl    # the same as slamkit's JSON lines; --jsonl alone prints them
    python -m corpus features.jsonl --out=units/x --num-units=500 --frame-rate=25 --layer=11 --centers=0123456789abcdef
    python -m corpus train.tsv train.km --out=units/x --like=units/mine --dedup      # fairseq; the recipe of another folder
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import config
from checkpoints.files import locked, replacing
from checkpoints.recognise import recognise
from corpus import foreign, inspector
from corpus.listing import hashes, held, known
from corpus.shards import UnitShards, names_in, read_meta, refuse_other_recipe, write_shards
from speech.encoder import CHUNKINGS
from speech.precision import PRECISIONS


@dataclass(frozen=True)
class CorpusConfig:
    paths: tuple[str, ...] = ()  # a shard folder to look into; or what to import: one .jsonl file, or a .tsv and its .km
    jsonl: str | None = None  # export the folder to this file of JSON lines (replaced); without a value, or -, to the terminal
    out: str | None = None  # import: folder for the shards, to which new documents are added
    overwrite: bool = False  # import: replace what --out holds
    like: str | None = None  # import: shard folder whose recipe the units share, instead of the eight options below
    num_units: int | None = None  # import: K, size of the k-means table
    frame_rate: float | None = None  # import: frames per second of speech
    model: str | None = None  # import: name of the model that the units come from
    layer: int | None = None  # import: its layer
    centers: str | None = None  # import: fingerprint of the k-means centres, as `python -m corpus FOLDER` shows it
    pad: int | None = None  # import: zeros that were put around each recording, samples (slamkit: 40)
    chunking: str | None = None  # import: how long recordings were encoded: overlap, or textless (the published pipeline)
    precision: str | None = None  # import: what the tokenizer multiplied in: float32, tf32, float16 or bfloat16
    dedup: bool = False  # import: collapse runs of equal units (their run lengths are added up)
    ALONE = {"jsonl": "-"}
    CHOICES = {"chunking": tuple(CHUNKINGS), "precision": tuple(PRECISIONS)}
    NEEDS = dict.fromkeys(("overwrite", "like", "num_units", "frame_rate", "model", "layer", "centers", "pad", "chunking",
                           "precision", "dedup"), "out")
    RANGES = {"num_units": (1, 2**16), "frame_rate": (config.ABOVE_0, 1000), "layer": (1, 1000), "pad": (0, 16_000)}


def imported_recipe(options):
    """The recipe that the options of an import describe, less `dedup`."""
    described = {key: getattr(options, key) for key in ("model", "layer", "num_units", "frame_rate", "centers")}
    described |= {key: value for key in ("pad", "chunking", "precision") if (value := getattr(options, key)) is not None}
    if options.like:
        extra = [key for key, value in described.items() if value is not None]
        if extra:
            raise ValueError(f"--like={options.like} says it all; leave out --{extra[0].replace('_', '-')}")
        described = UnitShards(options.like).recipe
    if not (described.get("num_units") or 0) > 0 or not (described.get("frame_rate") or 0) > 0:
        raise ValueError("an import needs --num-units and --frame-rate, both above 0, or --like=FOLDER with the same recipe")
    return {"kind": "hubert", **described}


def import_units(options):
    """The files in options.paths -> shards in options.out, after what it holds; returns the meta, and how many are new."""
    recipe = imported_recipe(options)

    def documents():
        rows = foreign.read(options.paths, recipe["num_units"], recipe["frame_rate"])
        for name, units, runs, seconds in config.progress(rows, desc="importing", unit="file"):
            yield name, *(foreign.collapse(units, runs) if options.dedup else (units, runs)), seconds

    # The recipe tells the truth about the units, whatever the file's format suggests; all lines are checked before any is written
    empty, repeats, ones = True, False, True
    for _, units, runs, _ in documents():
        empty, repeats, ones = False, repeats or bool((units[1:] == units[:-1]).any()), ones and bool((runs == 1).all())
    if empty:
        raise ValueError(f"{options.paths[0]} holds no units; copy it again")
    with locked(options.out, "units"):
        before = not options.overwrite and read_meta(options.out) or {"recipe": {}, "files": 0, "units": 0}
        frames = not before["recipe"].get("dedup", True) and not options.dedup and ones
        recipe["dedup"] = not (frames or repeats)  # frames need not repeat
        refuse_other_recipe(options.out, recipe, options.overwrite)
        new = not_in(options.out, documents()) if before["units"] else documents()
        meta = write_shards(options.out, recipe, new, overwrite=options.overwrite)
    return meta, meta["files"] - before["files"]


def not_in(folder, documents):
    """The documents that a folder of shards does not hold yet. Raises: ValueError where it holds others of the same name."""
    names = known(names_in(folder))
    wholes = known((name, units.tobytes()) for name, units, _ in UnitShards(folder))
    for name, units, runs, seconds in documents:
        if not held(hashes([name]), names):
            yield name, units, runs, seconds
        elif not held(hashes([(name, units.tobytes())]), wholes):
            raise ValueError(f"{folder} holds other units under the name {name}; give documents names of their own (file_name), "
                             "or another --out, or --overwrite")


def main(argv=None):
    options = config.load(CorpusConfig, argv, positional="paths")
    for path in options.paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"no file at {path}; check the path")
    suffixes = sorted(Path(path).suffix for path in options.paths if not Path(path).is_dir())
    if suffixes in ([".jsonl"], [".km", ".tsv"]) and len(options.paths) == len(suffixes):
        if not options.out or options.jsonl:
            raise ValueError("an import needs --out=FOLDER, and no --jsonl")
        meta, added = import_units(options)
        print(f"{meta['files']} files, {meta['hours']:.3f} h, {meta['units']} units in {options.out}"
              + (f"; {added or 'none'} of them new" if added < meta["files"] else ""))
    elif len(options.paths) != 1:
        raise ValueError("give one shard folder to look into, or one .jsonl file or a .tsv and its .km to import (--help)")
    elif options.out:
        raise ValueError(f"--out is for an import of .jsonl, or .tsv and .km; {options.paths[0]} "
                         + (recognise(options.paths[0]) or "is neither"))
    elif options.jsonl == "-":
        foreign.write_jsonl(UnitShards(options.paths[0]), sys.stdout)
    elif options.jsonl:
        shards = UnitShards(options.paths[0])
        with replacing(options.jsonl) as temporary, open(temporary, "w") as file:
            foreign.write_jsonl(shards, file)
    else:
        print(inspector.inspect(options.paths[0]))


if __name__ == "__main__":
    config.command(main)
