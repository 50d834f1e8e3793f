"""Rating pages: who hears what, and that a page tells nobody which system it was."""
import itertools
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from evaluation import study
from pages import rating
from speech.audio import SAMPLE_RATE, read_wav

ENDINGS = {"twist": "_0", "cold": "_0", "original": "", "resynthesis": "_resynth"}


def record(folder, names, comment="made by twist"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        rng = np.random.default_rng([ord(letter) for letter in f"{folder.name}{name}"])
        with soundfile.SoundFile(folder / f"{name}.wav", "w", SAMPLE_RATE, 1) as file:
            file.comment = comment
            file.write(0.1 * rng.standard_normal(1600))
    return folder


@pytest.fixture
def folders(tmp_path):
    return {system: record(tmp_path / system, [f"p{i}{ending}" for i in range(8)]) for system, ending in ENDINGS.items()}


def rate(folders, out, *arguments):
    systems = ",".join(f"{system}={folder}" for system, folder in folders.items())
    rating.main([f"--systems={systems}", f"--out={out}", "--raters=4", "--per-rater=5", *arguments])
    return json.loads((out / "study.json").read_text())


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL).group(1))


# ---------------------------------------------------------------------------------------------- who hears what

@pytest.mark.parametrize("treatments", [2, 3, 4, 6, 12])
def test_the_latin_square_is_balanced_at_every_size(treatments):
    for prompts, raters in itertools.product((2, 3, 4, 5, 6, 8, 9, 12), (1, 2, 3, 5, 8)):
        for per_rater in {1, 2, 3, 5, prompts - 1, prompts, prompts + 1, 2 * prompts, treatments * prompts} - {0}:
            if per_rater > treatments * prompts:
                continue
            count = np.zeros((raters, prompts, treatments), int)
            lists = study.latin(raters, per_rater, prompts, treatments)
            for rater, cells in enumerate(lists):
                for cell in cells:
                    count[rater][cell] += 1
            size = raters, per_rater, prompts, treatments
            assert count.sum((1, 2)).tolist() == [per_rater] * raters and count.max() <= 1, size
            assert count.sum(2).max() <= -(-per_rater // prompts), size  # a prompt twice only if there are too few
            assert np.ptp(count.sum(0)) <= 1, size  # each pair of both equally often
            assert np.ptp(count.sum(1), axis=1).max() <= (1 if per_rater <= prompts else 2), size


def test_no_prompt_comes_twice_in_a_row_and_systems_alternate():
    for prompts, treatments, per_rater in ((2, 4, 8), (2, 3, 5), (3, 2, 6), (12, 4, 12), (5, 6, 17)):
        for seed, cells in enumerate(study.latin(6, per_rater, prompts, treatments)):
            order = study.spread(cells, random.Random(seed))
            assert sorted(order) == sorted(cells)
            assert all(a[0] != b[0] for a, b in itertools.pairwise(order)), (prompts, treatments, order)
            if per_rater <= prompts:
                rounds = [{way for _, way in order[i:i + treatments]} for i in range(0, per_rater, treatments)]
                assert all(len(found) == treatments for found in rounds)
    cells = study.latin(1, 12, 12, 4)[0]
    assert study.spread(cells, random.Random(0)) != study.spread(cells, random.Random(1))


@pytest.mark.parametrize("kind", ["opinion", "preference"])
@pytest.mark.parametrize("prompts", [6, 20])
def test_a_rater_practises_rates_and_is_caught_as_often_as_asked(kind, prompts):
    options = SimpleNamespace(kind=kind, raters=7, per_rater=6, practice=2, catch=4, seed=3)
    raters, apart = study.plan(options, ["a", "b", "c"], [f"p{i}" for i in range(prompts)])
    assert [*raters] == [f"rater_{i:02d}" for i in range(1, 8)] and apart == (prompts == 20)
    sides = Counter()
    for items in raters.values():
        assert Counter(item["role"] for item in items) == {"practice": 2, "rated": 6, "catch": 4}
        assert [item["role"] for item in items[:3]] == ["practice", "practice", "rated"]
        assert all(a["prompt"] != b["prompt"] for a, b in itertools.pairwise(items) if "practice" not in (a["role"], b["role"])
                   and not (a["role"] == b["role"] == "catch"))
        rated = {item["prompt"] for item in items if item["role"] == "rated"}
        assert len(rated) == 6 and (not apart or not rated & {item["prompt"] for item in items if item["role"] != "rated"})
        for item in items:
            systems, noise = zip(*item["heard"])
            assert len(systems) == (1 if kind == "opinion" else 2) and (item["role"] == "catch") == ("accept" in item)
            if any(noise):
                right = [1, 2] if kind == "opinion" else ["AB"[noise.index(False)]]
                assert item["accept"] == right and len({*systems}) == 1 and "ask" not in item
            elif item["role"] == "catch":
                assert item["accept"] == [item["ask"]] and item["ask"] in ((3, 4, 5) if kind == "opinion" else ("A", "B"))
            if item["role"] == "rated":
                sides[systems] += 1
        asked = [item["ask"] for item in items if "ask" in item]
        assert len(asked) == 2 and asked[0] != asked[1]
    assert max(sides.values()) - min(sides.values()) <= 1 and len(sides) == (3 if kind == "opinion" else 6)


def test_more_clips_than_there_are_is_a_sentence():
    options = dict(kind="opinion", raters=2, per_rater=9, practice=0, catch=0, seed=0)
    for changes in ({}, {"per_rater": 2, "catch": 3}):
        with pytest.raises(ValueError, match="give 1 to [68]; at least 2 prompts"):
            study.plan(SimpleNamespace(**options | changes), ["a", "b"], ["p", "q", "r", "s"])
    with pytest.raises(ValueError, match="at least 2 prompts"):
        study.plan(SimpleNamespace(**options | {"per_rater": 1}), ["a", "b"], ["p"])


# ---------------------------------------------------------------------------------------------- which recordings

@pytest.mark.parametrize("names, prompts, left", [
    (["a_0 b_0", "a b", "a_resynth b_resynth"], "a_0 b_0", {}),
    (["a_0 a_1 b_0", "a b"], "a_0 b_0", {0: "a_1"}),
    (["a_0 a_1", "a_0 a_1"], "a_0 a_1", {}),
    (["story_12_0 story_7_0", "story_12 story_3"], "story_12_0", {0: "story_7_0", 1: "story_3"}),
    (["story_12 story_7", "story_12 story_3"], "story_12", {0: "story_7", 1: "story_3"}),
    (["a_0 a_0-2", "a_original"], "a_0", {0: "a_0-2"}),
    (["1089-134686-0000_0 1089-134686-0001_0", "1089-134686-0000 1089-134686-0001"], "1089-134686-0000_0 1089-134686-0001_0", {}),
    (["a_0_continuation b_0", "a b"], "a_0 b_0", {}),
    (["a", "b"], "", {0: "a", 1: "b"})])
def test_recordings_of_one_prompt_are_matched_by_their_names(names, prompts, left, tmp_path):
    folders = {f"s{i}": record(tmp_path / f"s{i}", stems.split()) for i, stems in enumerate(names)}
    found, notes = rating.match(folders)
    assert " ".join(found) == prompts and len(notes) == len(left)
    for i, stem in left.items():
        assert any(note.startswith(f"s{i}: 1 of ") and note.endswith(f": {stem}.wav") for note in notes), notes
    for paths in found.values():
        assert [path.parent.name for path in paths.values()] == [*folders]


@pytest.mark.parametrize("systems", ["a", "a={0}", "a={0},a={1}", "a={0},b={0}", "a={0},b=nowhere", "={0},b={1}", ""])
def test_what_names_no_systems_is_a_sentence(systems, tmp_path):
    given = systems.format(record(tmp_path / "x", ["p"]), record(tmp_path / "y", ["p"]))
    with pytest.raises(ValueError, match="--systems.*NAME=FOLDER"):
        rating.folders_of(tuple(given.split(",")))


# ---------------------------------------------------------------------------------------------- pages and sounds

@pytest.mark.parametrize("inline", [False, True])
def test_a_page_and_its_sounds_say_nothing_of_the_systems(inline, folders, tmp_path, capsys):
    out = tmp_path / "ratings"
    it = rate(folders, out, f"--inline={inline}")
    assert not inline or not (out / "sounds").exists()
    pages, sounds = sorted(out.glob("*.html")), sorted((out / "sounds").glob("*"))
    assert len(pages) == 4 and {path.stem for path in sounds} == (set() if inline else {*it["clips"]})
    for page in pages:
        text, data = page.read_text(), data_of(page)
        text = re.sub(r"base64,[\w+/=]+", "", text)
        assert not [word for word in (*ENDINGS, *map(str, folders.values()), "p0", "p1") if re.search(rf"\b{word}", text)]
        assert set().union(*data["items"]) == {"clips", "practice", "ask", "sounds"} and len(data["items"]) == 2 + 5 + 3
        assert [item["clips"] for item in data["items"]] == [item["clips"] for item in it["raters"][data["rater"]]]
        for item in data["items"]:
            assert all(each.startswith("data:audio/flac;base64,") if inline else (out / each).exists() for each in item["sounds"])
    for path in sounds:
        assert re.fullmatch("[0-9a-f]{8}", path.stem) and soundfile.SoundFile(path).comment == ""
    assert "never study.json" in capsys.readouterr().out


def test_the_same_seed_makes_the_same_study_another_one_another_and_none_is_replaced(folders, tmp_path):
    first = rate(folders, tmp_path / "a")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").rglob("*.*") if path.name != "study.json"}
    again = rate(folders, tmp_path / "b")
    assert first | {"options": 0} == again | {"options": 0} and len(files) > 10
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").rglob("*.*") if path.name != "study.json"}
    assert rate(folders, tmp_path / "a") == first
    with pytest.raises(ValueError, match="is another study"):
        rate(folders, tmp_path / "a", "--seed=1")
    other = rate(folders, tmp_path / "c", "--seed=1")
    assert other["study"] != first["study"] and not set(other["clips"]) & set(first["clips"])
    for path in folders["cold"].iterdir():
        soundfile.write(path, read_wav(path).numpy()[::-1], SAMPLE_RATE)
    assert rate(folders, tmp_path / "d")["study"] != first["study"]  # another recording is another study


def test_all_clips_have_one_level_and_noise_has_their_spectrum(folders):
    path = folders["twist"] / "p0_0.wav"
    wav, plain, noise = read_wav(path), rating.sound_of(path, False, -26.0, 0), rating.sound_of(path, True, -26.0, 0)
    for sound in (plain, noise):
        assert abs(10 * float(sound.square().mean().log10()) + 26) < 0.01 and len(sound) == len(wav)
    torch.testing.assert_close(plain / plain.norm(), wav / wav.norm())
    torch.testing.assert_close(torch.fft.rfft(noise).abs()[1:-1], torch.fft.rfft(plain).abs()[1:-1], atol=1e-3, rtol=1e-3)
    assert abs(float(plain @ noise) / float(plain @ plain)) < 0.2 and torch.equal(noise, rating.sound_of(path, True, -26.0, 0))
    assert torch.equal(rating.sound_of(path, False, None, 0), wav)
    assert float(rating.sound_of(path, False, 0.0, 0).abs().max()) <= rating.LOUDEST + 1e-6


def test_names_that_are_html_harm_nothing(tmp_path):
    folders = {'say "hi" & <b>': record(tmp_path / "one", ["<script>", "b<b>", "c"]),
               "x": record(tmp_path / "two", ["<script>", "b<b>", "c"])}
    it = rate(folders, tmp_path / "out", "--per-rater=2", "--catch=1", "--practice=1")
    assert it["systems"] == [*folders] and set(it["prompts"]) == {"<script>", "b<b>", "c"}
    for page in (tmp_path / "out").glob("*.html"):
        text = page.read_text()
        assert text.count("<script") == text.count("</script>") == 2 and "hi" not in re.findall(r'"hi"', text)
    assert not [path.name for path in (tmp_path / "out").rglob("*") if "<" in path.name]


def test_what_the_page_offers_is_what_the_reader_of_its_file_knows():
    for kind, values in study.VALUES.items():
        assert {*rating.ANSWERS[kind]} == {*values}
        shown = re.findall(r'type="radio" name="answer" value="(\w+)"', rating.body_of(kind, True, "2 pieces"))
        assert shown == [*map(str, rating.ANSWERS[kind])]
    assert "neither" not in rating.body_of("preference", False, "2 pairs")
