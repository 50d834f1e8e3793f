"""Opinions of listeners: agreement, intervals and tests against brute force, and what files of raters may have wrong."""
import json
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluation_command
from evaluation import opinion, study

SYSTEMS = ["twist", "cold", "original"]
OPTIONS = dict(kind="opinion", raters=5, per_rater=6, practice=1, catch=2, seed=0)


def made(**changes):
    """A study as pages/rating.py writes it, without sounds: the code of a clip is what it is."""
    options = SimpleNamespace(**OPTIONS | changes)
    raters, _ = study.plan(options, SYSTEMS, [f"p{i}" for i in range(8)])
    clips = {f"{system}-{each['prompt']}-{noise}": {"system": system, "prompt": each["prompt"], "noise": noise}
             for items in raters.values() for each in items for system, noise in each["heard"]}
    items = {rater: [{"role": each["role"], "clips": [f"{system}-{each['prompt']}-{noise}" for system, noise in each["heard"]],
                      **{key: each[key] for key in ("accept", "ask") if key in each}} for each in items]
             for rater, items in raters.items()}
    return {"study": "abc", "kind": options.kind, "systems": SYSTEMS, "clips": clips, "misses": 1, "raters": items}


def answered(it, rater, answer=lambda item: 3, catch=lambda item: item["accept"][0], upto=None):
    """What the page of a rater saves, with the answers that the functions give to rated and to catch clips."""
    items = it["raters"][rater][:upto]
    answers = [{"position": i, "clips": item["clips"], "answer": (catch if item["role"] == "catch" else answer)(item),
                "plays": [1], "seconds": 1.0, "changes": 0, "time": "2026"} for i, item in enumerate(items)]
    return signed({"study": it["study"], "rater": rater, "complete": upto is None, "answers": answers})


def signed(file):
    told = "".join(f" {each['position']}:{'+'.join(each['clips'])}={each['answer']}" for each in file["answers"])
    return file | {"check": f"{zlib.crc32((file['study'] + ' ' + file['rater'] + told).encode()):08x}"}


def put(folder, it, files):
    (folder / "study.json").write_text(json.dumps(it))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


# ---------------------------------------------------------------------------------------------- the maths

def test_alpha_is_krippendorffs_formula():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.integers(1, 6, (9, 4)).astype(float)
        values[rng.random(values.shape) < 0.4] = np.nan
        units = [row for row in (row[~np.isnan(row)] for row in values) if len(row) > 1]
        every = np.concatenate(units)
        observed = sum((a - b) ** 2 / (len(unit) - 1) for unit in units for a in unit for b in unit) / len(every)
        expected = sum((a - b) ** 2 for a in every for b in every) / (len(every) * (len(every) - 1))
        assert abs(opinion.alpha(values) - (1 - observed / expected)) < 1e-12
    assert opinion.alpha(np.array([[1.0, 1, np.nan], [4, 4, 4]])) == 1.0
    assert opinion.alpha(np.ones((3, 3))) is None and opinion.alpha(np.array([[1.0, np.nan], [np.nan, 2]])) is None


def test_a_weight_is_as_good_as_a_copy():
    """The value and variance of a resample are those of the table in which raters and prompts are repeated."""
    rng = np.random.default_rng(1)
    Y = rng.integers(1, 6, (2, 4, 6)).astype(float)
    Y[rng.random(Y.shape) < 0.3] = np.nan
    raters, prompts = np.array([[2.0, 0, 1, 1]]), np.array([[1.0, 3, 0, 1, 1, 0]])
    copied = Y.repeat(raters[0].astype(int), 1).repeat(prompts[0].astype(int), 2)
    noise = opinion.own_noise(Y)
    own = noise.repeat(raters[0].astype(int), 1).repeat(prompts[0].astype(int), 2)
    ours, theirs = (opinion.weighted(*given) for given in ((Y, noise, (1, -1), raters, prompts),
                                                           (copied, own, (1, -1), np.ones((1, 4)), np.ones((1, 6)))))
    assert np.allclose(ours, theirs) and np.allclose(ours[0], np.nanmean(copied[0]) - np.nanmean(copied[1]))
    apart = sum(sign * np.nan_to_num((y - np.nanmean(y)) / (~np.isnan(y)).sum()) for y, sign in zip(copied, (1, -1)))
    parts = [(apart.sum(axis) ** 2).sum() for axis in (1, 0)]
    floor = sum(np.nansum(each**2) / (~np.isnan(each)).sum() ** 2 for each in own) / 2
    assert np.allclose(ours[1], max(sum(parts) - (apart**2).sum(), floor))


