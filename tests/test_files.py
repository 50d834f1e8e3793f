"""checkpoints/files.py: nothing foreign is executed, nothing damaged is read, nothing half-written is left behind."""
import contextlib
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hubert_units
import twist
import vocoder
from checkpoints import download, files
from checkpoints import files as checkpoint
from speech.audio import write_wav


def tensors(count=6):
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(4, 5 + i, generator=generator) for i in range(count)}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---------------------------------------------------------------------------------------------- one process a folder

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
time.sleep(60)
"""


def holder(folder):
    return subprocess.Popen([sys.executable, "-c", HOLDER, folder / ".lock"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            text=True)


def test_a_folder_is_locked_against_other_processes_until_the_block_or_the_process_ends(tmp_path):
    with files.locked(tmp_path / "made/run", "run"):
        other = holder(tmp_path / "made/run")
        assert other.communicate(timeout=60)[0] == "" and other.returncode == 1
    (tmp_path / "made/run").mkdir()
    other = holder(tmp_path / "made/run")
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="made/run: another process is at work on the run there"):
        with files.locked(tmp_path / "made/run", "run"):
            pytest.fail("two processes in one folder")
    other.kill()
    other.communicate(timeout=60)
    with files.locked(tmp_path / "made/run", "run"):
        (tmp_path / "made/run/work").write_text("done")
    assert names_in(tmp_path) == ["made", "made/run", "made/run/work"]


def test_a_lock_that_its_last_holder_is_about_to_remove_does_not_count(tmp_path, monkeypatch):
    """Else this process would hold a file that is gone, and a third one the file that comes in its place."""
    lock = download.lock

    def late(file, wait):
        (tmp_path / ".lock").unlink()
        lock(file, wait)

    monkeypatch.setattr(download, "lock", late)
    with pytest.raises(ValueError, match="another process"):
        with files.locked(tmp_path, "run"):
            pass


def test_a_folder_in_which_nothing_was_written_is_not_left_behind(tmp_path):
    with pytest.raises(OSError, match="nothing to do"):
        with files.locked(tmp_path / "run", "run"):
            raise OSError("nothing to do")
    assert names_in(tmp_path) == []


def test_where_there_are_no_locks_work_goes_on(tmp_path, monkeypatch):
    def none(file, wait):
        raise OSError(errno.ENOLCK, "No locks available")

    with files.locked(tmp_path, "run"), monkeypatch.context() as windows:
        windows.setitem(sys.modules, "fcntl", None)
        with files.locked(tmp_path, "run"):
            pass
        windows.setattr(download, "lock", none)
        with files.locked(tmp_path, "run"):
            pass


# ---------------------------------------------------------------------------------------------- pickles that attack

class Payload:
    """Unpickling it makes a folder: the sign that foreign code was executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def as_torch_file(value, path):
    torch.save(value, path)


def as_old_torch_file(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def as_plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("place", [lambda evil: {"weight": torch.ones(2), "evil": evil}, lambda evil: evil, lambda evil: [evil],
                                   lambda evil: {evil: torch.ones(2)}], ids=["value", "whole", "list", "key"])
@pytest.mark.parametrize("write", [as_torch_file, as_old_torch_file, as_plain_pickle])
@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "file"])
def test_code_in_a_pickle_is_refused_and_not_executed(write, place, as_folder, tmp_path):
    sign, path = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    write(place(Payload(sign)), path)
    trusting = pickle.loads if write is as_plain_pickle else lambda _: torch.load(path, weights_only=False)
    try:
        trusting(path.read_bytes())
    except TypeError:
        pass  # mkdir returns None, which is executed all the same
    assert sign.is_dir()  # the attack is a real one: a reader that trusts the file executes it
    sign.rmdir()
    with pytest.raises(ValueError, match="convert it to safetensors"):
        files.read_tensors(tmp_path if as_folder else path)
    assert not sign.exists()


@pytest.mark.parametrize("value", [[torch.ones(2)], torch.ones(2), {"weight"}, 3], ids=["list", "tensor", "set", "number"])
def test_a_bin_file_that_is_no_dictionary_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="a.bin"):
        files.read_tensors(tmp_path / "a.bin")


# ---------------------------------------------------------------------------------------------- damage

@pytest.mark.parametrize("write, name", [(save_file, "model.safetensors"), (as_torch_file, "pytorch_model.bin"),
                                         (as_old_torch_file, "pytorch_model.bin")])
