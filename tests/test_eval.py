"""Evaluation end to end: official layouts made here, scored by a small reference written by hand; conventions, bad input."""
import csv
import itertools
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import eval as evaluation_command
import hubert_units as hubert_units
import twist
from conftest import RECIPE, TINY
from corpus.shards import write_shards
from evaluation import generation, likelihood, sets, transcripts
from speech.encoder import BUDGET_SECONDS, deduplicate
from training import distributed

VOCAB = twist.UnitVocab(20, recipe=RECIPE)
ALONE = distributed.Dist(0, 1, torch.device("cpu"))
VOICES = ("A", "B", "C", "D")
LEXICAL = ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct")
SYNTACTIC = ("filename", "id", "voice", "type", "subtype", "transcription", "correct")


# ---------------------------------------------------------------------------------------------- small worlds

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random speech LMs of 20 units with a window of 128."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        twist.save_speech_lm(twist.cold_start(TINY, VOCAB, seed), VOCAB, folder / str(seed))
    return folder


@pytest.fixture
def stub_encoder(monkeypatch):
    """Recordings are counted, not heard: the units of a wav are drawn by a generator seeded with its first sample."""
    class Stub(torch.nn.Module):
        recipe, budget, num_units = {key: value for key, value in RECIPE.items() if key != "dedup"}, 600, 20
        encoded = []

        def to(self, device):
            return self

        def checked(self, wav):
            return wav

        def begin(self, wavs):
            return lambda: self.encoded.extend(wavs) or [units_of(int(round(float(wav[0]) * 32768))) for wav in wavs]

    stub = Stub()
    monkeypatch.setattr(hubert_units, "load_unit_encoder", lambda *arguments, **options: stub)
    return stub


def units_of(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 20, (int(torch.randint(4, 15, (), generator=generator)),), generator=generator)


def write_wav(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(400, number / 32768), 16_000, subtype="PCM_16")


def write_table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def stems(seed):
    rng, letters = random.Random(seed), "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    while True:
        yield "".join(rng.choice(letters) for _ in range(11))


