"""The known names -> local files: the caches that are searched, the downloads.

    name of known.py | org/name of the Hugging Face hub --find--> our cache, ~/.textless, the Hugging Face cache: here already?
    if not: network --> NAME.part (goes on where it broke) --size, sha256--> renamed to NAME --a zip--> unpacked to a folder

A file under its own name is whole: writing happens under another name, and the rename comes last. Foreign caches are read
only; what they hold of the table is linked into ours, so a vocoder's four files stand side by side wherever they came from.

    NANOTWIST_HOME            our cache, default ~/.cache/nanotwist: KIND/NAME/ for the table, hub/ORG--NAME/, zip/, checked/
    NANOTWIST_MIRROR          instead of https://dl.fbaipublicfiles.com
    TEXTLESS_CHECKPOINT_ROOT  textlesslib's cache, default ~/.textless
    HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HOME, HF_HUB_OFFLINE: as in huggingface_hub, but OFFLINE holds for every host

Sources: resuming, RFC 9110 sections 13.1.5 (If-Range) and 14 (Range); addresses of the hub, its cache and its X-Linked-ETag,
the documentation of huggingface_hub.
"""
import contextlib
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import config
from checkpoints.archive import model_folder, room_for, unzip
from checkpoints.known import KNOWN

ATTEMPTS = 3  # connections a file may cost; each goes on where the last one broke
WAIT = 1.0  # seconds before the second attempt, twice as long before the third
TIMEOUT = 30.0  # seconds of silence after which a connection counts as broken
CHUNK = 1 << 20  # bytes between two looks at the progress bar
WEIGHTS = ("model.safetensors", "model.safetensors.index.json",  # of a model folder, the first that exists
           "pytorch_model.bin", "pytorch_model.bin.index.json")  # is the one that is read
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # org/name
SHARD = re.compile(r"\w[\w.-]*\.(safetensors|bin)", re.ASCII)  # a plain file name: no folder, nothing hidden
FROM_HUB = ("lm", "model", "tokenizer")  # kinds that org/name can be
CACHES = {"NANOTWIST_HOME": "~/.cache/nanotwist", "TEXTLESS_CHECKPOINT_ROOT": "~/.textless",
          "HF_HUB_CACHE": "~/.cache/huggingface/hub"}  # environment variable -> the folder where it is not set
HOSTS = {"NANOTWIST_MIRROR": "https://dl.fbaipublicfiles.com", "HF_ENDPOINT": "https://huggingface.co"}  # likewise


def cache(variable):
    value = os.environ.get(variable)
    if variable == "HF_HUB_CACHE" and not value and os.environ.get("HF_HOME"):
        value = os.environ["HF_HOME"] + "/hub"
    return Path(value or CACHES[variable]).expanduser().absolute()


def host(variable):
    return (os.environ.get(variable) or HOSTS[variable]).rstrip("/")


def hub_token():
    """HF_TOKEN or None. One that no header can carry is refused here, where the message need not quote it."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise ValueError("HF_TOKEN holds a space, a line break or another character that no token has; copy it again")
    return token or None


def whole(path):
    """Whether a file is there, readable and not empty. Its content is not looked at: it has its name because it is whole."""
    return os.path.isfile(path) and os.access(path, os.R_OK) and path.stat().st_size > 0


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trusted(path, sha256):
    """Whether a file is there with the right content. One that was hashed is known again by its place, size and date."""
    if not whole(path) or sha256 is None:
        return whole(path)
    status, record = path.stat(), cache("NANOTWIST_HOME") / "checked" / sha256
    seen = f"{status.st_size} {status.st_mtime_ns} {path.resolve()}\n"
    if record.is_file() and record.read_text() == seen:
        return True
    if digest(path) != sha256:
        return False
    with contextlib.suppress(OSError):  # a cache that may not be written to is hashed at every start
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(seen)
    return True


def read_index(index):
    """{name of a tensor: its weight file} of an index. It comes from a stranger, so the files must be plain names."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        strange = [name for name in weight_map.values() if not SHARD.fullmatch(name)]
    except (ValueError, LookupError, TypeError, AttributeError):
        weight_map = None
    if not weight_map:
        raise ValueError(f"{index} has no table `weight_map` of tensor and file names; get it again")
    if strange:
        raise ValueError(f"{index} points outside its folder, or to no weight file ({strange[0]!r}); refusing to follow it")
    return weight_map


def complete(folder):
    """Whether a folder of the hub's layout has config.json and all weights."""
    weights = next((folder / name for name in WEIGHTS if whole(folder / name)), None)
    if weights is None or not whole(folder / "config.json"):
        return False
    try:
        return weights.suffix != ".json" or all(whole(folder / name) for name in set(read_index(weights).values()))
    except ValueError:
        return False


def snapshot(repository):
    """Where the Hugging Face cache keeps `main` of org/name, if it does."""
    folder = cache("HF_HUB_CACHE") / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / "main"
    return folder / "snapshots" / (reference.read_text(errors="replace").strip() if whole(reference) else "none")


