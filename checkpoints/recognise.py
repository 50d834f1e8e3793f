"""What stands where something else was expected: a sentence about it, with what to give instead.

    path --first bytes of a file, names in a folder: strangers.txt--> "is a Git LFS pointer ...: run `git lfs pull`", or None
    settings --check_values--> "rms_norm_eps is '1e-5', expected a number"      tensor --sound--> quantised, or not finite
"""
import functools
import json
import re
import sys
from pathlib import Path

import torch

WANTED = "Hugging Face folder: config.json with model.safetensors or pytorch_model.bin"
HEAD = 512  # bytes of a file that are looked at
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes of a model's tensors
UNQUANTISED = "give the model in float32, float16 or bfloat16"
VALUES = {  # kind of a value in JSON -> (how it is called, whether a value is one)
    int: ("a whole number from 0 to 2**31", lambda value: type(value) is int and 0 <= value < 2**31),
    float: ("a number from 0 up", lambda value: type(value) in (int, float) and 0 <= value < 1e300),  # NaN and Infinity parse
    list: ("a list of whole numbers", lambda value: type(value) in (list, tuple) and all(map(VALUES[int][1], value))),
    tuple: ("a list of lists of whole numbers", lambda value: type(value) in (list, tuple) and all(map(VALUES[list][1], value))),
    **{kind: (called, lambda value, kind=kind: type(value) is kind)
       for kind, called in ((bool, "true or false"), (str, "a text"), (dict, "a dictionary"))}}


@functools.cache
def note(text):
    """What was understood in a way that its user may not expect, on screen: once a process."""
    print(text, file=sys.stderr)


def is_safetensors(path):
    """By its first bytes, the length of a header and the header in JSON; where they tell nothing, by its name."""
    with open(path, "rb") as file:
        head = file.read(9)
    is_one = head[8:] == b"{" or path.suffix == ".safetensors" and not head.startswith((b"PK\3\4", b"\x80"))
    if is_one != (path.suffix == ".safetensors"):
        note(f"{path} is read as {'safetensors' if is_one else 'a file of torch.save'}, which it is in spite of its name")
    return is_one


def recognise(path):
    """The end of a sentence about a file or folder, "is ...: do ..." or "holds ...: do ..."; None: nothing is known of it."""
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(HEAD).decode("latin1")  # a character a byte
    elif not path.is_dir():
        return None
    elif (adapter := path / "adapter_config.json").is_file():
        base = re.search(r'"base_model_name_or_path": *(".*?")', adapter.read_text(errors="replace"))
        return f"holds a LoRA adapter of {json.loads(base[1]) if base else 'another model'}: merge it into that model " \
               f"(merge_and_unload of peft), save it, and give the {WANTED}"
    elif gone := [each.name for each in sorted(path.iterdir()) if each.is_symlink() and not each.exists()]:
        return f"holds links to files that are not there ({', '.join(gone[:3])}): copy the files themselves, as cp -rL does"
    elif not any(path.iterdir()):
        return "is empty: copy or download it again"
    for line in Path(__file__).with_name("strangers.txt").read_text().splitlines():
        sign, _, said = line.partition("\t")
        if line.startswith("#"):
            continue
        if path.is_dir():
            found = not sign.startswith(("^", ".")) and [str(each) for each in sorted(path.glob(sign))[:4]]
        else:
            fits = re.match(sign[1:], head) if sign[0] == "^" else sign[0] == "." and path.name.endswith(sign)
            found = [str(path)] if fits else []
        if found:
            places = ", ".join(each.removesuffix("/config.json").removesuffix("/meta.json") for each in found)
            return said.replace("{}", places).replace("FOLDER", WANTED)
    return None


def refuse_stranger(path):
    """Raises ValueError for a file that is known to be none of weights, settings, centres or units."""
    if Path(path).is_file() and (said := recognise(path)):
        raise ValueError(f"{path} {said}")


def meant(settings, given=None):
    """The end of a sentence about a config.json that is of another kind of model than `given`, where that is known."""
    kind, option = settings.get("model_type"), None
    if "upsample_rates" in settings:
        option = "vocoder"
    elif kind == "hubert":
        option = "tokenizer"
    elif "offset" in settings or kind == "speech_language_model":
        option = "model"
    elif re.search("ForCausalLM|LMHeadModel", str(settings.get("architectures"))):
        option = "lm"
    return f"; this is the config.json of what is given as --{option}" if option not in (None, given) else ""


def check_values(settings, kinds, where):
    """Raises ValueError that names the key of a value of the wrong kind. kinds: {key: kind, of VALUES}; null passes."""
    for key, kind in kinds.items():
        called, fits = VALUES[kind]
        if settings.get(key) is not None and not fits(settings[key]):
            raise ValueError(f"{where}: {key} is {settings[key]!r:.40}, expected {called}; copy the file again")


def sound(tensor, name, where):
    """The tensor as it is, if it can be a weight. Raises ValueError for quantised ones, and for values that are no numbers."""
    kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
    if kind not in WEIGHTS and not (name.endswith("num_batches_tracked") and isinstance(tensor, torch.Tensor)):
        raise ValueError(f"{where}: {name} is quantised, or no weight ({kind}); {UNQUANTISED}")
    # a sum takes a tenth of the time of isfinite; it may overflow where all values are finite
    if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise ValueError(f"{where}: {name} holds {bad} values that are not finite; take an earlier checkpoint, or copy it again")
    return tensor