def test_own_noise_is_what_systems_raters_and_prompts_leave():
    rng = np.random.default_rng(4)
    Y = rng.normal(0, 2, (4, 1, 1)) + rng.normal(0, 2, (1, 30, 1)) + rng.normal(0, 2, (1, 1, 40))
    Y = np.where(rng.random(Y.shape) < 0.3, Y, np.nan)
    assert np.nanmax(abs(opinion.own_noise(Y))) < 1e-9 and np.array_equal(np.isnan(opinion.own_noise(Y)), np.isnan(Y))
    noise = rng.normal(0, 1, (60, *Y.shape))
    squares = [np.nanmean(opinion.own_noise((Y + each)[:, :8, :10]) ** 2) for each in noise]
    assert abs(np.mean(squares) - 1) < 0.05


def test_what_all_raters_share_and_what_a_rater_adds_to_all_cancels_in_a_difference():
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 3, (10, 1)) + rng.normal(0, 3, (1, 12))
    Y = np.stack([shared + 0.5, shared]) + rng.normal(0, 0.01, (2, 10, 12))
    noise = opinion.own_noise(Y)
    found = opinion.estimate(Y, noise, (1, -1), resamples=300)
    assert found.low < 0.5 < found.high and found.high - found.low < 0.02 and found.n == 240
    alone = opinion.estimate(Y[:1], noise[:1], resamples=300)
    assert alone.high - alone.low > 2
    assert opinion.flipped(Y) < 0.01 < opinion.flipped(np.stack([shared, shared])) == 1.0


def test_there_is_no_interval_without_three_raters_and_prompts_and_no_mean_of_nothing():
    rng = np.random.default_rng(3)

    def found(Y, **more):
        return opinion.estimate(Y, opinion.own_noise(Y), **more)

    assert found(rng.random((1, 2, 9))).low is None and found(rng.random((1, 9, 2))).low is None
    assert found(rng.random((1, 3, 3))).low is not None
    nothing = np.full((1, 4, 4), np.nan)
    assert opinion.estimate(nothing, nothing).value is None
    same = found(np.full((1, 4, 4), 2.0))
    assert (same.value, round(same.low, 9), round(same.high, 9)) == (2, 2, 2)
    assert found(rng.choice([1.0, 5.0], (1, 3, 4)), limits=(1, 5)).high <= 5


def test_the_sign_test_counts_throws_of_a_coin():
    assert opinion.sign_test(5, 0) == opinion.sign_test(0, 5) == 2 / 32
    assert opinion.sign_test(3, 3) == opinion.sign_test(0, 0) == 1.0
    assert opinion.sign_test(8, 2) == 2 * sum(math.comb(10, k) for k in range(3)) / 1024


# ---------------------------------------------------------------------------------------------- what came back

def test_files_that_are_not_as_they_should_be_get_a_sentence_each_and_the_others_count(tmp_path):
    it, good = made(), answered(made(), "rater_01")
    wrong = answered(it, "rater_02", lambda item: 7 if item["role"] == "rated" else 3)
    moved = answered(it, "rater_03")
    moved["answers"][1]["clips"] = ["another"]
    changed = answered(it, "rater_04")
    changed["answers"][2]["answer"] = 5 if changed["answers"][2]["answer"] != 5 else 4
    files = {"rater_01": good, "wrong": wrong, "moved": signed(moved), "changed": changed, "cut": json.dumps(good)[:200],
             "other": good | {"study": "xyz"}, "unknown": good | {"rater": "rater_99"}, "list": "[1, 2]", "empty": "",
             "holes": signed(answered(it, "rater_05", upto=2)) | {"answers": [{"answer": 3}]}, "deep": "[" * 100_000}
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    found, notes = study.read_answers(put(tmp_path, it, files), it)
    assert [*found] == ["rater_03", "rater_01", "rater_02"]   # by name of the file
    assert len(notes) == 11 + 2  # two are incomplete, then
    said = {name: [note for note in notes if f"/{name}.json" in note] for name in files}
    assert all(len(sentences) == (name != "rater_01") for name, sentences in said.items()), notes
    for name, words in (("cut", "cut short"), ("empty", "no JSON"), ("other", "another study: xyz, not abc"), ("deep", "no JSON"),
                        ("unknown", "does not know"), ("changed", "check does not fit"), ("list", "no file that a rating page"),
                        ("wrong", "6 answers are left out, which are none of 1"), ("moved", "1 answers"), ("holes", "without")):
        assert words in said[name][0]
    assert len(found["rater_01"]) == 9 and len(found["rater_02"]) == 3 and len(found["rater_03"]) == 8
    assert "rater_02 answered 3 of 9" in notes[-1] and "rater_03 answered 8 of 9" in notes[-2]


