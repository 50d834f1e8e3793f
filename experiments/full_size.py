"""What each experiment is at full size: launch lines, what they take, and what is published. Nothing here runs anything.

    TWINS[name], published.txt, configs/README.md --text--> what `python -m experiments NAME --full` prints

A line that trains starts a recipe of configs/, whose README has its launcher, planned memory and goal of hours; other updates or
another text LM change the hours in proportion. AUDIO (speech, docs/units.md), benchmarks/ (sWUGGY, sBLIMP, Spoken StoryCloze) and
FOLDER are yours to name; all else is made by a line above.
"""
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"
PUBLISHED = Path(__file__).with_name("published.txt")
PARAMETERS = {"facebook/opt-125m": 87_014_400, "facebook/opt-350m": 305_712_128, "HuggingFaceTB/SmolLM2-135M": 106_492_608,
              "HuggingFaceTB/SmolLM2-360M": 315_117_120}  # with 502 ids, of text LMs that take each other's place
MHUBERT, HUBERT = "mhubert-base-25hz", "hubert-base-ls960"
TOKENIZERS = {12.5: MHUBERT, 25: MHUBERT, 50: HUBERT, 100: HUBERT}  # by frame rate, Hz: half, native, native, twice
LAYERS = {MHUBERT: 11, HUBERT: 6}  # of the published centres
CENTRES = {(25, 500): "mhubert-base-25hz-kmeans-500"} | {(50, k): f"hubert-base-ls960-kmeans-{k}" for k in (100, 200, 500)}
SIZES = ("opt-125m", "opt-350m", "opt-1.3b")


# ------------------------------------------------------------------------------------------------ lines

def units(out="units", tokenizer=f"--tokenizer={MHUBERT}", audio="AUDIO", held_out="--hold-out=0.01 --by=folder"):
    """Shards in OUT/train and OUT/val."""
    return f"python hubert_units.py {audio} {tokenizer} {held_out} --out={out}"


def train(name, run, *options):
    """One run of configs/NAME.toml; run: its folder, if it is not the config's own."""
    return " ".join([f"scripts/{machine(name)[0]} configs/{name}.toml", *options, *[f"--out=runs/{run}"] * (run != name)])


def pair(name, *options, run=""):
    return train(name, run or name, *options), train(f"{name}-cold", f"{run or name}-cold", *options)


def three(name, *options, run=""):
    return *pair(name, *options, run=run), train(name, f"{run or name}-shuffled", "--init=shuffled", *options)


def score(run, tokenizer=f"--tokenizer={MHUBERT}", data="units", what="--task=all --data=benchmarks/"):
    """A run beside its cold twin."""
    return (f"python eval.py {what} --model=runs/{run}/model --versus=runs/{run}-cold/model {tokenizer} "
            f"--train-data={data}/train --out=runs/{run}/eval")


def cell(rate, k):
    """One tokenizer: centres where none are published, units, a warm and a cold OPT-350M, scores."""
    cell, hubert = f"{rate:g}hz-k{k}", TOKENIZERS[rate]
    run, folder, centres = f"opt-350m-{cell}", f"units/{cell}", CENTRES.get((rate, k), f"kmeans/{cell}.safetensors")
    tokenizer = f"--tokenizer={hubert} --kmeans={centres}"
    known = (CONFIGS / f"{run}.toml").exists()
    name, data = (run, ()) if known else ("opt-350m", (f"--data={folder}/train", f"--val-data={folder}/val"))
    fit = (f"python hubert_units.py AUDIO --tokenizer={hubert} --frame-rate={rate:g} --layer={LAYERS[hubert]} --fit={k} "
           f"--out={centres}")
    return (*[fit] * (not known), units(folder, tokenizer), train(name, run, *data),
            train(name, f"{run}-cold", "--init=cold", "--peak-lr=4e-4", *data), score(run, tokenizer, folder))


def fractions(size):
    """A hundredth, a tenth and all of the data, over as many updates and over as many epochs."""
    for share, steps in (("0.01", 4_000), ("0.1", 40_000)):
        yield from pair(size, f"--data-fraction={share}", run=f"{size}-{share}")
        yield from pair(size, f"--data-fraction={share}", f"--steps={steps}", run=f"{size}-{share}-epochs")
    yield from pair(size)


def language(name, folder):
    data = (f"--data={folder}/train", f"--val-data={folder}/val", "--steps=54000")  # one pass over 21,400 h
    return *three(name, *data, run=f"{name}-es"), score(f"{name}-es", data=folder, what=f"--task=ppl --data={folder}/val")


# ------------------------------------------------------------------------------------------------ what they take

