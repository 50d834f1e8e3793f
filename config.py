"""Options of a command: defaults < TOML file < command line, as one frozen dataclass.

    python train.py configs/pocket.toml --steps=100 --peak-lr 1e-3 --compile

A command declares its options as a frozen dataclass with one field a line and a trailing comment; the comments are the text of
--help. Beside them the class may say, for its heirs too:

    RANGES   {"name": (least, most)}     of a number; others are finite, not negative, whole ones at most MOST (`seed`: MOST_SEED)
    CHOICES  {"name": ("a", "b")}        of a text
    ALONE    {"name": "value"}           what --name means without a value; true/false options are switches: --name, --no-name
    RENAMED  {"old_name": "new_name"}    the old name is taken, and the new one is said
    FILES    {"out": "..."}              --out may be a file; else, before any work, a folder must be possible there
    NEEDS    {"name": "a|b c=x|y"}       where it has an effect: a or b is set and c is x or y; elsewhere it is said to have none

Keys may be written with - or _. The file, wherever it stands, is the word that ends in .toml. An option that is given twice has
its last value. Commas divide lists, but not the name of a path that exists, and not after a backslash; in the file a list holds
exactly its items. Patterns that the shell left alone (quoted) give the files that they match.
"""
import dataclasses
import difflib
import glob
import inspect
import json
import math
import os
import re
import sys
import time
import tomllib
from pathlib import Path

import torch
from tqdm import tqdm

LINE_SECONDS = 30.0  # between two lines of progress where no terminal shows a bar
ABOVE_0, LARGEST = sys.float_info.min, sys.float_info.max  # the least of a range that leaves 0 out; the most of any other
MOST, MOST_SEED = 2**31 - 1, 2**32 - 1  # whole numbers
HYPHENS = re.compile("[-\u2010-\u2015]+(?=[a-zA-Z])")  # of -o, or what a text editor makes of two
MACHINES = {  # what PyTorch, Triton and C++ say of a machine -> what we say
    "MemoryError|out of memory|allocate memory|bad_alloc|ALLOC_FAILED": "out of memory: less at once takes less (train.py: "
    "--micro-batch, --recompute; sample.py: --num-samples; others: --budget), and so do weights of --dtype=bfloat16",
    "InvalidCxxCompiler|Failed to find C compiler": "no C compiler is here, which compiled blocks and Triton's kernels need: "
    "install gcc or clang, or do without (--compile=none; TWIST_KERNELS=torch before the command)"}
USUAL = {  # ours -> what other projects call it
    "model": "checkpoint ckpt checkpoint_dir model_path model_name_or_path", "lm": "model model_name_or_path base_model",
    "init": "resume init_from resume_from_checkpoint checkpoint", "out": "o output output_dir output_file save_dir",
    "data": "dataset train_file", "audio": "data input input_dir", "prompts": "input text", "task": "benchmark",
    "steps": "epochs num_train_epochs iters max_iters max_steps", "peak_lr": "lr learning_rate", "weight_decay": "wd",
    "schedule": "lr_scheduler_type", "warmup": "warmup_steps", "micro_batch": "batch_size per_device_train_batch_size",
    "budget": "batch_size", "tokens_per_step": "gradient_accumulation_steps", "save_interval": "save_steps",
    "eval_interval": "eval_steps", "log_interval": "logging_steps", "block_size": "seq_len context", "fit": "n_clusters",
    "recompute": "gradient_checkpointing", "dtype": "precision fp16 bf16", "device": "gpu gpus cuda cpu no_cuda",
    "clip": "max_grad_norm", "beta_2": "adam_beta2", "workers": "num_workers", "num_samples": "n num_return_sequences",
    "max_new_units": "max_length length max_tokens max_new_tokens"}


