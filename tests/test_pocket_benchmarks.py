"""The bundled benchmarks of the pocket world, and the factory that makes them."""
import csv
import ctypes.util
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

import twist
from checkpoints import files
from corpus.shards import UnitShards, check_recipe
from evaluation import sets

FOLDER = files.POCKET / "benchmarks"
NAMES = {"swuggy": "mini-swuggy", "sblimp": "mini-sblimp", "sstorycloze": "mini-sstorycloze",
         "tstorycloze": "mini-tstorycloze"}
each = pytest.mark.parametrize("task", NAMES)
STORIES = ("sstorycloze", "tstorycloze")


def opened(task):
    """The benchmark, its documents {name: (units, runs)}, and its texts {item: (right, wrong)}."""
    found, = sets.find(task, FOLDER)
    with open(FOLDER / NAMES[task] / "texts.csv", newline="") as file:
        texts = {row["item"]: (row["positive"], row["negative"]) for row in csv.DictReader(file)}
    return found, {name: document for name, *document in UnitShards(found.units)}, texts


def sounds(phonemes):
    return tuple(phoneme.lstrip("',") for phoneme in phonemes.split())


@each
def test_the_bundled_benchmark_opens_and_every_name_is_in_its_shards(task):
    found, documents, texts = opened(task)
    used = [name for pair in found.pairs for name in (pair.positive, pair.negative)]
    assert len(found.pairs) >= 300 and len({pair.item for pair in found.pairs}) >= 300
    assert set(used) == set(documents) and len(used) == len(set(used))
    assert {pair.item for pair in found.pairs} == set(texts)


@each
def test_both_sides_are_of_one_held_out_voice_and_a_question_is_asked_once_in_each(task):
    found, _, _ = opened(task)
    heard = {line.partition("_train")[2] for line in UnitShards(files.find("pocket", "units") / "train").names}
    assert {voice.partition(".")[0] for voice in heard} == {str(i) for i in range(10)}  # the voices that were trained on
    voices = defaultdict(list)
    for pair in found.pairs:
        assert pair.positive == f"{pair.item}_{pair.voice}_positive" and pair.negative == f"{pair.item}_{pair.voice}_negative"
        voices[pair.item].append(pair.voice)
    expected = {("m2",), ("f3",)} if task in STORIES else {("m2", "f3")}
    assert set(map(tuple, voices.values())) == expected
    counts = Counter(voice for spoken in voices.values() for voice in spoken)
    assert max(counts.values()) - min(counts.values()) <= 2


@each
def test_everything_fits_the_window_of_the_bundled_model_and_has_its_recipe(task):
    found, documents, _ = opened(task)
    model, vocab = twist.load_speech_lm()
    recipe = UnitShards(found.units).recipe
    check_recipe(recipe, vocab.recipe, found.units)
    assert {key: recipe[key] for key in vocab.recipe} == vocab.recipe
    for name, (units, runs) in documents.items():
        assert len(vocab.encode(units, bos=True, eos=True)) <= model.config.block_size, name
        assert len(runs) == len(units) and (np.diff(units) != 0).all() and runs.min() >= 1, name


@each
def test_the_sides_differ_and_counting_units_wins_nothing(task):
    found, documents, texts = opened(task)
    assert all(right != wrong for right, wrong in texts.values())
    lengths = np.array([[len(documents[name][0]) for name in (pair.positive, pair.negative)] for pair in found.pairs])
    assert all(not np.array_equal(documents[pair.positive][0], documents[pair.negative][0]) for pair in found.pairs)
    shorter_wins = (np.sign(lengths[:, 1] - lengths[:, 0]) + 1).mean() / 2
    assert abs(shorter_wins - 0.5) < 0.02
    assert abs(np.diff(lengths).mean()) < 0.02 * lengths.mean()


