"""What listeners say of speech -> mean opinion (MMOS) with its interval, differences, preferences, agreement between raters.

    study.json, rater_01.json ... --study.py--> Y (K, R, I), NaN where nothing was rated; a sentence on what does not count
    Y --estimate--> mean of a system, or difference of two, with its interval;  --alpha--> agreement

Raters and prompts are both a sample: the question is what other raters would say of other prompts. So both are resampled with
replacement, independently; a rating counts as often as its rater times as often as its prompt was drawn. The plain quantiles of
such means are too wide, since each rating's own noise enters three times (Owen 2007): so each resample is studentised by its own
standard error, and quantiles of |t| make the interval, in which that excess cancels. The standard error is that of clustering in
two ways: squared sums of deviations over raters, plus those over prompts, less those of single ratings (Cameron, Gelbach and
Miller 2011). As a difference of sums it may be far too small by chance, so it has a floor. tests/test_opinion.py simulates what
the intervals cover.

A difference takes raters and prompts as they are drawn, the same for both systems, so what is one rater's strictness or one
prompt's ease cancels. Its p: signs of the difference are flipped at random for each rater, and for each prompt; the larger of the
two counts, as either may be what a difference comes from. Everything is NumPy in float64. Shapes: K systems (or pairs of them),
R raters, I prompts, B resamples.

Sources: Owen 2007 (arXiv 0712.1111), the pigeonhole bootstrap; Cameron, Gelbach and Miller 2011, section 2.2; Efron and
Tibshirani 1993, section 12.5 (bootstrap-t); Krippendorff 2011, computing his alpha, for interval data.
"""
import itertools
import math
from dataclasses import replace

import numpy as np

from evaluation import accuracy, reports
from evaluation.accuracy import Estimate
from evaluation.study import read_answers, read_study, tabulate, trusted

SHARE = 0.5  # of the variance by single ratings' own noise, the floor of every estimate; simulated, 1 covers up to 99 %, 0 but 82
LEAST = 3  # raters, and prompts, that an interval is made of
MOST_CELLS = 4_000_000  # of one array of resamples
CONVENTIONS = ["intervals: 95 %, studentised bootstrap over raters and prompts (both drawn with replacement)",
               "p of a difference: the larger of two sign-flip tests, over raters and over prompts, two-sided",
               "p of a preference: sign test over prompts, each a win of what most of its raters prefer, ties left out",
               "agreement: Krippendorff's alpha, interval data: 1 is perfect, 0 is chance",
               "the question and the answers' wording are this project's, not those of the TWIST paper"]


# ---------------------------------------------------------------------------------------------- the maths

def own_noise(Y):
    """Y (K, R, I) less what systems, raters and prompts explain, one added to the other (least squares), NaN where Y is.

    Scaled up, for the freedom that the fit takes, so that squares have the mean of the noise that single ratings have.
    """
    cells = np.argwhere(~np.isnan(Y))
    columns = np.concatenate([np.eye(size)[cells[:, axis]] for axis, size in enumerate(Y.shape)], axis=1)
    values = Y[tuple(cells.T)]
    fitted, _, rank, _ = np.linalg.lstsq(columns, values, rcond=None)
    found = np.full(Y.shape, np.nan)
    found[tuple(cells.T)] = (values - columns @ fitted) * math.sqrt(len(cells) / max(1, len(cells) - rank))
    return found


def weighted(Y, noise, signs, raters, prompts):
    """Signed sum of the K means of Y (K, R, I) and its variance, (B,) each.

    raters (B, R), prompts (B, I): how often each counts.
    """
    value, apart, floor = 0, 0, 0  # apart (B, R, I): how much each rating moves the value
    for y, own, sign in zip(Y, noise, signs):
        rated = ~np.isnan(y)
        count = ((raters @ rated) * prompts).sum(1)
        mean = ((raters @ np.where(rated, y, 0)) * prompts).sum(1) / count
        value = value + sign * mean
        apart = apart + sign * np.where(rated, y - mean[:, None, None], 0) / count[:, None, None]
        floor = floor + np.einsum("ri,br,bi->b", np.where(rated, own, 0) ** 2, raters, prompts) / count ** 2
    by_rater = (raters * np.einsum("bri,bi->br", apart, prompts) ** 2).sum(1)
    by_prompt = (prompts * np.einsum("bri,br->bi", apart, raters) ** 2).sum(1)
    alone = np.einsum("bri,br,bi->b", apart ** 2, raters, prompts)
    return value, np.maximum(by_rater + by_prompt - alone, SHARE * floor)  # by chance the sum may fall below 0