@pytest.mark.parametrize("second, kept, words", [
    (dict(), "a", "says the same"), (dict(answer=lambda item: 4), "a", "something else"), (dict(upto=4), "a", "something else")])
def test_who_sends_two_files_is_counted_once_by_the_fuller_one(tmp_path, second, kept, words):
    it = made()
    first, other = answered(it, "rater_01"), answered(it, "rater_01", **second)
    for names in (("a", "b"), ("b", "a")) if "upto" in second else (("a", "b"),):
        found, notes = study.read_answers(put(tmp_path, it, dict(zip(names, (first, other)))), it)
        assert len(found["rater_01"]) == 9 and found["rater_01"][3]["answer"] == first["answers"][3]["answer"]
        assert len(notes) == 1 and words in notes[0] and f"{names[0]}.json counts" in notes[0]


def test_who_misses_more_catch_clips_than_allowed_is_left_out_and_it_is_said_why():
    it = made(catch=3)
    asked = [item for item in it["raters"]["rater_01"] if "ask" in item]
    assert len(asked) == 2 and len({item["ask"] for item in asked}) == 2
    for deaf, left in ((lambda item: 4, True), (lambda item: 1, True), (lambda item: item.get("ask", 5), False)):
        answers = {each["position"]: each for each in answered(it, "rater_01", catch=deaf)["answers"]}
        kept, notes = study.trusted(it, {"rater_01": answers})
        assert (not kept, len(notes)) == (left, int(left))
        assert not left or "rater_01 is left out: 2 of 3 catch clips" in notes[0] and "not " in notes[0]


def test_a_preference_is_the_same_whichever_side_it_was_heard_on():
    it = made(kind="preference")
    better = ["original", "twist", "cold"]  # in this order for everybody

    def side(item):
        first, second = (better.index(it["clips"][code]["system"]) for code in item["clips"])
        return "A" if first < second else "B"

    found = {rater: {each["position"]: each for each in answered(it, rater, side)["answers"]} for rater in it["raters"]}
    names, Y = study.tabulate(it, found)
    assert names == [("twist", "cold"), ("twist", "original"), ("cold", "original")]
    assert [np.nanmean(y) for y in Y] == [1, 0, 0] and np.count_nonzero(~np.isnan(Y)) == 5 * 6
    rows, notes = opinion.preferences(names, Y, (200, 0))
    assert [row["value"] for row in rows] == [1, 0, 0] and "twist over cold: won 10, lost 0, neither 0" in notes[0]


def test_the_table_has_each_rating_where_it_belongs_and_no_practice_and_catch_clips():
    it = made(catch=2, practice=2)
    value = {code: 1 + i % 5 for i, code in enumerate(it["clips"])}
    found = {rater: {each["position"]: each for each in answered(it, rater, lambda item: value[item["clips"][0]])["answers"]}
             for rater in it["raters"]}
    names, Y = study.tabulate(it, found)
    prompts = sorted({clip["prompt"] for clip in it["clips"].values()})
    expected = np.full_like(Y, np.nan)
    for r, items in enumerate(it["raters"].values()):
        for item in items:
            if item["role"] == "rated":
                clip = it["clips"][item["clips"][0]]
                expected[names.index(clip["system"]), r, prompts.index(clip["prompt"])] = value[item["clips"][0]]
    assert names == SYSTEMS and np.array_equal(Y, expected, equal_nan=True)


# ---------------------------------------------------------------------------------------------- the command

def mmos(folder, *arguments):
    evaluation_command.main(["--task=mmos", f"--data={folder}", f"--out={folder}/out", "--resamples=200", *arguments])
    return json.loads((folder / "out/result.json").read_text())


