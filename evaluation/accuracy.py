"""Which of two is likelier -> accuracy with its error bar: outcomes, averages, bootstrap intervals, a paired test.

    outcome of a pair    1 if s(positive) > s(negative), `ties` (0.5) if they are equal, 0 else
    of a question        mean of its outcomes over the voices that it is asked in
    micro                mean over questions: the official ZeroSpeech score
    macro                mean over types of the mean over the questions of a type
    per recording        mean over pairs and voices, flat: what slamkit reports; the same where every question has all voices
    strict               share of questions that every voice answers rightly

Intervals are percentile bootstraps over questions (its voices are no independent observations; nor are the two files of a pair),
within each type for the macro average. Resampling n questions with replacement is a multinomial draw over the distinct values
that occur, and there are few: so thousands of resamples of any benchmark are one small matrix product. Where all questions have
the same outcome, the interval is that point: the bootstrap knows nothing of what it has not seen.

The test between two systems flips the sign of each question's difference at random: under the null hypothesis that the two are
exchangeable, all signs are equally likely (p is two-sided). Everything here is NumPy in float64. Shapes: N pairs, Q questions.

Sources: Efron and Tibshirani 1993, sections 13.3 (percentile interval) and 15.2 (permutation of paired differences).
"""
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
MOST_CELLS = 10_000_000  # of one matrix of counts


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float  # ends of the 95 % interval
    high: float
    n: int  # questions (or documents) behind it
    p: float | None = None  # of a paired test, for differences


def outcomes(positive, negative, ties=0.5):
    """Scores (N,) and (N,) -> (N,) float64 in {0, ties, 1}."""
    positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    return (positive > negative) + ties * (positive == negative)


def totals(values, questions, way="micro"):
    """Outcomes (N,) of questions (N,) -> numerators (Q,), denominators (Q,) whose sums' ratio is the average.

    way: micro (each question counts once), recordings (each pair does), strict (1 if all outcomes of a question are 1).
    """
    _, index, counts = np.unique(np.asarray(questions), return_inverse=True, return_counts=True)
    sums, counts = np.bincount(index, weights=values), counts.astype(np.float64)
    ones = np.ones(len(counts))
    return {"micro": (sums / counts, ones), "recordings": (sums, counts),
            "strict": ((sums == counts).astype(np.float64), ones)}[way]


def average(strata):
    """[(numerators, denominators)] of each type -> mean over the types of the ratio of their sums."""
    return float(np.mean([sums.sum() / counts.sum() for sums, counts in strata]))


def resampled(strata, resamples, seed):
    """Bootstrap replicates (R,) of average(strata); questions are drawn within their stratum."""
    rng, replicates = np.random.default_rng(seed), np.zeros(resamples)
    for sums, counts in strata:
        rows, multiplicity = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
        step = max(1, MOST_CELLS // len(rows))
        for begin in range(0, resamples, step):
            size = min(step, resamples - begin)
            drawn = rng.multinomial(len(sums), multiplicity / len(sums), size=size) @ rows  # (size, 2)
            replicates[begin:begin + size] += drawn[:, 0] / drawn[:, 1]
    return replicates / len(strata)


def interval(replicates):
    tail = (1 - CONFIDENCE) / 2
    return tuple(float(end) for end in np.quantile(replicates, (tail, 1 - tail)))


def estimate(strata, resamples=2000, seed=0):
    """Strata as in average() -> Estimate."""
    return Estimate(average(strata), *interval(resampled(strata, resamples, seed)), sum(len(sums) for sums, _ in strata))


def difference(ours, theirs, resamples=2000, seed=0, flips=10_000):
    """Two systems on the same questions -> Estimate of the first less the second, with p of the sign-flip test.

    ours, theirs: strata as in average(), with the same denominators.
    """
    apart = [(a - b, counts) for (a, counts), (b, _) in zip(ours, theirs)]
    rng, drawn = np.random.default_rng([seed, 1]), np.zeros(flips)
    for sums, counts in apart:
        sizes, multiplicity = np.unique(np.abs(sums), return_counts=True)
        signs = 2 * rng.binomial(multiplicity, 0.5, size=(flips, len(sizes))) - multiplicity  # sums of random signs
        drawn += signs @ sizes / counts.sum() / len(apart)
    found = average(apart)
    p = (1 + np.count_nonzero(np.abs(drawn) >= abs(found) - 1e-12)) / (1 + flips)
    return Estimate(found, *interval(resampled(apart, resamples, seed)), sum(len(sums) for sums, _ in apart), float(p))


def divided(values, questions, types, way="micro"):
    """As totals(), for each type by itself: the strata of a macro average."""
    types = np.asarray(types)
    return [totals(values[types == name], np.asarray(questions)[types == name], way) for name in np.unique(types)]
