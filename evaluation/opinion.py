"""What listeners say of speech -> mean opinion (MMOS) with its interval, differences, preferences, agreement between raters.

    study.json, rater_01.json ... --read_study, read_answers--> {rater: {position: answer}}, and a sentence on what is wrong
    answers --catch clips--> the raters who count --tabulate--> Y (K, R, I), NaN where nothing was rated
    Y --estimate--> mean of a system, or difference of two, with its interval;  --alpha--> agreement

Raters and prompts are both a sample: the question is what other raters would say of other prompts. So both are resampled with
replacement, independently; a rating counts as often as its rater times as often as its prompt was drawn. The plain quantiles of
such means are too wide, since each rating's own noise enters three times (Owen 2007): so each resample is studentised by its own
standard error, and quantiles of |t| make the interval, in which that excess cancels. The standard error is that of clustering in
two ways: squared sums of deviations over raters, plus those over prompts, less those of single ratings (Cameron, Gelbach and
Miller 2011). tests/test_opinion.py simulates what it covers.

A difference takes raters and prompts as they are drawn, the same for both systems, so what is one rater's strictness or one
prompt's ease cancels. Its p: signs of the difference are flipped at random for each rater, and for each prompt; the larger of the
two counts, as either may be what a difference comes from. Everything is NumPy in float64. Shapes: K systems (or pairs of them),
R raters, I prompts, B resamples.

Sources: Owen 2007 (arXiv 0712.1111), the pigeonhole bootstrap; Cameron, Gelbach and Miller 2011, section 2.2; Efron and
Tibshirani 1993, section 12.5 (bootstrap-t); Krippendorff 2011, computing his alpha, for interval data.
"""
import itertools
import json
import math
import zlib
from pathlib import Path

import numpy as np

from evaluation import accuracy, reports
from evaluation.accuracy import Estimate

LEAST = 3  # raters, and prompts, that an interval is made of
MOST_CELLS = 4_000_000  # of one array of resamples
VALUES = {"opinion": {value: float(value) for value in range(1, 6)}, "preference": {"A": 1.0, "neither": 0.5, "B": 0.0}}
CONVENTIONS = ["intervals: 95 %, studentised bootstrap over raters and prompts (both drawn with replacement)",
               "p of a difference: the larger of two sign-flip tests, over raters and over prompts, two-sided",
               "p of a preference: sign test over prompts, each a win of what most of its raters prefer, ties left out",
               "agreement: Krippendorff's alpha, interval data: 1 is perfect, 0 is chance",
               "the question and the answers' wording are this project's, not those of the TWIST paper"]


# ---------------------------------------------------------------------------------------------- files

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
        raise FileNotFoundError(f"--data={folder}: no study.json in it; give the folder that python -m pages rate wrote, with the "
                                "raters' files put there")
    study = read_json(path)
    if not isinstance(study, dict) or not {"study", "kind", "systems", "clips", "raters", "misses"} <= {*study}:
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
    items = study["raters"].get(str(found["rater"]))
    if items is None:
        raise ValueError(f"{path} is of {found['rater']}, whom study.json does not know")
    try:
        said = "".join(f" {each['position']}:{'+'.join(each['clips'])}={each['answer']}" for each in entries)
    except (TypeError, KeyError):
        raise ValueError(f"{path} has an answer without position, clips or answer; ask for it again") from None
    if found["check"] != f"{zlib.crc32(f'{study['study']} {found['rater']}{said}'.encode()):08x}":
        raise ValueError(f"{path} was changed after its page saved it: its check does not fit; ask for it again")
    good = {each["position"]: each for each in entries if each["position"] in range(len(items))
            and items[each["position"]]["clips"] == each["clips"] and each["answer"] in [*VALUES[study["kind"]]]}
    return str(found["rater"]), good, len(entries) - len(good)


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
            notes.append(f"{path}: {bad} answers are left out, which are none of {', '.join(map(str, VALUES[study['kind']]))}, or "
                         "are of other clips than this rater's")
        if rater in found:
            same = found[rater] == answers
            longer = len(answers) > len(found[rater])
            kept, other = (path, source[rater]) if longer else (source[rater], path)
            notes.append(f"{rater} came twice: {kept} counts, and {other} " + ("is the same" if same else "differs and does not: it "
                         f"has {'fewer answers' if longer or len(answers) < len(found[rater]) else 'as many answers, and came later'}"))
            if not longer:
                continue
        found[rater], source[rater] = answers, path
    for rater, answers in found.items():
        if len(answers) < len(study["raters"][rater]):
            notes.append(f"{rater} answered {len(answers)} of {len(study['raters'][rater])}, which count")
    return found, notes


