"""corpus/ but the loader: what is written is read, a kill loses nothing."""
import builtins
import csv
import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from corpus import inspector, journal
from corpus import shards as shards_module
from corpus.__main__ import main
from corpus.inspector import inspect
from corpus.journal import Journal, assemble
from corpus.listing import Listing
from corpus.shards import ShardWriter, UnitShards, check_recipe, names_in, publish, write_shards

RECIPE = {"kind": "hubert", "num_units": 10, "layer": 3, "centers": "abc", "frame_rate": 25.0}


def write(folder, documents, shard=0):
    writer = ShardWriter(folder, shard)
    for i, units in enumerate(documents):
        writer.add(np.array(units), np.full(len(units), 2), f"file {shard} {i}", 1.0)
    writer.finish()
    return writer


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 10, size=n).tolist() for n in (7, 0, 31, 1, 64, 12)]
    publish(tmp_path, RECIPE, [write(tmp_path, documents[:3], 0), write(tmp_path, documents[3:], 1)])
    return UnitShards(tmp_path), documents


def test_documents_of_all_shards_come_back_in_order(shards):
    shards, documents = shards
    assert [shards.document(i)[0].tolist() for i in range(len(shards))] == documents
    assert shards.document(2)[1].tolist() == [2] * 31
    assert shards.names == [f"file {s} {i}" for s in (0, 1) for i in range(3)]
    assert shards.meta["units"] == sum(map(len, documents)) and shards.meta["files"] == 6


