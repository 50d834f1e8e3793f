"""What stands where something else was expected: a sentence about it, with what to give instead.

    path --first bytes of a file, names in a folder: strangers.txt--> "is a Git LFS pointer ...: run `git lfs pull`", or None
"""
import json
import re
from pathlib import Path

WANTED = "Hugging Face folder: config.json with model.safetensors or pytorch_model.bin"
HEAD = 512  # bytes of a file that are looked at


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
