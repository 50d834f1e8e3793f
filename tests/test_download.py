"""download.py against servers on this machine that break off, lie, redirect and refuse: only what is whole is kept."""
import email.utils
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from checkpoints import archive, download, known

ROOT = Path(__file__).parent.parent
DATA = bytes(range(256)) * 1200  # 307,200 bytes: more than sockets hold back
TOY = "toys/toy.pt"
REPOSITORY = "/org/name/resolve/main/"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Page:
    """What a server says at one address. `breaks` holds, for each request to come, after how many bytes it hangs up."""

    def __init__(self, data=b"", etag='"1"', ranges=True, code=200, headers=(), breaks=(), length=None):
        self.data, self.etag, self.ranges, self.code = data, etag, ranges, code
        self.headers, self.breaks, self.length = dict(headers), list(breaks), length

    def answer(self, request):
        begin, code, headers = 0, self.code, dict(self.headers)
        if self.etag:
            headers["ETag"] = self.etag
        wanted, version = request.headers.get("Range"), request.headers.get("If-Range")
        same = version and version in (self.etag, headers.get("Last-Modified")) and not version.startswith("W/")
        if code == 200 and self.ranges and wanted and same:
            begin, code = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {begin}-{len(self.data) - 1}/{len(self.data)}"
            if begin >= len(self.data):
                begin, code, headers["Content-Range"] = len(self.data), 416, f"bytes */{len(self.data)}"
        body = self.data[begin:]
        request.send_response(code)
        if self.length != "unsaid":
            headers.setdefault("Content-Length", self.length or len(body))
        for name, value in headers.items():
            request.send_header(name, str(value))
        request.end_headers()
        sent = body[:self.breaks.pop(0)] if self.breaks else body
        request.server.sent.append(len(sent))
        request.wfile.write(sent)


class Usage(NamedTuple):
    """What shutil.disk_usage says."""
    free: int


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        page = self.server.pages.get(self.path)
        if page is None:
            page = Page(code=404)
        page.answer(self)

    def log_message(self, *_):
        pass