def load(cls, argv=None, positional=None, base=None, quiet=False):
    """Parse the command line into an instance of the frozen dataclass `cls`.

    Args:
        argv: list of arguments, default sys.argv[1:].
        positional: name of the tuple[str, ...] field that takes the arguments without `--`; None allows none.
        base: {field: value} that the command line overrides, and that overrides the options file.
        quiet: nothing is said of what has no effect.
    Raises: ValueError for an unknown key, an ill-typed value, one out of range or a stray argument. `--help` prints and exits 0.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, positional))
        raise SystemExit(0)
    file, words, given = None, [], {}
    while argv:
        word = argv.pop(0)
        if word.startswith("--"):
            name, value = read_option(cls, word, argv)
            if not quiet and type(value) is tuple and given.get(name, value) != value:
                print(f"--{name.replace('_', '-')} is given more than once: only {','.join(value)} counts; divide by commas",
                      file=sys.stderr)
            given[name] = value
        elif HYPHENS.match(word) and not os.path.exists(word):
            raise ValueError(f"{word}: options begin with two hyphens" + nearest(cls, HYPHENS.sub("", word, 1)))
        elif word.endswith(".toml"):
            if file is not None:
                raise ValueError(f"{word} is a second options file; give one, and the rest as --key=value")
            file = read_toml(cls, word)
        elif positional is None:
            raise ValueError(f"stray argument {word!r}; options are written --key=value, an options file ends in .toml (--help)")
        else:
            words.append(word)
    if words:
        given[positional] = given.get(positional, ()) + matching(words)
    options = cls(**(file or {}) | (base or {}) | given)
    check(options)
    if not quiet and os.environ.get("RANK", "0") == "0":  # torchrun's first process
        say_idle(options, [*given, *(name for name, value in (file or {}).items() if value != getattr(cls, name))])
    return options


def read_option(cls, word, left):
    """(name, value) of a word that begins with --; the value may be the first of the words that are left, and is taken there."""
    key, equals, text = word[2:].partition("=")
    for field in dataclasses.fields(cls):
        if field.type is bool and not equals and key.replace("-", "_") == f"no_{field.name}":
            return field.name, False  # --no-dedup is --dedup=false
    field = find_field(cls, key)
    alone = "true" if field.type is bool else declared(cls, "ALONE").get(field.name)
    known = ("true", "false") if field.type is bool else declared(cls, "CHOICES").get(field.name)
    if not equals and left and not left[0].startswith("--") and (alone is None or known is None or left[0] in known):
        equals, text = "=", left.pop(0)
    if not equals and alone is None:
        raise ValueError(f"--{key} needs a value: --{key}=...")
    return field.name, parse(field, text if equals else alone)


def declared(cls, table):
    """What cls and the classes that it inherits from say in a table of the head of this file."""
    return {key: value for base in reversed(cls.__mro__) for key, value in vars(base).get(table, {}).items()}


def say_idle(options, names):
    """Print which of these options have no effect beside the others (NEEDS)."""
    for name in names:
        for other, equals, wanted in (need.partition("=") for need in declared(type(options), "NEEDS").get(name, "").split()):
            value = max((getattr(options, each) for each in other.split("|")), key=bool)  # the first that is set
            if str(value) not in wanted.split("|") if equals else not value:
                off, shown = value is None or value is False, other.replace("_", "-").replace("|", " or --")
                print(f"--{name.replace('_', '-')} has no effect {'without' if off else 'with'} --{shown}"
                      + ("" if off or type(value) is bool else f"={value}"), file=sys.stderr)
                break


def find_field(cls, key):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    name = key.replace("-", "_")
    renamed = declared(cls, "RENAMED").get(name)
    if renamed:
        print(f"--{key} is now called --{renamed.replace('_', '-')}", file=sys.stderr)
        name = renamed
    if name not in fields:
        raise ValueError(f"unknown option --{key}" + nearest(cls, name))
    return fields[name]


def nearest(cls, key):
    """The end of a sentence about an unknown key: the option that is meant, if one is like it."""
    names, key = [field.name for field in dataclasses.fields(cls)], key.partition("=")[0].lower().replace("-", "_")
    if key in ("c", "cfg", "config", "config_file"):
        return "; an options file is named alone: my.toml"
    parts = set(key.split("_"))
    near = ([name for name in names if key in USUAL.get(name, "").split()][:2] or difflib.get_close_matches(key, names, 1, 0.75)
            or [name for name in names if parts <= (its := set(name.split("_"))) or its <= parts][:3]
            or difflib.get_close_matches(key, names, 1, 0.65))
    meant = " or ".join(f"--{name.replace('_', '-')}" for name in near)
    return f"; did you mean {meant}? (--help lists all)" if near else " (--help lists all)"


def parse(field, text):
    """One value of the command line. The empty text and `none` stand for None in optional fields."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    kind, optional, option = field.type, False, f"--{field.name.replace('_', '-')}={text}"
    if kind not in (bool, int, float, str) and type(None) in getattr(kind, "__args__", ()):
        kind, optional = kind.__args__[0], True
    if optional and text.lower() in ("", "none"):
        return None
    if not text and field.default and kind not in (bool, int, float):
        raise ValueError(f"{option} is empty; leave it out for {field.default if kind is str else ','.join(field.default)}")
    if kind is str:
        return os.path.expanduser(text)
    if getattr(kind, "__origin__", None) is tuple:
        return matching(map(os.path.expanduser, divide(text)))
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return kind(text.replace("_", "")) if kind is int else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{option}: expected {kinds[kind]}") from None


