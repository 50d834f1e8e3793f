"""Weights on disk -> {their name: tensor}, safely; names -> files.

    folder (config.json + *.safetensors | *.bin [+ index.json]) --open_tensors--> {name: tensor}, names untouched
    fairseq .pt   --read_fairseq--> its settings, {name: tensor}
    k-means .bin  --read_kmeans-->  centres (K, C), layer

No foreign pickle is executed: pickles.py reads them all. Everything that this project writes is safetensors and JSON, under
a temporary name first, so a file that exists is whole.
"""
import contextlib
import difflib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import tokenize
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoints import download, pickles
from checkpoints.archive import model_folder
from checkpoints.recognise import WANTED, is_safetensors, note, recognise, refuse_stranger, sound

POCKET = Path(__file__).parent.parent / "pocket"
KINDS = {  # what an option asks for -> where the pocket world keeps it
    "lm": POCKET / "text_lm", "model": POCKET / "speech_lm", "tokenizer": POCKET / "hubert",
    "kmeans": POCKET / "hubert/kmeans.safetensors", "vocoder": POCKET / "vocoder", "units": POCKET / "units",
}
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # some network disks have none: there the user must see to it
MOST_NAME = 255  # bytes of a file's name, on all common disks
OURS = ("runs", "units", "build", "results", "pocket")  # folders that this project writes to
SHARD_BYTES = 5 * 1024**3  # above this a model is written as several files with an index
CENTRES = ("cluster_centers_", "cluster_centers", "centers", "centroids", "kmeans")  # or their estimator
# what torch.compile, FSDP, activation checkpointing, DeepSpeed and DDP put into the names of tensors
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|^module)\.")
NESTED = ("generator", "state_dict", "model_state_dict", "model", "module", "net", "params")  # where trainers keep the tensors


def find(name, kind):
    """A local folder or file, `pocket`, or a known name (downloaded once, see download.py) -> Path.

    Args: kind: lm, model, tokenizer, kmeans or vocoder, as the option is called that names it; or units, which several do.
    Raises: FileNotFoundError if there is nothing here and nothing can be fetched. For what looks like a path nothing is asked.
    """
    path = KINDS[kind] if name == "pocket" else Path(name).expanduser()
    if path.exists():
        return download.find_zip(path) if path.suffix.lower() == ".zip" and path.is_file() else path
    missing = f"{path}: no such file or folder" if kind == "units" else f"--{kind}={name}: no such file or folder ({path})"
    if "://" in name or name.startswith("huggingface.co/"):
        raise FileNotFoundError(f"--{kind}={name} is an address: give org/name as it stands there, or a downloaded folder")
    if kind == "units" or looks_local(name):
        beside = path.parent.iterdir() if path.parent.is_dir() and path.name else ()
        near = difflib.get_close_matches(path.name, [other.name for other in beside], n=1)
        raise FileNotFoundError(f"{missing}; " + (f"did you mean {path.with_name(near[0])}?" if near else
                                                  "give a local folder, or `pocket`, which comes with the repository"))
    try:
        return download.find(name, kind)
    except (ValueError, OSError) as error:
        raise FileNotFoundError(f"{missing}; " + str(error).removeprefix(f"--{kind}={name}: ")) from None


def looks_local(name):
    """Whether a name is meant as a path: by how it begins or ends, by its depth, or because its first folder is here or ours."""
    first, slash, rest = name.partition("/")
    return (not name or name[0] in "./~" or "/" in rest or bool(slash) and (not rest or first in OURS or Path(first).is_dir())
            or Path(name).suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".zip", ".json", ".npy"))


def find_model(name, kind):
    """As find, for a model: the folder that holds config.json, which may stand in the one that was named, or around the file."""
    path = find(str(name), kind)
    shard = re.fullmatch(r"(pytorch_)?model-\d+-of-\d+\.(safetensors|bin)", path.name)
    inside = (shard or path.name in ("config.json", *download.WEIGHTS)) and (path.parent / "config.json").is_file()
    if (folder := path.parent if inside else model_folder(path)) != path:
        note(f"--{kind}={name}: the model is in {folder}")
    if not (folder / "config.json").exists() and (kind != "tokenizer" or path.is_dir()):  # fairseq's HuBERTs are one file
        raise FileNotFoundError(f"--{kind}={name}: {misfit(path)}")
    return folder


