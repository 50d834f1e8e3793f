"""What several runs say together: paired differences with Student's interval, updates to the same loss, and a verdict by a rule.

    losses of two arms, by seed --paired--> differences (n,) --interval--> mean [low, high] --verdict--> seen | ... | not tested

THE RULE, written before the runs. A contrast claims that one arm ends below another (or scores above it). Its differences are
paired by seed; the interval is Student's t at 95 % over seeds.
    seen          the interval excludes 0 in the claimed direction, with five seeds or more
    suggested     the same with fewer seeds, from two on; or one seed alone, without an interval, in the claimed direction
    not seen      the interval holds 0, or a single seed points the other way
    contradicted  the interval excludes 0 in the other direction, with two seeds or more
    not tested    there are no runs, or an arm's rates are not all tried
No interval is corrected for there being many.
"""
import math
from dataclasses import dataclass

import numpy as np

LEAST, CONFIDENCE = 5, 0.95  # seeds behind "seen"; of intervals


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float | None  # one seed has no interval
    high: float | None
    n: int


def student_t(df, confidence=CONFIDENCE):
    """The quantile t for which |T| <= t with that probability, T being Student's with df degrees of freedom."""
    angle = (np.arange(200_000) + 0.5) / 200_000 * math.pi / 2  # T = sqrt(df) tan(angle) has density ~ cos(angle)^(df - 1)
    mass = np.cumsum(np.cos(angle) ** (df - 1))
    return math.sqrt(df) * math.tan(angle[np.searchsorted(mass, confidence * mass[-1])])


def interval(values):
    """Mean of values (n,), n > 0, with its interval."""
    values = np.asarray(values, float)
    mean, n = float(values.mean()), len(values)
    reach = student_t(n - 1) * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return Interval(mean, *((mean - reach, mean + reach) if n > 1 else (None, None)), n)


def verdict(found):
    """An Interval of differences in the claimed direction, or None -> a word of the rule."""
    if found is None:
        return "not tested"
    if found.n == 1:
        return "suggested" if found.mean > 0 else "not seen"
    if found.low > 0:
        return "seen" if found.n >= LEAST else "suggested"
    return "contradicted" if found.high < 0 else "not seen"


def updates_to(curve, loss):
    """First update at which a curve [(step, validation loss), ...] is at or below `loss`, between validations on a straight line;
    None if it never is."""
    before = None
    for step, value in curve:
        if value <= loss:
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value) if before else float(step)
        before = step, value
    return None
