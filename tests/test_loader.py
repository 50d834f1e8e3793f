"""loader.py: every batch against a slow plain implementation; (seed, step) alone decide; fractions, mixtures, mistakes."""
import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from corpus.loader import ROUND, Batch, Mixture, UnitLoader, subset
from corpus.shards import ShardWriter, UnitShards, publish
from twist import UnitVocab

RECIPE = {"kind": "hubert", "num_units": 10, "layer": 3, "centers": "abc", "frame_rate": 25.0}
WITH, WITHOUT = UnitVocab(10), UnitVocab(10, offset=0, bos=None, eos=None, pad=None)
LATE = UnitVocab(10, offset=3, bos=70_000, eos=70_000)  # a special token behind all units, beyond 16 bits
FILES = ([7, 0, 31, 1], [], [0, 0], [1, 64, 0, 12, 1, 1], [0])  # units of the documents in each file


def write(folder, files, recipe=RECIPE):
    """UnitShards of these documents, given as lists of lists of units, one outer list a file."""
    writers = [ShardWriter(folder, shard) for shard in range(len(files))]
    for writer, documents in zip(writers, files):
        for units in documents:
            writer.add(np.array(units, dtype=np.int64), np.ones(len(units), np.int64), "x", 1.0)
        writer.finish()
    publish(folder, recipe, writers)
    return UnitShards(folder)


def in_memory(files):
    """The same without a disk: what a loader reads of UnitShards."""
    parts = [(np.array([unit for units in documents for unit in units], np.uint16),) for documents in files]
    lengths = np.array([len(units) for units in itertools.chain(*files)], np.int64)
    return SimpleNamespace(parts=parts, bounds=lambda extra: np.append(0, np.cumsum(lengths + extra)), folder="x", recipe=RECIPE)


def drawn(lengths_of_files, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.integers(0, 10, size=n).tolist() for n in lengths] for lengths in lengths_of_files]


@pytest.fixture
def files():
    return drawn(FILES)


@pytest.fixture
def shards(tmp_path, files):
    return write(tmp_path / "units", files)


def slow_windows(documents, vocab, T, packing):
    """All windows as (ids, targets, starts) lists, by walking over the stream id by id."""
    ids, owner = [], []
    for number, units in enumerate(documents):
        document = ([] if vocab.bos is None else [vocab.bos]) + [unit + vocab.offset for unit in units]
        ids += document
        owner += [number] * len(document)
    windows = []
    for begin in range(0, len(ids) - T, T):
        row = range(begin, begin + T)
        targets = [-100 if packing == "documents" and vocab.bos is None and owner[p] != owner[p + 1] else ids[p + 1] for p in row]
        starts = [min(q for q in row if owner[q] == owner[p]) - begin for p in row] if packing == "documents" else None
        windows.append(([ids[p] for p in row], targets, starts))
    return windows


def lists(batch):
    """A Batch as [(ids, targets, starts), ...] of lists."""
    starts = itertools.repeat(None) if batch.document_starts is None else batch.document_starts.tolist()
    return list(zip(batch.ids.tolist(), batch.targets.tolist(), starts))


def slow_rows(windows, seed, positions):
    """The published order: one permutation of all windows per epoch."""
    rows = []
    for position in positions:
        epoch, index = divmod(position, len(windows))
        rows.append(windows[np.random.default_rng([seed, epoch]).permutation(len(windows))[index]])
    return rows


# ---------------------------------------------------------------------------------------------- windows

@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("vocab", [WITH, WITHOUT, LATE], ids=["bos", "no bos", "late bos"])
@pytest.mark.parametrize("T", [1, 2, 8, 16, 100])
def test_every_window_is_that_of_a_walk_over_the_stream(shards, files, packing, vocab, T):
    expected = slow_windows([units for part in files for units in part], vocab, T, packing)
    loader = UnitLoader(shards, vocab, T, 2, seed=0, packing=packing)
    assert loader.windows == len(expected) and loader.T == T
    assert lists(loader.window(*range(loader.windows))) == expected
    assert [lists(loader.window(w))[0] for w in range(loader.windows)] == expected
    back_and_forth = [*range(loader.windows)][::-1] * 2
    assert lists(loader.window(*back_and_forth)) == [expected[w] for w in back_and_forth]


@given(files=st.lists(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=5), min_size=1, max_size=4),
       T=st.integers(1, 9), vocab=st.sampled_from([WITH, WITHOUT, LATE]), packing=st.sampled_from(["stream", "documents"]),
       seed=st.integers(0, 99), step=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_a_step_is_that_of_the_slow_loader_for_any_documents(files, T, vocab, packing, seed, step):
    expected = slow_windows([units for part in files for units in part], vocab, T, packing)
    assume(expected and any(units for part in files for units in part))
    loader = UnitLoader(in_memory(files), vocab, T, 5, seed, packing=packing)
    assert lists(loader.rows(step, 0, 5)) == slow_rows(expected, seed, range(5 * step, 5 * step + 5))