def write_slm21(root, split="dev", questions=24, shuffle=True):
    """lexical/ and syntactic/ as sLM21 unzips; returns the rows of both tables. Some pairs are ties: the same recording twice."""
    rng, names, numbers = random.Random(5), stems(6), itertools.count(1)
    tables = {"lexical": [], "syntactic": []}
    for i in range(questions):
        for voice in VOICES:
            number = next(numbers)
            for correct in (1, 0):
                frequency = "" if correct == 0 else (0, 1, 5, 6, 20, 21, 100, 101)[i % 8]
                word = f"word{i}" if correct else ""
                tables["lexical"].append((next(names), i, voice, frequency, word, "p h", 2, correct))
                write_wav(root / f"lexical/{split}/{tables['lexical'][-1][0]}.wav", number if i == 3 else next(numbers))
    for i in range(questions):
        kind = ("agreement", "binding", "binding_long")[i % 5 % 3]  # types of unequal size
        for voice in VOICES[:2]:
            for correct in (1, 0):
                tables["syntactic"].append((next(names), i // 3, voice, kind, f"sub{i}", f"the sentence, {correct}", correct))
                write_wav(root / f"syntactic/{split}/{tables['syntactic'][-1][0]}.wav", next(numbers))
    for kind, header in (("lexical", LEXICAL), ("syntactic", SYNTACTIC)):
        rows = tables[kind][:]
        if shuffle:
            rng.shuffle(rows)
        write_table(root / f"{kind}/{split}/gold.csv", header, rows)
        tables[kind] = [dict(zip(header, row)) for row in rows]
    return tables


def evaluate(tmp_path, *arguments, out="out"):
    """Run the command; returns {(benchmark, subset, system, measure): value} and the parsed result.json."""
    evaluation_command.main([f"--out={tmp_path}/{out}", f"--cache={tmp_path}/cache", f"--train-data={tmp_path}/train",
                             "--device=cpu", "--resamples=200", *arguments])
    result = json.loads((tmp_path / out / "result.json").read_text())
    rows = [row for section in result["sections"] for row in section["rows"]]
    return {(row["benchmark"], row["subset"], row["system"], row["measure"]): row["value"] for row in rows}, result


@pytest.fixture
def world(tmp_path, stub_encoder, models):
    write_train(tmp_path)
    return tmp_path


def write_train(folder):
    rng = np.random.default_rng(0)
    documents = [(f"{i}.wav", units := rng.integers(0, 20, 40), np.ones_like(units), 2.0) for i in range(6)]
    write_shards(folder / "train", RECIPE, documents)


# ---------------------------------------------------------------------------------------------- the reference, by hand

def reference_score(model, number):
    """Mean nats per unit after <S>, one sequence at a time, in float64 from the logits on."""
    units, _ = deduplicate(units_of(number))
    ids = torch.tensor([1, *(int(unit) + 2 for unit in units)])
    with torch.no_grad():
        p = model(ids[None, :-1])[0].double().log_softmax(-1)
    return float(p[torch.arange(len(units)), ids[1:]].mean())


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def win(a, b):
    return 1.0 if a > b else 0.5 if a == b else 0.0


def submitted(path):
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in Path(path).read_text().splitlines()}


def reference_swuggy(rows, scores):
    """{question: (mean over voices, frequency)} in plain loops."""
    found = {}
    for question in {row["id"] for row in rows}:
        results, frequency = [], None
        for voice in VOICES:
            right = [row for row in rows if (row["id"], row["voice"], row["correct"]) == (question, voice, 1)][0]
            wrong = [row for row in rows if (row["id"], row["voice"], row["correct"]) == (question, voice, 0)][0]
            results.append(win(scores[right["filename"]], scores[wrong["filename"]]))
            frequency = right["frequency"]
        found[question] = mean(results), frequency
    return found


def test_swuggy_in_the_official_layout_equals_a_reference_written_by_hand(world, models):
    rows = write_slm21(world / "slm21")["lexical"]
    values, result = evaluate(world, "--task=swuggy", f"--data={world}/slm21", f"--model={models}/0")
    scores = submitted(world / "out/submission/lexical/dev.txt")
    assert set(scores) == {row["filename"] for row in rows}
    found = reference_swuggy(rows, scores)
    name = "swuggy slm21/lexical/dev"

    def value(subset):
        return values[name, subset, "model", "%"]

    assert abs(value("all") - 100 * mean(score for score, _ in found.values())) < 1e-9
    for subset, belongs in (("vocabulary = in vocabulary", lambda f: f > 0), ("vocabulary = out of vocabulary", lambda f: f == 0),
                            ("frequency = 1-4", lambda f: 1 <= f < 5), ("frequency = 5-19", lambda f: 5 <= f < 20),
                            ("frequency = 20-99", lambda f: 20 <= f < 100), ("frequency = >=100", lambda f: f >= 100)):
        assert abs(value(subset) - 100 * mean(score for score, f in found.values() if belongs(f))) < 1e-9, subset
    assert abs(value("all voices right") - 100 * mean(score == 1 for score, _ in found.values())) < 1e-9
    assert result["sections"][0]["ties"]["model"] == 4  # question 3, whose recordings are the same, in four voices
    assert found[3][0] == 0.5


def test_sblimp_in_the_official_layout_equals_a_reference_written_by_hand(world, models):
    rows = write_slm21(world / "slm21")["syntactic"]
    values, _ = evaluate(world, "--task=sblimp", f"--data={world}/slm21/syntactic/dev", f"--model={models}/0")
    scores = submitted(world / "out/submission/syntactic/dev.txt")
    by_question, by_voice = {}, {}
    for right in rows:
        for wrong in rows:
            keys = ("type", "subtype", "id", "voice")
            if right["correct"] == 1 and wrong["correct"] == 0 and all(right[key] == wrong[key] for key in keys):
                score = win(scores[right["filename"]], scores[wrong["filename"]])
                by_question.setdefault((right["type"], right["subtype"], right["id"]), []).append(score)
                by_voice.setdefault(right["voice"], []).append(score)
    by_type = {}
    for (kind, *_), results in by_question.items():
        by_type.setdefault(kind, []).append(mean(results))
    name = next(key[0] for key in values)
    expected = {"all": mean(mean(results) for results in by_question.values()),
                "macro over types": mean(mean(results) for results in by_type.values()),
                "per recording": mean(score for results in by_question.values() for score in results),
                **{f"type = {kind}": mean(results) for kind, results in by_type.items()},
                **{f"voice = {voice}": mean(results) for voice, results in by_voice.items()}}
    assert len(by_type) == 3 and len({len(results) for results in by_type.values()}) > 1
    for subset, score in expected.items():
        assert abs(values[name, subset, "model", "%"] - 100 * score) < 1e-9, subset


def test_the_scores_are_the_mean_log_likelihoods_of_the_units(world, models):
    rows = write_slm21(world / "slm21", questions=4)["lexical"]
    evaluate(world, "--task=swuggy", f"--data={world}/slm21", f"--model={models}/0")
    scores, (model, _) = submitted(world / "out/submission/lexical/dev.txt"), twist.load_speech_lm(models / "0")
    for row in rows:
        wav, _ = soundfile.read(world / f"slm21/lexical/dev/{row['filename']}.wav", dtype="int16")
        assert abs(scores[row["filename"]] - reference_score(model, int(wav[0]))) < 1e-5


def test_pairing_by_row_order_is_compared_with_pairing_by_id(world, models):
    write_slm21(world / "sorted", shuffle=False)
    write_slm21(world / "shuffled", shuffle=True)
    notes = {}
    for name in ("sorted", "shuffled"):
        _, result = evaluate(world, "--task=sblimp", f"--data={world}/{name}", f"--model={models}/0", out=name)
        notes[name] = " ".join(result["sections"][0]["notes"])
    assert "by the official row order agree" in notes["sorted"]
    assert "are others in the official row order" in notes["shuffled"] and "per recording" in notes["shuffled"]


# ---------------------------------------------------------------------------------------------- other layouts

def test_spoken_storycloze_is_read_from_its_zip_and_paired_by_story(world, models, stub_encoder):
    archive = world / "sSC.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(5):
            for side, correct in enumerate(("correct", "incorrect")):
                name = f"{2 * i + side}_story-{'abcde'[i]}_{correct}.wav"
                write_wav(world / "tmp" / name, 10 * i + side + 1)
                file.write(world / "tmp" / name, f"sSC/{name}")
        file.writestr("__MACOSX/sSC/._0_story-a_correct.wav", b"junk")
    values, result = evaluate(world, "--task=sstorycloze", f"--data={archive}", f"--model={models}/0")
    model, _ = twist.load_speech_lm(models / "0")
    expected = mean(win(reference_score(model, 10 * i + 1), reference_score(model, 10 * i + 2)) for i in range(5))
    (section,) = result["sections"]
    assert abs(next(v for key, v in values.items() if key[1:3] == ("all", "model")) - 100 * expected) < 1e-9
    assert "5 pairs of 5 questions" in section["title"]
    assert len(stub_encoder.encoded) == 10 and not any(path.name == "sSC" for path in world.iterdir())  # nothing was unpacked
    evaluate(world, "--task=sstorycloze", f"--data={archive}", f"--model={models}/1")
    assert len(stub_encoder.encoded) == 10  # the second model found the units in the cache


def test_the_real_tokenizer_reads_wavs_out_of_a_zip_as_out_of_a_folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(4):
        path = tmp_path / f"wavs/tSC/{i}_{i // 2}x_{'in' * (i % 2)}correct.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, 3200 + 800 * i), 16_000)
    with zipfile.ZipFile(tmp_path / "tSC.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((tmp_path / "wavs/tSC").iterdir()):
            file.write(path, path.name)
    scores = []
    for source in ("wavs", "tSC.zip"):
        evaluation_command.main(["--task=tstorycloze", f"--data={tmp_path}/{source}", f"--out={tmp_path}/{source}.out",
                                 f"--cache={tmp_path}/cache", "--device=cpu", "--resamples=100"])
        (table,) = (tmp_path / f"{source}.out").glob("*_pairs.csv")
        scores.append([(row["item"], row["model_positive"], row["model_negative"], row["bigram_positive"])
                       for row in read_table(table)])
    assert len(scores[0]) == 2 and sorted(scores[0]) == sorted(scores[1])


@pytest.mark.slow
def test_two_processes_print_and_write_what_one_does(tmp_path):
    rng = np.random.default_rng(0)
    write_table(tmp_path / "a/pairs.csv", ("positive", "negative"), [(f"{i}p.wav", f"{i}n.wav") for i in range(6)])
    for i, side in itertools.product(range(6), "pn"):
        soundfile.write(tmp_path / f"a/{i}{side}.wav", rng.normal(0, 0.1, 2400 + 300 * i), 16_000)
    arguments = ["--task=pairs", f"--data={tmp_path}/a", "--device=cpu", "--resamples=100"]
    evaluation_command.main([*arguments, f"--out={tmp_path}/1", f"--cache={tmp_path}/cache1"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "eval.py"]
    run = subprocess.run([*launcher, *arguments, f"--out={tmp_path}/2", f"--cache={tmp_path}/cache2"],
                         cwd=Path(evaluation_command.__file__).parent, capture_output=True, text=True, timeout=120,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("wrote ") == 1
    one, two = (json.loads((tmp_path / f"{n}/result.json").read_text())["sections"] for n in (1, 2))
    assert one == two
    for side in ("positive", "negative"):
        a, b = ([float(row[f"model_{side}"]) for row in read_table(tmp_path / f"{n}/pairs_a_pairs.csv")] for n in (1, 2))
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_encoding_that_was_interrupted_goes_on(world, models, stub_encoder, monkeypatch):
    write_slm21(world / "slm21", questions=4)
    monkeypatch.setitem(BUDGET_SECONDS, "cpu", 0.1)  # four recordings at a time
    arguments = ["--task=swuggy", f"--data={world}/slm21", f"--model={models}/0"]
    begin = stub_encoder.begin

    def stopped(wavs):
        if len(stub_encoder.encoded) > 12:
            raise KeyboardInterrupt
        return begin(wavs)

    monkeypatch.setattr(stub_encoder, "begin", stopped, raising=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate(world, *arguments)
    done = len(stub_encoder.encoded)
    assert 12 < done < 32
    monkeypatch.setattr(stub_encoder, "begin", begin)
    evaluate(world, *arguments)
    assert len(stub_encoder.encoded) == 32  # those that were finished were not encoded again
    write_wav(next((world / "slm21/lexical/dev").glob("*.wav")), 9999)
    evaluate(world, *arguments)
    assert len(stub_encoder.encoded) == 64  # a recording changed: the units are made anew


def found_in(root, task, **options):
    return sets.find(task, root, **options)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_slamkit_layouts_are_paired_by_their_integers(tmp_path):
    for part, mark, offset in (("swuggy_inter/a", "_", 0), ("swuggy_oov/a", "_", 0), ("sblimp/agreement", "+", 0),
                               ("sblimp/binding", "+", 1)):
        for n in (0, 1, 10, 11, 2, 3):
            touch(tmp_path / part / f"{n + offset}{mark}x.wav")
    inter, oov = found_in(tmp_path, "swuggy")
    assert {Path(pair.positive).name for pair in inter.pairs} == {"0_x.wav", "2_x.wav", "10_x.wav"}
    assert {(Path(pair.positive).name, Path(pair.negative).name) for pair in oov.pairs} == {
        ("0_x.wav", "1_x.wav"), ("2_x.wav", "3_x.wav"), ("10_x.wav", "11_x.wav")}
    (sblimp,) = found_in(tmp_path, "sblimp")
    assert {(pair.labels["type"], Path(pair.positive).name) for pair in sblimp.pairs} == {
        ("agreement", "0+x.wav"), ("agreement", "2+x.wav"), ("agreement", "10+x.wav"),
        ("binding", "1+x.wav"), ("binding", "3+x.wav"), ("binding", "11+x.wav")}  # numbered from 1 there


def test_the_innermost_telling_folder_decides_whose_recordings_they_are(tmp_path):
    write_table(tmp_path / "swuggy/lexical/dev/gold.csv", LEXICAL, [("x", 1, "A", 3, "w", "p", 1, 1),
                                                                    ("y", 1, "A", "", "", "p", 1, 0)])
    touch(tmp_path / "swuggy/lexical/test/0_z.wav")  # without a gold.csv, and of another split
    for n, word in enumerate(("correct", "incorrect")):
        touch(tmp_path / f"swuggy/tSC/{n}_a_{word}.wav")
    assert [(found.task, found.name) for found in found_in(tmp_path / "swuggy", "all")] == [
        ("swuggy", "swuggy/lexical/dev"), ("tstorycloze", "swuggy/tSC")]


def test_multi_speaker_storycloze_has_a_voice_for_each_folder_and_text_is_left_alone(tmp_path):
    for speaker in ("anna", "ben"):
        for i in range(3):
            touch(tmp_path / f"ms_sSC/{speaker}/{2 * i}_s{i}_correct.wav")
            touch(tmp_path / f"ms_sSC/{speaker}/{2 * i + 1}_s{i}_incorrect.wav")
    touch(tmp_path / "cross_ms_tSC/anna/1_correct.wav")
    (found,) = found_in(tmp_path, "all")
    assert (found.task, len(found.pairs), {pair.voice for pair in found.pairs}) == ("sstorycloze", 6, {"anna", "ben"})
    assert {pair.item for pair in found.pairs} == {"s0", "s1", "s2"}
    assert len(found_in(tmp_path, "sstorycloze", voices=("ben",))[0].pairs) == 3
    with pytest.raises(ValueError, match="no voice carl, only anna, ben"):
        found_in(tmp_path, "sstorycloze", voices=("carl",))


def test_storycloze_names_without_a_story_are_paired_by_integers_and_words(tmp_path):
    for n, word in enumerate(("correct", "incorrect", "incorrect", "correct")):
        touch(tmp_path / f"stories/{n}_{word}.wav")
    (found,) = found_in(tmp_path, "sstorycloze")
    assert {(Path(pair.positive).name, Path(pair.negative).name) for pair in found.pairs} == {
        ("0_correct.wav", "1_incorrect.wav"), ("3_correct.wav", "2_incorrect.wav")}


def test_the_eight_parts_of_salmon_are_paired_by_index_and_alphabet(tmp_path):
    for part in sets.SALMON:
        for i in range(12):
            touch(tmp_path / f"salmon_benchmark/{part}/sample_{i}_a.wav")
            touch(tmp_path / f"salmon_benchmark/{part}/sample_{i}_b.wav")
    found = found_in(tmp_path, "salmon")
    assert {Path(benchmark.name).name for benchmark in found} == set(sets.SALMON)
    for benchmark in found:
        assert len(benchmark.pairs) == 12
        assert all(pair.positive.endswith("_a.wav") and pair.negative == pair.positive[:-5] + "b.wav" for pair in benchmark.pairs)


LAYOUTS = {  # task -> the folder to be named, and files in it
    "swuggy": ("swuggy_inter", [f"{i}_a.wav" for i in range(4)]), "sblimp": ("sblimp", [f"b/{i}+a.wav" for i in range(4)]),
    "sstorycloze": ("sSC", ["0_a_correct.wav", "1_a_incorrect.wav"]),
    "tstorycloze": ("tSC", ["0_a_correct.wav", "1_a_incorrect.wav"]),
    "salmon": ("bg_alignment", ["sample_0_a.wav", "sample_0_b.wav"]), "pairs": ("mine", ["a.wav", "b.wav"])}


@pytest.mark.parametrize("task", [*LAYOUTS, "lexical", "syntactic"])
def test_a_set_is_found_however_its_folder_is_named(task, tmp_path, monkeypatch):
    if task in LAYOUTS:
        folder, names = LAYOUTS[task]
        for name in names:
            touch(tmp_path / "sets" / folder / name)
        if task == "pairs":
            write_table(tmp_path / "sets/mine/pairs.csv", ("positive", "negative"), [("a.wav", "b.wav")])
        folders = [tmp_path / "sets" / folder]
    else:
        write_slm21(tmp_path / "sets/sLM21", questions=2)
        folders = [tmp_path / "sets/sLM21", tmp_path / "sets/sLM21" / task, tmp_path / "sets/sLM21" / task / "dev"]
        task = "swuggy" if task == "lexical" else "sblimp"

    def found(data):
        return [(benchmark.name, benchmark.split, [(Path(pair.positive).resolve(), Path(pair.negative).resolve(), pair.item)
                                                   for pair in benchmark.pairs]) for benchmark in sets.find(task, data)]

    for folder in folders:
        expected = found(str(folder))
        (folder / "loop").symlink_to(folder)  # ends, and adds nothing
        (tmp_path / "current").symlink_to(folder)
        monkeypatch.chdir(folder.parent)
        relative = f"../{folder.parent.name}/{folder.name}"
        ways = [found(data) for data in (folder.name, f"{folder.name}/", relative, tmp_path / "current")]
        monkeypatch.chdir(tmp_path / "current")
        assert [*ways, found("."), found("./")] == [expected] * 6
        monkeypatch.chdir(tmp_path)
        (tmp_path / "store").mkdir()
        folder.rename(tmp_path / "store/v2")  # the name that says what it is stands at the link
        folder.symlink_to(tmp_path / "store/v2")
        assert [pairs for *_, pairs in found(folder)] == [[tuple(
            Path(str(part).replace(str(folder), f"{tmp_path}/store/v2")) for part in pair[:2]) + pair[2:] for pair in pairs]
            for *_, pairs in expected]
        folder.unlink()
        (tmp_path / "store/v2").rename(folder)
        for path in (tmp_path / "current", folder / "loop"):
            path.unlink()
        (tmp_path / "store").rmdir()


def write_pairs(folder, count=30, header=("positive", "negative", "voice", "type"), extra=lambda i: (), voices=1, twins=()):
    """pairs.csv and units/ of our own; the positives have even numbers. twins: pairs whose units are equal."""
    documents, rows = [], []
    for i in range(count):
        for voice in range(voices):
            for side in (0, 1):
                number = 1000 * voice + 2 * i + (0 if i in twins else side)
                units, runs = deduplicate(units_of(number))
                documents.append((f"{i}{'pn'[side]}{voice}", units.numpy(), runs.numpy(), 1.0))
            rows.append((f"{i}p{voice}", f"{i}n{voice}", f"v{voice}", f"t{i % 3}", *extra(i)))
    write_shards(folder / "units", RECIPE, documents)
    write_table(folder / "pairs.csv", header, rows)
    return rows


def test_pairs_of_our_own_with_units_labels_and_frequencies(world, models):
    write_pairs(world / "sets/swuggy", header=("positive", "negative", "voice", "type", "frequency", "item"),
                extra=lambda i: (i % 3 * 10, i), voices=2)
    write_pairs(world / "sets/mini-sblimp")
    write_pairs(world / "sets/condition", header=("positive", "negative", "voice", "type", "condition"),
                extra=lambda i: ("xy"[i % 2],))
    values, result = evaluate(world, "--task=all", f"--data={world}/sets", f"--model={models}/0")
    titles = [section["title"].partition(":")[0] for section in result["sections"]]
    assert titles == ["swuggy, sets/swuggy", "sblimp, sets/mini-sblimp", "pairs, sets/condition"]
    subsets = {key[1] for key in values if key[0] == "swuggy sets/swuggy"}
    assert {"frequency = 5-19", "vocabulary = in vocabulary", "voice = v1", "macro over types"} <= subsets
    assert "30 questions, 2 voices" in result["sections"][0]["title"]
    assert ("pairs sets/condition", "condition = y", "bigram", "%") in values


def test_bands_of_frequency_are_closed_on_the_left():
    edges = {"out of vocabulary": (0, 0.9), "1-4": (1, 4.9), "5-19": (5, 19), "20-99": (20, 99), ">=100": (100, 1e6)}
    for band, frequencies in edges.items():
        assert {sets.frequency_labels(str(frequency), "a row")["frequency"] for frequency in frequencies} == {band}


# ---------------------------------------------------------------------------------------------- what must hold for any scores

def all_value(values, system="model"):
    return next(value for key, value in values.items() if key[1:3] == ("all", system))


def test_swapping_the_columns_gives_100_less_the_accuracy(world, models):
    rows = write_pairs(world / "a", twins=(4, 5))
    straight, _ = evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={models}/0", f"--versus={models}/1")
    write_table(world / "a/pairs.csv", ("negative", "positive", "voice", "type"), rows)
    swapped, _ = evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={models}/0", f"--versus={models}/1")
    for system in ("model", "versus", "bigram", "unigram", "length"):
        for key, value in straight.items():
            if key[2] == system and key[1] != "all voices right":
                assert abs(value + swapped[key] - 100) < 1e-9, key
    assert 0 < all_value(straight) < 100
    key = ("pairs a", "all", "model - versus", "%")
    assert abs(straight[key] + swapped[key]) < 1e-9
    assert abs(straight[key] - all_value(straight) + all_value(straight, "versus")) < 1e-9


def test_a_model_that_prefers_the_positive_has_100_and_a_coin_about_50(world, models, monkeypatch):
    write_pairs(world / "a", count=400)

    def scored(favour):
        rng = np.random.default_rng(3)

        def log_probabilities(model, rows, *arguments):
            return [np.full(len(row) - 1, rng.random() - 1 if favour is None else -float(i % 2 == favour))
                    for i, row in enumerate(rows)]

        monkeypatch.setattr(evaluation_command, "log_probabilities", log_probabilities)
        _, result = evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={models}/0")
        return next(row for row in result["sections"][0]["rows"] if row["subset"] == "all" and row["system"] == "model")

    # documents come in the order of their names, 0n0 before 0p0: the positive is the odd one
    assert scored(favour=0)["value"] == 100 and scored(favour=1)["value"] == 0
    coin = scored(favour=None)
    assert coin["low"] < 50 < coin["high"] and 4 < coin["high"] - coin["low"] < 15


def test_ties_count_what_the_option_says(world, models):
    write_pairs(world / "a", count=10, twins=range(10))
    for ties in (0, 0.5, 1):
        values, _ = evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={models}/0", f"--ties={ties}")
        assert all_value(values) == all_value(values, "length") == 100 * ties
    kept = [json.loads((world / "out" / name).read_text())["options"]["ties"] for name in ("result-1.json", "result-2.json")]
    assert kept == [0, 0.5]  # results of other evaluations stay
    before = sorted((world / "out").iterdir())
    evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={models}/0", f"--ties={ties}")
    assert sorted((world / "out").iterdir()) == before


# ---------------------------------------------------------------------------------------------- conventions

def test_conventions_change_the_score_as_they_say(world, models):
    write_pairs(world / "a", count=6)
    model, _ = twist.load_speech_lm(models / "0")

    def score(*options):
        evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={models}/0", *options)
        return float(read_table(world / "out/pairs_a_pairs.csv")[0]["model_positive"])

    units = deduplicate(units_of(0))[0]
    other = deduplicate(units_of(1))[0]
    ids = torch.tensor([1, *(units + 2).tolist(), 1])
    with torch.no_grad():
        p = model(ids[None, :-1])[0].log_softmax(-1)[torch.arange(len(units) + 1), ids[1:]].double()
        without = model(ids[None, 1:-2])[0].log_softmax(-1)[torch.arange(len(units) - 1), ids[2:-1]].double()
    common = next((i for i, (a, b) in enumerate(zip(units, other)) if a != b), min(len(units), len(other)))
    assert abs(score() - p[:-1].mean()) < 1e-5
    assert abs(score("--norm=sum") - p[:-1].sum()) < 1e-4
    assert abs(score("--eos") - p.mean()) < 1e-5
    assert abs(score("--bos=no") - without.mean()) < 1e-5
    assert abs(score("--score=ending") - p[common:-1].mean()) < 1e-5


def test_endings_begin_where_pairs_csv_says(world, models):
    write_pairs(world / "a", count=6, header=("positive", "negative", "voice", "type", "positive_start", "negative_start"),
                extra=lambda i: (0.08, 0.04))  # seconds; the recipe has 25 frames in each
    evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={models}/0", "--score=ending", "--norm=sum")
    model, _ = twist.load_speech_lm(models / "0")
    units, runs = deduplicate(units_of(0))
    ids = torch.tensor([1, *(units + 2).tolist()])
    with torch.no_grad():
        p = model(ids[None, :-1])[0].log_softmax(-1)[torch.arange(len(units)), ids[1:]].double()
    begins = int((runs.cumsum(0) <= 2).sum())
    assert abs(float(read_table(world / "out/pairs_a_pairs.csv")[0]["model_positive"]) - p[begins:].sum()) < 1e-4


def test_the_conventions_stand_in_every_output(world, models, capsys):
    write_pairs(world / "a", count=6)
    _, result = evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={models}/0", "--published")
    text = capsys.readouterr().out
    for phrase in ("mean over units", "given and not scored", "ending token: not scored", "ties count 0.5", "split dev",
                   "voices: all"):
        assert phrase in text and any(phrase in line for line in result["conventions"]), phrase
    assert "TWIST-1.3B" in text and "not verified" in text and "Slam                mean log-likelihood" in text


@pytest.mark.parametrize("task, there, absent", [
    ("ppl", ("bootstrap over documents", "beginning token", "unigram"), ("sLM21", "ties", "length", "questions", "whole")),
    ("generation", (), ("sLM21", "ties", "bootstrap", "unigram", "beginning token")),
    ("pairs", ("ties count", "bootstrap over questions", "length: "), ("documents",))])
def test_only_the_conventions_of_what_was_measured_are_printed(task, there, absent, world, models):
    write_pairs(world / "a", count=6)
    data = world / "a" if task == "pairs" else world / "a/units"
    conventions = "\n".join(evaluate(world, f"--task={task}", f"--data={data}", f"--model={models}/0", "--prompts=2",
                                     "--prompt-seconds=0.2", "--max-new-units=3")[1]["conventions"])
    assert all(words in conventions for words in there) and not any(words in conventions for words in absent), conventions


def test_what_the_window_leaves_out_of_continuations_is_noted(world, models):
    write_pairs(world / "a", count=6)
    arguments = ["--task=generation", f"--data={world}/a/units", f"--model={models}/0", "--prompts=2", "--prompt-seconds=0.2"]
    notes = "".join(evaluate(world, *arguments, "--max-new-units=5000")[1]["sections"][0]["notes"])
    assert "new units, not --max-new-units=5000" in notes
    assert "new units" not in "".join(evaluate(world, *arguments, "--max-new-units=3")[1]["sections"][0]["notes"])


def test_long_sequences_are_cut_off_and_reported_or_scored_by_a_window(world, models):
    rng = np.random.default_rng(1)
    long = [(name, rng.integers(0, 20, n), np.ones(n, dtype=int), 1.0) for name, n in (("p", 300), ("n", 90))]
    write_shards(world / "a/units", RECIPE, long)
    write_table(world / "a/pairs.csv", ("positive", "negative"), [("p", "n")])
    model, vocab = twist.load_speech_lm(models / "0")

    def score(*options):
        _, result = evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={models}/0", *options)
        return float(read_table(world / "out/pairs_a_pairs.csv")[0]["model_positive"]), " ".join(result["sections"][0]["notes"])

    ids = vocab.encode(long[0][1], bos=True)
    with torch.no_grad():
        first = model(ids[None, :128])[0].log_softmax(-1)[torch.arange(128), ids[1:129]].double()
        second = model(ids[None, 64:192])[0].log_softmax(-1)[torch.arange(128), ids[65:193]].double()
        third = model(ids[None, 128:256])[0].log_softmax(-1)[torch.arange(128), ids[129:257]].double()
        last = model(ids[None, 172:300])[0].log_softmax(-1)[torch.arange(128), ids[173:301]].double()
    cut, note = score()
    assert abs(cut - first.mean()) < 1e-5 and "1 of 2 sequences are longer than the window of 128 units, and cut off" in note
    slid, note = score("--long=slide")
    expected = torch.cat([first, second[64:], third[64:], last[-44:]])
    assert len(expected) == 300 and abs(slid - expected.mean()) < 1e-5 and "sliding window" in note
    with pytest.raises(ValueError, match="--long=slide"):
        score("--score=ending")


# ---------------------------------------------------------------------------------------------- perplexity

def test_perplexity_is_that_of_transformers_for_the_same_weights(world, models):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(models / "0").eval()
    rng = np.random.default_rng(2)
    documents = [(f"{i}", rng.integers(0, 20, n), np.ones(n, dtype=int), n / 25) for i, n in enumerate((5, 60, 128, 3))]
    write_shards(world / "val", RECIPE, documents)
    values, _ = evaluate(world, "--task=ppl", f"--data={world}/val", f"--model={models}/0")
    nats, units = 0.0, 0
    for _, row, _, _ in documents:
        ids = torch.tensor([[1, *(row + 2)]])
        with torch.no_grad():
            p = theirs(ids[:, :-1]).logits[0].double().log_softmax(-1)
        nats, units = nats - float(p[torch.arange(len(row)), ids[0, 1:]].sum()), units + len(row)
    assert values["ppl val", "loss", "model", "nats per unit"] == pytest.approx(nats / units, abs=1e-5)
    assert values["ppl val", "perplexity", "model", "per unit"] == pytest.approx(np.exp(nats / units), rel=1e-5)
    assert values["ppl val", "bits of speech", "model", "per second"] == pytest.approx(nats / np.log(2) / (units / 25), rel=1e-4)


def test_perplexity_of_recordings_and_of_a_second_model(world, models):
    for i in range(6):
        write_wav(world / f"recordings/{i}.wav", i + 1)
    values, result = evaluate(world, "--task=ppl", f"--data={world}/recordings", f"--model={models}/0", f"--versus={models}/1")
    rows = result["sections"][0]["rows"]
    (apart,) = [row for row in rows if row["system"] == "model - versus"]
    name = rows[0]["benchmark"]
    ours, theirs = (values[name, "loss", system, "nats per unit"] for system in ("model", "versus"))
    assert apart["value"] == pytest.approx(ours - theirs)
    assert 0 < apart["p"] <= 1 and apart["low"] <= apart["value"] <= apart["high"]


# ---------------------------------------------------------------------------------------------- generation

def test_generation_is_described_and_transcripts_are_scored(world, models):
    (world / "said.tsv").write_text("a\tThe dog, the dog ran. The dog!\nb\tA cat sat\n")
    arguments = ["--task=generation", f"--data={world}/train", f"--model={models}/0", "--prompts=4", "--prompt-seconds=0.4",
                 "--max-new-units=20"]
    values, _ = evaluate(world, *arguments, f"--transcripts={world}/said.tsv")
    assert values["generation train", "units", "held-out speech", "length_max"] <= 20
    # the dog dog-the the-dog dog-ran ran-the the-dog: 3 of 6 bigrams occur more than once; none of a-cat, cat-sat does
    assert values["generation train", "words", "model", "auto_bleu_2"] == pytest.approx((3 / 6 + 0) / 2)
    assert values["generation train", "words", "model", "GenPPL per byte"] > 1
    rows = [json.loads(line) for line in (world / "out/continuations.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(0 <= unit < 20 for row in rows for unit in row["units"])
    again, _ = evaluate(world, *arguments, out="again")
    assert all(again[key] == value for key, value in values.items() if key[1] == "units")
    lines = [{"name": "a", "text": "one two", "log_probability": -6.0, "tokens": 3},
             {"name": "b", "text": "x", "log_probability": -4, "tokens": 1}]
    (world / "said.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values, _ = evaluate(world, *arguments, f"--transcripts={world}/said.jsonl")
    key = "generation train", "words", "model", "GenPPL per token of the file's own model"
    assert values[key] == pytest.approx(np.exp((2 + 4) / 2))


def test_auto_bleu_and_distinct_by_hand():
    assert generation.auto_bleu([1, 2, 1, 2, 3]) == 2 / 4
    assert generation.auto_bleu([1, 1, 1]) == 1 and generation.auto_bleu([1]) is None
    assert generation.distinct([[1, 2, 1], [1, 2]], 2) == 2 / 3 and generation.distinct([[1]], 2) is None


@pytest.mark.parametrize("text", ["a", "a\tb\tx\t3", "a\tb\t1\t3", "a\tb\t-1"])
def test_transcripts_that_are_none_are_refused_by_line(tmp_path, text):
    (tmp_path / "x.tsv").write_text("ok\tfine\n" + text)
    with pytest.raises(ValueError, match="line 2"):
        transcripts.read_transcripts(tmp_path / "x.tsv")


# ---------------------------------------------------------------------------------------------- bad input

def test_a_missing_recording_is_named_and_its_pair_left_out(world, models):
    rows = write_slm21(world / "slm21", questions=40)["lexical"]
    victim = rows[0]["filename"]
    (world / f"slm21/lexical/dev/{victim}.wav").unlink()
    _, result = evaluate(world, "--task=swuggy", f"--data={world}/slm21", f"--model={models}/0")
    (section,) = result["sections"]
    assert any(f"{victim}.wav): 1 of 160 pairs left out (0.62%)" in note for note in section["notes"])
    assert len(section["missing"]) == 1 and "159 pairs of 40 questions" in section["title"]
    (world / f"slm21/lexical/dev/{rows[1]['filename']}.wav").write_bytes(b"no sound")  # as good as missing
    (world / f"slm21/lexical/dev/{rows[2]['filename']}.wav").unlink()
    with pytest.raises(ValueError, match="more than 1%"):
        evaluate(world, "--task=swuggy", f"--data={world}/slm21", f"--model={models}/0")


def test_the_challenge_archive_without_gold_csv_is_explained(world, models):
    write_slm21(world / "slm21", questions=2)
    (world / "slm21/lexical/dev/gold.csv").unlink()
    with pytest.raises(ValueError, match="no gold.csv.*challenge.*sLM21-dataset"):
        evaluate(world, "--task=swuggy", f"--data={world}/slm21", f"--model={models}/0")


def test_another_split_is_read_and_a_missing_one_is_named(world, models):
    write_slm21(world / "slm21", split="test", questions=2)
    values, _ = evaluate(world, "--task=swuggy", f"--data={world}/slm21", f"--model={models}/0", "--split=test")
    assert ("swuggy slm21/lexical/test", "all", "model", "%") in values
    assert (world / "out/submission/lexical/test.txt").exists()
    with pytest.raises(ValueError, match="--split=dev.*lexical/test only"):
        evaluate(world, "--task=swuggy", f"--data={world}/slm21", f"--model={models}/0")


def gold(root, rows, header=LEXICAL, kind="lexical"):
    write_table(root / kind / "dev/gold.csv", header, rows)
    for row in rows:
        touch(root / kind / f"dev/{row[0]}.wav")


@pytest.mark.parametrize("rows, message", [
    ([("x", 1, "A", 3, "w", "p", 1, 1), ("y", 1, "B", "", "", "p", 1, 0)], "voice A, its wrong one only in B; .*of one voice"),
    ([("x", 1, "A", 3, "w", "p", 1, 1)], "no wrong one at all"),
    ([("x", 1, "A", 3, "w", "p", 1, 1), ("y", 1, "A", 3, "w", "p", 1, 1)], "x both have correct=1|y and x both"),
    ([("x", 1, "A", 3, "w", "p", 1, "yes")], "correct='yes'"),
    ([("x", 1, "A", "often", "w", "p", 1, 1), ("y", 1, "A", "", "", "p", 1, 0)], "frequency 'often'"),
    ([], "lists no pairs"),
    ([("x", 1, "A")], "line 2: 3 values for 8 columns"),
])
def test_a_gold_csv_that_contradicts_itself_is_refused(tmp_path, rows, message):
    gold(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        found_in(tmp_path, "swuggy")


def test_a_gold_csv_with_unknown_columns_names_those_it_lacks(tmp_path):
    gold(tmp_path, [("x", 1, "A", 3, 1)], header=("file", "id", "speaker", "frequency", "correct"))
    with pytest.raises(ValueError, match="columns file, id, speaker, frequency, correct, and not filename, voice"):
        found_in(tmp_path, "swuggy")


def test_units_and_model_of_different_recipes_are_refused(world, models):
    write_pairs(world / "a", count=3)
    other = twist.UnitVocab(20, recipe={**RECIPE, "layer": 7})
    twist.save_speech_lm(twist.cold_start(TINY, other), other, world / "other")
    with pytest.raises(ValueError, match="layer is 1, expected 7"):
        evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={world}/other")
    with pytest.raises(ValueError, match="--versus.*layer is 7, expected 1"):
        evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={models}/0", f"--versus={world}/other")
    plain = twist.UnitVocab(20, recipe={**RECIPE, "dedup": False})
    twist.save_speech_lm(twist.cold_start(TINY, plain), plain, world / "plain")
    with pytest.raises(ValueError, match="dedup is True, expected False"):
        evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={world}/plain")
    rounded = twist.UnitVocab(20, recipe={**RECIPE, "precision": "float16"})
    twist.save_speech_lm(twist.cold_start(TINY, rounded), rounded, world / "rounded")
    with pytest.raises(ValueError, match="precision is float32, expected float16"):
        evaluate(world, "--task=pairs", f"--data={world}/a", f"--model={world}/rounded")


@pytest.mark.parametrize("arguments, message", [
    (["--task=blimp"], "expected one of all, ppl"), (["--norm=max"], "expected one of mean, sum"),
    (["--ties=2"], "--ties=2.0: expected a number of at least 0 and at most 1"),
    (["--data=nowhere", "--task=swuggy"], "no such file or folder"), (["--tsak=ppl"], "did you mean --task"),
])
def test_wrong_options_are_one_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        evaluation_command.main(arguments)


def test_a_folder_without_an_evaluation_set_says_what_was_found(tmp_path):
    touch(tmp_path / "music/a.wav")
    with pytest.raises(ValueError, match="no such evaluation set.*music"):
        found_in(tmp_path, "sblimp")
    with pytest.raises(ValueError, match="do not say which recordings are pairs"):
        touch(tmp_path / "sSC/a.wav")
        found_in(tmp_path, "sstorycloze")


def test_the_batched_scores_are_those_of_one_sequence_at_a_time(models):
    model, vocab = twist.load_speech_lm(models / "0")
    rng = np.random.default_rng(0)
    rows = [vocab.encode(rng.integers(0, 20, n), bos=True) for n in (3, 77, 1, 128, 40, 3, 200, 129, 0)]
    together = likelihood.log_probabilities(model, rows, ALONE, budget=300)
    alone = [likelihood.log_probabilities(model, [row], ALONE)[0] for row in rows]
    assert [len(part) for part in together] == [len(row) - 1 for row in rows]
    for a, b in zip(together, alone):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
