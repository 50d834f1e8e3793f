"""A study with listeners: who hears what in which order, and what they answered.

    systems, prompts --plan--> items of each rater --pages/rating.py--> study.json, a page a rater
    study.json, what the pages saved --read_study, read_answers--> {rater: {position: answer}}, a sentence on each fault
                                     --trusted--> without those who miss catch clips --tabulate--> Y (K, R, I)

A catch clip has a right answer: the page asks for a certain one, or what is heard is noise with the spectrum of speech, which
deserves at most a 2, and loses against speech. Shapes: K systems (or pairs of them), R raters, I prompts.
"""
import itertools
import json
import math
import random
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

VALUES = {"opinion": {value: float(value) for value in range(1, 6)}, "preference": {"A": 1.0, "neither": 0.5, "B": 0.0}}


# ---------------------------------------------------------------------------------------------- who hears what

def latin(raters, per_rater, prompts, treatments):
    """Numbers (prompt, treatment) of each rater's clips, a list a rater: a Latin square that goes on as long as clips are needed.

    Each prompt meets each treatment equally often, and so does each rater, to within one (a rater who hears a prompt more than
    once: to within two). No rater has a prompt twice unless there are fewer prompts than clips, and no pair of both twice.
    """
    turns = treatments // math.gcd(prompts, treatments)  # laps over all prompts until they would meet the same treatments again
    found = [[] for _ in range(raters)]
    for k in range(raters * per_rater):
        lap, at = divmod(k, prompts)
        again = per_rater > prompts
        found[k // per_rater].append((at if again else (at + lap // turns) % prompts,
                                      (k + again * (lap % treatments // turns)) % treatments))
    return found


def spread(cells, rng):
    """(prompt, treatment) cells in random order; if possible no prompt twice in a row, all treatments before one comes again."""
    left, found = rng.sample(cells, len(cells)), []
    while left:
        prompts, treatments = (Counter(cell[i] for cell in left) for i in (0, 1))
        free = [cell for cell in left if not found or cell[0] != found[-1][0]] or left
        found.append(max(free, key=lambda cell: (prompts[cell[0]], treatments[cell[1]])))  # the first of equals, which is random
        left.remove(found[-1])
    return found


def treatments_of(kind, systems):
    """What is heard of one prompt: a system, or an ordered pair of them; all pairs come before the first is turned round."""
    pairs = list(itertools.combinations(systems, 2))
    return [(system,) for system in systems] if kind == "opinion" else pairs + [pair[::-1] for pair in pairs]


def plan(options, systems, prompts):
    """Items of every rater {rater: [item]}, and whether practice has prompts of its own.

    An item: role (practice, rated, catch), prompt, heard: (system, whether it is turned into noise) of each sound; of a catch
    item accept, the right answers, and perhaps ask, what the page asks for.
    Raises: ValueError for more clips than there are, or fewer than catch clips.
    """
    rng = random.Random(options.seed)
    opinion = options.kind == "opinion"
    systems, prompts = rng.sample(systems, len(systems)), rng.sample(prompts, len(prompts))
    treatments = treatments_of(options.kind, systems)
    spare = max(options.practice, options.catch > 0)
    apart = prompts[:spare] if len(prompts) >= options.per_rater + spare else []
    rated = prompts[len(apart):]
    if options.catch > options.per_rater or not 0 < options.per_rater <= len(rated) * len(treatments) or len(rated) < 2:
        raise ValueError(f"--per-rater={options.per_rater}: {len(rated)} prompts that all systems have, each in "
                         f"{len(treatments)} ways, give 1 to {len(rated) * len(treatments)}; at least 2 prompts are needed, and "
                         f"as many clips as --catch={options.catch}")
    raters = {}
    lists = latin(options.raters, options.per_rater, len(rated), len(treatments))
    for number, cells in enumerate(rng.sample(lists, len(lists)), start=1):
        order = [(rated[prompt], treatments[way]) for prompt, way in spread(cells, rng)]
        items = [item("rated", prompt, way) for prompt, way in order]
        asked = rng.sample((3, 4, 5) if opinion else ("A", "B"), 3 if opinion else 2)  # who answers all alike misses one of two
        for c, at in reversed([*enumerate(sorted(rng.sample(range(1, len(order) + 1), options.catch)))]):
            near = {prompt for prompt, _ in order[at - 1:at + 1]}
            prompt, way = rng.choice(apart or [each for each in rated if each not in near] or rated), rng.choice(treatments)
            if c % 2 == 0:
                answer = asked[c // 2 % len(asked)]
                items.insert(at, item("catch", prompt, way) | {"accept": [answer], "ask": answer})
            elif opinion:
                items.insert(at, item("catch", prompt, way, noise=0) | {"accept": [1, 2]})
            else:
                side = rng.randrange(2)
                items.insert(at, item("catch", prompt, way[:1] * 2, noise=side) | {"accept": ["BA"[side]]})
        first = apart or [prompt for prompt, _ in reversed(order)]  # else those that come last
        raters[f"rater_{number:02d}"] = [item("practice", first[i % len(first)], treatments[(i + number) % len(treatments)])
                                         for i in range(options.practice)] + items
    return raters, bool(apart)


def item(role, prompt, way, noise=None):
    return {"role": role, "prompt": prompt, "heard": [(system, i == noise) for i, system in enumerate(way)]}


# ---------------------------------------------------------------------------------------------- what came back

def read_json(path):
    """What a JSON file holds; ValueError if it is none, OSError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):  # of a text that is no UTF-8, too
        raise ValueError(f"{path} is no JSON, perhaps cut short; ask for it again") from None


def read_study(folder):
    """study.json of a folder, as pages/rating.py writes it. Raises: OSError, ValueError if it is not there, or is none."""
    path = Path(folder or "") / "study.json"
    if not folder or not path.is_file():
        raise FileNotFoundError(f"--data={folder}: no study.json in it; give the folder that python -m pages rate wrote, and "
                                "put the raters' files there")
    study = read_json(path)
    known = isinstance(study, dict) and {"study", "kind", "systems", "clips", "raters", "misses"} <= {*study}
    if not known or study["kind"] not in VALUES:
        raise ValueError(f"{path} is no study of python -m pages rate; take the one that its pages were made with")
    return study


def read_answer_file(path, study):
    """(rater, {position: entry}, how many entries are left out) of a file; ValueError says why none of it counts."""
    found = read_json(path)
    entries = found.get("answers") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not {"study", "rater", "check"} <= {*found}:
        raise ValueError(f"{path} is no file that a rating page saved")
    if found["study"] != study["study"]:
        raise ValueError(f"{path} is of another study: {found['study']}, not {study['study']}")
    rater = str(found["rater"])
    if rater not in study["raters"]:
        raise ValueError(f"{path} is of {rater}, whom study.json does not know")
    try:
        told = "".join(f" {each['position']}:{'+'.join(each['clips'])}={each['answer']}" for each in entries)
    except (TypeError, KeyError):
        raise ValueError(f"{path} has an answer without its position, clips or value; ask for it again") from None
    if found["check"] != f"{zlib.crc32((study['study'] + ' ' + rater + told).encode()):08x}":
        raise ValueError(f"{path} was changed after its page saved it: its check does not fit; ask for it again")
    items, values = dict(enumerate(study["raters"][rater])), VALUES[study["kind"]]
    good = {each["position"]: each for each in entries if {type(each["position"]), type(each["answer"])} <= {int, str}
            and items.get(each["position"], {}).get("clips") == each["clips"] and each["answer"] in values}
    return rater, good, len(entries) - len(good)


def read_answers(folder, study):
    """{rater: {position: entry}} of all files in a folder, and notes, a sentence each: what is left out, or came twice."""
    found, source, notes = {}, {}, []
    for path in sorted(path for path in Path(folder).rglob("*.json") if path.name != "study.json"):
        try:
            rater, answers, bad = read_answer_file(path, study)
        except (ValueError, OSError) as error:
            notes.append(f"left out: {error}")
            continue
        if bad:
            notes.append(f"{path}: {bad} answers are left out, which are none of {', '.join(map(str, VALUES[study['kind']]))}, "
                         "or are of other clips than this rater's")
        if rater in found:  # the fuller one counts, of equals the first by name
            more = len(answers) > len(found[rater])
            kept, other = (path, source[rater]) if more else (source[rater], path)
            notes.append(f"{rater} came twice: {kept} counts, {other} "
                         + ("says the same" if found[rater] == answers else "says something else, in no more answers"))
        if rater not in found or more:
            found[rater], source[rater] = answers, path
    notes += [f"{rater} answered {len(answers)} of {len(study['raters'][rater])}, which count" for rater, answers in found.items()
              if len(answers) < len(study["raters"][rater])]
    return found, notes


def trusted(study, found):
    """The raters who do not miss more catch clips than study.json allows, {rater: answers}; and a sentence on each other one."""
    kept, notes = {}, []
    for rater, answers in found.items():
        items = study["raters"][rater]
        caught = [(position, items[position]["accept"]) for position in sorted(answers) if items[position]["role"] == "catch"]
        missed = [f"number {position + 1}: {answers[position]['answer']}, not {' or '.join(map(str, right))}"
                  for position, right in caught if answers[position]["answer"] not in right]
        if len(missed) > study["misses"]:
            notes.append(f"{rater} is left out: {len(missed)} of {len(caught)} catch clips missed ({'; '.join(missed)})")
        else:
            kept[rater] = answers
    return kept, notes


def tabulate(study, found):
    """Names of what is rated, K systems or (system, system) pairs, and Y (K, R, I): opinions; of pairs 1 where the first won.

    NaN where nothing was rated; the mean where a rater heard the same twice.
    """
    clips, prefer = study["clips"], study["kind"] == "preference"
    names = [*itertools.combinations(study["systems"], 2)] if prefer else study["systems"]
    prompts = sorted({clip["prompt"] for clip in clips.values()})
    sums, counts = np.zeros((2, len(names), len(found), len(prompts)))
    for r, (rater, answers) in enumerate(found.items()):
        for position, each in answers.items():
            if study["raters"][rater][position]["role"] == "rated":
                systems, value = tuple(clips[code]["system"] for code in each["clips"]), VALUES[study["kind"]][each["answer"]]
                name = systems if prefer else systems[0]
                if name not in names:  # the pair with its sides changed
                    name, value = name[::-1], 1 - value
                cell = names.index(name), r, prompts.index(clips[each["clips"][0]]["prompt"])
                sums[cell], counts[cell] = sums[cell] + value, counts[cell] + 1
    with np.errstate(invalid="ignore"):
        return names, sums / counts