def test_the_types_and_shapes_are_those_that_the_model_takes(shards):
    batch = UnitLoader(shards, WITH, 8, 4, seed=0, packing="documents").rows(0, 0, 4)
    assert isinstance(batch, Batch)
    assert [part.dtype for part in batch] == [torch.int64, torch.int64, torch.int32]
    assert all(part.shape == (4, 8) and part.is_contiguous() for part in batch)
    assert (batch.document_starts[:, 1:] >= batch.document_starts[:, :-1]).all()
    assert UnitLoader(shards, WITH, 8, 4, seed=0).rows(0, 0, 4).document_starts is None
    batch.targets.fill_(-100)
    assert (batch.ids >= 0).all()  # no memory is shared


def test_what_a_document_learns_at_its_end(tmp_path):
    shards = write(tmp_path, [[[1, 2, 3], [4], [5, 6, 7, 8]]])
    batch = UnitLoader(shards, WITH, 9, 1, seed=0, packing="documents").window(0)  # unit u is u + 2, <S> is 1
    assert lists(batch) == [([1, 3, 4, 5, 1, 6, 1, 7, 8], [3, 4, 5, 1, 6, 1, 7, 8, 9], [0, 0, 0, 0, 4, 4, 6, 6, 6])]
    batch = UnitLoader(shards, WITHOUT, 7, 1, seed=0, packing="documents").window(0)
    assert lists(batch) == [([1, 2, 3, 4, 5, 6, 7], [2, 3, -100, -100, 6, 7, 8], [0, 0, 0, 3, 4, 4, 4])]


# ---------------------------------------------------------------------------------------------- order

@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_an_epoch_visits_every_window_once_in_an_order_that_changes(shards, packing):
    loader = UnitLoader(shards, WITH, 8, 5, seed=0, packing=packing)
    numbers = loader.numbers(np.arange(3 * loader.windows)).reshape(3, -1)
    assert [sorted(epoch) for epoch in numbers.tolist()] == [list(range(loader.windows))] * 3
    assert numbers[0].tolist() != numbers[1].tolist() != numbers[2].tolist()
    assert numbers[0].tolist() != UnitLoader(shards, WITH, 8, 5, seed=1).numbers(np.arange(loader.windows)).tolist()


def mixed(tmp_path, files, batch, **options):
    """A mixture of three corpora of different size, in the ratio 5 : 3 : 2."""
    loaders = []
    for i, (part, number) in enumerate(((files, 0), (drawn([[40, 3, 9]], 1), 1), (drawn([[90], [33, 0, 2]], 2), 2))):
        folder = tmp_path / f"corpus{i}"
        loaders.append(UnitLoader(UnitShards(folder) if folder.exists() else write(folder, part), WITH, 4, batch,
                                  seed=number, **options))
    return Mixture(loaders, [5, 3, 2])


@pytest.mark.parametrize("kind", ["stream", "documents", "mixture"])
def test_ranks_share_a_step_and_a_resumed_run_goes_on_where_it_was(tmp_path, shards, files, kind):
    def fresh():
        if kind == "mixture":
            return mixed(tmp_path, files, 8, packing="documents")
        return UnitLoader(shards, WITH, 8, 8, seed=3, packing=kind)

    one = fresh()
    whole = [lists(one.rows(step, 0, 8)) for step in range(9)]
    two, four = fresh(), fresh()
    for step in (8, 0, 3, 4, 4):  # any order of asking, from a loader that has not seen the steps before
        assert lists(two.rows(step, 0, 4)) + lists(two.rows(step, 4, 4)) == whole[step]
        assert [row for rank in range(4) for row in lists(four.rows(step, 2 * rank, 2))] == whole[step]


# ---------------------------------------------------------------------------------------------- fractions

def test_fractions_are_nested_and_of_the_right_size():
    lengths = np.random.default_rng(0).integers(0, 600, 5000)
    chosen = [subset(lengths, fraction) for fraction in (1e-9, 0.01, 0.1, 0.5, 0.99, 1)]
    for fraction, fewer, more in zip((1e-9, 0.01, 0.1, 0.5, 0.99), chosen, chosen[1:]):
        assert set(fewer) < set(more) and fewer.tolist() == sorted(set(fewer))
        assert fraction * lengths.sum() <= lengths[fewer].sum() < fraction * lengths.sum() + 600
    assert chosen[-1].tolist() == list(range(5000))


def test_no_document_less_would_reach_the_fraction():
    lengths = np.full(10, 7)
    assert [len(subset(lengths, fraction)) for fraction in (0.05, 0.1, 0.5, 0.51, 0.9, 0.91)] == [1, 1, 5, 6, 9, 10]


@pytest.mark.parametrize("vocab", [WITH, WITHOUT], ids=["bos", "no bos"])
def test_a_fraction_is_the_loader_of_its_documents_in_their_order_whatever_the_seed(shards, files, vocab):
    documents = [units for part in files for units in part]
    for fraction in (0.2, 0.5, 0.8):
        kept = [documents[i] for i in subset(shards.lengths, fraction)]
        expected = slow_windows(kept, vocab, 4, "documents")
        loader = UnitLoader(shards, vocab, 4, 3, 7, packing="documents", fraction=fraction)
        assert 0 < len(kept) < len(documents)
        assert lists(loader.window(*range(loader.windows))) == expected
        assert lists(loader.rows(1, 0, 3)) == slow_rows(expected, 7, range(3, 6))
    with pytest.raises(ValueError, match="fewer than one window of 65, at a fraction of 0.001"):
        UnitLoader(shards, vocab, 64, 1, 0, fraction=0.001)


