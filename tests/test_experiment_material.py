"""What experiments are made of: units of people, text LMs, merged units. All of it in miniature, against oracles."""
import dataclasses
import json

import numpy as np
import pytest
import torch

import eval as evaluate
import twist
from checkpoints import files
from conftest import RECIPE, TINY
from corpus.shards import UnitShards, check_recipe, write_shards
from experiments import merged_units, real, text_lms
from pocket.build import TEXT_LM_SHAPE

# ------------------------------------------------------------------------------------------------ units of people


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """A folder of released files with 300 made-up recordings a corpus, and {name: frame units}."""
    rng, spoken, folder = np.random.default_rng(0), {}, tmp_path / "released"
    (folder / "units").mkdir(parents=True)
    (folder / "text_lm/stories260K_hf").mkdir(parents=True)
    for name in sum(real.LISTS.values(), ()):
        rows = {f"{name}/{i}.wav": np.repeat(rng.integers(100, size=6), rng.integers(1, 4, size=6)) for i in range(150)}
        (folder / "units" / name).write_text("".join(
            f"{{'audio': '{audio}', 'hubert': '{' '.join(map(str, units))}', 'duration': {len(units) / 50}}}\n"
            for audio, units in rows.items()))
        spoken |= rows
    monkeypatch.setenv(real.FOLDER, str(folder))
    return folder, spoken


def test_every_recording_is_trained_on_or_held_out_and_both_corpora_are_held_out_alike(lists, tmp_path):
    train, val = (UnitShards(folder) for folder in real.real_units(tmp_path / "material"))
    assert sorted([*train.names, *val.names]) == sorted(lists[1])
    assert [sum(name.startswith(corpus) for name in val.names) for corpus in real.LISTS] == [real.HELD_OUT] * 2
    for shards in (train, val):
        for name, units, runs in shards:
            assert np.repeat(units, runs).tolist() == lists[1][name].tolist() and (np.diff(units) != 0).all()
    seconds = sum(file["seconds"] for shards in (train, val) for file in shards.each_file())
    assert seconds == pytest.approx(sum(map(len, lists[1].values())) / real.FRAME_RATE)


def test_real_units_are_made_once_and_the_same_everywhere(lists, tmp_path):
    first = real.real_units(tmp_path / "a")
    held = UnitShards(real.real_units(tmp_path / "b")[1]).names
    assert UnitShards(first[1]).names == held
    (lists[0] / "units").rename(tmp_path / "gone")
    assert real.real_units(tmp_path / "a") == first
    (first[0] / "meta.json").unlink()  # half made: it is not taken for whole
    with pytest.raises(FileNotFoundError, match="LJSpeech_hubert100_val.txt"):
        real.real_units(tmp_path / "a")


def test_a_list_that_is_damaged_is_named_with_its_line(lists, tmp_path):
    path = lists[0] / "units" / real.LISTS["VCTK"][0]
    lines = path.read_text().splitlines()
    for wrong in ("{'audio': 'a', 'hubert': '1 100', 'duration': 1.0}", "{'audio': 'a', 'hubert': [1]}", "__import__('os')"):
        path.write_text("\n".join([*lines[:4], wrong, *lines[5:]]))
        with pytest.raises(ValueError, match="VCTK_hubert100_val.txt, line 5"):
            real.real_units(tmp_path)


def test_what_is_not_there_is_said_with_the_way_to_get_it(lists, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="hf download HuggingFaceTB/SmolLM2-135M"):
        real.smollm2(tmp_path)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2/config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match='expected "initializer_range": 0.0416'):
        real.smollm2(tmp_path)
    (tmp_path / "smollm2/config.json").write_text(json.dumps({"initializer_range": 0.041666666666666664}))
    assert real.smollm2(tmp_path) == tmp_path / "smollm2"
    monkeypatch.delenv(real.FOLDER)
    with pytest.raises(ValueError, match=real.FOLDER):
        real.real_units(tmp_path / "material")


# ------------------------------------------------------------------------------------------------ text LMs

