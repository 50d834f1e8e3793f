"""listing.py, and what extraction and loader hold of each name: sorted as Paths are, known by hashes, a few bytes each."""
import itertools
import json
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bench.listing import NAMES, bench_listing, made_up, paths_of
from bench.loader import write_sparse
from corpus import extract, journal, listing
from corpus.__main__ import not_in
from corpus.extract import as_named, find_audio, list_audio
from corpus.journal import Journal, Places, assemble
from corpus.listing import Listing, absent, held, in_order, known
from corpus.loader import UnitLoader
from corpus.shards import UnitShards, names_in, write_shards
from twist import UnitVocab

RECIPE = {"kind": "hubert", "num_units": 500, "frame_rate": 25.0}
AWKWARD = ["a/z.wav", "a.b/c.wav", "a-b/c.wav", "a/b/c.wav", "a", "a b/c", "\u00fc/1", "z/\udcff.wav", "\ue000/1", "\U0001f600/1",
           "new\nline/a", "tab\t/a", "../up/a", "A/a", "a/Z.wav", "a/\x01", "a/z.wav.flac", 'quote"\\/a']


def peak_of(work, *arguments):
    """Most bytes that Python held during work(*arguments), beyond what it held before."""
    tracemalloc.start()
    try:
        work(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("run", [1, 2, 5, 17, 18, 19, 1000])
def test_names_are_sorted_as_paths_however_few_are_held(run, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "RUN", run)
    monkeypatch.setattr(listing, "BLOCK", 3)
    for seed in range(3):
        names = np.random.default_rng(seed).permutation(np.array(AWKWARD, object)).tolist()
        assert [*in_order(iter(names), tmp_path / "not/there/yet")] == [str(path) for path in sorted(map(Path, names))]
    assert not [*tmp_path.iterdir()]
    assert not [*in_order([], tmp_path)]


def test_a_large_folder_is_read_in_pieces_and_a_file_that_is_named_twice_counts_once(tmp_path, monkeypatch):
    for name in itertools.chain(*([f"{folder}/{i}.wav" for i in range(7)] for folder in ("", "b", "b/c"))):
        (tmp_path / "set" / name.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name.lstrip("/")).touch()
    expected = sorted((tmp_path / "set").rglob("*.wav"))
    assert len(expected) == 21
    monkeypatch.setattr("checkpoints.archive.PIECE", 3)
    monkeypatch.setattr(listing, "RUN", 4)
    assert find_audio([tmp_path / "set"]) == expected
    monkeypatch.chdir(tmp_path / "set")
    for given, names in ((["b/../0.wav", "."], ["0.wav"]), ([".", "b/../0.wav", "0.wav"], ["0.wav"]),
                         (["b/../0.wav", "0.wav", "b"], ["b/../0.wav"])):
        found = [str(path) for path in find_audio(given)]
        assert [name for name in found if Path(name).resolve() == tmp_path / "set/0.wav"] == (
            names if given[0] == "." else ["b/../0.wav"]) and len(found) == (21 if "." in given else 15)


def test_a_set_of_hashes_is_a_set_of_names(monkeypatch):
    monkeypatch.setattr(listing, "BLOCK", 7)
    rng = np.random.default_rng(0)
    for inside in (0, 1, 50, 300):
        names = [f"{number}" for number in rng.integers(0, 200, 100)]
        some = {f"{number}" for number in rng.integers(0, 200, inside)}
        assert [*absent(names, known(some))] == [name for name in names if name not in some]
    assert held(np.array([-5, 0, 5]), np.array([-5, 3, 5])).tolist() == [True, False, True]


def test_every_process_reads_its_share_of_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "BLOCK", 4)
    names, done = [*AWKWARD, *(f"{i}" for i in range(30))], {"a/z.wav", "7", "8", "9", "29", "\u00fc/1"}
    one = Listing(tmp_path / "work/names")
    assert one.write(iter(names), known(done)) == [len(names), len(names) - len(done)]
    assert [*one] == [*one] == names
    left = [name for name in names if name not in done]
    for world in (1, 2, 5, 64):
        assert [[*one.left(rank, world)] for rank in range(world)] == [left[rank::world] for rank in range(world)]


def test_a_recording_is_found_in_its_journal_and_what_nobody_asked_for_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.listing.BLOCK", 3)
    for rank, names in enumerate((("b", "a", "c"), ("c", "d"), ())):
        one = Journal(tmp_path, RECIPE, rank)
        for i, name in enumerate(names):
            one.add(name, [rank, i], [1, 1], 1.0)
        one.fail("e", "broken")
        one.close()
    places = Places(tmp_path / "work")
    found = dict(places.search(["a", "x", "c", "e", "b"]))
    assert [name for name, place in found.items() if place < 0] == ["x", "e"] and places.reasons == {"e": "broken"}
    assert [places.read(name, found[name])[0].tolist() for name in "abc"] == [[0, 1], [0, 0], [1, 0]]  # the last c counts
    assert places.beyond(known([])) and not places.beyond(known(["d"]))
    with pytest.raises(ValueError, match="changed while it was read .a.; start"):
        places.read("a", found["b"])
    assert not Places(tmp_path / "nothing").beyond(known([]))