def divide(text):
    """Items between commas. The name of a path that exists is one item, and so is what has a backslash before its commas."""
    parts, items = re.split(r"(?<!\\),", text), []
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if os.path.exists(",".join(parts[:n]))), 1)
        items.append(",".join(parts[:count]).replace("\\,", ","))
        parts = parts[count:]
    return [item if os.path.exists(item) else item.strip() for item in items if item.strip()]  # after a comma may stand a space


def matching(words):
    """Patterns of paths (*, ?, [a-z], ** for any depth) -> the paths, sorted; what is no pattern, or matches nothing, stays."""
    return tuple(path for word in words for path in
                 (not os.path.exists(word) and sorted(glob.glob(word, recursive=True)) or [word]))


def read_toml(cls, path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"no options file at {path}; check the path")
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8; save it as such") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not a TOML file: {error}; write `key = value`, each key once, texts in quotes, "
                         "true and false in small letters") from None
    values = {}
    for key, value in table.items():
        if isinstance(value, dict) or isinstance(value, list) and dict in map(type, value):
            raise ValueError(f"{path} has a section [{key}]; write its keys without sections, one `key = value` a line")
        try:
            field = find_field(cls, key)
            if field.name in values:
                raise ValueError(f"{key} is given twice, in two spellings")
            if isinstance(value, list) and getattr(field.type, "__origin__", None) is not tuple:
                raise ValueError(f"{key} is a list; expected one value")
            kinds = set(map(type, value if isinstance(value, list) else [value]))
            if {bool, list} & kinds and field.type not in (bool, bool | None):
                raise ValueError(f"{key} = {json.dumps(value, default=str)}: expected a number, or text in quotes")
            values[field.name] = tuple(map(str, value)) if isinstance(value, list) else parse(field, str(value))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return values