@pytest.mark.parametrize("size", text_lms.SIZES)
def test_the_bodies_of_all_families_are_of_one_size(size, tmp_path):
    bodies = []
    for family in text_lms.FAMILIES:
        files.write_json(tmp_path / family / "config.json", text_lms.shape(family, size))
        lm = twist.load_lm_config(tmp_path / family)
        assert lm.family == family and lm.block_size == text_lms.POSITIONS
        bodies.append(twist.count_parameters(tmp_path / family) - lm.vocab_size * lm.n_embd * (1 if lm.tie_embeddings else 2))
    assert max(bodies) < 1.05 * min(bodies) and all(0.8 < body / (float(size[:-1]) * 1e6) < 1.05 for body in bodies)


def test_a_llama_of_the_middle_size_is_the_pockets_text_lm():
    assert text_lms.shape("llama", "3M") == TEXT_LM_SHAPE


def test_a_random_order_keeps_the_bytes_of_each_story(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lms, "STORIES", {"val": (7, 12)})
    plain, random = (UnitShards(text_lms.text_shards(tmp_path, "stories", order, "val")) for order in text_lms.ORDERS)
    assert plain.names == random.names and len(plain) == 12
    for (_, units, _), (_, permuted, _) in zip(plain, random, strict=True):
        assert sorted(units) == sorted(permuted) and (units != permuted).any()


@pytest.fixture
def teller(tmp_path, monkeypatch):
    """What stories260K is made of, in miniature, in a folder of released files; its words."""
    folder = tmp_path / "released/text_lm"
    words = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), *(f" w{i}." for i in range(253))]
    folder.mkdir(parents=True)
    (folder / "tok512.bin").write_bytes(bytes(3000) + b"".join(word.encode() + b"\0" for word in words))
    lm = twist.cold_start(dataclasses.replace(TINY, block_size=24), twist.UnitVocab(510))
    twist.save_speech_lm(lm, twist.UnitVocab(510), folder / "stories260K_hf")
    monkeypatch.setenv(real.FOLDER, str(folder.parent))
    monkeypatch.setattr(text_lms, "ROWS", 5)
    return folder


def test_words_are_read_as_the_bytes_that_they_stand_for(teller):
    words = text_lms.read_words(teller / "tok512.bin")
    assert len(words) == 512 and b"".join(words[3:259]) == bytes(range(256)) and words[-1] == b" w252."
    (teller / "cut.bin").write_bytes((teller / "tok512.bin").read_bytes()[:4000])
    with pytest.raises(ValueError, match="expected 512"):
        text_lms.read_words(teller / "cut.bin")


def test_a_story_ends_where_the_model_ends_it_or_with_a_whole_sentence(monkeypatch):
    words = [b"", b"<s>", b"", b" One.", b" two", b"\n"]
    drawn = torch.tensor([[1, 3, 4, 1, 1], [1, 3, 5, 3, 4], [1, 4, 4, 4, 4]])
    monkeypatch.setattr(text_lms, "generate", lambda *_, **__: drawn)
    lm = twist.cold_start(TINY, twist.UnitVocab(4))
    assert list(text_lms.tell(lm, words, 0)) == [b"One. two", b"One.\n One.", b""]


def test_telling_goes_on_where_it_was_interrupted(teller, tmp_path, monkeypatch):
    monkeypatch.setattr(text_lms, "TOLD", {"train": (3, 2)})
    whole = list(UnitShards(text_lms.text_shards(tmp_path / "a", "elsewhere", "as it is", "train")))
    monkeypatch.setattr(text_lms, "TOLD", {"train": (3, 1)})
    text_lms.text_shards(tmp_path / "b", "elsewhere", "as it is", "train")
    monkeypatch.setattr(text_lms, "TOLD", {"train": (3, 2)})
    parts = list(UnitShards(text_lms.text_shards(tmp_path / "b", "elsewhere", "as it is", "train")))
    assert len(whole) == 10 and len({name for name, *_ in whole}) == 10 and sum(len(units) for _, units, _ in whole) > 10
    assert [(name, units.tolist()) for name, units, _ in whole] == [(name, units.tolist()) for name, units, _ in parts]