def test_the_command_reads_a_study_without_a_model_and_prints_the_published_numbers_on_demand(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation_command, "Evaluation", None)  # it is what loads a model
    it = made()
    mean = {"twist": 4, "cold": 2, "original": 5}
    put(tmp_path, it, {rater: answered(it, rater, lambda item: mean[it["clips"][item["clips"][0]]["system"]])
                       for rater in it["raters"]})
    result = mmos(tmp_path, "--published")
    by = {(row["subset"], row["system"]): row for section in result["sections"] for row in section["rows"]}
    assert [by["all prompts", system]["value"] for system in SYSTEMS] == [4, 2, 5]
    assert by["twist - cold", "difference"]["value"] == 2 and by["twist - cold", "difference"]["n"] == 20
    assert by["all clips", "raters"]["value"] == 1.0  # all agree
    text = capsys.readouterr().out
    assert "are this project's" in text and "MMOS, 1 to 5 (all: ? not verified)" in text and "5 of 5 raters" in text


def test_what_is_no_study_or_has_no_rater_who_counts_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no study.json"):
        mmos(tmp_path)
    with pytest.raises(FileNotFoundError, match="--data=None: no study.json"):
        evaluation_command.main(["--task=mmos"])
    for content, words in (("{", "no JSON"), ("{}", "no study"), (json.dumps(made() | {"kind": "smell"}), "no study")):
        (tmp_path / "study.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            mmos(tmp_path)
    it = made()
    put(tmp_path, it, {"rater_01": answered(it, "rater_01", catch=lambda item: 4 if item["accept"] != [4] else 3), "cut": "{"})
    with pytest.raises(ValueError, match="no rater's file counts.*rater_01 is left out.*cut short"):
        mmos(tmp_path)


# ---------------------------------------------------------------------------------------------- raters of known bias and noise

MEANS = (2.4, 3.1, 3.4, 4.2)
# standard deviations of a rater's strictness, a prompt's ease, what a rater and a prompt have for one system, and the rest
WORLDS = [(0.4, 0.3, 0.2, 0.3, 0.7), (0.8, 0.3, 0.1, 0.2, 0.6), (0.05, 0.05, 0.0, 0.0, 1.0)]


def rated(values):
    return np.clip(np.round(values), 1, 5)


def simulated(rng, spreads, raters, per_rater):
    """Y (4, R, I) of one study whose raters hear what the Latin square gives them."""
    rater, prompt, taste, fit, rest = spreads
    a, b = rng.normal(0, rater, raters), rng.normal(0, prompt, per_rater)
    tastes, fits = rng.normal(0, taste, (4, raters)), rng.normal(0, fit, (4, per_rater))
    Y = np.full((4, raters, per_rater), np.nan)
    for r, cells in enumerate(study.latin(raters, per_rater, per_rater, 4)):
        for i, s in cells:
            Y[s, r, i] = rated(MEANS[s] + a[r] + b[i] + tastes[s, r] + fits[s, i] + rng.normal(0, rest))
    return Y


@pytest.mark.slow
@pytest.mark.parametrize("spreads, raters, per_rater", [*((spreads, 5, 20) for spreads in WORLDS), (WORLDS[1], 10, 40),
                                                        (WORLDS[2], 20, 60)])
def test_intervals_cover_what_countless_raters_would_say_of_countless_prompts(spreads, raters, per_rater):
    """200 studies of four systems; of five raters, differences may err to the safe side by one point more."""
    rng = np.random.default_rng(1)
    draws = rng.normal(0, math.hypot(*spreads), 2_000_000)
    truth, studies = np.array([rated(mean + draws).mean() for mean in MEANS]), 200
    covered = {1: [], 2: []}  # by the number of systems that an interval is of
    for k in range(studies):
        Y = simulated(rng, spreads, raters, per_rater)
        noise = opinion.own_noise(Y)
        for planes, signs in [([i], (1,)) for i in range(4)] + [([i + 1, i], (1, -1)) for i in range(3)]:
            found = opinion.estimate(Y[planes], noise[planes], signs, resamples=300, seed=k)
            covered[len(planes)].append(found.low <= truth[planes] @ signs <= found.high)
    means, differences = map(np.mean, covered.values())
    assert 0.92 <= means <= 0.98 and 0.92 <= differences <= (0.98 if raters > 5 else 0.99), (means, differences)