def check(options):
    """Raise ValueError for a number out of its range, or a text that is none of its choices (RANGES and CHOICES, see above)."""
    ranges, choices, files = (declared(type(options), table) for table in ("RANGES", "CHOICES", "FILES"))
    for field in dataclasses.fields(options):
        value, option = getattr(options, field.name), f"--{field.name.replace('_', '-')}={getattr(options, field.name)}"
        if type(value) is tuple and ("" in value or not value and field.default):
            raise ValueError(f"--{field.name.replace('_', '-')}={','.join(value)}: a name in it is empty, perhaps by "
                             "a variable that is not set; name something, or leave it out")
        if field.name == "out" and value and not Path(field.default or "").suffix:
            there = next(place for place in (Path(value), *Path(value).absolute().parents) if place.exists())
            if not (there.is_dir() or there == Path(value) and "out" in files) or not os.access(there, os.W_OK):
                raise NotADirectoryError(f"{option}: {there} is no folder that can be written to; give another")
        if field.name in choices and value is not None and value not in choices[field.name]:
            raise ValueError(f"{option}: expected one of {', '.join(choices[field.name])}")
        if type(value) not in (int, float):
            continue
        usual = LARGEST if type(value) is float else MOST_SEED if field.name == "seed" else MOST
        least, most = ranges.get(field.name, (0, usual))
        if not least <= value <= most:  # NaN too
            kind = "a whole number" if type(value) is int else "a finite number" if not math.isfinite(value) else "a number"
            lower = "above 0" if least == ABOVE_0 else f"of at least {least:.10g}"
            raise ValueError(f"{option}: expected {kind} {lower}" + (f" and at most {most:.10g}" if most < LARGEST else ""))


def choose_device(name, language_model=True):
    """What --device=auto | cpu | cuda | cuda:N | mps means here; auto: cuda if there is one, else cpu, never mps (Apple's GPU).

    Raises: ValueError for others, for what is not there, and for mps unless it is a language_model that goes there.
    """
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?|mps", name):
        raise ValueError(f"--device={name}: expected auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not language_model:
        raise ValueError("--device=mps is for language models: tokenizers and vocoders use --device=cpu there")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device=mps, but PyTorch sees no Apple GPU; use --device=cpu")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda") and int(name[5:] or 0) >= gpus:
        seen = f"{gpus} of them, cuda:0 to cuda:{gpus - 1}" if gpus else "no GPU; use --device=cpu"
        raise ValueError(f"--device={name}, but PyTorch sees {seen}")
    return ("cuda" if gpus else "cpu") if name == "auto" else name


def beside(device):
    """Where tokenizer and vocoder run beside a language model on that device: HuBERT needs float64, which mps has not."""
    return "cpu" if torch.device(device).type == "mps" else device


def to_toml(options):
    """The resolved options as TOML text that `load` reads back; None values are left out (None is their default)."""
    values = {name: value for name, value in vars(options).items() if value is not None}
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())  # as JSON writes them


def help_text(cls, positional=None):
    """Launch lines (the module's docstring), then every option with its default and its comment."""
    module = sys.modules[cls.__module__].__doc__ or ""
    lines = [module.strip(), "", "options (--key=value or --key value; and a TOML file of them):"]
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


def sentence(error):
    """An error as text; of the system's own, such as [Errno 17], the file and what is wrong with it; "" for a fault of ours."""
    if isinstance(error, (MemoryError, RuntimeError)):
        return next((words for said, words in MACHINES.items() if re.search(said, repr(error))), "")
    if not isinstance(error, OSError) or not error.filename:
        return str(error)
    remedy = "; a folder is needed there" if isinstance(error, (FileExistsError, NotADirectoryError)) else ""
    return f"{error.filename2 or error.filename}: {error.strerror.lower()}{remedy}"


def command(main):
    """Run a command's main(); what the user can mend becomes one sentence and exit code 2, not a traceback.

    TWIST_TRACEBACK=1 shows the traceback, for finding faults of ours.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may hold what the terminal, or UTF-8, has not
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError, MemoryError, RuntimeError, SystemExit) as error:
        said, fault = isinstance(error, SystemExit), isinstance(error, RuntimeError) and not sentence(error)
        if said and error.code != 2 or os.environ.get("TWIST_TRACEBACK") == "1" or fault:
            raise
        program = Path(sys.argv[0])
        name = f"python -m {program.parent.name}" if program.stem == "__main__" else program.name
        print(end="" if said else f"{name}: error: {sentence(error)}\n", file=sys.stderr)
        group = sys.modules.get("torch.distributed")
        if group and group.is_available() and group.is_initialized():  # its threads may abort a Python that is taken down
            sys.stdout.flush(), os._exit(2)
        raise SystemExit(2) from None