def places(repository):
    """Where our cache and the Hugging Face cache keep org/name, or would."""
    return cache("NANOTWIST_HOME") / "hub" / repository.replace("/", "--"), snapshot(repository)


def lock(file, wait=True):
    """Hold the lock of an open file until it is closed or its process ends; BlockingIOError if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def once(place, done, work):
    """Work unless it is done, one process at a time: the others wait, and find it done. A lock ends with its process."""
    if done():
        return
    path = place.with_name(place.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
        lock(file)
    except OSError as error:
        raise OSError(f"cannot write and lock {path} ({error.strerror}); set NANOTWIST_HOME to another folder") from None
    with file:
        if not done():
            work()


class Broken(OSError):
    """The connection failed or the answer was cut short: worth another attempt."""


class Missing(FileNotFoundError):
    """The server is there, the file is not."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects. The token stays with the host it was meant for, and https is never left for http."""

    stated = None  # sha256 of the file as the hub states it, in its own answer: the redirect

    def redirect_request(self, request, response, code, message, headers, url):
        self.stated = self.stated or stated_sha256(headers)
        new = super().redirect_request(request, response, code, message, headers, url)
        old, target = urlsplit(request.full_url), urlsplit(new.full_url)
        if target.scheme not in (old.scheme, "https"):
            raise urllib.error.HTTPError(url, code, f"refusing a redirect from {old.scheme} to {url}", headers, response)
        token = request.unredirected_hdrs.get("Authorization")  # urllib copies only the other headers
        if token and old[:2] == target[:2]:
            new.add_unredirected_header("Authorization", token)
        return new


def stated_sha256(headers):
    value = headers.get("X-Linked-ETag", "").strip('"').lower()
    return value if re.fullmatch("[0-9a-f]{64}", value) else None


def validator(headers):
    """What If-Range may hold, a strong ETag or else the date of the last change; None if the server gives neither."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def beside(part):
    return part.with_name(part.name + ".json")  # which version of the file the part is of


def discard(part):
    part.unlink(missing_ok=True)
    beside(part).unlink(missing_ok=True)


def resume_point(url, part):
    """(bytes here, validator of their version), or (0, None) where a rest could not be told to belong to them."""
    try:
        known = json.loads(beside(part).read_text())
        offset = part.stat().st_size
        return (offset, known["validator"]) if offset and known["url"] == url and known["validator"] else (0, None)
    except (OSError, ValueError, LookupError, TypeError):
        return 0, None


def extent(response):
    """(first byte, size of the whole file) that an answer claims; the size is None, or the first byte -1, if it does not say."""
    if response.status != 206:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    claim = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return (int(claim[1]), int(claim[2])) if claim else (-1, None)


def transfer(url, part, token):
    """Bring `part` to its full size, from where it stands. Returns the sha256 that the hub states, or None.

    Raises: HTTPError for an answer that is a refusal; Broken, with what has come kept in `part`; OSError of the disk.
    """
    offset, version = resume_point(url, part)
    rest = {"Range": f"bytes={offset}-", "If-Range": version} if offset else {}
    redirects = Redirects()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "nanotwist", **rest})
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        discard(part)  # the file has no such rest; the next attempt asks for all of it
        raise Broken("the server does not have the range that is missing") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a malformed address
        raise Broken(getattr(error, "reason", None) or error) from None
    with response:
        start, total = extent(response)  # start is 0 where the server ignores ranges or has another version now
        if start not in (0, offset) or start and validator(response.headers) not in (version, None):
            discard(part)
            raise Broken("the server sent another range or version than it was asked for")
        if total is None and not response.chunked:  # a connection cut short would look like the end
            raise OSError(f"{url}: the server does not say how large the file is; use another mirror")
        if not start:
            discard(part)
        receive(response, url, part, total)
    return redirects.stated or stated_sha256(response.headers)


def receive(response, url, part, total):
    """Append the body of an answer to `part`, with a progress bar on a terminal."""
    try:
        with open(part, "ab") as file:
            offset = file.tell()
            if not offset:
                beside(part).write_text(json.dumps({"url": url, "validator": validator(response.headers)}))
            room_for((total or 0) - offset, part.parent)
            with config.progress(total=total, initial=offset, desc=part.stem, unit="B", unit_scale=True) as bar:
                while chunk := read(response):
                    file.write(chunk)
                    bar.update(len(chunk))
    except OSError as error:
        if error.errno is None:  # ours, and a sentence already
            raise
        raise OSError(f"cannot write {part} ({error.strerror}); set NANOTWIST_HOME to another disk") from None
    if total not in (None, part.stat().st_size):
        raise Broken(f"the connection ended after {part.stat().st_size} of {total} bytes")


def read(response):
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"the connection broke ({error})") from None


def fetch(url, path, sha256=None, repository=None):
    """A file from the network -> path, whole and checked, or an error. `repository` is org/name if the hub is asked."""
    need = f"; the folder needs config.json and the first of {', '.join(WEIGHTS)} that exists, an index with its shards"
    by_hand = (f"get {url} where there is a network and put it at {path}{need if repository else ''} (searched before any "
               f"download: {', '.join(f'{variable}={cache(variable)}' for variable in CACHES)})")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise OSError(f"HF_HUB_OFFLINE forbids the network; {by_hand}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(ATTEMPTS):
        time.sleep(WAIT * attempt)
        try:
            stated = transfer(url, part, hub_token() if repository else None)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in (408, 429):
                raise refusal(error, url, repository, by_hand) from None
            trouble = f"{error.code} {error.reason}"
        except Broken as error:
            trouble = error
    else:
        raise OSError(f"no whole file from {url} in {ATTEMPTS} attempts, the last: {trouble}; try again, or {by_hand}")
    expected = sha256 or stated
    found = digest(part) if expected else None
    if found != expected:
        discard(part)
        raise ValueError(f"{url} arrived with sha256 {found}, expected {expected}; it was thrown away: try again, or {by_hand}")
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    discard(part)  # what stood beside it


def refusal(error, url, repository, by_hand):
    """The error to raise for an answer that no further attempt would change."""
    if error.code == 404:
        return Missing(f"{url} does not exist (404); check the name" + (
            f": {repository} is neither a local path nor a repository with that file" if repository else ", or NANOTWIST_MIRROR"))
    if error.code in (401, 403) and repository:
        return PermissionError(f"{url} is refused ({error.code}): {repository} is a gated or private repository, or none at all; "
                               "accept its conditions on its page and set HF_TOKEN to a token that may read it")
    return OSError(f"{url} is refused ({error.code} {error.reason}); {by_hand}")


def find_zip(path):
    """A local .zip of a model -> the folder it was unpacked to, in our cache. A changed file is unpacked anew."""
    path = Path(path)
    status = path.stat()
    version = hashlib.sha256(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache("NANOTWIST_HOME") / "zip" / f"{path.stem}-{version}"
    once(folder, folder.is_dir, lambda: unzip(path, folder))
    return model_folder(folder)


def known_files(files, place):
    """Files of the table, side by side in a folder: linked to textlesslib's, or downloaded."""
    for file in files:
        target, theirs = place / file.name, cache("TEXTLESS_CHECKPOINT_ROOT") / (file.textless or file.name)
        if trusted(target, file.sha256):
            continue
        if target.is_symlink():
            target.unlink()  # what it points to has changed or gone
        elif whole(target):
            raise ValueError(f"{target} has sha256 {digest(target)}, expected {file.sha256}; delete it to download it anew")
        if trusted(theirs, file.sha256):
            place.mkdir(parents=True, exist_ok=True)
            target.symlink_to(theirs)
        else:
            fetch(f"{host('NANOTWIST_MIRROR')}/{file.url}", target, file.sha256)