def test_no_non_word_sounds_like_a_word_and_each_has_as_many_phonemes_as_its_word():
    _, _, texts = opened("swuggy")
    words = {sounds(right) for right, _ in texts.values()}
    non_words = [sounds(wrong) for _, wrong in texts.values()]
    assert not words & set(non_words)
    assert all(len(right.split()) == len(wrong.split()) for right, wrong in texts.values())
    changed = [sum(a != b for a, b in zip(right.split(), wrong.split())) for right, wrong in texts.values()]
    assert set(changed) <= {1, 2}


@pytest.mark.slow
def test_no_non_word_is_in_the_vocabulary_of_the_stories_or_a_word_of_english():
    pairs, stories = pytest.importorskip("pocket.pairs"), pytest.importorskip("pocket.stories")
    if not ctypes.util.find_library("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    _, _, texts = opened("swuggy")
    engine, voice = pairs.Espeak(), pairs.HELD_OUT_VOICES[0][0]
    names = " ".join([*stories.NAMES["f"], *stories.NAMES["m"], *stories.PETS.values()]).lower().split()
    spellings = {*stories.words(), *stories.STOP, *names}
    if pairs.ENGLISH.exists():
        spellings |= set(pairs.ENGLISH.read_text(encoding="utf-8").split())
    known = {pairs.unstressed(engine.phonemes(word, voice)) for word in spellings if word.isascii() and word.isalpha()}
    assert set(texts) <= set(stories.words())
    assert all(sounds(right) in known for right, _ in texts.values())  # the check sees the words themselves
    assert not [wrong for _, wrong in texts.values() if sounds(wrong) in known]


def test_the_words_have_frequencies_and_the_sentences_have_their_types():
    found, _, _ = opened("swuggy")
    assert all(pair.labels["frequency"] in sets.BANDS for pair in found.pairs)
    assert len({pair.labels["frequency"] for pair in found.pairs}) >= 3
    found, _, _ = opened("sblimp")
    counts = Counter(pair.labels["type"] for pair in found.pairs)
    assert set(counts) == {"agreement", "pronoun", "word_order"} and max(counts.values()) - min(counts.values()) <= 4


@pytest.mark.parametrize("task", STORIES)
def test_stories_differ_in_their_last_sentence_only_and_say_when_it_begins(task):
    found, documents, texts = opened(task)
    for right, wrong in texts.values():
        assert re.split("(?<=[.!?]) ", right)[:-1] == re.split("(?<=[.!?]) ", wrong)[:-1]
    alike = []
    for pair in found.pairs:
        start, other = pair.starts
        frames = [np.repeat(*documents[name]) for name in (pair.positive, pair.negative)]
        assert start == other and 2 < start < min(map(len, frames)) / 25  # one voice reads the same words in the same way
        before = int(start * 25) - 5
        alike.append((frames[0][:before] == frames[1][:before]).mean())
    assert np.mean(alike) > 0.9  # not all: HuBERT hears the whole recording


def written(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.skipif(not ctypes.util.find_library("espeak-ng") or not Path("/usr/share/dict/words").exists(),
                    reason="espeak-ng or the word list is not installed")
def test_the_factory_makes_the_same_bytes_again(tmp_path):
    started = [subprocess.Popen([sys.executable, "-m", "pocket.pairs", f"--out={tmp_path / name}", "--count=2", "--spoken=5"],
                                cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL) for name in "ab"]
    assert [process.wait(timeout=600) for process in started] == [0, 0]
    first, again = written(tmp_path / "a"), written(tmp_path / "b")
    assert first == again and {path.parts[0] for path in first} == set(NAMES.values())
    for task, name in NAMES.items():
        found, = sets.find(task, tmp_path / "a")
        assert len({pair.item for pair in found.pairs}) == 2, name
    with open(tmp_path / "a/mini-swuggy/texts.csv") as file, open(FOLDER / "mini-swuggy/texts.csv") as bundled:
        assert {row["item"] for row in csv.DictReader(file)} <= {row["item"] for row in csv.DictReader(bundled)}