def machine(name):
    """(launcher, planned memory, goal of hours, on what) of configs/NAME.toml, from the table in configs/README.md."""
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in (CONFIGS / "README.md").read_text().splitlines()]
    row = next(row for row in rows if len(row) == 6 and any(fnmatch(name, known) for known in re.findall("`(.*?)`", row[0])))
    goal, card = re.search(r"([\d.]+) on ([\w ]*H200)", row[5]).groups()
    return re.search("`(.*?)`", row[1])[1], row[4], float(goal), card


def hours(line):
    """(goal of hours, on what) of a line that trains."""
    name = re.search(r"configs/(\S+)\.toml", line)[1]
    (_, _, goal, card), recipe = machine(name), tomllib.loads((CONFIGS / f"{name}.toml").read_text())
    steps, lm = (re.search(rf"--{option}=(\S+)", line) for option in ("steps", "lm"))
    goal *= int(steps[1]) / recipe["steps"] if steps else 1
    return goal * (PARAMETERS[lm[1]] / PARAMETERS[recipe["lm"]] if lm else 1), card


def text(name):
    """What --full prints of an experiment."""
    *lines, note = TWINS[name]
    shown = [line + ("  # {:.3g} h on {}".format(*hours(line)) if line.startswith("scripts/") else "") for line in lines]
    names = dict.fromkeys(re.findall(r"configs/(\S+?)(?:-cold)?\.toml", " ".join(lines)))
    said = [": ".join(row.split("\t")[1:]) for row in PUBLISHED.read_text().splitlines() if row.startswith(f"{name}\t")]
    return "\n".join([
        f"{name} at full size. Nothing of it was run here: hours are goals, memory is planned (--dry-run plans it).", "", *shown,
        "", note, "", *(f"memory, {each}: {machine(each)[1]}" for each in names), "", *said])


START = (units(), *three("opt-350m"), score("opt-350m"))
TWINS = {  # experiment -> lines for a shell in the order in which they are run, and what else there is to know
    "real": (units(), *three("opt-125m"), *three("opt-125m", "--lm=HuggingFaceTB/SmolLM2-135M", run="smollm2-135m"),
             score("opt-125m"), score("smollm2-135m"),
             units("units/50hz-k200", f"--tokenizer={HUBERT} --kmeans={CENTRES[50, 200]}"), *pair("opt-125m-50hz-k200"),
             "The last pair is the smallest comparison of two starts."),
    "starts": (*START, "The schedule does not know its end: rows of log.csv are smaller budgets. Other seeds: --seed and --out."),
    "fair": (*START, "No text LM has read what is spoken here."),
    "knowledge": (*START, "Exchanged layers, text in random order: the first training with --lm=FOLDER of such a text LM."),
    "data": (units(), *(line for size in SIZES for line in fractions(size)), "-epochs: as many passes as with all of the data."),
    "tokenizers": (*(line for rate in TOKENIZERS for k in (100, 200, 500, 1000) for line in cell(rate, k)),
                   "As many units are fewer hours of speech at a higher rate: change --steps for equal hours."),
    "families": (units(), *(line for name in ("opt-350m", "bloom-560m", "pythia-410m") for line in (*three(name), score(name))),
                 *three("opt-350m", "--lm=HuggingFaceTB/SmolLM2-360M", run="smollm2-360m"), score("smollm2-360m"),
                 train("slam", "slam"), "SmolLM2 is LLaMA-shaped; slam has a recipe and data of its own (configs/README.md)."),
    "sizes": (units(), *(line for size in SIZES for line in (*three(size), score(size))), train("llama-7b", "llama-7b"),
              train("llama-13b", "llama-13b"), "Meta gates LLaMA's weights; a cold 7B: --init=cold, a --peak-lr of its own."),
    "cost": (*START, *pair("opt-1.3b"), "python -m bench generate --device=cuda", "Seconds and memory stand in a run's log.csv."),
    "embedding": (units(), *(train("opt-350m", f"opt-350m-{kind}", f"--embedding={kind}") for kind in ("matched", "truncate")),
                  train("opt-350m", "opt-350m"), "The last is the fresh table."),
    "languages": ("find unlabelled_data/es -name '202007*' > val_sittings.txt",
                  units("units/voxpopuli-es", audio="unlabelled_data/es", held_out="--hold-out=val_sittings.txt"),
                  *language("bloom-560m", "units/voxpopuli-es"), *language("pythia-410m", "units/voxpopuli-es"),
                  "Spanish of VoxPopuli; Spanish is among BLOOM's languages, Pythia reads English. Spanish alone: --lm=FOLDER."),
    "words": (*START, "Merged units: the same lines with --data=FOLDER and --val-data=FOLDER of shards that hold them."),
    "regime": (units(), *fractions("opt-350m"), "Longer reading: the warm lines with --lm=FOLDER of earlier and later text LMs.")}
