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
from dataclasses import dataclass, replace

import numpy as np

TAIL = (1 - 0.95) / 2  # share of the replicates beyond each end of an interval
MOST_CELLS = 10_000_000  # of one matrix of counts


@dataclass(frozen=True)
class Estimate:
    value: float | None
    low: float | None  # ends of the 95 % interval
    high: float | None
    n: int  # questions (or documents) behind it
    p: float | None = None  # of a paired test, for differences

    def through(self, function):
        """The estimate of an increasing function of it: percent of a share, exp of a loss."""
        return replace(self, **{key: float(function(getattr(self, key))) for key in ("value", "low", "high")})


def outcomes(positive, negative, ties=0.5):
    """Scores (N,) and (N,) -> (N,) float64 in {0, ties, 1}."""
    positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    return (positive > negative) + ties * (positive == negative)


def stratify(values, questions, types=None, way="micro"):
    """Outcomes (N,) of questions (N,) -> [(numerators (Q,), denominators (Q,))], whose sums' ratio is the average of a type.

    types: (N,), a stratum each for the macro average; None: all are of one. way: micro, recordings (each pair counts) or strict.
    """
    types = np.zeros(len(values)) if types is None else np.asarray(types)
    found = []
    for kind in np.unique(types):
        _, index, counts = np.unique(np.asarray(questions)[types == kind], return_inverse=True, return_counts=True)
        sums, counts = np.bincount(index, weights=values[types == kind]), counts.astype(np.float64)
        ones, right = np.ones(len(counts)), (sums == counts).astype(np.float64)
        found.append({"micro": (sums / counts, ones), "recordings": (sums, counts), "strict": (right, ones)}[way])
    return found


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


def estimate(strata, resamples=2000, seed=0):
    """Strata as in average() -> Estimate."""
    low, high = map(float, np.quantile(resampled(strata, resamples, seed), (TAIL, 1 - TAIL)))
    return Estimate(average(strata), low, high, sum(len(sums) for sums, _ in strata))


def difference(ours, theirs, resamples=2000, seed=0, flips=10_000):
    """Two systems on the same questions -> Estimate of the first less the second, with p of the sign-flip test.

    ours, theirs: strata as in average(), with the same denominators.
    """
    apart = [(a - b, counts) for (a, counts), (b, _) in zip(ours, theirs)]
    found = estimate(apart, resamples, seed)
    rng, drawn = np.random.default_rng([seed, 1]), np.zeros(flips)
    for sums, counts in apart:
        sizes, multiplicity = np.unique(np.abs(sums), return_counts=True)
        signs = 2 * rng.binomial(multiplicity, 0.5, size=(flips, len(sizes))) - multiplicity  # sums of random signs
        drawn += signs @ sizes / counts.sum() / len(apart)
    return replace(found, p=float((1 + np.count_nonzero(np.abs(drawn) >= abs(found.value) - 1e-12)) / (1 + flips)))