def misfit(path):
    """What an existing path is that holds no model, as a sentence."""
    held = f"holds {', '.join(sorted(each.name for each in path.iterdir())[:5])}" if path.is_dir() else "is one file"
    return f"no config.json in {path}, which {recognise(path) or f'{held}: give a {WANTED}'}"


def read_json(path):
    path = Path(path)
    if not path.is_file():
        model = path.name == "config.json" and path.parent.exists()
        raise FileNotFoundError(misfit(path.parent) if model else f"no file at {path}")
    refuse_stranger(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object; copy the file again")
    return value


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    write_bytes(path, text.encode("utf-8", "surrogateescape"))  # names of files need not be UTF-8


def write_beside(path, text):
    """Write text. Other text that stands there is kept, the oldest as number 1: result.json -> result-1.json."""
    path = Path(path)
    with alone(path.parent):
        if path.is_file() and path.read_bytes() != text.encode("utf-8", "surrogateescape"):
            numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
            os.replace(path, next(other for other in numbered if not other.exists()))
        write_text(path, text)


@contextlib.contextmanager
def alone(folder):
    """One process at a time chooses free names in a folder and writes there; others wait for it, where locks are known."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # what cannot be written is said when it is
            Path(folder).mkdir(parents=True, exist_ok=True)
            place = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, place)
            download.lock(place)
        yield


def write_bytes(path, content, temporary=None):
    """temporary: the name to write under where several processes write the same file."""
    with replacing(path, temporary) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path, temporary=None):
    """Yields a temporary name to write under; what stands there is on the disk before the file has its own.

    Raises: OSError that names the file and the reason, if it cannot be written; then nothing of it is left.
    """
    path = Path(path)
    name = os.fsencode(path.name)
    short = path.name if len(name) <= MOST_NAME - 4 else hashlib.sha256(name).hexdigest()
    temporary = temporary or path.with_name(f"{short}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        told = OSError(f"cannot write {path} ({getattr(error, 'strerror', None) or error}); make room, or give another place")
        told.errno = getattr(error, "errno", None)
        raise told from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # it is there if something went wrong


@contextlib.contextmanager
def locked(folder, what):
    """A folder that this process alone works in until the block, or the process, ends: it holds folder/.lock.

    Args: folder: made if it is not there, and removed again if nothing is written. what: it holds, for the sentence (run, units).
    Raises: ValueError if another process works in it.
    """
    folder = Path(folder)
    path = folder / ".lock"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            download.lock(file, wait=False)
            held = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))  # else its last holder removed it
        except OSError as error:
            held = error.errno in NO_LOCKS
        if not held:
            raise ValueError(f"{folder}: another process is at work on the {what} there; wait until it has ended, or name "
                             "another folder")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                folder.rmdir()  # if it is empty


class Lazy(Mapping):
    """{name: tensor}, each read when it is asked for, so memory holds what is used.

    Args: places: {name: where its tensor is}. read: function (name, that place) -> tensor.
    """

    def __init__(self, places, read):
        self.places, self.read = places, read

    def __getitem__(self, name):
        return self.read(name, self.places[name])

    def __contains__(self, name):
        return name in self.places  # a Mapping's own would read the tensor

    def __iter__(self):
        return iter(self.places)

    def __len__(self):
        return len(self.places)


def open_tensors(path):
    """All tensors of a weight file or model folder (there of the first of download.WEIGHTS), dtypes as stored: a Mapping.

    Names are those of the file, less what compiling and distributing a model puts into them.
    Raises: FileNotFoundError naming what was looked for; ValueError for a truncated or foreign file.
    """
    path = Path(path)
    if path.is_dir():
        present = [name for name in download.WEIGHTS if (path / name).is_file()]
        if not present:
            raise FileNotFoundError(f"no model.safetensors or pytorch_model.bin (or their .index.json) in {path}, which "
                                    + (recognise(path) or "holds no weights"))
        path = path / present[0]
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}; the download or copy is incomplete")
    refuse_stranger(path)
    if path.name.endswith(".index.json"):
        return open_sharded(path)
    if not is_safetensors(path):
        return read_pickle(path)

    def read(_, name):
        with open_safetensors(path) as file:  # opened for each tensor: a mapped file counts as memory until it is closed
            return file.get_tensor(name)

    with open_safetensors(path) as file:
        return Lazy(unwrapped(file.keys(), path), read)


def unwrapped(names, path):
    """{name: its name in the file}, without the names of wrappers, which is said where there were any."""
    plain = {WRAPPERS.sub("", name): name for name in names}
    if changed := next((name for name, stored in plain.items() if name != stored), None):
        note(f"{path}: {plain[changed]} is taken as {changed}: so are models saved that were compiled or distributed")
    return plain if len(plain) == len(names) else dict(zip(names, names))


def open_sharded(index):
    """The shards that an index names; every tensor must be where it says, and nothing may be missing."""
    weight_map, opened = download.read_index(index), {}

    def tensors(shard):
        if shard not in opened:
            opened.clear()  # of .bin files, the tensors of one are in memory at a time
            opened[shard] = open_tensors(index.parent / shard)
        return opened[shard]

    for shard in sorted(set(weight_map.values())):
        missing = sorted(name for name, place in weight_map.items()
                         if place == shard and WRAPPERS.sub("", name) not in tensors(shard))
        if missing:
            raise ValueError(f"{index} promises {len(missing)} tensors that {shard} lacks, e.g. {missing[0]}; copy both again")
    plain = unwrapped(weight_map, index)
    return Lazy(plain, lambda name, stored: tensors(weight_map[stored])[name])


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); copy it again") from None


def read_tensors(path):
    """As open_tensors, with every tensor read: {name: tensor}."""
    return dict(open_tensors(path))


def read_pickle(path):
    """A pickle of tensors -> {name: tensor}, with any other entries (a trainer's step) that are plain data."""
    tensors = pickles.load(path)
    if isinstance(tensors, dict):
        tensors = next((tensors[key] for key in NESTED if isinstance(tensors.get(key), dict)), tensors)
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{path} holds no dictionary of tensors; save the state_dict() of the model")
    foreign = [name for name, value in tensors.items() if isinstance(value, pickles.Inert) or not isinstance(name, str)]
    if foreign:
        raise ValueError(f"{path} holds things that are no tensors ({str(foreign[0]):.60}); convert it to safetensors")
    return {name: tensors[stored] for name, stored in unwrapped(tensors, path).items()}


def find_generator(path):
    """The weight file in a vocoder's folder, if a trainer named it: the latest g_00400000, or the one .pt file; else `path`."""
    refuse_stranger(path)
    if path.name == "config.json" and path.is_file():
        path = path.parent
        note(f"the vocoder is in {path}")
    if path.is_dir() and not any((path / name).is_file() for name in download.WEIGHTS):
        found = sorted(path.glob("g_[0-9]*"), key=lambda file: (len(file.name), file.name))[-1:] or sorted(path.glob("*.pt"))
        if len(found) > 1:
            raise ValueError(f"{path} holds {', '.join(file.name for file in found[:4])}: name the one that is the generator")
        if found:
            note(f"{path}: its generator is {found[0].name}")
            return found[0]
    return path


def read_generator(path):
    tensors = read_tensors(path)
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds {str(list(tensors)[:3]):.80}, not the tensors of a generator; give its g_... file")
    return {name: sound(tensor, name, path) for name, tensor in tensors.items()}


def held(value):
    """What a wrapper in a trainer's settings holds: an object's attributes, omegaconf's content, an enum's value; else itself."""
    for _ in range(2):  # omegaconf wraps an enum once more; a forged wrapper may hold itself
        if type(value) is pickles.Inert and type(value.state) is dict:
            value = value.state.get("_content", value.state.get("_val", value.state))
        elif type(value) is pickles.Inert and value.args and len(value.args) == 1:
            value = value.args[0]
    return value


def read_fairseq(path):
    """A fairseq checkpoint -> (its settings as one flat dictionary, {name: tensor} of the network).

    The settings stand in `args` (a Namespace) in files before fairseq 0.11, in `cfg` (sections of dictionaries, Namespaces or
    omegaconf containers) after; stripped copies have neither.
    """
    refuse_stranger(path)
    value = pickles.load(path)
    tensors = value.get("model") if isinstance(value, dict) else None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is no fairseq checkpoint: it has no `model` that is a dictionary of tensors; give the .pt file "
                         "of a HuBERT, or a Hugging Face folder")
    tensors = {name: tensors[stored] for name, stored in unwrapped(tensors, path).items()}
    cfg = held(value.get("cfg") or {})
    sections = [value.get("args"), cfg.get("task"), cfg.get("model")] if isinstance(cfg, dict) else []
    sections = [section for section in map(held, sections) if isinstance(section, dict)]
    return {key: held(setting) for section in sections for key, setting in section.items()}, tensors


def read_kmeans(path):
    """A k-means file -> centres (K, C) float32, and what the file says of them, as text by name: layer, frame_rate, model.

    Our safetensors (`centers`, the rest in its header); a pickle of an estimator, a dictionary or the array; .npy.
    """
    path = Path(path)
    refuse_stranger(path)
    if is_safetensors(path):
        with open_safetensors(path) as file:
            if "centers" not in file.keys():
                raise ValueError(f"{path} has no tensor `centers`, only {sorted(file.keys())[:3]}")
            return sound(file.get_tensor("centers"), "centers", path).float(), file.metadata() or {}
    with open(path, "rb") as file:
        array = file.read(6) == b"\x93NUMPY"
    state = read_npy(path) if array else pickles.load(path)
    for _ in range(3):  # an estimator's attributes, perhaps in a dictionary of other things
        state = state.state if isinstance(state, pickles.Inert) else state
        if isinstance(state, dict):
            state = next((state[key] for key in CENTRES if key in state), *state.values() if len(state) == 1 else [None])
    if isinstance(state, np.ndarray) and state.dtype.kind in "fiu":
        state = torch.from_numpy(state.astype(np.float32))  # of either byte order
    if not isinstance(state, torch.Tensor) or state.ndim != 2 or not state.numel():
        raise ValueError(f"{path} holds no table of centres (K, C); give one KMeans's joblib dump, or safetensors with `centers`")
    return sound(state, "the table of centres", path).float(), {}


def read_npy(path):
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: no more than the file has, whatever it promises
    except (ValueError, EOFError, TypeError, OverflowError, MemoryError, SyntaxError, tokenize.TokenError):  # of a header
        raise ValueError(f"{path} is no array of numbers, or damaged; copy it again") from None


def write_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as one safetensors file, atomically. Shared storage is written once a name."""
    plain, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt", **(metadata or {})})
        temporary.chmod(0o644)  # safetensors makes it readable by the owner alone


def refuse_existing(path, overwrite=False, remedy="give another --out, or --overwrite to replace it"):
    """Raise ValueError if a path holds something, a file or a folder that is not empty, unless the user says --overwrite."""
    path = Path(path)
    if not overwrite and (any(path.iterdir()) if path.is_dir() else path.exists()):
        raise ValueError(f"{path} is there already; {remedy}")


def write_model(folder, config, tensors, shard_bytes=SHARD_BYTES):
    """Write a Hugging Face style folder: config.json + model.safetensors, in several files with an index if large.

    The folder is built under a temporary name and swapped in, so a reader sees the old model or the new one. All that the old
    one held is gone then, so a folder that is no model's is refused.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds files, but no model (no config.json): it is not replaced; give another folder")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    try:
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
            write_json(temporary / "model.safetensors.index.json",
                       {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                        "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}})
        for name, shard in zip(names, shards):
            write_tensors(temporary / name, shard)
        write_json(temporary / "config.json", config)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    replace_folder(temporary, folder)


def replace_folder(temporary, folder):
    """Move a finished folder into place; the one it replaces is set aside first, and removed last."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
