"""likelihood.py: log-probabilities against transformers', windows, batches; n-gram models against counting by hand."""
import math
from collections import Counter

import numpy as np
import pytest
import torch

import twist
from conftest import RECIPE, TINY
from corpus.shards import UnitShards, write_shards
from evaluation import likelihood
from training import distributed

ALONE = distributed.Dist(0, 1, torch.device("cpu"))
VOCAB = twist.UnitVocab(20, recipe=RECIPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    twist.save_speech_lm(twist.cold_start(TINY, VOCAB), VOCAB, folder)
    return folder


def test_log_likelihoods_are_those_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    theirs, (ours, vocab) = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), twist.load_speech_lm(folder)
    rng = np.random.default_rng(0)
    rows = [vocab.encode(rng.integers(0, 20, n), bos=True, eos=True) for n in (1, 5, 17, 60, 126)]
    for row, found in zip(rows, likelihood.log_probabilities(ours, rows, ALONE)):
        with torch.no_grad():
            loss = theirs(row[None], labels=row[None]).loss
            p = theirs(row[None]).logits[0, :-1].double().log_softmax(-1)
        np.testing.assert_allclose(found, p[torch.arange(len(row) - 1), row[1:]].numpy(), atol=2e-5)
        assert found.mean() == pytest.approx(-loss.item(), abs=1e-5)


@pytest.mark.parametrize("length", [2, 9, 10, 11, 12, 17, 40])
@pytest.mark.parametrize("window, stride", [(10, 5), (10, 10), (10, 1), (7, 3)])
def test_windows_score_every_target_once_with_the_context_they_promise(length, window, stride):
    scored = []
    for begin, end, first in likelihood.windows(length, window, stride):
        assert 0 <= begin < end <= length - 1 and end - begin <= window
        scored += range(first, end + 1)
        # a target sees all ids before it, or at least window - stride of them
        assert begin == 0 or first - begin > window - stride
        assert begin == 0 or end - begin == window
    assert scored == list(range(1, length))


def test_batches_hold_each_sequence_once_within_the_budget():
    lengths = list(np.random.default_rng(0).integers(1, 90, 200)) + [500]
    groups = likelihood.batches(lengths, 300)
    assert sorted(i for group in groups for i in group) == list(range(201))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 300 for group in groups)
    assert len(groups) < 40


def test_equal_sequences_have_equal_bits_whatever_batch_they_would_fall_into(folder):
    model, vocab = twist.load_speech_lm(folder)
    rng = np.random.default_rng(4)
    twin = vocab.encode(rng.integers(0, 20, 30), bos=True)
    rows = [twin] + [vocab.encode(rng.integers(0, 20, n), bos=True) for n in (30, 31, 30, 35, 30)] + [twin.clone()] * 3
    found = likelihood.log_probabilities(model, rows, ALONE, budget=70)
    assert all(np.array_equal(found[0], found[i]) for i in (6, 7, 8))
    assert [len(part) for part in found] == [len(row) - 1 for row in rows]


def test_two_processes_share_the_work_and_both_have_all_of_it(folder):
    model, vocab = twist.load_speech_lm(folder)
    rng = np.random.default_rng(1)
    rows = [vocab.encode(rng.integers(0, 20, n), bos=True) for n in rng.integers(1, 200, 30)]
    whole = likelihood.log_probabilities(model, rows, ALONE, budget=200)

    class Half(distributed.Dist):
        def sum_array(self, array):  # instead of the network
            parts.append(array)
            return array

    parts = []
    for rank in (0, 1):
        likelihood.log_probabilities(model, rows, Half(rank, 2, torch.device("cpu")), budget=200)
    assert all((part != 0).any() for part in parts) and not ((parts[0] != 0) & (parts[1] != 0)).any()
    np.testing.assert_allclose(parts[0] + parts[1], np.concatenate(whole), atol=1e-6)


@pytest.mark.parametrize("eos", [False, True])
def test_unigram_and_bigram_are_counted_within_documents(tmp_path, eos):
    rng = np.random.default_rng(0)
    documents = [list(rng.integers(0, 20, n)) for n in (30, 1, 0, 12)]
    write_shards(tmp_path, RECIPE, [(str(i), np.array(d, dtype=int), np.ones(len(d), dtype=int), 1.0)
                                    for i, d in enumerate(documents)])
    counts = likelihood.UnitCounts(UnitShards(tmp_path), 20, eos)
    single, double = Counter(), Counter()
    for document in filter(None, documents):
        symbols = ["<", *document, *[">"] * eos]
        single.update(symbols[1:])
        double.update(zip(symbols, symbols[1:]))
    V, k, units = 20 + eos, likelihood.SMOOTHING, [3, 3, 17, 0]
    targets, before = units + [">"] * eos, ["<", *units]
    total = sum(single.values())
    unigram = [math.log((single[b] + k) / (total + k * V)) for b in targets]
    bigram = [math.log((double[a, b] + k) / (sum(n for (x, _), n in double.items() if x == a) + k * V))
              for a, b in zip(before, targets)]
    for order, expected in ((1, unigram), (2, bigram)):
        for bos in (True, False):
            found = counts.log_probabilities(units, order, bos, eos)
            np.testing.assert_allclose(found, expected[0 if bos else 1:], atol=1e-12)
    for table in (counts.unigram[None], counts.bigram):
        np.testing.assert_allclose(np.exp(table).sum(1), 1, atol=1e-12)


def test_counting_in_pieces_is_counting_the_whole(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    write_shards(tmp_path, RECIPE, [(str(i), d := rng.integers(0, 20, 50), np.ones_like(d), 1.0) for i in range(5)])
    whole = likelihood.UnitCounts(UnitShards(tmp_path), 20).bigram
    monkeypatch.setattr(likelihood, "PIECE", 7)
    np.testing.assert_array_equal(likelihood.UnitCounts(UnitShards(tmp_path), 20).bigram, whole)
