"""data.py: what is written is read, and the batch of a step depends on (seed, step) alone."""
import numpy as np
import pytest
import torch

import data
from twist import UnitVocab

RECIPE = {"kind": "hubert", "num_units": 10, "layer": 3, "centers": "abc", "frame_rate": 25.0}


def write(folder, documents, shard=0, recipe=RECIPE):
    writer = data.ShardWriter(folder, recipe, shard)
    for i, units in enumerate(documents):
        writer.add(np.array(units), np.full(len(units), 2), f"file {shard} {i}", 1.0)
    writer.close()
    return folder


def stream(documents, vocab):
    return torch.cat([vocab.encode(document, bos=True) for document in documents])


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 10, size=n).tolist() for n in (7, 0, 31, 1, 64, 12)]
    write(tmp_path, documents[:3], 0)
    write(tmp_path, documents[3:], 1)
    data.merge_meta(tmp_path, 2)
    return data.UnitShards(tmp_path), documents


def test_documents_of_all_shards_come_back_in_order(shards):
    shards, documents = shards
    assert [shards.document(i)[0].tolist() for i in range(len(shards))] == documents
    assert shards.document(2)[1].tolist() == [2] * 31
    assert shards.names == [f"file {s} {i}" for s in (0, 1) for i in range(3)]
    assert shards.meta["units"] == sum(map(len, documents)) and shards.meta["files"] == 6


def test_windows_are_consecutive_pieces_of_the_stream_with_one_id_of_overlap(shards):
    shards, documents = shards
    vocab = UnitVocab(10)
    whole = stream(documents, vocab)
    loader = data.UnitLoader(shards, vocab, 16, 2, seed=0)
    assert loader.windows == (len(whole) - 1) // 16
    for w in range(loader.windows):
        assert loader.window(w).tolist() == whole[16 * w:16 * w + 17].tolist()


def test_an_epoch_visits_every_window_once_in_an_order_that_changes(shards):
    loader = data.UnitLoader(shards[0], UnitVocab(10), 8, 2, seed=0)
    n = loader.windows - loader.windows % 2
    epochs = [torch.cat([loader.rows(step, 0, 2) for step in range(e * n // 2, (e + 1) * n // 2)]) for e in (0, 1)]
    assert len({tuple(row.tolist()) for row in epochs[0]}) == n
    assert epochs[0].tolist() != epochs[1].tolist()


def test_ranks_share_the_batch_of_a_step_and_any_order_of_asking_gives_the_same(shards):
    one = data.UnitLoader(shards[0], UnitVocab(10), 8, 4, seed=3)
    whole = [one.rows(step, 0, 4) for step in range(6)]
    other = data.UnitLoader(shards[0], UnitVocab(10), 8, 4, seed=3)
    for step in (5, 0, 3):
        assert torch.equal(torch.cat([other.rows(step, 0, 2), other.rows(step, 2, 2)]), whole[step])


def test_unfinished_or_mixed_shards_are_refused(tmp_path, shards):
    with pytest.raises(FileNotFoundError, match="hubert_units"):
        data.UnitShards(tmp_path / "nothing")
    with pytest.raises(ValueError, match="another recipe"):
        data.ShardWriter(shards[0].folder, {**RECIPE, "layer": 4})
    with pytest.raises(ValueError, match="another tokenizer"):
        data.check_recipe({**RECIPE, "centers": "xyz"}, RECIPE, "here")
    with open(shards[0].folder / "00001.units.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(ValueError, match="copy it again"):
        data.UnitShards(shards[0].folder)


def test_nothing_is_visible_before_close(tmp_path):
    writer = data.ShardWriter(tmp_path, RECIPE)
    writer.add(np.array([1, 2]), np.array([1, 1]), "a", 1.0)
    assert all(file.suffix == ".tmp" for file in tmp_path.iterdir())


def test_units_that_do_not_fit_16_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="65535"):
        data.ShardWriter(tmp_path, RECIPE).add(np.array([70000]), np.array([1]), "a", 1.0)
