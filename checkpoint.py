"""Weights on disk -> {their name: tensor}, safely; the known names -> folders.

    folder (config.json + *.safetensors | *.bin [+ index.json]) --read_tensors--> {name: tensor}, names untouched

No foreign pickle is executed: .bin and .pt files are opened with torch's `weights_only=True`. Everything that this
project writes is safetensors and JSON, under a temporary name first, so a file that exists is whole.
"""
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

POCKET = Path(__file__).parent / "pocket"
KINDS = {  # what an option asks for -> where the pocket world keeps it
    "lm": POCKET / "text_lm", "model": POCKET / "speech_lm", "tokenizer": POCKET / "hubert",
    "vocoder": POCKET / "vocoder", "units": POCKET / "units",
}
SHARD_BYTES = 5 * 1024**3  # above this a model is written as several files with an index
DAMAGED = (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
           pickle.UnpicklingError, struct.error, zipfile.BadZipFile)  # what a damaged pickle makes torch.load raise


def find(name, kind):
    """A local folder or file, or the known name `pocket` -> Path. kind is a key of KINDS."""
    path = KINDS[kind] if name == "pocket" else Path(name)
    if not path.exists():
        raise FileNotFoundError(f"--{kind}={name}: no such file or folder ({path}); give a local folder, or `pocket`")
    return path


def read_json(path):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; a model folder holds config.json and its weights")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object; copy the file again")
    return value


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_tensors(path):
    """All tensors of a weight file or model folder: {name: tensor}, dtypes as stored.

    In a folder the order of preference is model.safetensors, its index, pytorch_model.bin, its index.
    Raises: FileNotFoundError naming what was looked for; ValueError for a truncated or foreign file.
    """
    path = Path(path)
    if path.is_dir():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (path / name).is_file():
                return read_file(path / name)
            if (path / f"{name}.index.json").is_file():
                return read_sharded(path / f"{name}.index.json")
        raise FileNotFoundError(f"no model.safetensors or pytorch_model.bin (or their .index.json) in {path}")
    if path.name.endswith(".index.json"):
        return read_sharded(path)
    return read_file(path)


def read_sharded(index):
    """The shards named by `weight_map`; every tensor must be where the index says, and nothing may be missing."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no table `weight_map` of tensor and file names; copy the file again")
    tensors = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".."):
            raise ValueError(f"{index} points outside its folder ({name!r}); refusing to follow it")
        tensors.update(read_file(index.parent / name))
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ValueError(f"{index} promises {len(missing)} tensors that its shards lack, e.g. {missing[0]}")
    return tensors


def read_file(path):
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}; the download or copy is incomplete")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); copy it again") from None
    try:
        mmap = zipfile.is_zipfile(path)  # files from before torch 1.6 are no zip and must be read whole
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be opened as plain tensors ({reason}); convert it to safetensors") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, expected a dictionary of tensors")
    return tensors


def write_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as one safetensors file, atomically. Shared storage is written once a name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    plain, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    save_file(plain, temporary, metadata={"format": "pt", **(metadata or {})})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.chmod(0o644)  # safetensors makes it readable by the owner alone
    os.replace(temporary, path)


def read_metadata(path):
    """The string table in a safetensors header."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); copy it again") from None


def write_model(folder, config, tensors, shard_bytes=SHARD_BYTES):
    """Write a Hugging Face style folder: config.json + model.safetensors, in several files with an index if large.

    The folder is built under a temporary name and swapped in, so a reader sees the old model or the new one.
    """
    folder = Path(folder)
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
    if len(shards) == 1:
        write_tensors(temporary / "model.safetensors", shards[0])
    else:
        weight_map = {}
        for i, shard in enumerate(shards, start=1):
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(temporary / name, shard)
            weight_map.update(dict.fromkeys(shard, name))
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(temporary / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(temporary / "config.json", config)
    replace_folder(temporary, folder)


def replace_folder(temporary, folder):
    """Move a finished folder into place; the one it replaces is set aside first, and removed last."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