@pytest.mark.parametrize("family", ("opt", "gpt_neox"))  # plain rows, and rows sorted by heads
def test_layers_change_places_and_nothing_else_does(family, tmp_path):
    shape = text_lms.shape(family, "0.8M") | {"hidden_size": 32, "word_embed_proj_dim": 32}
    files.write_json(tmp_path / "shape/config.json", shape)
    lm = twist.cold_start(twist.load_lm_config(tmp_path / "shape"), twist.UnitVocab(256), seed=1)
    twist.save_speech_lm(lm, twist.UnitVocab(256), tmp_path / "lm", torch.float16)
    lm = twist.load_text_lm(tmp_path / "lm")
    orders, ids = set(), torch.arange(40)[None]
    for seed in range(3):
        moved = twist.load_text_lm(text_lms.layers_permuted(tmp_path / "lm", tmp_path / str(seed), seed))
        order = [next(i for i, old in enumerate(lm.h) if torch.equal(old.mlp.up.weight, new.mlp.up.weight)) for new in moved.h]
        assert sorted(order) == [0, 1, 2, 3] and all(i != place for place, i in enumerate(order))
        orders.add(tuple(order))
        expected = twist.load_text_lm(tmp_path / "lm")
        expected.h = torch.nn.ModuleList(expected.h[i] for i in order)
        with torch.no_grad():
            assert torch.equal(moved(ids), expected(ids)) and not torch.equal(moved(ids), lm(ids))
    assert len(orders) > 1
    before = (tmp_path / "0/model.safetensors").stat().st_mtime_ns
    text_lms.layers_permuted(tmp_path / "lm", tmp_path / "0", 0)
    assert (tmp_path / "0/model.safetensors").stat().st_mtime_ns == before


def test_a_text_lm_of_both_languages_reads_half_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lms, "STORIES", {"train": (3, 4), "val": (9, 2)})
    called = []
    monkeypatch.setattr(text_lms, "run", lambda *words: called.append(words))
    text_lms.text_lm(tmp_path, text="both", steps=50)
    options = dict(word[2:].split("=", 1) for word in called[0] if "=" in word)
    assert options["data-weights"] == "1,1" and options["steps"] == "50"
    english, german = (UnitShards(folder).names for folder in options["data"].split(","))
    assert english == [f"story {i}" for i in range(3, 7)] and german == [f"de story {i}" for i in range(3, 7)]


@pytest.mark.slow
def test_a_text_lm_is_trained_once_and_starts_a_speech_lm(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lms, "STORIES", {"train": (0, 60), "val": (5_000_000, 40)})
    place = text_lms.text_lm(tmp_path, "bloom", "0.8M", steps=12)
    rows = (place.parent / "log.csv").read_text().splitlines()
    losses = [float(row.split(",")[2]) for row in (rows[1], rows[-1])]
    assert rows[0].split(",")[2] == "val_loss" and losses[1] < losses[0] - 1
    assert twist.warm_start(twist.load_text_lm(place), twist.UnitVocab(100)).config.family == "bloom"
    monkeypatch.setattr(text_lms, "run", lambda *_: pytest.fail("it is there"))
    assert text_lms.text_lm(tmp_path, "bloom", "0.8M", steps=12) == place


# ------------------------------------------------------------------------------------------------ merged units

def random_shards(folder, seed, alphabet=4, documents=12):
    rng = np.random.default_rng(seed)
    spoken = [rng.integers(alphabet, size=rng.integers(30)) for _ in range(documents)]
    write_shards(folder, {**RECIPE, "num_units": alphabet, "dedup": False}, [
        (f"{i}.wav", units, rng.integers(1, 9, size=len(units)), 0.5 * i) for i, units in enumerate(spoken)])
    return UnitShards(folder)


def joined(document, pair, new):
    """One merge as its definition says, from left to right."""
    out = []
    for unit in document:
        out.append(unit)
        if tuple(out[-2:]) == pair:
            out[-2:] = [new]
    return out


