"""Options of a command: defaults < TOML file < --key=value, as one frozen dataclass.

    python train.py configs/pocket.toml --steps=100 --peak-lr=1e-3

A command declares its options as a frozen dataclass with one field a line and a trailing comment; the comments are
the text of --help. Keys may be written with - or _; --key alone sets a true/false option, --no-key unsets it. An unknown
key, in the file too, is an error that names the nearest one, and a value of the wrong type is an error that names the type.
Options that several commands share are a dataclass which theirs inherit from. An option that has been renamed is still taken
under its old name, which the class lists in RENAMED = {"old_name": "new_name"}; where it stands, the new one is said.
"""
import dataclasses
import difflib
import inspect
import os
import re
import sys
import time
import tomllib
from pathlib import Path

import torch
from tqdm import tqdm

LINE_SECONDS = 30.0  # between two lines of progress where no terminal shows a bar


def load(cls, argv=None, positional=None, base=None):
    """Parse the command line into an instance of the frozen dataclass `cls`.

    Args:
        argv: list of arguments, default sys.argv[1:].
        positional: name of the tuple[str, ...] field that takes the arguments without `--`; None allows none.
            A first argument that ends in .toml is always the options file.
        base: {field: value} that the command line overrides, and that overrides the options file.
    Raises: ValueError for an unknown key, an ill-typed value or a stray argument. `--help` prints and exits 0.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, positional))
        raise SystemExit(0)
    values, words = {}, []
    if argv and argv[0].endswith(".toml"):
        values.update(read_toml(cls, argv.pop(0)))
    values.update(base or {})
    for argument in argv:
        if not argument.startswith("--"):
            words.append(argument)
            continue
        key, equals, text = argument[2:].partition("=")
        positive = [field for field in dataclasses.fields(cls) if field.type is bool
                    and not equals and key.replace("-", "_") == f"no_{field.name}"]
        if positive:  # --no-dedup is --dedup=false
            values[positive[0].name] = False
            continue
        field = find_field(cls, key)
        if not equals:
            if field.type is not bool:
                raise ValueError(f"--{key} needs a value: --{key}=...")
            text = "true"
        values[field.name] = parse(field, text)
    if words and positional is None:
        raise ValueError(f"stray argument {words[0]!r}; options are written --key=value (--help lists them)")
    if words:
        values[positional] = tuple(words)
    return cls(**values)


def find_field(cls, key):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    name = key.replace("-", "_")
    renamed = getattr(cls, "RENAMED", {}).get(name)
    if renamed:
        print(f"--{key} is now called --{renamed.replace('_', '-')}", file=sys.stderr)
        name = renamed
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown option --{key}; did you mean --{near.replace('_', '-')}? (--help lists all)")
    return fields[name]


def parse(field, text):
    """One value of the command line. The empty text and `none` stand for None in optional fields."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    kind, optional = field.type, False
    if kind not in (bool, int, float, str) and type(None) in getattr(kind, "__args__", ()):
        kind, optional = kind.__args__[0], True
    if optional and text.lower() in ("", "none"):
        return None
    if kind is str:
        return text
    if getattr(kind, "__origin__", None) is tuple:
        return tuple(part for part in text.split(",") if part)
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return kind(text.replace("_", "")) if kind is int else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"--{field.name.replace('_', '-')}={text}: expected {kinds[kind]}") from None


def read_toml(cls, path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"no options file at {path}; check the path")
    try:
        table = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from None
    values = {}
    for key, value in table.items():
        field = find_field(cls, key)
        text = ",".join(value) if isinstance(value, list) else str(value)
        values[field.name] = parse(field, text)
    return values


def check_choices(options, choices):
    """Raise ValueError for an option that is none of its choices, {name: (choice, ...)}."""
    for name, known in choices.items():
        if getattr(options, name) not in known:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(options, name)}: expected one of {', '.join(known)}")


def choose_device(name):
    """What --device=auto | cpu | cuda means here: cpu or cuda. Raises ValueError for others, and where there is no GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device={name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but PyTorch sees no GPU; use --device=cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def to_toml(options):
    """The resolved options as TOML text that `load` reads back; None values are left out (None is their default)."""
    lines = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is None:
            continue
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, (int, float)):
            text = repr(value)
        elif isinstance(value, tuple):
            text = "[" + ", ".join(quote(item) for item in value) + "]"
        else:
            text = quote(value)
        lines.append(f"{field.name} = {text}")
    return "\n".join(lines) + "\n"


def quote(text):
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def help_text(cls, positional=None):
    """Launch lines (the module's docstring), then every option with its default and its comment."""
    module = sys.modules[cls.__module__].__doc__ or ""
    lines = [module.strip(), "", "options (--key=value, after an optional TOML file):"]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for base in cls.__mro__[:-1]:  # its own first, then those that it shares with others
        for name, comment in re.findall(r"^    (\w+): [^\n]*?  # (.+)$", inspect.getsource(base), re.MULTILINE):
            field = fields.pop(name, None)
            if field and name != positional:
                default = "" if field.default is None else field.default
                lines.append(f"  --{name.replace('_', '-')}={default}\n        {comment}")
    return "\n".join(lines)


class Lines:
    """Where tqdm writes a bar that no terminal shows: now and then one of its states becomes a line of its own."""

    def __init__(self):
        self.last = time.monotonic()

    def write(self, text):
        if text.strip() and time.monotonic() - self.last >= LINE_SECONDS:
            print(text.strip(), file=sys.stderr, flush=True)
            self.last = time.monotonic()

    def flush(self):
        sys.stderr.flush()


def progress(rows=None, shown=True, **options):
    """A progress bar, as tqdm(rows, **options) makes it; without a terminal lines, none within LINE_SECONDS.

    shown: False on the processes that print nothing.
    """
    if not sys.stderr.isatty():
        layout = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} passed, {remaining} left, {rate_fmt}{postfix}"
        options |= {"file": Lines(), "bar_format": layout}
    return tqdm(rows, disable=not shown, **options)


def command(main):
    """Run a command's main(); what the user can mend becomes one sentence and exit code 2, not a traceback.

    TWIST_TRACEBACK=1 shows the traceback, for finding faults of ours.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("TWIST_TRACEBACK") == "1":
            raise
        program = Path(sys.argv[0])
        name = f"python -m {program.parent.name}" if program.stem == "__main__" else program.name
        print(f"{name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