# ---------------------------------------------------------------------------------------------- memory

@pytest.fixture
def many(tmp_path, monkeypatch):
    """50,000 made-up names whose walk yields them, in a working folder; as large a part of them is held as of ten million."""
    monkeypatch.setattr(extract, "walk", lambda root, seen: made_up(30_000))
    monkeypatch.setattr(listing, "RUN", 1000)
    monkeypatch.setattr(listing, "BLOCK", 10)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recordings").mkdir()
    return tmp_path / "units"


def test_listing_holds_a_few_bytes_of_names_in(many):
    """8 of each in the folder, 8 of each that is finished, and what is read at a time; as strings they would take over 100."""
    write_shards(many, RECIPE, [(name, [1], [1], 1.0) for name in itertools.islice(paths_of(30_000), 0, None, 50)])
    lines = (many / "00000.files.jsonl").read_text().splitlines()
    assert [*names_in(many)] == [json.loads(line)["file_name"] for line in lines] and len(lines) == 600
    one = Listing(many / "work/names")
    counts = []
    peak = peak_of(lambda: counts.append(one.write(as_named(list_audio(["recordings"], many), many), known([]))))
    assert counts == [[29_400, 29_400]] and peak < 40 * 30_000
    expected = sorted({*paths_of(30_000)} - {*names_in(many)}, key=lambda name: name.split("/"))
    assert [*one] == expected
    assert peak_of(lambda: sum(1 for _ in one.left(1, 8))) < 5 * 30_000


def test_joining_the_journals_holds_a_few_bytes_of_each_recording(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "BLOCK", 50)
    names, line = [*paths_of(5000)], b'{"file_name": "%b", "seconds": 1.0, "units": "AQA=", "runs": "AQA="'
    Journal(tmp_path, RECIPE).close()
    (tmp_path / "work/00001.00000.jsonl").write_bytes(b"".join(journal.seal(line % name.encode()) for name in names))
    Listing(tmp_path / "work/names").write(names, known([]))
    del names
    assert peak_of(assemble, tmp_path, RECIPE, Listing(tmp_path / "work/names")) < 120 * 5000
    assert UnitShards(tmp_path).meta["files"] == 5000


def test_an_import_holds_a_few_bytes_of_each_document_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "BLOCK", 50)
    write_shards(tmp_path, RECIPE, [(name, [7], [1], 1.0) for name in paths_of(2000)])
    documents = [("new", np.array([7]), np.array([1]), 1.0), (next(paths_of(1000)), np.array([7]), np.array([1]), 1.0)]
    found = []
    assert peak_of(lambda: found.extend(not_in(tmp_path, documents))) < 80 * 2000
    assert [name for name, *_ in found] == ["new"]


def test_a_loader_holds_eight_bytes_of_each_document_and_the_order_of_its_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.loader.SHARD_UNITS", 2**23)  # 13 shards, as ten million documents have
    write_sparse(tmp_path / "units", 300_000)
    loaders = []
    peak = peak_of(lambda: loaders.append(UnitLoader(UnitShards(tmp_path / "units"), UnitVocab(500), 1024, 8, 0)))
    loader, shards = loaders[0], loaders[0].shards
    assert loader.rows(0, 0, 8).ids.shape == (8, 1024) and peak < 13 * len(shards)
    assert isinstance(shards.parts[0][2], np.memmap)
    bounds = np.append(0, np.cumsum(np.random.default_rng(0).integers(100, 601, 300_000)))
    assert np.array_equal(loader.bounds, bounds + np.arange(300_001)) and np.array_equal(shards.lengths, np.diff(bounds))
    assert len(shards) == 300_000 and len(shards.document(299_999)[0]) == bounds[-1] - bounds[-2]


@pytest.mark.skipif(sys.platform != "linux", reason="the system's table of maps is Linux's")
@pytest.mark.parametrize("whole", [0, 10**9])
def test_a_corpus_that_is_larger_than_memory_may_be_is_read_at_random_without_reading_ahead(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.loader.WHOLE_UNITS", whole)
    write_sparse(tmp_path / "units", 1000)
    loader = UnitLoader(UnitShards(tmp_path / "units"), UnitVocab(500), 1024, 8, 0)
    flags = next(part for part in Path("/proc/self/smaps").read_text().split(f"{tmp_path}/units/00000.units.bin")[1:])
    assert ("rr" in re.search("VmFlags: (.*)", flags)[1].split()) == (whole == 0)
    assert loader.rows(0, 0, 8).ids.max() == 2


@pytest.mark.slow
def test_a_million_names_are_listed_and_recordings_joined_in_little_memory():
    mb = {row["what"]: row["mb"] for row in bench_listing(None, NAMES // 10, NAMES // 20, NAMES // 500, NAMES // 50)}
    assert NAMES == 10_000_000 and mb["list"] < 80 and mb["share"] < 20 and mb["assemble"] < 40