def test_a_file_cut_short_anywhere_is_an_error_that_names_it(write, name, tmp_path):
    path = tmp_path / name
    write(tensors(), path)
    whole = path.read_bytes()
    assert_equal(files.read_tensors(tmp_path), tensors())
    for length in sorted({0, 1, 7, 8, 9, 100, len(whole) - 1, *range(0, len(whole), len(whole) // 25)}):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=name):
            files.read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\noid 1",
                                     b"PK\x03\x04 no archive", bytes(range(256)), b"\x80\x02}q\x00.", b"\0" * 64],
                         ids=["html", "lfs-pointer", "zip-head", "bytes", "empty-pickle", "zeros"])
def test_a_file_of_something_else_is_an_error_that_names_it(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        files.read_tensors(tmp_path)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors or pytorch_model.bin"):
        files.read_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        files.read_tensors(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"[1, 2]", b"null", b"'single': 1"])
def test_a_config_that_is_no_json_object_is_an_error_that_names_it(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json"):
        files.read_json(tmp_path / "config.json")


def test_a_missing_config_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no config.json in {tmp_path}"):
        files.read_json(tmp_path / "config.json")


def flipped(data, positions, cases, seed):
    """Copies of a file's bytes with one byte at one of the positions changed."""
    rng = random.Random(seed)
    for _ in range(cases):
        position, value = rng.choice(positions), rng.randrange(1, 256)
        yield data[:position] + bytes([data[position] ^ value]) + data[position + 1:]


def pocket_copy(folder, part):
    shutil.copytree(files.KINDS[part], folder)
    return folder


@pytest.mark.parametrize("part, load", [
    ("lm", twist.load_text_lm), ("model", lambda folder: twist.load_speech_lm(folder)[0]),
    ("tokenizer", hubert_units.load_unit_encoder), ("vocoder", vocoder.load_vocoder)],
                         ids=["lm", "model", "tokenizer", "vocoder"])
def test_a_flipped_byte_in_a_header_or_config_is_a_clear_error_or_changes_no_weight(part, load, tmp_path):
    folder = pocket_copy(tmp_path / "copy", part)
    expected = load(folder).state_dict()
    weights, settings = min(folder.glob("model*.safetensors")), folder / "config.json"
    whole, header, refused = weights.read_bytes(), int.from_bytes(weights.read_bytes()[:8], "little"), 0
    for damaged in flipped(whole, range(8 + header), 40, seed=0):  # what follows the header is the numbers, without a checksum
        weights.write_bytes(damaged)
        try:
            assert_equal(load(folder).state_dict(), expected)
        except (ValueError, OSError) as error:
            assert str(error)
            refused += 1
    assert refused > 20
    weights.write_bytes(whole)
    data = settings.read_bytes()
    for damaged in flipped(data, range(len(data)), 120, seed=1):
        settings.write_bytes(damaged)
        try:
            assert_equal(load(folder).state_dict(), expected)  # a changed number that no weight depends on, e.g. an epsilon
        except (ValueError, OSError) as error:
            assert str(error)
            refused += 1
    assert refused > 60


# ---------------------------------------------------------------------------------------------- shards with an index

def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/secret.safetensors", "sub/a.safetensors", "..", ""])
def test_an_index_that_points_outside_its_folder_is_not_followed(outside, tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", folder / "sub" / "a.safetensors"):
        save_file({"weight": torch.ones(2)}, place)
    write_index(folder, {"weight": outside})
    with pytest.raises(ValueError, match="outside its folder"):
        files.read_tensors(folder)


def test_an_index_that_promises_a_missing_tensor_names_it(tmp_path):
    save_file({"here": torch.ones(2)}, tmp_path / "a.safetensors")
    write_index(tmp_path, {"here": "a.safetensors", "gone": "a.safetensors"})
    with pytest.raises(ValueError, match="gone"):
        files.read_tensors(tmp_path)


def test_an_index_that_promises_a_missing_file_names_it(tmp_path):
    save_file({"here": torch.ones(2)}, tmp_path / "a.safetensors")
    write_index(tmp_path, {"here": "a.safetensors", "gone": "b.safetensors"})
    with pytest.raises(FileNotFoundError, match="b.safetensors"):
        files.read_tensors(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'])
def test_an_index_without_a_table_of_files_is_an_error_that_names_it(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json"):
        files.read_tensors(tmp_path)


def test_safetensors_are_preferred_to_a_pickle_and_one_file_to_shards(tmp_path):
    save_file({"weight": torch.full((1,), 1.0)}, tmp_path / "model.safetensors")
    torch.save({"weight": torch.full((1,), 2.0)}, tmp_path / "pytorch_model.bin")
    save_file({"weight": torch.full((1,), 3.0)}, tmp_path / "model-00001-of-00001.safetensors")
    write_index(tmp_path, {"weight": "model-00001-of-00001.safetensors"})
    for expected, used in ((1.0, "model.safetensors"), (3.0, "model.safetensors.index.json"), (2.0, "pytorch_model.bin")):
        assert files.read_tensors(tmp_path)["weight"].item() == expected
        (tmp_path / used).unlink()


# ---------------------------------------------------------------------------------------------- writing

@pytest.mark.parametrize("shard_bytes", [1, 200, 10**9])
def test_a_model_written_in_shards_is_read_back_equal(shard_bytes, tmp_path):
    expected = tensors()
    files.write_model(tmp_path / "model", {"model_type": "x"}, expected, shard_bytes=shard_bytes)
    assert_equal(files.read_tensors(tmp_path / "model"), expected)
    assert files.read_json(tmp_path / "model" / "config.json") == {"model_type": "x"}
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) == {1: 6, 200: 5, 10**9: 1}[shard_bytes]
    for path in shards:
        content = load_file(path).values()
        assert len(content) == 1 or sum(tensor.nbytes for tensor in content) <= shard_bytes
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        assert [path.name for path in shards] == names
        index = files.read_json(tmp_path / "model" / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        assert_equal(files.read_tensors(tmp_path / "model" / "model.safetensors.index.json"), expected)


def test_a_smaller_model_written_over_a_larger_one_leaves_none_of_its_files(tmp_path):
    files.write_model(tmp_path / "model", {}, tensors(6), shard_bytes=1)
    files.write_model(tmp_path / "model", {}, tensors(2))
    assert names_in(tmp_path) == ["model", "model/config.json", "model/model.safetensors"]


def test_every_dtype_layout_and_shared_storage_survives(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    expected = {"half": base.half(), "bfloat16": base.bfloat16(), "int64": base.long(), "number": torch.tensor(3.0),
                "turned": base.T, "strided": base[:, ::2], "rows": base[1:3], "other rows": base[3:], "empty": torch.zeros(0, 3),
                "shared": base, "shared again": base, "trained": torch.nn.Parameter(base)}
    files.write_tensors(tmp_path / "a.safetensors", expected, metadata={"layer": "3"})
    assert_equal(files.read_tensors(tmp_path / "a.safetensors"), expected)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata()["layer"] == "3"


def test_a_folder_that_is_no_models_is_not_replaced_by_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.csv").write_text("step\n")
    with pytest.raises(ValueError, match="run holds files, but no model"):
        files.write_model(tmp_path / "run", {"model_type": "x"}, {"a": torch.zeros(1)})
    assert names_in(tmp_path) == ["run", "run/log.csv"]
    (tmp_path / "empty").mkdir()
    files.write_model(tmp_path / "empty", {"model_type": "x"}, {"a": torch.zeros(1)})


def test_a_warm_start_replaces_a_model_only_if_it_is_told_to(tmp_path, monkeypatch):
    twist.main(["--units=20", f"--out={tmp_path}/model"])
    before = (tmp_path / "model/model.safetensors").read_bytes()
    monkeypatch.setattr(twist, "load_text_lm", lambda name: pytest.fail("refused late"))
    with pytest.raises(ValueError, match="model is there already; give another --out, or --overwrite"):
        twist.main(["--units=20", "--seed=1", f"--out={tmp_path}/model"])
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    monkeypatch.undo()
    twist.main(["--units=20", "--seed=1", f"--out={tmp_path}/model", "--overwrite"])
    assert (tmp_path / "model/model.safetensors").read_bytes() != before


def test_text_that_is_written_beside_other_text_keeps_it_under_a_number(tmp_path):
    for text in ("one", "one", "two", "two", "three"):
        files.write_beside(tmp_path / "result.json", text)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "result.json": "three", "result-1.json": "one", "result-2.json": "two"}


def test_texts_that_are_written_at_the_same_time_are_all_kept(tmp_path):
    texts = [str(number) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: files.write_beside(tmp_path / "result.json", text), texts))
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == sorted(texts)


def test_a_text_may_name_a_file_whose_name_is_not_utf_8(tmp_path):
    for number in range(2):
        files.write_beside(tmp_path / "pairs.csv", os.fsdecode(b"caf\xe9.wav") + str(number))
    assert (tmp_path / "pairs.csv").read_bytes() == b"caf\xe9.wav1" and (tmp_path / "pairs-1.csv").exists()


def test_writing_leaves_no_temporary_files(tmp_path):
    files.write_tensors(tmp_path / "new folder" / "a.safetensors", tensors())
    files.write_json(tmp_path / "b.json", {"a": [1, None, "ü"]})
    files.write_text(tmp_path / "c.txt", "text\n")
    for _ in range(2):  # also over an existing folder
        files.write_model(tmp_path / "model", {}, tensors(), shard_bytes=200)
    assert not [name for name in names_in(tmp_path) if name.endswith((".tmp", ".old"))]
    assert len(names_in(tmp_path)) == 12  # 2 folders, 3 files, and config, index and 5 shards of the model
    assert files.read_json(tmp_path / "b.json") == {"a": [1, None, "ü"]}
    assert (tmp_path / "c.txt").read_text() == "text\n"


@pytest.mark.parametrize("moment", ["second shard", "config", "first rename"])
def test_a_crash_while_writing_leaves_the_old_model_whole(moment, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    files.write_model(folder, {"version": 1}, tensors())
    calls = []

    def crash(real, at):
        def function(*arguments, **options):
            calls.append(arguments)
            if len(calls) == at:
                raise OSError("disk full")
            return real(*arguments, **options)
        return function

    name, at = {"second shard": ("save_file", 2), "config": ("write_json", 2), "first rename": ("replace_folder", 1)}[moment]
    monkeypatch.setattr(checkpoint, name, crash(getattr(checkpoint, name), at))
    changed = {name: tensor + 1 for name, tensor in tensors().items()}
    with pytest.raises(OSError, match="disk full"):
        files.write_model(folder, {"version": 2}, changed, shard_bytes=1)
    assert_equal(files.read_tensors(folder), tensors())
    assert files.read_json(folder / "config.json") == {"version": 1}
    monkeypatch.undo()
    files.write_model(folder, {"version": 2}, changed, shard_bytes=1)  # the leftovers of the crash do no harm
    assert_equal(files.read_tensors(folder), changed)
    assert names_in(tmp_path)[0] == "model" and not [name for name in names_in(tmp_path) if ".tmp" in name or ".old" in name]


def test_a_crash_between_the_two_renames_has_set_the_old_model_aside(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    files.write_model(folder, {"version": 1}, tensors())
    replace = os.replace

    def crash(source, target):
        if target == folder:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        files.write_model(folder, {"version": 2}, tensors(2))
    assert_equal(files.read_tensors(tmp_path / "model.old"), tensors())


def test_a_crash_while_writing_a_file_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, {"weight": torch.zeros(3)})
    files.write_json(tmp_path / "a.json", {"version": 1})

    def crash(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)  # everything is written, nothing is sure to be on the disk
    with pytest.raises(OSError, match="disk full"):
        files.write_tensors(path, {"weight": torch.ones(3)})
    with pytest.raises(OSError, match="disk full"):
        files.write_json(tmp_path / "a.json", {"version": 2})
    assert files.read_tensors(path)["weight"].tolist() == [0.0, 0.0, 0.0]
    assert files.read_json(tmp_path / "a.json") == {"version": 1}


@contextlib.contextmanager
def full_disk():
    """Inside, a file of more than 20 kB cannot be written; pytest's own report, outside, may be one."""
    before, how = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, how)


WRITERS = {"wav": lambda path, size: write_wav(path, torch.zeros(size)),
           "text": lambda path, size: files.write_text(path, "a" * size),
           "tensors": lambda path, size: files.write_tensors(path, {"a": torch.zeros(size)}),
           "model": lambda path, size: files.write_model(path, {}, {"a": torch.zeros(size)})}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(kind, tmp_path):
    write, place = WRITERS[kind], tmp_path / "new/a"
    with full_disk(), pytest.raises(OSError, match="cannot write .*new/.*too large.*; make room, or give another place"):
        write(place, 30_000)
    assert names_in(tmp_path) == ["new"]
    write(place, 10)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path) if (tmp_path / name).is_file()}
    with full_disk(), pytest.raises(OSError, match="cannot write"):
        write(place, 30_000)
    assert {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path) if (tmp_path / name).is_file()} == before
    if kind != "model":
        for name in ("a" * 300, "ü" * 150):
            with pytest.raises(OSError, match="cannot write .*File name too long"):
                write(tmp_path / name, 10)
    assert not [name for name in names_in(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize("name", ["a" * 251 + ".wav", "ü" * 125 + ".wav"])
def test_a_name_as_long_as_a_disk_allows_can_be_written(name, tmp_path):
    WRITERS["wav"](tmp_path / name, 10)
    WRITERS["text"](tmp_path / f"{name[:-4]}.txt", 10)
    assert names_in(tmp_path) == sorted([name, f"{name[:-4]}.txt"])


# ---------------------------------------------------------------------------------------------- names

@pytest.mark.parametrize("kind", ["lm", "model", "tokenizer", "vocoder"])
def test_a_name_that_is_not_found_names_the_option(kind, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=f"--{kind}=somewhere/else"):
        files.find("somewhere/else", kind)
    monkeypatch.setitem(files.KINDS, kind, tmp_path / "pocket")
    with pytest.raises(FileNotFoundError, match=f"--{kind}=pocket"):
        files.find("pocket", kind)
    (tmp_path / "pocket").mkdir()
    assert files.find("pocket", kind) == tmp_path / "pocket"
    assert files.find(str(tmp_path), kind) == tmp_path