def estimate(Y, noise, signs=(1,), resamples=2000, seed=0, limits=(-np.inf, np.inf)):
    """Estimate of the signed sum of the K means of Y (K, R, I), NaN where nothing is rated: (1,) a mean, (1, -1) a difference.

    noise: as own_noise gives it, of all systems together. limits: of the scale, within which the interval is cut. There is none
    for fewer than 3 raters or prompts, or where a system has no rating (then no value, either).
    """
    rated = ~np.isnan(Y)
    Y, noise = (table[:, rated.any((0, 2))][:, :, rated.any((0, 1))] for table in (Y, noise))
    if not rated.any((1, 2)).all():
        return Estimate(None, None, None, int(rated.sum()))
    _, R, I = Y.shape
    value, variance = (float(found[0]) for found in weighted(Y, noise, signs, np.ones((1, R)), np.ones((1, I))))
    if min(R, I) < LEAST:
        return Estimate(value, None, None, int(rated.sum()))
    rng, step, found = np.random.default_rng(seed), max(1, MOST_CELLS // (R * I)), []
    with np.errstate(invalid="ignore", divide="ignore"):
        for begin in range(0, resamples, step):
            size = min(step, resamples - begin)
            draws = (rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64) for n in (R, I))
            values, variances = weighted(Y, noise, signs, *draws)
            found.append(np.abs(values - value) / np.sqrt(variances))
    t = np.concatenate(found)
    t = t[np.isfinite(t)]  # others drew a single rater, or a system not at all
    reach = math.sqrt(variance) * float(np.quantile(t, 1 - 2 * accuracy.TAIL)) if len(t) else 0.0
    return Estimate(value, max(limits[0], value - reach), min(limits[1], value + reach), int(rated.sum()))


def flipped(Y, seed=0):
    """p of the difference of two systems, Y (2, R, I): the larger of sign flips over raters and over prompts; else None."""
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

    1 - what raters of the same unit differ by, over what any two ratings differ by, in mean squares. Units of one rating count
    for nothing.
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

def preferences(names, Y, how):
    """Rows of a preference study, one a pair, and a sentence on each. how: resamples and seed."""
    rows, notes = [], []
    for (ours, theirs), y, noise in zip(names, Y, own_noise(Y)):
        counted = [int(np.count_nonzero(y == value)) for value in (1, 0, 0.5)]
        with np.errstate(invalid="ignore"):
            mean = np.where(np.isnan(y), 0, y).sum(0) / (~np.isnan(y)).sum(0)
        wins, losses = np.count_nonzero(mean > 0.5), np.count_nonzero(mean < 0.5)
        share = replace(estimate(y[None], noise[None], (1,), *how, (0, 1)), p=sign_test(wins, losses))
        rows.append(reports.row("preference", f"{ours} over {theirs}", "share of wins", "neither: half", share))
        notes.append(f"{ours} over {theirs}: won {counted[0]}, lost {counted[1]}, neither {counted[2]}; "
                     f"of prompts won {wins}, lost {losses}")
    return rows, notes


def opinions(names, Y, how):
    """Rows of an opinion study: one a system, and one a pair of them. how: resamples and seed."""
    noise, pairs = own_noise(Y), [[i, j] for i, j in itertools.combinations(range(len(names)), 2)]
    rows = [reports.row("mmos", "all prompts", name, "opinion, 1 to 5", estimate(Y[[k]], noise[[k]], (1,), *how, (1, 5)))
            for k, name in enumerate(names)]
    apart = [replace(estimate(Y[pair], noise[pair], (1, -1), *how), p=flipped(Y[pair], how[1])) for pair in pairs]
    return rows, [reports.row("mmos", f"{names[i]} - {names[j]}", "difference", "points", found)
                  for (i, j), found in zip(pairs, apart)]


def run(options):
    """--task=mmos: sections on what was rated, on differences (of opinions), on agreement. options: data, resamples, seed."""
    study = read_study(options.data)
    came, notes = read_answers(options.data, study)
    found, caught = trusted(study, came)
    notes = caught + notes
    if not found:
        raise ValueError(" ".join([f"--data={options.data}: no rater's file counts; put what the pages saved there.", *notes]))
    names, Y = tabulate(study, found)
    rated, how, apart = ~np.isnan(Y), (options.resamples, options.seed), []
    R, I = np.count_nonzero(rated.any((0, 2))), np.count_nonzero(rated.any((0, 1)))
    plays = [count for answers in found.values() for each in answers.values() if isinstance(each.get("plays"), list)
             for count in each["plays"] if type(count) is int]
    if plays:
        notes.insert(0, f"clips were played {np.mean(plays):.2f} times on average")
    if min(R, I) < LEAST:
        notes.append(f"no intervals: {R} raters and {I} prompts, and there must be {LEAST} of each")
    if study["kind"] == "preference":
        rows, said = preferences(names, Y, how)
        notes = said + notes
    else:
        rows, apart = opinions(names, Y, how)
    agreed = Estimate(alpha(Y.transpose(0, 2, 1).reshape(-1, len(found))), None, None, int(rated.sum()))
    agreement = reports.row("agreement", "all clips", "raters", "Krippendorff's alpha", agreed)
    title = f"{study['kind']}: study {study['study']}, {R} of {len(study['raters'])} raters, {I} prompts"
    sections = {title: rows, "differences between systems": apart, "agreement between raters": [agreement]}
    return [{"title": name, "notes": notes if name == title else [], "rows": rows} for name, rows in sections.items() if rows]