def by_hand(documents, first, vocabulary):
    """(merges, merged documents) by counting every pair again after each merge."""
    merges = []
    for new in range(first, vocabulary):
        counts = {}
        for document in documents:
            for pair in zip(document, document[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        documents = [joined(document, merges[-1], new) for document in documents]
    return merges, documents


@pytest.mark.parametrize("seed", range(6))
def test_merges_are_those_of_brute_force_and_can_be_undone(seed, tmp_path):
    shards = random_shards(tmp_path / "plain", seed, alphabet=2 + seed % 3)  # of two units, many stand beside themselves
    first = shards.recipe["num_units"]
    merges, documents = by_hand([units.tolist() for _, units, _ in shards], first, first + 9)
    found = merged_units.fit(shards, first + 9)
    assert [*map(tuple, found.tolist())] == merges
    made = UnitShards(merged_units.merge(shards, found, tmp_path / "merged"))
    assert [units.tolist() for _, units, _ in made] == documents and made.names == shards.names
    assert [*made.each_file()] == [*shards.each_file()] and made.recipe["num_units"] == first + 9
    spelt = merged_units.spellings(found, first)
    for (_, units, runs), (_, merged, sums) in zip(shards, made, strict=True):
        assert [unit for one in merged for unit in spelt[one].tolist()] == units.tolist()
        ends = np.cumsum([len(spelt[unit]) for unit in merged], dtype=int)
        assert sums.tolist() == [int(runs[end - len(spelt[unit]):end].sum()) for unit, end in zip(merged, ends)]


def test_three_in_a_row_are_one_pair_and_one_left_over():
    units = np.array([0, 0, 0, 1, 0, 0, -1, 0, 0, 0, 0, -1])
    assert merged_units.join(units, (0, 0), 2).tolist() == [2, 0, 1, 2, -1, 2, 2, -1]


def test_too_large_a_vocabulary_says_how_far_the_pairs_go(tmp_path):
    shards = random_shards(tmp_path, 0)
    with pytest.raises(ValueError, match="ask for fewer"):
        merged_units.fit(shards, 2000)
    with pytest.raises(ValueError, match="more than the 4 units"):
        merged_units.fit(shards, 4)


@pytest.fixture
def merged(tmp_path):
    """Units and a benchmark; the folder of the same in a vocabulary of 8."""
    for seed, part in enumerate(("units/train", "units/val", "benchmarks/mini-swuggy/units")):
        random_shards(tmp_path / part, seed)
    table = "positive,negative\n" + "".join(f"{2 * i}.wav,{2 * i + 1}.wav\n" for i in range(6))
    (tmp_path / "benchmarks/mini-swuggy/pairs.csv").write_text(table)
    return merged_units.merged_units(tmp_path, 8, tmp_path / "units", tmp_path / "benchmarks")


def test_merged_units_are_made_once_and_mixed_with_nothing(merged, tmp_path, monkeypatch):
    recipe, benchmark = UnitShards(merged / "train").recipe, merged / "benchmarks" / "mini-swuggy"
    assert (benchmark / "pairs.csv").read_text() == (tmp_path / "benchmarks/mini-swuggy/pairs.csv").read_text()
    assert recipe == UnitShards(benchmark / "units").recipe == UnitShards(merged / "val").recipe
    with pytest.raises(ValueError, match="units of another tokenizer"):
        check_recipe(UnitShards(tmp_path / "units/train").recipe, recipe, "plain", but=("num_units",))
    for name in ("fit", "write_shards"):
        monkeypatch.setattr(merged_units, name, lambda *_, **__: pytest.fail("they are there"))
    assert merged_units.merged_units(tmp_path, 8, tmp_path / "units", tmp_path / "benchmarks") == merged


@pytest.mark.slow
def test_a_speech_lm_of_merged_units_is_measured(merged, tmp_path):
    vocab = twist.UnitVocab(8, recipe=UnitShards(merged / "train").recipe)
    twist.save_speech_lm(twist.cold_start(TINY, vocab), vocab, tmp_path / "lm")
    evaluate.main([f"--model={tmp_path}/lm", "--task=swuggy", f"--data={merged}/benchmarks", f"--out={tmp_path}/eval",
                   f"--train-data={merged}/train", "--norm=sum", "--resamples=100", "--dtype=float32"])
    assert json.loads((tmp_path / "eval/result.json").read_text())