def known_model(file, folder):
    """A zip of the table -> the folder it is unpacked to. The zip itself is not kept."""
    known_files([file], folder.parent)
    unzip(folder.parent / file.name, folder)
    (folder.parent / file.name).unlink()


def download_repository(repository, folder):
    address = f"{host('HF_ENDPOINT')}/{repository}/resolve/main"

    def get(name):
        if not whole(folder / name):
            fetch(f"{address}/{name}", folder / name, repository=repository)

    get("config.json")
    with contextlib.suppress(Missing):
        get("generation_config.json")  # before the weights, since with them the folder counts as complete
    for name in WEIGHTS:
        try:
            get(name)
        except Missing:
            continue
        if name.endswith(".json"):
            try:
                shards = sorted(set(read_index(folder / name).values()))
            except ValueError:
                (folder / name).unlink()  # or it would be in the way of a repaired one
                raise
            for shard in shards:
                get(shard)
        return
    raise FileNotFoundError(f"{address} has none of {', '.join(WEIGHTS)}; a model in another format cannot be read")


def find(name, kind):
    """A known name -> a local folder (models; anything of the hub) or file, downloaded if no cache has it. kind: of KNOWN.

    Raises: ValueError for a name that is not known or a file with wrong content; OSError if it cannot be had.
    """
    if kind == "vocoder" and name in KNOWN["tokenizer"]:  # the vocoder of its units
        name = f"{KNOWN['tokenizer'][name].kmeans}-hifigan"
    if name in KNOWN[kind]:
        files, place = KNOWN[kind][name].files, cache("NANOTWIST_HOME") / kind / name
        if kind == "model":
            once(place, place.is_dir, lambda: known_model(files[0], place))
            return model_folder(place)
        once(place, lambda: all(trusted(place / file.name, file.sha256) for file in files), lambda: known_files(files, place))
        return place / files[0].name
    if kind in FROM_HUB and REPOSITORY.fullmatch(name) and "--" not in name and ".." not in name:
        folder, theirs = places(name)
        if complete(theirs) and not complete(folder):
            return theirs
        once(folder, lambda: complete(folder), lambda: download_repository(name, folder))
        return folder
    hub = ["any org/name of the Hugging Face hub (such as facebook/opt-125m)"] if kind in FROM_HUB else []
    raise ValueError(f"--{kind}={name}: no such name; give {', '.join([*KNOWN[kind], *hub])} or a local path")
