"""accuracy.py: averages against plain loops, intervals against the binomial formula and by simulation, the paired test."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import accuracy


def one_stratum(values, questions=None):
    values = np.asarray(values, float)
    return accuracy.stratify(values, np.arange(len(values)) if questions is None else np.asarray(questions))


def test_outcomes_are_1_half_and_0():
    assert accuracy.outcomes([1, 2, 3], [0, 2, 4]).tolist() == [1, 0.5, 0]
    assert accuracy.outcomes([1, 2, 3], [0, 2, 4], ties=0).tolist() == [1, 0, 0]
    assert accuracy.outcomes([-math.inf, -math.inf], [-1, -math.inf]).tolist() == [0, 0.5]


@given(st.lists(st.tuples(st.sampled_from([0, 0.5, 1]), st.integers(0, 4), st.sampled_from("xyz")), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_averages_equal_plain_loops(rows):
    values, questions, types = (list(column) for column in zip(*rows))
    questions = [f"{kind}{q}" for kind, q in zip(types, questions)]
    by_question = {}
    for value, question in zip(values, questions):
        by_question.setdefault(question, []).append(value)
    means = {question: sum(found) / len(found) for question, found in by_question.items()}
    array = np.array(values)

    def average(way):
        return accuracy.average(accuracy.stratify(array, questions, way=way))

    assert average("micro") == pytest.approx(sum(means.values()) / len(means), abs=1e-12)
    assert average("recordings") == pytest.approx(sum(values) / len(values), abs=1e-12)
    assert average("strict") == pytest.approx(sum(mean == 1 for mean in means.values()) / len(means), abs=1e-12)
    by_type = {}
    for question, mean in means.items():
        by_type.setdefault(question[0], []).append(mean)
    macro = sum(sum(found) / len(found) for found in by_type.values()) / len(by_type)
    assert accuracy.average(accuracy.stratify(array, questions, types)) == pytest.approx(macro, abs=1e-12)


@pytest.mark.parametrize("n, p", [(200, 0.5), (1871, 0.52), (6300, 0.85)])
def test_the_interval_of_single_answers_is_that_of_the_binomial_formula(n, p):
    right = round(n * p)
    found = accuracy.estimate(one_stratum([1] * right + [0] * (n - right)), resamples=20_000, seed=1)
    half = 1.96 * math.sqrt(found.value * (1 - found.value) / n)
    assert found.value == right / n and found.n == n
    for end, expected in ((found.low, found.value - half), (found.high, found.value + half)):
        assert abs(end - expected) < 0.06 * half + 0.5 / n  # a share of n has steps of 1 / n


def test_voices_of_one_question_are_no_independent_observations():
    rng = np.random.default_rng(0)
    answers = (rng.random(500) < 0.6).astype(float)  # every voice agrees
    alone = accuracy.estimate(one_stratum(answers))
    voices = accuracy.estimate(one_stratum(np.repeat(answers, 4), np.repeat(np.arange(500), 4)))
    assert (voices.value, voices.low, voices.high, voices.n) == (alone.value, alone.low, alone.high, 500)


def test_the_bootstrap_is_that_of_drawing_questions_one_by_one():
    rng = np.random.default_rng(2)
    sums, counts = rng.integers(0, 3, 40).astype(float), rng.integers(1, 5, 40).astype(float)
    strata = [(sums[:10], counts[:10]), (sums[10:], counts[10:])]
    ours = accuracy.resampled(strata, 20_000, seed=0)
    drawn = []
    for _ in range(20_000):
        ratios = []
        for a, b in strata:
            chosen = rng.integers(0, len(a), len(a))
            ratios.append(a[chosen].sum() / b[chosen].sum())
        drawn.append(np.mean(ratios))
    assert abs(ours.mean() - np.mean(drawn)) < 4 * np.std(drawn) / math.sqrt(20_000) * math.sqrt(2)
    assert ours.std() == pytest.approx(np.std(drawn), rel=0.04)
    for q in (0.025, 0.5, 0.975):
        assert abs(np.quantile(ours, q) - np.quantile(drawn, q)) < 0.08 * np.std(drawn)


@pytest.mark.parametrize("kind", ["single", "voices", "macro"])
def test_intervals_cover_the_truth_in_95_of_100_simulations(kind):
    rng, covered = np.random.default_rng({"single": 7, "voices": 8, "macro": 9}[kind]), 0
    for trial in range(500):
        if kind == "single":
            truth, strata = 0.62, one_stratum(rng.random(300) < 0.62)
        elif kind == "voices":  # the voices of a question share its difficulty
            difficulty = rng.beta(2, 1, 250)
            answers = rng.random((250, 4)) < difficulty[:, None]
            truth, strata = 2 / 3, one_stratum(answers.reshape(-1), np.repeat(np.arange(250), 4))
        else:
            parts = [(0.5, 60), (0.7, 250), (0.8, 120)]
            truth, strata = 2 / 3, [one_stratum(rng.random(n) < p)[0] for p, n in parts]
        found = accuracy.estimate(strata, resamples=1000, seed=trial)
        covered += found.low <= truth <= found.high
    assert 0.93 * 500 <= covered <= 0.97 * 500, covered


def test_a_difference_has_the_sign_test_of_the_binomial():
    ours, theirs = np.zeros(100), np.zeros(100)
    ours[:30], theirs[30:45] = 1, 1  # 30 questions only we answer rightly, 15 only they
    found = accuracy.difference(one_stratum(ours), one_stratum(theirs), flips=200_000)
    exact = sum(math.comb(45, k) for k in range(46) if abs(2 * k - 45) >= 15) / 2**45
    assert found.value == pytest.approx(0.15) and found.p == pytest.approx(exact, rel=0.03)
    other = accuracy.difference(one_stratum(theirs), one_stratum(ours), flips=200_000)
    assert other.value == -found.value and other.p == found.p


def test_equal_systems_differ_by_nothing_and_p_is_uniform_under_the_null():
    same = one_stratum(np.random.default_rng(0).random(50) < 0.5)
    found = accuracy.difference(same, same)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    rng, small = np.random.default_rng(1), 0
    for seed in range(300):
        a, b = (one_stratum(rng.random(200) < 0.7) for _ in range(2))
        small += accuracy.difference(a, b, resamples=100, seed=seed, flips=500).p <= 0.05
    assert small <= 0.05 * 300 + 3 * math.sqrt(300 * 0.05 * 0.95)


def test_the_same_seed_gives_the_same_interval():
    strata = one_stratum(np.random.default_rng(0).random(100) < 0.6)
    assert accuracy.estimate(strata, seed=3) == accuracy.estimate(strata, seed=3) != accuracy.estimate(strata, seed=4)