def trusted(study, found):
    """The raters who do not miss more catch clips than study.json allows, {rater: answers}; and a sentence on each other one."""
    notes = []
    for rater, answers in found.items():
        items = study["raters"][rater]
        caught = [(position, items[position]["accept"]) for position in answers if items[position]["role"] == "catch"]
        missed = [f"item {position + 1}: {answers[position]['answer']}, not {' or '.join(map(str, right))}"
                  for position, right in caught if answers[position]["answer"] not in right]
        if len(missed) > study["misses"]:
            notes.append(f"{rater} is left out: {len(missed)} of {len(caught)} catch clips missed ({'; '.join(missed)})")
            found = {other: values for other, values in found.items() if other != rater}
    return found, notes


def tabulate(study, found):
    """Names of what is rated, a system or (system, system) each, K of them, and Y (K, R, I): opinions, or 1 where the first won."""
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


# ---------------------------------------------------------------------------------------------- the maths

def weighted(Y, signs, raters, prompts):
    """Signed sum of the K means of Y (K, R, I) and its variance, (B,) each; raters (B, R), prompts (B, I): how often each counts."""
    value, apart = 0, 0  # apart (B, R, I): how much each rating moves the value
    for y, sign in zip(Y, signs):
        rated = ~np.isnan(y)
        count = ((raters @ rated) * prompts).sum(1)
        mean = ((raters @ np.where(rated, y, 0)) * prompts).sum(1) / count
        value = value + sign * mean
        apart = apart + sign * np.where(rated, y - mean[:, None, None], 0) / count[:, None, None]
    by_rater = (raters * np.einsum("bri,bi->br", apart, prompts) ** 2).sum(1)
    by_prompt = (prompts * np.einsum("bri,br->bi", apart, raters) ** 2).sum(1)
    alone = np.einsum("bri,br,bi->b", apart ** 2, raters, prompts)
    return value, np.maximum(by_rater + by_prompt - alone, np.minimum(by_rater, by_prompt))  # the first may fall below 0 by chance


def estimate(Y, signs=(1,), resamples=2000, seed=0, limits=(-np.inf, np.inf)):
    """Estimate of the signed sum of the K means of Y (K, R, I), NaN where nothing is rated: (1,) a mean, (1, -1) a difference.

    limits: of the scale, within which the interval is cut. There is none for fewer than 3 raters or prompts, or where a system
    has no rating (then no value, either).
    """
    rated = ~np.isnan(Y)
    Y = Y[:, rated.any((0, 2))][:, :, rated.any((0, 1))]
    if not rated.any((1, 2)).all():
        return Estimate(None, None, None, int(rated.sum()))
    _, R, I = Y.shape
    value, variance = (float(found[0]) for found in weighted(Y, signs, np.ones((1, R)), np.ones((1, I))))
    if min(R, I) < LEAST:
        return Estimate(value, None, None, int(rated.sum()))
    rng, step, found = np.random.default_rng(seed), max(1, MOST_CELLS // (R * I)), []
    with np.errstate(invalid="ignore", divide="ignore"):
        for begin in range(0, resamples, step):
            size = min(step, resamples - begin)
            draws = (rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64) for n in (R, I))
            values, variances = weighted(Y, signs, *draws)
            found.append(np.abs(values - value) / np.sqrt(variances))
    t = np.concatenate(found)
    t = t[np.isfinite(t)]  # others drew a single rater, or a system not at all
    reach = math.sqrt(variance) * float(np.quantile(t, 1 - 2 * accuracy.TAIL)) if len(t) else 0.0
    return Estimate(value, max(limits[0], value - reach), min(limits[1], value + reach), int(rated.sum()))