def test_unfinished_or_mixed_shards_are_refused(tmp_path, shards):
    with pytest.raises(FileNotFoundError, match="hubert_units"):
        UnitShards(tmp_path / "nothing")
    with pytest.raises(ValueError, match="another recipe"):
        write_shards(shards[0].folder, {**RECIPE, "layer": 4}, [])
    with pytest.raises(ValueError, match="another tokenizer"):
        check_recipe({**RECIPE, "centers": "xyz"}, RECIPE, "here")
    with open(shards[0].folder / "00001.units.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(ValueError, match="copy it again"):
        UnitShards(shards[0].folder)


def test_nothing_is_visible_before_close(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add(np.array([1, 2]), np.array([1, 1]), "a", 1.0)
    assert all(file.suffix == ".tmp" for file in tmp_path.iterdir())


def test_units_that_do_not_fit_16_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="65535"):
        ShardWriter(tmp_path).add(np.array([70000]), np.array([1]), "a", 1.0)


@pytest.mark.parametrize("key, usual, other", [("pad", 0, 40), ("chunking", "overlap", "textless"), ("dedup", True, False),
                                               ("precision", "float32", "float16")])
def test_a_recipe_that_is_silent_about_an_option_means_its_default(key, usual, other):
    silent = {name: value for name, value in RECIPE.items() if name != key}
    check_recipe(silent, {**silent, key: usual}, "here")
    check_recipe({**silent, key: other}, {**silent, key: other}, "here")
    for one, two in (({}, {key: other}), ({key: other}, {}), ({key: other}, {key: usual})):
        with pytest.raises(ValueError, match=f"another tokenizer .{key} is"):
            check_recipe({**silent, **one}, {**silent, **two}, "here")


@pytest.mark.parametrize("key", ["kind", "num_units", "layer", "centers", "frame_rate"])
def test_everything_that_changes_units_is_compared(key):
    with pytest.raises(ValueError, match=f"another tokenizer .{key} is"):
        check_recipe({**RECIPE, key: "other"}, RECIPE, "here")


# ---------------------------------------------------------------------------------------------- interrupted work

NAMES = [f"{i}.wav" for i in range(12)] + ["\u00fc b.wav", "not utf-8 \udcff.wav"]
BROKEN = {"3.wav": "3.wav is no audio", "7.wav": 'it said "no",\nin two lines'}


def recording(name):
    """units, runs, seconds of a recording that is not broken; one is empty, one is longer than a writer's buffer."""
    rng = np.random.default_rng(NAMES.index(name))
    length = {"5.wav": 0, "6.wav": 5000}.get(name, int(rng.integers(1, 40)))
    return rng.integers(0, 10, length), rng.integers(1, 9, length), length / 7


def encode(journal_, names):
    for name in names:
        if name in BROKEN:
            journal_.fail(name, BROKEN[name])
        else:
            journal_.add(name, *recording(name))


def finished(folder):
    """Names of the recordings that its journals hold, good or failed."""
    return {row["file_name"] for _, _, row in journal.read_journals(folder / "work")}


def left(folder, names):
    """What hubert_units.py would still do of them, in order."""
    listing = Listing(folder / "work/names")
    listing.write(names, journal.finished(folder / "work"))
    return [*listing.left(0, 1)]


def extract(folder, names=NAMES, recipe=RECIPE, overwrite=False):
    """A start that nothing disturbs."""
    one = Journal(folder, recipe)
    encode(one, left(folder, names))
    one.close()
    return assemble(folder, recipe, names, overwrite)


def contents(folder):
    assert all(path.is_file() for path in folder.iterdir())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of at most 150 units, written without waiting for the disk: no test cuts the power."""
    monkeypatch.setattr("corpus.shards.SHARD_UNITS", 150)
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def clean(tmp_path, small_shards):
    """The bytes of a folder whose extraction nothing disturbed."""
    extract(tmp_path / "clean")
    return contents(tmp_path / "clean")


def test_an_extraction_holds_every_recording_in_the_order_of_the_list(tmp_path, clean):
    shards = UnitShards(tmp_path / "clean")
    good = [name for name in NAMES if name not in BROKEN]
    assert shards.names == good and len(shards.parts) > 2
    for name, units, runs in shards:
        assert [units.tolist(), runs.tolist()] == [part.tolist() for part in recording(name)[:2]]
    assert all(len(units) <= 150 or len(offsets) == 2 for units, _, offsets, _ in shards.parts)
    with open(tmp_path / "clean" / "failures.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert list(csv.reader(file)) == [["file", "reason"], *map(list, BROKEN.items())]
    assert (shards.meta["files"], shards.meta["failures"]) == (len(good), 2)
    assert shards.meta["hours"] == pytest.approx(sum(recording(name)[2] for name in good) / 3600)


def test_one_large_shard_holds_the_same_documents_as_many_small_ones(tmp_path, clean, monkeypatch):
    monkeypatch.setattr("corpus.shards.SHARD_UNITS", 2**28)
    extract(tmp_path / "one")
    one, many = (UnitShards(tmp_path / name) for name in ("one", "clean"))
    assert len(one.parts) == 1
    assert [(name, units.tolist(), runs.tolist()) for name, units, runs in one] == [
        (name, units.tolist(), runs.tolist()) for name, units, runs in many]


@pytest.mark.parametrize("seed", range(12))
def test_any_number_of_processes_any_order_and_any_kill_give_the_same_bytes(seed, tmp_path, clean):
    rng, folder = np.random.default_rng(seed), tmp_path / "out"
    starts = 0
    while True:
        world, starts = int(rng.integers(1, 5)), starts + 1
        left(folder, NAMES)
        todo = [rng.permutation([*Listing(folder / "work/names").left(rank, world)]).tolist() for rank in range(world)]
        assert sorted(itertools.chain(*todo)) == sorted({*NAMES} - finished(folder))
        journals = [Journal(folder, RECIPE, rank) for rank in range(world)]
        if not any(todo):
            break
        for one, names in zip(journals, todo):
            before, done = finished(folder), names[:int(rng.integers(0, len(names) + 1))]
            encode(one, done)
            assert finished(folder) == before | {*done}
            one.close()
            size = os.path.getsize(one.file.name)
            os.truncate(one.file.name, size - int(rng.integers(0, 80) * rng.integers(0, 2)) if size > 80 else size)
    assert starts > 1
    assemble(folder, RECIPE, NAMES)
    assert contents(folder) == clean


def five_finished(folder):
    """A journal of five recordings: its lines, their bytes, its file's name."""
    one = Journal(folder, RECIPE)
    encode(one, NAMES[:5])
    one.close()
    with open(one.file.name, "rb") as file:
        lines = file.readlines()
    return lines, b"".join(lines), os.path.basename(one.file.name)


def test_a_journal_cut_at_any_byte_loses_the_cut_recording_only(tmp_path, clean):
    lines, whole, file_name = five_finished(tmp_path / "first")
    ends = np.cumsum([len(line) for line in lines])
    for cut in range(int(ends[2]) - 1, len(whole) + 1):
        folder = tmp_path / f"cut {cut}"
        shutil.copytree(tmp_path / "first", folder)
        (folder / "work" / file_name).write_bytes(whole[:cut])
        assert finished(folder) == set(NAMES[:int((ends <= cut).sum())])
        assert left(folder, NAMES) == [name for name in NAMES if name not in finished(folder)]
        if cut % 9 == 0:
            extract(folder)
            assert contents(folder) == clean


def test_a_flipped_bit_anywhere_in_a_journal_is_noticed_and_that_recording_done_again(tmp_path, clean):
    lines, whole, file_name = five_finished(tmp_path / "first")
    begin, end = len(lines[0]), len(lines[0] + lines[1])
    for position in range(begin, end):
        folder = tmp_path / f"bit {position}"
        shutil.copytree(tmp_path / "first", folder)
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (folder / "work" / file_name).write_bytes(damaged)
        lost = {NAMES[1], NAMES[2]} if position == end - 1 else {NAMES[1]}  # without its end, a line takes the next along
        assert finished(folder) == set(NAMES[:5]) - lost
        if position % 9 == 0:
            with pytest.raises(ValueError, match=f"{len(NAMES) - 5 + len(lost)} of {len(NAMES)} recordings are not finished"):
                assemble(folder, RECIPE, NAMES)
            extract(folder)
            assert contents(folder) == clean


SECONDS = 60  # that anything here may take


def work_until_killed(folder, rank, world, told):
    """What a process of an extraction does, saying so; when it has nothing left to do, it waits for the kill."""
    one, done = Journal(folder, RECIPE, rank), finished(folder)
    told.send("begun")
    for name in [name for name in NAMES[rank::world] if name not in done]:
        encode(one, [name])
        told.send(name)
    time.sleep(SECONDS)


def assemble_small(folder, told):
    """`assemble` into shards as small as those of the fixture `clean`."""
    shards_module.SHARD_UNITS = 150
    told.send("begun")
    assemble(folder, RECIPE, NAMES)


@pytest.fixture
def start(monkeypatch):
    """A function that starts another function in a process: (process, what it tells). The processes are forks of one without
    threads, not of this one, where PyTorch has some: a lock that a thread holds at the fork is held forever in the child."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # read when that one starts
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_shards"])

    def start(function, *arguments):
        told, tell = server.Pipe(duplex=False)
        process = server.Process(target=function, args=(*arguments, tell), daemon=True)
        process.start()
        tell.close()
        assert told.poll(SECONDS) and told.recv() == "begun"
        return process, told

    return start


def kill(process):
    process.kill()  # nothing happens to one that has ended
    process.join(SECONDS)
    return process.exitcode


@pytest.mark.slow
def test_processes_that_are_really_killed_lose_nothing_that_was_finished(tmp_path, clean, start):
    rng, folder, kept = np.random.default_rng(0), tmp_path / "out", set()
    for world in (2, 3, 1, 2, 3):
        todo = [name for name in NAMES[::world] if name not in kept]
        started, said = [start(work_until_killed, folder, rank, world) for rank in range(world)], set()
        for _ in range(int(rng.integers(0, len(todo) + 1))):  # so much of the first one's work is let pass
            assert started[0][1].poll(SECONDS)
            said.add(started[0][1].recv())
        assert [kill(process) for process, _ in started] == [-signal.SIGKILL] * world
        before, kept = kept, finished(folder)
        assert before | said <= kept
    one = Journal(folder, RECIPE)
    encode(one, left(folder, NAMES))
    one.close()
    for _ in range(20):  # then the one that assembles
        process, _ = start(assemble_small, folder)
        time.sleep(float(rng.uniform(0, 0.02)))
        assert kill(process) in (0, -signal.SIGKILL)
        if (folder / "meta.json").exists():
            UnitShards(folder)
        if not (folder / "work").exists():  # what failed would be tried again, by the command but not by `assemble`
            break
    extract(folder)
    assert contents(folder) == clean


def test_a_broken_recording_in_between_leaves_the_shards_as_they_are_without_it(tmp_path, clean):
    extract(tmp_path / "good", [name for name in NAMES if name not in BROKEN])
    good = contents(tmp_path / "good")
    for name in good.keys() | clean.keys():
        assert (good[name] == clean[name]) == (name not in ("meta.json", "failures.csv")), name


def test_a_recording_that_failed_once_and_was_encoded_later_is_good(tmp_path):
    early, late = (Journal(tmp_path, RECIPE, rank) for rank in (1, 0))  # journals are read in the order of the ranks
    early.fail("0.wav", "the disk was away")
    encode(late, ["0.wav"])
    early.close(), late.close()
    meta = assemble(tmp_path, RECIPE, ["0.wav"])
    assert (meta["files"], meta["failures"]) == (1, 0)


def test_work_of_another_recipe_is_refused_with_the_way_out(tmp_path):
    other = {**RECIPE, "layer": 4}
    Journal(tmp_path, RECIPE).close()
    for call in (lambda: Journal(tmp_path, other, 1), lambda: assemble(tmp_path, other, []),
                 lambda: write_shards(tmp_path, other, [])):
        with pytest.raises(ValueError, match="layer is 3, now 4.*another --out, or delete .*work"):
            call()
    shutil.rmtree(tmp_path / "work")
    Journal(tmp_path, other).close()  # the other way out
    shutil.rmtree(tmp_path / "work")
    extract(tmp_path)
    for call in (lambda: assemble(tmp_path, other, []), lambda: write_shards(tmp_path, other, [])):
        with pytest.raises(ValueError, match="layer is 3, now 4.*another --out, or delete that folder .--overwrite"):
            call()
    assert [*names_in(tmp_path)] == [name for name in NAMES if name not in BROKEN]


def test_an_unfinished_folder_says_so(tmp_path):
    Journal(tmp_path, RECIPE).close()
    with pytest.raises(FileNotFoundError, match="interrupted: start the same command again"):
        UnitShards(tmp_path)


def test_units_and_run_lengths_of_different_number_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a: 2 units, but 1 run lengths"):
        Journal(tmp_path, RECIPE).add("a", [1, 2], [1], 1.0)
    with pytest.raises(ValueError, match="a: 2 units, but 1 run lengths"):
        ShardWriter(tmp_path).add([1, 2], [1], "a", 1.0)


def test_a_damaged_or_incomplete_folder_is_not_added_to(tmp_path, small_shards):
    extract(tmp_path)
    shutil.copy(tmp_path / "00001.offsets.bin", tmp_path / "kept")
    (tmp_path / "00001.offsets.bin").unlink()
    for call in (UnitShards, lambda folder: [*names_in(folder)], extract):
        with pytest.raises(ValueError, match="documents, its meta.json promises 12; copy it again"):
            call(tmp_path)
    shutil.move(tmp_path / "kept", tmp_path / "00001.offsets.bin")
    assert len([*names_in(tmp_path)]) == 12
    (tmp_path / "meta.json").write_text("[")
    with pytest.raises(ValueError, match="meta.json is damaged"):
        next(names_in(tmp_path))


def test_an_extraction_that_replaces_leaves_the_older_readable_until_its_end(tmp_path, clean, monkeypatch):
    folder = tmp_path / "out"
    monkeypatch.setattr("corpus.shards.SHARD_UNITS", 20)
    extract(folder, recipe={**RECIPE, "layer": 4})
    assert len(contents(folder)) > len(clean)
    monkeypatch.setattr("corpus.shards.SHARD_UNITS", 150)
    one = Journal(folder, RECIPE)
    assert finished(folder) == set()
    encode(one, NAMES[:4])
    assert UnitShards(folder).recipe["layer"] == 4
    assert UnitShards(folder).names == [name for name in NAMES if name not in BROKEN]
    one.close()
    extract(folder, overwrite=True)
    assert contents(folder) == clean


def test_a_second_extraction_adds_the_shards_of_a_clean_run_over_what_is_new(tmp_path, clean):
    """Numbered after the first ones, which stay as they are; a mended recording leaves the list of failures."""
    early, late = [name for name in NAMES if name not in NAMES[4:9]], NAMES[4:9]
    folder, alone = tmp_path / "out", tmp_path / "alone"
    extract(folder, early)
    before, shards = contents(folder), UnitShards(folder)
    first = [units.tolist() for _, units, _ in shards]
    one = Journal(folder, RECIPE)
    one.add("3.wav", [1, 2], [1, 1], 0.5)  # it failed in the first call
    encode(one, late)
    one.close()
    meta = assemble(folder, RECIPE, NAMES)  # of which most are in
    other = Journal(alone, RECIPE)
    other.add("3.wav", [1, 2], [1, 1], 0.5)
    encode(other, late)
    other.close()
    added = assemble(alone, RECIPE, ["3.wav", *late])
    count, after = len(shards.parts), contents(folder)
    assert {name: after[name] for name in before if name[0] == "0"} == {name: before[name] for name in before if name[0] == "0"}
    assert {name: after[name] for name in after.keys() - before.keys()} == {
        f"{int(name[:5]) + count:05d}{name[5:]}": content for name, content in contents(alone).items() if name[0] == "0"}
    assert UnitShards(folder).names == [*(name for name in early if name not in BROKEN), "3.wav",
                                        *(name for name in late if name not in BROKEN)]
    assert shards.document(3)[0].tolist() == first[3]  # whoever has it open goes on
    with open(folder / "failures.csv", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["file", "7.wav"]
    assert (meta["files"], meta["failures"]) == (13, 1) and meta["units"] == UnitShards(folder).lengths.sum()
    assert meta["hours"] == pytest.approx(added["hours"] + shards.meta["hours"])
    assert extract(folder) == meta and contents(folder) == after  # nothing is new


def test_work_of_another_interrupted_extraction_is_kept_until_that_goes_on(tmp_path, small_shards):
    one = Journal(tmp_path, RECIPE)
    encode(one, NAMES[:2])
    one.close()
    extract(tmp_path, NAMES[8:])
    assert UnitShards(tmp_path).names == NAMES[8:]
    assert finished(tmp_path) == set(NAMES) - set(NAMES[2:8])
    extract(tmp_path, NAMES[:3])
    assert UnitShards(tmp_path).names == [*NAMES[8:], *NAMES[:3]] and not (tmp_path / "work").exists()


class Interrupted(Exception):
    """Not an error that anything handles."""


@pytest.mark.parametrize("way", ["empty", "added", "replaced"])
def test_an_assembly_interrupted_at_any_rename_is_done_again(way, tmp_path, small_shards, monkeypatch):
    replace, remove, wanted = os.replace, os.unlink, {}
    for n in [1000, *range(100)]:  # the first is not interrupted
        folder, overwrite = tmp_path / f"{n}", way == "replaced"
        if way != "empty":
            extract(folder, NAMES[:6])
        before = contents(folder) if folder.exists() else {}
        one = Journal(folder, RECIPE)
        encode(one, [name for name in NAMES if overwrite or name not in NAMES[:6]] if way != "empty" else NAMES)
        one.close()
        calls = iter(range(1000))

        def interrupted(function, *paths, n=n, calls=calls, **inside):
            if not inside and next(calls) == n:  # the journals go last, by a descriptor of their folder
                raise Interrupted
            function(*paths, **inside)

        monkeypatch.setattr(os, "replace", lambda *paths: interrupted(replace, *paths))
        monkeypatch.setattr(os, "unlink", lambda *paths, **inside: interrupted(remove, *paths, **inside))
        names = [name for name in NAMES if name not in BROKEN or name not in NAMES[:6]] if way == "added" else NAMES
        try:
            assemble(folder, RECIPE, names, overwrite)
            if n < 1000:
                break
            wanted = contents(folder)
            continue
        except Interrupted:
            pass
        finally:
            monkeypatch.undo()
            monkeypatch.setattr("corpus.shards.SHARD_UNITS", 150)
            monkeypatch.setattr(os, "fsync", lambda file: None)
        if way == "added":  # readable at every moment: as it was, or as it will be
            found = UnitShards(folder)
            assert found.names == [name for name in NAMES if name not in BROKEN][:len(found)] and len(found) in (5, 12)
            assert all((folder / name).read_bytes() == content for name, content in before.items() if name[0] == "0")
        elif (folder / "meta.json").exists():  # whatever counts is whole: the older shards, or the new ones
            assert len(UnitShards(folder)) in (5, 12)
        Journal(folder, RECIPE).close()
        assert finished(folder) >= set(NAMES[6:])
        assemble(folder, RECIPE, names, overwrite)
        assert contents(folder) == wanted
    assert n > 8 and contents(folder) == wanted


def test_a_kill_while_the_journals_are_removed_leaves_no_work(tmp_path, clean, monkeypatch):
    folder = tmp_path / "out"

    def begin(path, **options):
        if path.exists():
            next(path.glob("*.jsonl")).unlink()
            raise Interrupted

    monkeypatch.setattr(shutil, "rmtree", begin)
    with pytest.raises(Interrupted):
        extract(folder)
    monkeypatch.undo()
    extract(folder)
    assert contents(folder) == clean


class SmallDisk:
    """Stands in for open(): all files together take `room` bytes, then writing fails as on a full disk."""

    def __init__(self, room):
        self.room = room

    def open(self, path, mode="r", **options):
        if mode not in ("wb", "xb"):
            return builtins.open(path, mode, **options)
        disk = self

        class File(io.FileIO):
            def write(self, data):
                if not disk.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written = super().write(memoryview(data)[:disk.room])
                disk.room -= written
                return written

        return io.BufferedWriter(File(path, mode[0]))


def test_a_full_disk_is_explained_and_the_same_command_goes_on(tmp_path, clean, monkeypatch):
    seen = Counter()
    for room in (*range(0, 4000, 250), *range(4000, 200_000, 1500)):
        folder, disk = tmp_path / str(room), SmallDisk(room)
        with monkeypatch.context() as patch:
            for module in ("corpus.shards", "corpus.journal"):
                patch.setattr(f"{module}.open", disk.open, raising=False)
            try:
                one = Journal(folder, RECIPE)
                for name in NAMES:
                    encode(one, [name])
                one.close()
                seen["journal whole"] += 1
                assemble(folder, RECIPE, NAMES)
                break
            except OSError as error:
                message = str(error)
        assert not (folder / "meta.json").exists()
        assert not list(folder.glob("*.bin.tmp"))  # room is made for the next start
        kept = len(finished(folder))
        seen[kept] += 1
        assert str(folder) in message and "MB free" in message and f" {kept} recordings are finished and kept" in message
        assert "same command again" in message and "\n" not in message
        extract(folder)
        assert contents(folder) == clean
    assert contents(folder) == clean and len(seen) > 5 and seen["journal whole"] > 10


def test_a_full_disk_leaves_an_older_extraction_readable(tmp_path, clean, monkeypatch):
    for overwrite in (False, True):
        folder = tmp_path / str(overwrite)
        extract(folder, NAMES[:2])
        one = Journal(folder, RECIPE)
        encode(one, NAMES[::-1])
        one.close()
        with monkeypatch.context() as patch:
            patch.setattr("corpus.shards.open", SmallDisk(1000).open, raising=False)
            with pytest.raises(OSError, match="14 recordings are finished and kept"):
                assemble(folder, RECIPE, NAMES[::-1], overwrite)
        assert UnitShards(folder).names == NAMES[:2]


def test_other_disk_errors_pass_unchanged(tmp_path, monkeypatch):
    one = Journal(tmp_path, RECIPE)
    with pytest.raises(PermissionError, match="^not you$"), journal.full_disk_explained(tmp_path):
        raise PermissionError("not you")
    one.close()


def test_a_journal_that_changes_while_it_is_assembled_is_noticed(tmp_path, monkeypatch):
    one = Journal(tmp_path, RECIPE)
    encode(one, NAMES[:3])
    one.close()

    def write_later(folder, recipe, documents, *rest):
        os.truncate(one.file.name, os.path.getsize(one.file.name) - 1)
        return write_shards(folder, recipe, documents, *rest)

    monkeypatch.setattr(journal, "write_shards", write_later)
    with pytest.raises(ValueError, match="changed while it was read .2.wav.; start the same command again"):
        assemble(tmp_path, RECIPE, NAMES[:3])
    assert not (tmp_path / "meta.json").exists()


def test_assembling_holds_one_recording_in_memory(tmp_path):
    one, units = Journal(tmp_path, RECIPE), np.arange(50_000) % 10
    for i in range(60):
        one.add(f"{i}", units, np.ones_like(units), 1.0)
    one.close()
    tracemalloc.start()
    assemble(tmp_path, RECIPE, [f"{i}" for i in range(60)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6 < sum(os.path.getsize(path) for path in tmp_path.iterdir()) / 3


# ---------------------------------------------------------------------------------------------- the inspector

def test_the_inspector_counts_as_a_loop_does(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.shards.SHARD_UNITS", 300)
    monkeypatch.setattr(inspector, "PIECE", 64)
    rng, recipe = np.random.default_rng(1), {**RECIPE, "num_units": 30}
    documents = [(f"{i}.wav", rng.geometric(0.15, n).clip(max=25), rng.geometric(0.4, n), n / 9)
                 for i, n in enumerate((50, 1, 0, 299, 120, 77, 300, 4))]
    write_shards(tmp_path, recipe, documents, failures=[("x", "bad"), ("y", "bad")])
    units = [unit for _, some, _, _ in documents for unit in some.tolist()]
    runs = sorted(run for _, _, some, _ in documents for run in some.tolist())
    seconds, counts = len(units) / 9, Counter(units)
    entropy = -sum(n / len(units) * math.log2(n / len(units)) for n in counts.values())
    m = inspector.measure(UnitShards(tmp_path))
    assert m["counts"].tolist() == [counts[unit] for unit in range(30)]
    assert m["never"] == sum(counts[unit] == 0 for unit in range(30)) > 3
    assert (m["documents"], m["failures"], m["units"]) == (8, 2, len(units))
    assert m["seconds"] == pytest.approx(seconds) and m["units_per_second"] == pytest.approx(9)
    assert m["document_mean"] == len(units) / 8 and m["document_median"] == 63.5 and m["document_longest"] == 300
    assert m["entropy"] == pytest.approx(entropy) and m["perplexity"] == pytest.approx(2**entropy)
    assert m["bits_per_second"] == pytest.approx(entropy * len(units) / seconds)
    assert m["frames"] == sum(runs) and m["run_mean"] == pytest.approx(sum(runs) / len(runs)) and m["run_max"] == runs[-1] > 8
    for key, q in (("run_median", 0.5), ("run_95", 0.95)):
        assert m[key] == runs[math.ceil(q * len(runs)) - 1]
    assert m["run_ranges"] == {label: sum(low <= run <= (high or run) for run in runs)
                               for label, (low, high) in inspector.RANGES.items()}
    assert sum(m["run_ranges"].values()) == len(units)
    text = inspect(tmp_path)
    for words in (f"{seconds / 3600:.3f} hours in 8 documents; 2 recordings failed", f"units      {len(units)} (9.00 per second",
                  "median 63.5, longest 300 (6.wav)", f"{entropy:.3f} bits a unit", f"{m['never']} never used", "layer 3",
                  f"{entropy * 9:.1f} bits per second", "first units of 0.wav: " + " ".join(map(str, units[:20])) + "\n"):
        assert words in text + "\n"
    most, least = (part.splitlines()[1:11] for part in text.split("  unit  share, ")[1:])
    ordered = sorted(counts, key=lambda unit: (-counts[unit], unit))
    assert [int(line.split()[0]) for line in most] == ordered[:10]
    assert [int(line.split()[0]) for line in least if line] == ordered[::-1][:10]
    assert f"{100 * counts[ordered[0]] / len(units):.2f} %" in most[0]


@pytest.mark.parametrize("runs, median, most", [([1, 1, 2, 4], 1, 4), ([1, 2, 2], 2, 2), ([1] * 19 + [7], 1, 1),
                                                ([1] * 18 + [7, 9], 1, 7)])
def test_a_quantile_is_the_first_value_that_enough_do_not_exceed(tmp_path, runs, median, most):
    write_shards(tmp_path, RECIPE, [("a", np.zeros(len(runs)), np.array(runs), 1.0)])
    m = inspector.measure(UnitShards(tmp_path))
    assert (m["run_median"], m["run_95"]) == (median, most)


def test_the_inspector_takes_text_and_names_that_are_no_text(tmp_path):
    documents = [("not utf-8 \udcff", np.array([200, 7]), np.ones(2), 0.0)]
    write_shards(tmp_path, {"kind": "bytes", "num_units": 256}, documents)
    text = inspect(tmp_path)
    text.encode()
    assert "per second" not in text and "254 never used" in text and "first units of not utf-8 \\udcff: 200 7" in text


# ---------------------------------------------------------------------------------------------- the files of others

def run(*words):
    main([str(word) for word in words])


def test_json_lines_come_back_as_the_same_shards(tmp_path, small_shards, capsys):
    extract(tmp_path / "first")
    run(tmp_path / "first", f"--jsonl={tmp_path}/new/x.jsonl")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.jsonl"]
    capsys.readouterr()
    run(tmp_path / "first", "--jsonl")
    assert capsys.readouterr().out == (tmp_path / "new/x.jsonl").read_text()
    rows = [json.loads(line) for line in open(tmp_path / "new/x.jsonl")]
    assert [row["file_name"] for row in rows] == [name for name in NAMES if name not in BROKEN]
    assert all(list(row) == ["units", "duration", "file_name"] for row in rows)
    run(tmp_path / "new/x.jsonl", f"--out={tmp_path}/second", f"--like={tmp_path}/first")
    first, second = (contents(tmp_path / name) for name in ("first", "second"))
    streams = [name for name in first if name.endswith(".bin")]
    assert len(streams) > 6 and all(second[name] == first[name] for name in streams)
    run(tmp_path / "second", f"--jsonl={tmp_path}/again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "new/x.jsonl").read_text()
    shards = UnitShards(tmp_path / "second")
    assert shards.recipe == {**RECIPE, "dedup": False}  # random units do repeat
    assert shards.meta["hours"] * 3600 == pytest.approx(sum(sum(row["duration"]) for row in rows) / 25)


def test_json_lines_without_durations_or_names_and_with_the_recipe_from_options(tmp_path, capsys):
    (tmp_path / "features.jsonl").write_text('{"units": [1, 2, 1]}\n\n{"units": [], "file_name": "b.wav"}\r\n'
                                             '{"units": [9], "duration": [70000], "file_name": "c.wav"}')
    run(tmp_path / "features.jsonl", f"--out={tmp_path}/out", "--num-units=10", "--frame-rate=50", "--model=mine", "--layer=9",
        "--centers=00ff")
    assert "3 files" in capsys.readouterr().out
    shards = UnitShards(tmp_path / "out")
    assert [(name, units.tolist(), runs.tolist()) for name, units, runs in shards] == [
        ("line_1", [1, 2, 1], [1, 1, 1]), ("b.wav", [], []), ("c.wav", [9], [65535])]
    assert shards.recipe == {"kind": "hubert", "model": "mine", "layer": 9, "num_units": 10, "frame_rate": 50.0,
                             "centers": "00ff", "dedup": True}
    assert shards.meta["hours"] * 3600 == pytest.approx(70003 / 50)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_fairseq_pair_is_imported_as_it_is_or_deduplicated(swapped, tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"/audio\na/one.flac\t16000\ntwo \xff.flac\t8000\r\nthree.flac\t400\n")
    (tmp_path / "x.km").write_text("5 5 5 2 2 5\n7 \r\n\n")
    files = [tmp_path / "x.tsv", tmp_path / "x.km"][::-1 if swapped else 1]
    run(*files, f"--out={tmp_path}/plain", "--num-units=8", "--frame-rate=50")
    run(*files, f"--out={tmp_path}/dedup", "--num-units=8", "--frame-rate=50", "--dedup=true")
    plain, dedup = (UnitShards(tmp_path / name) for name in ("plain", "dedup"))
    assert plain.names == dedup.names == ["/audio/a/one.flac", "/audio/two \udcff.flac", "/audio/three.flac"]
    assert [part.tolist() for part in plain.document(0)] == [[5, 5, 5, 2, 2, 5], [1] * 6]
    assert [part.tolist() for part in dedup.document(0)] == [[5, 2, 5], [3, 2, 1]]
    assert [part.tolist() for part in dedup.document(1)] == [[7], [1]] and len(dedup.document(2)[0]) == 0
    assert (plain.recipe["dedup"], dedup.recipe["dedup"]) == (False, True)
    assert plain.meta["hours"] * 3600 == pytest.approx(1.525) and dedup.meta["hours"] == plain.meta["hours"]


IMPORT = ("--num-units=8", "--frame-rate=50")


def test_run_lengths_of_equal_neighbours_are_added_up(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"units": [5, 5, 2, 5, 5], "duration": [1, 2, 3, 4, 9]}\n{"units": []}\n')
    run(tmp_path / "x.jsonl", f"--out={tmp_path}/out", *IMPORT, "--dedup")
    shards = UnitShards(tmp_path / "out")
    assert [part.tolist() for part in shards.document(0)] == [[5, 2, 5], [3, 3, 13]]
    assert len(shards.document(1)[0]) == 0 and shards.recipe["dedup"]


@pytest.mark.parametrize("line, words", [
    ("not json", "expected"), ("[1, 2]", "expected"), ('{"duration": [1]}', "expected"), ("[" * 100_000, "expected"),
    ('{"units": "1 2"}', "list of whole numbers"), ('{"units": [1.0]}', "list of whole numbers"),
    ('{"units": [true]}', "list of whole numbers"), ('{"units": [1, 10]}', "unit 10 lies outside 0 to 9"),
    ('{"units": [3, -1]}', "unit -1 lies outside 0 to 9"), ('{"units": [1], "duration": [1, 1]}', "duration must be"),
    ('{"units": [1], "duration": [0]}', "duration must be"), ('{"units": [1], "duration": 1}', "duration must be"),
    ('{"units": [1], "duration": [1.5]}', "duration must be"), ('{"units": [1], "file_name": 3}', "file_name must be")])
@pytest.mark.parametrize("first", [[1, 1], [1]])
def test_a_bad_json_line_is_named_and_nothing_is_replaced(line, words, first, tmp_path, small_shards):
    out = tmp_path / "out"
    extract(out, recipe={**RECIPE, "dedup": first == [1]})
    before = contents(out)
    (tmp_path / "x.jsonl").write_text(json.dumps({"units": first}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"x.jsonl, line 2: .*{words}"):
        run(tmp_path / "x.jsonl", f"--out={out}", f"--like={out}")
    assert contents(out) == before


@pytest.mark.parametrize("tsv, km, words", [
    ("/r\na\t1\nb\t1\n", "1\n", "x.km has no line 2"), ("/r\na\t1\n", "1\n2\n", "x.tsv has no line 3"),
    ("", "", "x.tsv, line 1: expected the folder"), ("a\t1\n", "1\n", "x.tsv, line 1: expected the folder"),
    ("/r\na\n", "1\n", "x.tsv, line 2: expected path"), ("/r\na\tx\n", "1\n", "x.tsv, line 2: expected path"),
    ("/r\n\t5\n", "1\n", "x.tsv, line 2: expected path"), ("/r\na\t-1\n", "1\n", "x.tsv, line 2: expected path"),
    ("/r\na\t1\nb\t1\n", "1\n2,3\n", "x.km, line 2: expected whole"), ("/r\na\t1\n", "1 -2\n", "x.km, line 1: expected whole"),
    ("/r\na\t1\n", "9" * 5000, "x.km, line 1: expected whole"), ("/r\na\t1\n", "1 8\n", "x.km, line 1: unit 8 lies outside")])
def test_a_bad_fairseq_line_is_named(tsv, km, words, tmp_path):
    (tmp_path / "x.tsv").write_text(tsv)
    (tmp_path / "x.km").write_text(km)
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "x.tsv", tmp_path / "x.km", f"--out={tmp_path}/out", *IMPORT)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_the_command_says_what_it_needs(tmp_path, capsys):
    extract(tmp_path / "units")
    run(tmp_path / "units")
    assert capsys.readouterr().out == inspect(tmp_path / "units") + "\n"
    (tmp_path / "x.jsonl").write_text('{"units": [1]}\n')
    x, out = tmp_path / "x.jsonl", f"--out={tmp_path}/out"
    for words, wrong in (("give one shard folder", []), ("give one shard folder", [x, x, out]), ("needs --out", [x, *IMPORT]),
                         ("no --jsonl", [x, out, "--jsonl=y", *IMPORT]), ("--out is for", [tmp_path / "units", out]),
                         ("--num-units and --frame-rate", [x, out, "--num-units=8"]), ("--num-units and", [x, out]),
                         ("--frame-rate=0.0: expected a number above 0", [x, out, "--num-units=8", "--frame-rate=0"]),
                         ("leave out --num-units", [x, out, f"--like={tmp_path}/units", "--num-units=8"])):
        with pytest.raises(ValueError, match=words):
            run(*wrong)
    with pytest.raises(FileNotFoundError, match="no file at .*y.jsonl"):
        run(tmp_path / "y.jsonl", out, *IMPORT)
    with pytest.raises(FileNotFoundError, match="no file at .*nowhere"):
        run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="another recipe"):
        run(x, f"--out={tmp_path}/units", *IMPORT)


def test_an_import_adds_what_is_new_and_takes_no_document_for_another(tmp_path, capsys):
    one, two, three, out = (tmp_path / name for name in ("1.jsonl", "2.jsonl", "3.jsonl", "out"))
    one.write_text('{"units": [1, 1], "file_name": "a"}\n{"units": [2], "file_name": "b"}\n')
    two.write_text('{"units": [2], "file_name": "b"}\n{"units": [3], "file_name": "c"}\n')
    three.write_text('{"units": [4, 4]}\n')
    recipe = ["--num-units=10", "--frame-rate=25"]
    run(one, f"--out={out}", *recipe)
    first = {path.name: path.read_bytes() for path in out.glob("0*")}
    run(two, f"--out={out}", *recipe)  # frames that do not repeat, into frames
    assert "3 files" in (said := capsys.readouterr().out) and "1 of them new" in said
    assert UnitShards(out).names == ["a", "b", "c"] and UnitShards(out).recipe["dedup"] is False
    assert all((out / name).read_bytes() == content for name, content in first.items())
    run(three, f"--out={out}", *recipe)
    after = contents(out)
    run(three, f"--out={out}", *recipe)
    assert "none of them new" in capsys.readouterr().out and UnitShards(out).names == ["a", "b", "c", "line_1"]
    three.write_text('{"units": [5, 5]}\n')
    with pytest.raises(ValueError, match="out holds other units under the name line_1"):
        run(three, f"--out={out}", *recipe)
    with pytest.raises(ValueError, match="another recipe .num_units is 10, now 11.*--overwrite"):
        run(two, f"--out={out}", "--num-units=11", "--frame-rate=25")
    assert contents(out) == after
    run(two, f"--out={out}", "--num-units=11", "--frame-rate=25", "--overwrite")
    assert UnitShards(out).names == ["b", "c"] and UnitShards(out).recipe["num_units"] == 11


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"


@pytest.mark.parametrize("name, content, words", [
    ("meta.json", LFS, "meta.json is a Git LFS pointer"), ("00000.units.bin", LFS, "units.bin is a Git LFS pointer"),
    ("00000.runs.bin", b"\1\0", "runs.bin holds 1 units, its offsets promise"),
    *((f"00000.{name}", None, f"{name} is not there") for name in ("units.bin", "runs.bin", "files.jsonl")),
    ("meta.json", {"recipe": "hubert"}, "no dictionary `recipe`"),
    ("meta.json", {"recipe": None}, "no dictionary `recipe`"), ("meta.json", {"files": None}, "no number of `files`"),
    ("meta.json", {"recipe": {**RECIPE, "num_units": "9"}}, "num_units is '9', expected a whole number"),
    ("meta.json", {"recipe": {**RECIPE, "frame_rate": "fast"}}, "frame_rate is 'fast', expected a number")])
def test_a_folder_that_was_copied_in_part_or_edited_is_a_sentence(name, content, words, tmp_path):
    write_shards(tmp_path, RECIPE, [("a.wav", np.arange(9), np.ones(9, int), 1.0)])
    if content is None:
        (tmp_path / name).unlink()
    else:
        edited = isinstance(content, dict) and json.dumps({**json.loads((tmp_path / name).read_text()), **content}).encode()
        (tmp_path / name).write_bytes(edited or content)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        UnitShards(tmp_path)
    assert str(tmp_path) in str(caught.value) and "Errno" not in str(caught.value)