def new_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.pages, server.requests, server.sent = {}, [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def servers():
    pair = new_server(), new_server()
    yield pair
    for server in pair:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def server(servers, tmp_path, monkeypatch):
    """The first of two servers stands for all hosts; every cache is an empty folder of this test."""
    for name in list(os.environ):
        if name.startswith(("HF_", "NANOTWIST_", "TEXTLESS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NANOTWIST_HOME", str(tmp_path / "ours"))
    monkeypatch.setenv("NANOTWIST_MIRROR", servers[0].url + "/")
    monkeypatch.setenv("HF_ENDPOINT", servers[0].url)
    monkeypatch.setattr(download, "WAIT", 0)
    return servers[0]


@pytest.fixture
def toy(server, monkeypatch):
    """A known tokenizer of one file, served by a page that a test may spoil."""
    file = known.File(TOY, sha256(DATA), textless="toy_bear.pt")
    monkeypatch.setitem(download.KNOWN["tokenizer"], "toy", known.Entry([file]))
    server.pages["/" + TOY] = Page(DATA)
    return server.pages["/" + TOY]


def repository(server, **files):
    """Serve org/name with a config.json and the given files; double underscores stand for dots."""
    for name, data in {"config__json": b"{}", **files}.items():
        server.pages[REPOSITORY + name.replace("__", ".")] = Page(data)


def paths(server):
    return [path.removeprefix(REPOSITORY) for path, _ in server.requests]


def names_in(folder):
    return {path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


# ---------------------------------------------------------------------------------------------- one file

def test_a_known_name_is_downloaded_once_byte_for_byte(toy, server, tmp_path):
    path = download.find("toy", "tokenizer")
    assert path == tmp_path / "ours/tokenizer/toy/toy.pt" and path.read_bytes() == DATA
    assert names_in(path.parent) == {"toy.pt"}  # no part, no note
    assert download.find("toy", "tokenizer") == path and len(server.requests) == 1


@pytest.mark.parametrize("etag, headers", [('"1"', {}), ('W/"1"', {"Last-Modified": email.utils.formatdate(0, usegmt=True)})],
                         ids=["etag", "date"])
def test_a_broken_download_goes_on_where_it_broke(etag, headers, toy, server):
    toy.etag, toy.headers, toy.breaks = etag, headers, [100_000, 50_000]
    assert download.find("toy", "tokenizer").read_bytes() == DATA
    ranges = [headers.get("Range") for _, headers in server.requests]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert server.sent == [100_000, 50_000, len(DATA) - 150_000]  # nothing twice


def test_a_download_that_fails_leaves_a_part_from_which_the_next_call_goes_on(toy, server, tmp_path):
    toy.breaks = [100_000, 0, 0]
    with pytest.raises(OSError, match="100000 of 307200 bytes") as error:
        download.find("toy", "tokenizer")
    assert f"{server.url}/{TOY}" in str(error.value) and str(tmp_path / "ours/tokenizer/toy/toy.pt") in str(error.value)
    assert names_in(tmp_path / "ours") == {"toy.pt.part", "toy.pt.part.json"}
    assert download.find("toy", "tokenizer").read_bytes() == DATA
    assert server.sent == [100_000, 0, 0, len(DATA) - 100_000]


def test_a_server_without_ranges_is_asked_for_the_whole_file_again(toy, server):
    toy.ranges, toy.breaks = False, [100_000]
    assert download.find("toy", "tokenizer").read_bytes() == DATA
    assert server.sent == [100_000, len(DATA)]


def test_a_file_without_a_version_is_never_pieced_together(toy, server):
    toy.etag, toy.breaks = None, [100_000]
    assert download.find("toy", "tokenizer").read_bytes() == DATA
    assert [headers.get("Range") for _, headers in server.requests] == [None, None]


def test_a_file_that_changed_between_attempts_is_fetched_whole(toy, server):
    old, new = Page(bytes(len(DATA)), etag='"old"', breaks=[100_000] * 3), Page(DATA, etag='"new"')
    server.pages["/" + TOY] = old
    with pytest.raises(OSError):
        download.find("toy", "tokenizer")
    server.pages["/" + TOY] = new
    assert download.find("toy", "tokenizer").read_bytes() == DATA
    assert server.requests[-1][1]["If-Range"] == '"old"' and server.sent[-1] == len(DATA)


def test_a_server_that_answers_ranges_of_another_version_is_not_trusted(server):
    repository(server, model__safetensors=b"")
    page = server.pages[REPOSITORY + "model.safetensors"] = Page(bytes(len(DATA)), breaks=[100_000])
    answer = page.answer

    def forgetful(request):  # the second answer ignores If-Range
        if request.headers.get("Range"):
            page.data, page.etag = DATA, '"2"'
            request.headers.replace_header("If-Range", '"2"')
        answer(request)

    page.answer = forgetful
    assert (download.find("org/name", "lm") / "model.safetensors").read_bytes() == DATA


def test_a_server_that_answers_another_range_is_not_trusted(server):
    repository(server)
    page = server.pages[REPOSITORY + "model.safetensors"] = Page(DATA, breaks=[100_000])
    answer = page.answer

    def confused(request):  # the rest from byte 100 on, where that from byte 100,000 on was asked for
        if request.headers.get("Range"):
            request.headers.replace_header("Range", "bytes=100-")
        answer(request)

    page.answer = confused
    assert (download.find("org/name", "lm") / "model.safetensors").read_bytes() == DATA


def test_a_part_that_is_longer_than_the_file_is_thrown_away(toy, server, tmp_path):
    place = tmp_path / "ours/tokenizer/toy"
    place.mkdir(parents=True)
    (place / "toy.pt.part").write_bytes(DATA + b"more")
    (place / "toy.pt.part.json").write_text(json.dumps({"url": f"{server.url}/{TOY}", "validator": '"1"'}))
    assert download.find("toy", "tokenizer").read_bytes() == DATA
    assert [headers.get("Range") for _, headers in server.requests] == [f"bytes={len(DATA) + 4}-", None]


def test_a_part_from_another_address_is_not_continued(toy, server, servers, tmp_path, monkeypatch):
    servers[1].pages["/" + TOY] = Page(bytes(len(DATA)), breaks=[100_000] * 3)
    monkeypatch.setenv("NANOTWIST_MIRROR", servers[1].url)
    with pytest.raises(OSError):
        download.find("toy", "tokenizer")
    monkeypatch.setenv("NANOTWIST_MIRROR", server.url)
    assert download.find("toy", "tokenizer").read_bytes() == DATA
    assert "Range" not in server.requests[0][1]


def test_wrong_content_is_thrown_away_and_both_hashes_are_named(toy, tmp_path):
    toy.data = DATA[:-1] + b"!"
    with pytest.raises(ValueError) as error:
        download.find("toy", "tokenizer")
    assert sha256(DATA) in str(error.value) and sha256(toy.data) in str(error.value)
    assert not names_in(tmp_path / "ours")


def test_a_file_whose_end_cannot_be_seen_is_refused(toy, tmp_path):
    toy.length = "unsaid"
    with pytest.raises(OSError, match="does not say how large"):
        download.find("toy", "tokenizer")
    assert "toy.pt" not in names_in(tmp_path)


@pytest.mark.parametrize("end, whole", [(b"0\r\n\r\n", True), (b"", False)])
def test_a_file_in_chunks_is_whole_only_with_the_last_chunk(end, whole, server, tmp_path):
    repository(server)
    chunk = b"%x\r\n%b\r\n" % (len(DATA), DATA)
    server.pages[REPOSITORY + "model.safetensors"] = Page(chunk + end, length="unsaid", headers={"Transfer-Encoding": "chunked"})
    if whole:
        assert (download.find("org/name", "lm") / "model.safetensors").read_bytes() == DATA
    else:
        with pytest.raises(OSError, match="the connection broke"):
            download.find("org/name", "lm")
        assert "model.safetensors" not in names_in(tmp_path)


def test_a_missing_file_is_an_error_that_names_the_address(toy, server):
    del server.pages["/" + TOY]
    with pytest.raises(FileNotFoundError, match=f"{server.url}/{TOY} does not exist"):
        download.find("toy", "tokenizer")
    assert len(server.requests) == 1  # asking again would not help


def test_a_busy_server_is_asked_again_after_a_while(toy, server, monkeypatch):
    answer, waits = toy.answer, []
    monkeypatch.setattr(download, "WAIT", 1.0)
    monkeypatch.setattr(download.time, "sleep", waits.append)

    def busy_once(request):
        Page(code=503).answer(request) if len(server.requests) == 1 else answer(request)

    toy.answer = busy_once
    assert download.find("toy", "tokenizer").read_bytes() == DATA
    assert len(server.requests) == 2 and waits == [0, 1.0]


def test_a_server_that_always_fails_is_an_error_that_says_so(toy, server):
    toy.code = 500
    with pytest.raises(OSError, match=f"{TOY} in 3 attempts, the last: 500"):
        download.find("toy", "tokenizer")
    assert len(server.requests) == 3


def test_a_dead_server_is_an_error_that_names_the_address_and_the_place(toy, servers, tmp_path, monkeypatch):
    servers[1].server_close()
    monkeypatch.setenv("NANOTWIST_MIRROR", servers[1].url)
    with pytest.raises(OSError, match=r"the last: \[Errno \d+\] Connection refused; ") as error:
        download.find("toy", "tokenizer")
    assert not isinstance(error.value, urllib.error.URLError)
    assert f"{servers[1].url}/{TOY}" in str(error.value) and str(tmp_path / "ours/tokenizer/toy/toy.pt") in str(error.value)


def test_a_silent_server_counts_as_broken(toy, server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    done = threading.Event()
    toy.answer = lambda request: done.wait(5)
    with pytest.raises(OSError, match="timed out"):
        download.find("toy", "tokenizer")
    done.set()
    assert len(server.requests) == 3


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
@pytest.mark.parametrize("name, kind, address, place", [
    ("toy", "tokenizer", f"/{TOY}", "tokenizer/toy/toy.pt"),
    ("TWIST-350M", "model", "/textless_nlp/twist/lms/TWIST-350M.zip", "model/TWIST-350M.zip"),
    ("org/name", "lm", REPOSITORY + "config.json", "hub/org--name/config.json")])
def test_offline_nothing_is_asked_and_the_message_says_what_to_put_where(value, name, kind, address, place, toy, server, tmp_path,
                                                                         monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE") as error:
        download.find(name, kind)
    assert server.requests == []
    assert server.url + address in str(error.value) and str(tmp_path / "ours" / place) in str(error.value)
    for variable in ("NANOTWIST_HOME", "TEXTLESS_CHECKPOINT_ROOT", "HF_HUB_CACHE"):
        assert variable in str(error.value)


def test_a_file_put_by_hand_where_the_message_said_is_found_if_it_is_the_right_one(toy, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "ours/tokenizer/toy/toy.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA[:-1])
    with pytest.raises(ValueError, match=f"{sha256(DATA[:-1])}, expected {sha256(DATA)}; delete it"):
        download.find("toy", "tokenizer")
    path.write_bytes(DATA)
    assert download.find("toy", "tokenizer") == path and server.requests == []


def test_a_full_disk_is_an_error_before_anything_is_written(toy, server, tmp_path, monkeypatch):
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: Usage(free=len(DATA) - 1))
    with pytest.raises(OSError, match=f"are needed in {tmp_path}.*NANOTWIST_HOME"):
        download.find("toy", "tokenizer")
    assert "toy.pt" not in names_in(tmp_path) and len(server.requests) == 1
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.part")) == 0


def test_a_cache_that_is_a_file_is_an_error_that_says_what_to_set(toy, tmp_path):
    (tmp_path / "ours").write_text("no folder")
    with pytest.raises(OSError, match="set NANOTWIST_HOME"):
        download.find("toy", "tokenizer")


# ---------------------------------------------------------------------------------------------- names

@pytest.mark.parametrize("kind", download.KNOWN)
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(kind, server):
    with pytest.raises(ValueError, match="local path") as error:
        download.find("nonsense", kind)
    for name in download.KNOWN[kind]:
        assert name in str(error.value)
    assert ("org/name" in str(error.value)) == (kind in ("lm", "model", "tokenizer"))
    assert server.requests == []


@pytest.mark.parametrize("kind", ["kmeans", "vocoder"])
def test_what_the_hub_does_not_have_in_our_format_is_not_asked_for_there(kind, server):
    with pytest.raises(ValueError, match="no such name"):
        download.find("org/name", kind)
    assert server.requests == []


@pytest.mark.parametrize("name", ["", "a/b/c", "../name", "org/..", "org/na me", "/name", "org/", "-x/name", "org/a--b", "a..b/c",
                                  "o?/n"])
def test_what_is_no_repository_name_never_becomes_an_address(name, server):
    with pytest.raises(ValueError, match="no such name"):
        download.find(name, "lm")
    assert server.requests == []


def test_the_table_is_consistent():
    assert set(download.KNOWN) == {"lm", "model", "tokenizer", "kmeans", "vocoder"}
    for kind, entries in download.KNOWN.items():
        for entry in entries.values():
            names = [file.name for file in entry.files]
            assert len(set(names)) == len(names)
            for file in entry.files:
                assert (file.sha256 is None) == (kind == "model") and len(file.sha256 or "0" * 64) == 64
            assert (entry.layer is not None) == (kind == "kmeans")
            assert (entry.kmeans in download.KNOWN["kmeans"]) == (kind == "tokenizer")
    assert {f"{entry.kmeans}-hifigan" for entry in download.KNOWN["tokenizer"].values()} == set(download.KNOWN["vocoder"])
    assert [download.KNOWN["kmeans"][f"hubert-base-ls960-kmeans-{k}"].layer for k in (50, 100, 200, 500)] == [6] * 4


def test_a_vocoder_is_found_by_its_tokenizer_too_with_all_files_side_by_side(server, monkeypatch):
    files = [known.File(f"voice/{name}", sha256(name.encode())) for name in ("generator.pt", "config.json", "speakers.txt")]
    monkeypatch.setitem(download.KNOWN["vocoder"], "mhubert-base-25hz-kmeans-500-hifigan", known.Entry(files))
    server.pages.update({"/" + file.url: Page(file.name.encode()) for file in files})
    path = download.find("mhubert-base-25hz", "vocoder")
    assert path.name == "generator.pt" and names_in(path.parent) == {file.name for file in files}
    assert download.find("mhubert-base-25hz-kmeans-500-hifigan", "vocoder") == path and len(server.requests) == 3


# ---------------------------------------------------------------------------------------------- other caches

def test_a_file_of_textlesslib_is_used_and_left_alone(toy, server, tmp_path, monkeypatch):
    theirs = tmp_path / "home/.textless/toy_bear.pt"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(DATA)
    path = download.find("toy", "tokenizer")
    assert path.name == "toy.pt" and path.resolve() == theirs and path.read_bytes() == DATA
    assert server.requests == [] and names_in(theirs.parent) == {"toy_bear.pt"}
    monkeypatch.setattr(download, "digest", None)  # hashed once: the second time it is known by size and date
    assert download.find("toy", "tokenizer") == path


@pytest.mark.parametrize("content", [b"", DATA[:-1]], ids=["empty", "cut"])
def test_a_damaged_file_of_textlesslib_is_passed_over(content, toy, server, tmp_path, monkeypatch):
    theirs = tmp_path / "elsewhere/toy_bear.pt"
    theirs.parent.mkdir()
    theirs.write_bytes(content)
    monkeypatch.setenv("TEXTLESS_CHECKPOINT_ROOT", str(theirs.parent))
    assert download.find("toy", "tokenizer").read_bytes() == DATA
    assert len(server.requests) == 1 and theirs.read_bytes() == content


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(bytes(len(DATA)))], ids=["gone", "changed"])
def test_a_file_of_textlesslib_that_goes_or_changes_is_downloaded(spoil, toy, server, tmp_path):
    theirs = tmp_path / "home/.textless/toy_bear.pt"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(DATA)
    path = download.find("toy", "tokenizer")
    spoil(theirs)
    assert download.find("toy", "tokenizer") == path and path.read_bytes() == DATA
    assert not path.is_symlink() and len(server.requests) == 1


def in_hub_cache(root, names):
    """A repository as the Hugging Face libraries keep it: blobs, and a snapshot of links to them."""
    folder = root / "models--org--name"
    snapshot = folder / "snapshots/0123abc"
    for place in (folder / "refs", folder / "blobs", snapshot):
        place.mkdir(parents=True)
    (folder / "refs/main").write_text("0123abc")
    for name, data in names.items():
        (folder / "blobs" / sha256(data)).write_bytes(data)
        (snapshot / name).symlink_to(folder / "blobs" / sha256(data))
    return snapshot


SHARDS = {"m-1-of-2.safetensors": b"one", "m-2-of-2.safetensors": b"two"}
INDEX = json.dumps({"weight_map": {"a": min(SHARDS), "b": max(SHARDS), "c": min(SHARDS)}}).encode()
BIN_INDEX = INDEX.replace(b".safetensors", b".bin")


@pytest.mark.parametrize("variable, value, root", [("HF_HOME", "hf", "hf/hub"), ("HF_HUB_CACHE", "hc", "hc"),
                                                   ("HOME", "home", "home/.cache/huggingface/hub")])
@pytest.mark.parametrize("files", [{"model.safetensors": b"w"}, {"pytorch_model.bin": b"w"},
                                   {"model.safetensors.index.json": INDEX, **SHARDS}], ids=["safetensors", "bin", "shards"])
def test_a_complete_snapshot_of_the_hugging_face_cache_is_used(variable, value, root, files, server, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, str(tmp_path / value))
    snapshot = in_hub_cache(tmp_path / root, {"config.json": b"{}", **files})
    assert download.find("org/name", "lm") == snapshot and server.requests == []


@pytest.mark.parametrize("files", [{"config.json": b"{}"}, {"model.safetensors": b"w"},
                                   {"config.json": b"{}", "model.safetensors": b""},
                                   {"config.json": b"{}", "model.safetensors.index.json": INDEX, "m-1-of-2.safetensors": b"one",
                                    "pytorch_model.bin": b"a reader would take the index first"},
                                   {"config.json": b"{}", "model.safetensors.index.json": b"{"}],
                         ids=["no-weights", "no-config", "empty-weights", "shard-missing", "index-damaged"])
def test_an_incomplete_snapshot_is_passed_over(files, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    in_hub_cache(tmp_path / "hf", files)
    repository(server, model__safetensors=b"whole")
    folder = download.find("org/name", "lm")
    assert folder == tmp_path / "ours/hub/org--name" and (folder / "model.safetensors").read_bytes() == b"whole"


# ---------------------------------------------------------------------------------------------- the hub

def test_a_repository_is_downloaded_once_with_its_config(server):
    repository(server, model__safetensors=DATA, generation_config__json=b"{}", pytorch_model__bin=b"not wanted")
    folder = download.find("org/name", "model")
    assert names_in(folder) == {"config.json", "generation_config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == DATA
    asked = len(server.requests)
    assert download.find("org/name", "lm") == folder and len(server.requests) == asked  # every kind, one cache


def test_without_safetensors_the_bin_file_is_taken(server):
    repository(server, pytorch_model__bin=DATA)
    folder = download.find("org/name", "lm")
    assert names_in(folder) == {"config.json", "pytorch_model.bin"}
    assert paths(server) == ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
                             "pytorch_model.bin"]


@pytest.mark.parametrize("name, index", [("model.safetensors", INDEX), ("pytorch_model.bin", BIN_INDEX)])
def test_all_shards_of_an_index_are_fetched_and_an_interruption_is_made_up_for(name, index, server):
    shards = {shard.replace(".safetensors", Path(name).suffix): data for shard, data in SHARDS.items()}
    repository(server, **{f"{name}.index.json": index}, **shards)
    last = server.pages.pop(REPOSITORY + max(shards))
    with pytest.raises(FileNotFoundError, match=max(shards)):
        download.find("org/name", "lm")
    server.pages[REPOSITORY + max(shards)] = last
    folder = download.find("org/name", "lm")
    assert {shard: (folder / shard).read_bytes() for shard in shards} == shards
    assert paths(server).count(min(shards)) == 1  # kept from the first call


@pytest.mark.parametrize("evil", ["../x.bin", "/etc/x.bin", "a/b.bin", "..", "", ".hidden.bin", "config.json", "x.py", 3, None,
                                  ["x"]])
def test_an_index_that_names_anything_but_weights_in_its_folder_is_refused(evil, server, tmp_path):
    index = json.dumps({"weight_map": {"a": "good.bin", "b": evil}}).encode()
    repository(server, **{"pytorch_model.bin.index.json": index, "good.bin": b"w", "x": b"escaped"})
    with pytest.raises(ValueError, match="index.json"):
        download.find("org/name", "lm")
    assert paths(server)[-1] == "pytorch_model.bin.index.json"
    assert "pytorch_model.bin.index.json" not in names_in(tmp_path)  # so that a repaired one is fetched


def test_a_repository_without_weights_is_an_error_that_lists_what_was_looked_for(server):
    repository(server, flax_model__msgpack=b"w")
    with pytest.raises(FileNotFoundError, match="has none of model.safetensors, .*pytorch_model.bin"):
        download.find("org/name", "lm")


def test_a_missing_repository_is_an_error_that_names_the_address(server):
    with pytest.raises(FileNotFoundError, match=f"{server.url}{REPOSITORY}config.json does not exist.*neither a local path"):
        download.find("org/name", "lm")


@pytest.mark.parametrize("code", [401, 403])
def test_a_gated_repository_is_an_error_that_tells_of_the_token(code, server):
    server.pages[REPOSITORY + "config.json"] = Page(code=code)
    with pytest.raises(PermissionError, match=rf"{REPOSITORY}config.json.*{code}.*gated.*HF_TOKEN"):
        download.find("org/name", "lm")
    assert len(server.requests) == 1


def test_the_token_goes_to_the_hub_and_to_no_other_host(server, servers, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    repository(server)
    elsewhere = Page(code=302, headers={"Location": f"{servers[1].url}/blob", "X-Linked-ETag": f'"{sha256(DATA)}"'})
    server.pages[REPOSITORY + "model.safetensors"] = Page(code=307, headers={"Location": "/org/renamed"})
    server.pages["/org/renamed"] = elsewhere
    servers[1].pages["/blob"] = Page(DATA)
    assert (download.find("org/name", "lm") / "model.safetensors").read_bytes() == DATA
    assert len(server.requests) == 4  # a redirect within the hub keeps it
    assert all(headers.get("Authorization") == "Bearer hf_secret" for _, headers in server.requests)
    assert len(servers[1].requests) == 1 and "hf_secret" not in str(servers[1].requests)


def test_the_token_is_not_sent_to_the_other_hosts_of_the_table(toy, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download.find("toy", "tokenizer")
    assert "hf_secret" not in str(server.requests)


@pytest.mark.parametrize("token", ["hf_se\ncret", "hf se cret", "hf_secr\u00e9t"])
def test_a_token_that_no_header_can_carry_is_refused_without_being_shown(token, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match="HF_TOKEN") as error:
        download.find("org/name", "lm")
    assert token not in str(error.value) and server.requests == []


@pytest.mark.parametrize("redirected", [True, False])
def test_the_hash_that_the_hub_states_is_checked(redirected, server, servers, tmp_path):
    repository(server)
    stated = {"X-Linked-ETag": f'"{sha256(b"something else")}"'}
    page = Page(code=302, headers={"Location": f"{servers[1].url}/blob", **stated}) if redirected else Page(DATA, headers=stated)
    server.pages[REPOSITORY + "model.safetensors"] = page
    servers[1].pages["/blob"] = Page(DATA)
    with pytest.raises(ValueError) as error:
        download.find("org/name", "lm")
    assert sha256(DATA) in str(error.value) and sha256(b"something else") in str(error.value)
    assert names_in(tmp_path / "ours") == {"config.json"}


def test_a_download_goes_on_behind_a_redirect(server, servers):
    repository(server)
    server.pages[REPOSITORY + "model.safetensors"] = Page(code=302, headers={"Location": f"{servers[1].url}/blob"})
    servers[1].pages["/blob"] = Page(DATA, etag='"blob"', breaks=[100_000])
    assert (download.find("org/name", "lm") / "model.safetensors").read_bytes() == DATA
    assert servers[1].sent == [100_000, len(DATA) - 100_000]


def test_https_is_not_left_for_http():
    request = urllib.request.Request("https://hub.example/file")
    redirects = download.Redirects()
    with pytest.raises(urllib.error.HTTPError, match="refusing a redirect from https to http"):
        redirects.redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://elsewhere.example/file")
    assert redirects.redirect_request(request, io.BytesIO(), 302, "Found", {}, "https://elsewhere.example/file")


def test_redirects_in_a_circle_end_in_an_error(toy, server):
    toy.code, toy.headers = 302, {"Location": "/" + TOY}
    with pytest.raises(OSError, match=TOY) as error:
        download.find("toy", "tokenizer")
    assert not isinstance(error.value, urllib.error.HTTPError)


@pytest.mark.slow
def test_two_processes_at_once_download_once(server, tmp_path):
    repository(server, model__safetensors=DATA)
    page, both_wait = server.pages[REPOSITORY + "model.safetensors"], threading.Event()
    answer = page.answer

    def slow(request):
        both_wait.wait(20)
        answer(request)

    page.answer = slow
    code = "from checkpoints import download; print('ready', flush=True); print(download.find('org/name', 'lm'))"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        limit = threading.Timer(60, process.kill)  # which ends the line that is waited for
        limit.daemon = True
        limit.start()
        assert process.stdout.readline() == "ready\n"
    threading.Timer(0.8, both_wait.set).start()  # by then the second one waits for the first
    found = [Path(process.communicate(timeout=30)[0].strip()) for process in processes]
    assert found == [tmp_path / "ours/hub/org--name"] * 2 and (found[0] / "model.safetensors").read_bytes() == DATA
    assert paths(server) == ["config.json", "generation_config.json", "model.safetensors"]


# ---------------------------------------------------------------------------------------------- zip archives

def zipped(members, **options):
    """{name or ZipInfo: bytes} -> the bytes of an archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data, **options)
    return buffer.getvalue()


def member(name, mode=0o100644):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def local(data, tmp_path, name="mine.zip"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize("prefix", ["", "TWIST-350M/"], ids=["flat", "nested"])
def test_a_released_model_is_downloaded_unpacked_and_its_zip_removed(prefix, server, tmp_path):
    members = {f"{prefix}config.json": b"{}", f"{prefix}pytorch_model.bin": DATA, "__MACOSX/._config.json": b"junk"}
    server.pages["/textless_nlp/twist/lms/TWIST-350M.zip"] = Page(zipped(members))
    folder = download.find("TWIST-350M", "model")
    assert folder == tmp_path / "ours/model/TWIST-350M" / prefix
    assert (folder / "pytorch_model.bin").read_bytes() == DATA and not list(tmp_path.rglob("*.zip"))
    assert download.find("TWIST-350M", "model") == folder and len(server.requests) == 1


def test_a_local_zip_is_unpacked_once_and_anew_when_it_changes(tmp_path):
    path = local(zipped({"config.json": b"{}"}), tmp_path)
    folder = download.find_zip(path)
    (folder / "mark").touch()
    assert download.find_zip(str(path)) == folder and (folder / "mark").exists() and path.exists()
    local(zipped({"config.json": b'{"new": 1}'}), tmp_path)
    assert (download.find_zip(path) / "config.json").read_bytes() == b'{"new": 1}'
    with pytest.raises(FileNotFoundError, match="other.zip"):
        download.find_zip(tmp_path / "other.zip")


@pytest.mark.parametrize("evil", [member("../evil"), member("a/../../evil"), member("/tmp/evil"), member("a\\..\\evil"),
                                  member("C:/evil"), member("evil", 0o120777), member("evil", 0o020666)],
                         ids=["parent", "deep-parent", "absolute", "backslash", "drive", "link", "device"])
def test_an_archive_that_reaches_out_of_its_folder_is_refused_whole(evil, tmp_path):
    path = local(zipped({"config.json": b"{}", evil: b"/etc/passwd"}), tmp_path)
    with pytest.raises(ValueError, match="mine.zip: .*nothing was unpacked"):
        archive.unzip(path, tmp_path / "in/side")
    assert names_in(tmp_path) == {"mine.zip"} and not (tmp_path / "in/side").exists()


def test_an_encrypted_archive_is_refused(tmp_path):
    data = bytearray(zipped({"config.json": b"{}"}))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # bit 0 of the flags in both headers
        data[data.index(signature) + offset] |= 1
    with pytest.raises(ValueError, match="encrypted"):
        archive.unzip(local(data, tmp_path), tmp_path / "out")


@pytest.mark.parametrize("claim", [len(DATA) + 1, len(DATA) - 1, 10])
def test_an_archive_that_lies_about_a_size_is_refused(claim, tmp_path):
    data = zipped({"config.json": b"{}", "big": DATA})
    lie = data.replace(len(DATA).to_bytes(4, "little"), claim.to_bytes(4, "little"))
    assert lie != data
    with pytest.raises(ValueError, match="mine.zip is damaged"):
        archive.unzip(local(lie, tmp_path), tmp_path / "out")
    assert names_in(tmp_path) == {"mine.zip"}


def test_an_archive_cut_short_anywhere_is_refused(tmp_path):
    data = zipped({"config.json": b"{}", "model.safetensors": os.urandom(300)})
    for length in range(0, len(data), 7):
        with pytest.raises(ValueError, match="mine.zip is (damaged or no zip|empty)"):
            archive.unzip(local(data[:length], tmp_path), tmp_path / "out")
    assert names_in(tmp_path) == {"mine.zip"}


@pytest.mark.slow
def test_a_damaged_byte_in_an_archive_is_found(tmp_path):
    data = bytearray(zipped({"config.json": b"{}", "model.safetensors": os.urandom(300)}))
    for position in range(len(data)):
        spoilt = data.copy()
        spoilt[position] ^= 0xFF
        try:
            archive.unzip(local(spoilt, tmp_path), tmp_path / f"out{position}")
        except (ValueError, OSError) as error:
            assert "mine.zip" in str(error)
            assert not (tmp_path / f"out{position}").exists()
        else:  # a date, an attribute or a name: the contents are as they were
            contents = [path.read_bytes() for path in (tmp_path / f"out{position}").rglob("*") if path.is_file()]
            assert {len(content) for content in contents} <= {2, 300}


def test_an_archive_too_large_for_the_disk_is_an_error_before_anything_is_unpacked(tmp_path, monkeypatch):
    path = local(zipped({"config.json": b"{}", "big": DATA}), tmp_path)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: Usage(free=len(DATA)))
    with pytest.raises(OSError, match="are needed in"):
        download.find_zip(path)
    assert names_in(tmp_path) == {"mine.zip"}


def test_a_folder_that_exists_is_never_unpacked_over(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists already; delete it"):
        archive.unzip(local(zipped({"config.json": b"{}"}), tmp_path), tmp_path / "out")


def test_a_member_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zipped({member("config.json"): b"{}", member("config.json"): b"{ }"})
    with pytest.raises(OSError, match="mine.zip"):
        archive.unzip(local(data, tmp_path), tmp_path / "out")


@pytest.mark.parametrize("members", [{"readme": b""}, {"a/config.json": b"{}", "b/config.json": b"{}"},
                                     {"a/b/config.json": b"{}"}], ids=["none", "two", "too-deep"])
def test_a_folder_without_one_config_is_an_error_that_says_what_was_found(members, tmp_path):
    path = local(zipped(members), tmp_path)
    with pytest.raises(ValueError, match="holds (readme|a, b|a): expected config.json"):
        download.find_zip(path)