# ---------------------------------------------------------------------------------------------- mixtures

def test_every_round_of_a_mixture_has_exact_quotas_in_an_order_of_its_own(tmp_path, files):
    mixture = mixed(tmp_path, files, 8)
    corpora = np.searchsorted(mixture.bounds, mixture.numbers(np.arange(3 * ROUND)), side="right").reshape(3, ROUND)
    assert [Counter(row.tolist()) for row in corpora] == [{1: ROUND // 2, 2: 3 * ROUND // 10, 3: ROUND // 5}] * 3
    assert corpora[0].tolist() != corpora[1].tolist()
    assert len(set(corpora[0, :20].tolist())) == 3  # mixed, not one corpus after the other


def test_each_corpus_of_a_mixture_runs_through_its_own_order(tmp_path, files):
    mixture = mixed(tmp_path, files, 8)
    numbers = mixture.numbers(np.arange(2 * ROUND + 100))
    for corpus, loader in enumerate(mixture.loaders):
        own = numbers[(mixture.bounds[corpus] <= numbers) & (numbers < mixture.bounds[corpus + 1])] - mixture.bounds[corpus]
        assert own.tolist() == loader.numbers(np.arange(len(own))).tolist()


def test_rows_of_a_mixture_are_the_windows_of_its_corpora(tmp_path, files):
    mixture = mixed(tmp_path, files, 8, packing="documents")
    windows = [row for loader in mixture.loaders for row in lists(loader.window(*range(loader.windows)))]
    assert mixture.windows == len(windows) and mixture.T == 4
    assert lists(mixture.rows(2, 0, 8)) == [windows[number] for number in mixture.numbers(np.arange(16, 24))]
    assert lists(mixture.window(len(windows) - 1, 0)) == [windows[-1], windows[0]]


def test_quotas_are_largest_remainders(shards):
    loaders = [UnitLoader(shards, WITH, 8, 4, seed=0)] * 3
    assert Mixture(loaders, [1, 1, 1]).quotas.tolist() == [334, 333, 333]
    assert Mixture(loaders, [0.0012, 0.0019, 0.9969]).quotas.tolist() == [1, 2, 997]
    assert Mixture(loaders[:1], [3]).quotas.tolist() == [ROUND]


# ---------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("options, words", [
    (dict(packing="document"), "packing is 'document', expected stream or documents"),
    (dict(fraction=0), "fraction of the data is 0"), (dict(fraction=1.01), "more than 0 and at most 1"),
    (dict(fraction=float("nan")), "fraction"), (dict(block_size=0), "block size 0"), (dict(block_size=-8), "at least 1"),
    (dict(batch=0), "batch 0"), (dict(block_size=500), "smaller --block-size")])
def test_an_option_out_of_range_is_one_sentence(shards, options, words):
    with pytest.raises(ValueError, match=words):
        UnitLoader(shards, WITH, **{"block_size": 8, "batch": 4, "seed": 0, **options})


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], []])
def test_weights_must_be_one_positive_number_a_corpus(shards, weights):
    with pytest.raises(ValueError, match="2 corpora: expected one finite number above 0"):
        Mixture([UnitLoader(shards, WITH, 8, 4, seed=0)] * 2, weights)


def test_corpora_that_do_not_fit_together_are_refused(tmp_path, shards):
    loader = UnitLoader(shards, WITH, 8, 4, seed=0)
    other = write(tmp_path / "other", drawn([[50]]), {**RECIPE, "centers": "xyz"})
    with pytest.raises(ValueError, match="other: units of another tokenizer"):
        Mixture([loader, UnitLoader(other, WITH, 8, 4, seed=0)], [1, 1])
    for second in (UnitLoader(shards, WITH, 4, 4, seed=0), UnitLoader(shards, WITHOUT, 8, 4, seed=0),
                   UnitLoader(shards, WITH, 8, 4, seed=0, packing="documents")):
        with pytest.raises(ValueError, match="block size, vocabulary and packing"):
            Mixture([loader, second], [1, 1])
    with pytest.raises(ValueError, match="smallest is under one row in 1000"):
        Mixture([loader, loader], [1, 1e-4])
    with pytest.raises(ValueError, match="0 corpora"):
        Mixture([], [])


def test_windows_that_do_not_exist_are_refused(shards):
    loader = UnitLoader(shards, WITH, 8, 4, seed=0)
    for one in (loader, Mixture([loader, loader], [1, 1])):
        for number in (-1, one.windows):
            with pytest.raises(ValueError, match="there are 0 .. "):
                one.window(0, number)


def test_units_beyond_the_vocabulary_are_refused(shards):
    loader = UnitLoader(shards, UnitVocab(5), 8, 4, seed=0)
    with pytest.raises(ValueError, match="another tokenizer"):
        loader.window(*range(loader.windows))