def flipped(Y, seed=0):
    """p of the difference of two systems, Y (2, R, I): the larger of sign flips over raters and over prompts; None without both."""
    with np.errstate(invalid="ignore"):
        rated = ~np.isnan(Y)
        found = []
        for axis in (2, 1):  # means of each rater, of each prompt
            both = rated.any(axis).all(0)
            ours, theirs = (np.where(rated, Y, 0).sum(axis) / rated.sum(axis))[:, both]
            if len(ours):
                ones = np.ones(len(ours))
                found.append(accuracy.difference([(ours, ones)], [(theirs, ones)], resamples=2, seed=seed).p)
    return max(found) if len(found) == 2 else None


def sign_test(wins, losses):
    """Two-sided p of so many wins and losses if each were a throw of a fair coin, exactly; ties are in neither."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n)


def alpha(values):
    """Krippendorff's alpha for interval data: values (units, raters), NaN where not rated. None if all values are the same.

    1 - what raters of the same unit differ by, over what any two ratings differ by, in mean squares. Units of one rating are left out.
    """
    rated = ~np.isnan(values)
    values = values[rated.sum(1) > 1]
    counts = (~np.isnan(values)).sum(1)
    if not len(values) or np.nanvar(values) == 0:
        return None
    within = (counts / (counts - 1) * np.nansum((values - np.nanmean(values, 1, keepdims=True)) ** 2, 1)).sum()
    n = counts.sum()
    return float(1 - within / (n / (n - 1) * np.nansum((values - np.nanmean(values)) ** 2)))


# ---------------------------------------------------------------------------------------------- the task

def run(options):
    """--task=mmos: sections on what is rated, on differences (opinions only), and on agreement. options: data, resamples, seed."""
    study = read_study(options.data)
    files, notes = read_answers(options.data, study)
    found, caught = trusted(study, files)
    if not found:
        raise ValueError(" ".join([f"--data={options.data}: no rater's file counts; put what the pages saved there.", *notes, *caught]))
    names, Y = tabulate(study, found)
    R, I = (int((~np.isnan(Y)).any(axes).sum()) for axes in ((0, 2), (0, 1)))
    if min(R, I) < LEAST:
        notes.append(f"no intervals: {R} raters and {I} prompts, and there must be {LEAST} of each")
    plays = [sum(each["plays"]) / len(each["plays"]) for answers in found.values() for each in answers.values() if each.get("plays")]
    notes = [f"{len(found)} of {len(study['raters'])} raters count; each clip was played {np.mean(plays or 0):.2f} times",
             *caught, *notes]
    how, rows, apart = (options.resamples, options.seed), [], []
    for k, name in enumerate(names):
        if study["kind"] == "opinion":
            rows.append(reports.row("mmos", "all prompts", name, "opinion, 1 to 5", estimate(Y[k:k + 1], (1,), *how, (1, 5))))
            continue
        with np.errstate(invalid="ignore"):
            rated = ~np.isnan(Y[k])
            mean = (np.where(rated, Y[k], 0).sum(0) / rated.sum(0))[rated.any(0)]
        wins, losses = (int(side.sum()) for side in (mean > 0.5, mean < 0.5))
        found_share = estimate(Y[k:k + 1], (1,), *how, (0, 1))
        rows.append(reports.row("preference", f"{name[0]} over {name[1]}", "share of wins", "neither: half",
                                accuracy.replace(found_share, p=sign_test(wins, losses))))
        notes.append(f"{name[0]} over {name[1]}: won {(Y[k] > 0.5).sum()}, lost {(Y[k] < 0.5).sum()}, neither {(Y[k] == 0.5).sum()}; "
                     f"by prompts won {wins}, lost {losses}")
    for i, j in itertools.combinations(range(len(names)), 2) if study["kind"] == "opinion" else ():
        found_difference = accuracy.replace(estimate(Y[[i, j]], (1, -1), *how), p=flipped(Y[[i, j]], options.seed))
        apart.append(reports.row("mmos", f"{names[i]} - {names[j]}", "difference", "points", found_difference))
    agreed = Estimate(alpha(Y.transpose(0, 2, 1).reshape(-1, len(found))), None, None, int((~np.isnan(Y)).sum()))
    agreement = [reports.row("agreement", "all clips", "raters", "Krippendorff's alpha", agreed)]
    sections = [{"title": f"{study['kind']}: study {study['study']}, {R} raters, {I} prompts", "notes": notes, "rows": rows},
                {"title": "differences between systems", "notes": [], "rows": apart},
                {"title": "agreement between raters", "notes": [], "rows": agreement}]
    return [section for section in sections if section["rows"]]
