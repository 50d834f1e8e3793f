"""The plan of the house: seven chapters at the door, rooms behind them, imports that point down, files that can be read alone.

The tables below are the plan. Whoever needs another arrow or more lines changes a table, and says why.
"""
import ast
import dataclasses
import functools
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import bench.__main__
import config

ROOT = Path(__file__).parent.parent
DOOR = {"twist.py", "model.py", "hubert_units.py", "vocoder.py", "train.py", "sample.py", "eval.py",  # the chapters
        "config.py", "conftest.py", "README.md", "GUIDE.md", "LICENSE", "pyproject.toml"}
# Who may import whom, from the bottom up: a chapter or room imports only what stands above it in this table and in its own row.
IMPORTS = {
    "config": (),
    "kernels": (),
    "checkpoints": ("config",),
    "speech": ("checkpoints",),
    "corpus": ("speech", "checkpoints", "config"),
    "model": ("kernels",),
    "twist": ("model", "checkpoints", "config"),
    "training": ("twist", "model", "checkpoints", "kernels", "config"),
    "evaluation": ("model", "speech", "checkpoints", "kernels", "config"),
    "pages": ("speech", "corpus", "evaluation", "checkpoints", "config"),
    "hubert_units": ("pages", "speech", "corpus", "checkpoints", "training", "kernels", "config"),
    "vocoder": ("pages", "speech", "corpus", "checkpoints", "config"),
    "sample": ("twist", "model", "hubert_units", "vocoder", "evaluation", "pages", "speech", "corpus", "kernels", "config"),
    "train": ("twist", "model", "corpus", "training", "pages", "sample", "hubert_units", "kernels", "checkpoints", "config"),
    "eval": ("evaluation", "twist", "hubert_units", "vocoder", "pages", "speech", "corpus", "training", "kernels", "checkpoints",
             "config"),
    "scripts": ("twist", "model", "corpus", "training", "checkpoints", "config"),
    "pocket": ("twist", "hubert_units", "vocoder", "speech", "corpus", "evaluation", "kernels", "checkpoints", "config"),
    "experiments": ("pocket", "pages", "train", "twist", "model", "speech", "corpus", "checkpoints", "kernels", "config"),
    "bench": ("train", "twist", "model", "hubert_units", "vocoder", "speech", "corpus", "training", "evaluation", "kernels",
              "checkpoints", "config"),
}
# 80 until scripts checked updates of real batches, and bench the vocoder; 81 until eval spoke what it measures, the factory
# counted the errors of words as it does, and there were pages to look at, which stand on five rooms and under the chapters; 95
# until experiments made their own material, with the factory and the tokenizer; 102 until they knew train's defaults; 103
# until they said where bfloat16 is emulated.
MOST_ROOMS, MOST_ARROWS = 22, 104
# Lines at most. A chapter gets an option and one call; the work stands in a room. Tests and pocket/stories.py are exempt.
# Chapters and core had 9,000 until they read audio to its real end (speech/containers.py), recognised what is no model, added to
# folders instead of replacing them, checked what is resumed, and gave every option its range; 10,700 until names of millions of
# recordings were listed outside memory, a token was drawn without a look at the device, an update was launched while the last one
# ran, and kernels were tuned where they run; 11,900 until it listened to itself: recognisers, opinions of listeners, what is held
# out. bench had 1,700 until it measured all that.
LINES = {"each chapter": 350, "each core file": 450, "chapters and core": 13_000, "bench": 2_200, "pocket": 2_800,
         "experiments": 1_200, "pages": 1_500}
MOST_WORDS_AT_THE_DOOR = 1_250  # of README.md's prose: commands, output, tables and the picture are not counted
CORE = ("speech", "corpus", "checkpoints", "training", "evaluation", "kernels")
MOST_LINES_OF_THE_LOOP = 60
TEST_ONLY = {"transformers", "sklearn", "joblib", "torchaudio", "fairseq", "pytest", "hypothesis", "scipy", "pandas"}
OPTIONAL = {"wandb": ("training",), "tokenizers": ("evaluation",),  # extras
            **dict.fromkeys(("moonshine_voice", "onnxruntime", "pocketsphinx"), ("pocket",))}
RUNTIME = {"torch", "numpy", "soundfile", "tqdm", "safetensors", "triton"}  # as in pyproject.toml


def relative(path):
    return str(path.relative_to(ROOT))


def room_of(path):
    """The chapter or room that a file stands in."""
    return path.stem if path.parent == ROOT else path.relative_to(ROOT).parts[0]


CHAPTERS = sorted(path for path in ROOT.glob("*.py") if path.name != "conftest.py")
PARTS = sorted(path for room in IMPORTS for path in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
each_file = pytest.mark.parametrize("path", CHAPTERS + PARTS, ids=relative)


@functools.cache
def parse(path):
    return ast.parse(path.read_text(), str(path))


@functools.cache
def imported(path):
    """Names of all modules that a file imports, those inside functions too; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms_imported(path):
    return {name.partition(".")[0] for name in imported(path)} & set(IMPORTS) - {room_of(path)}


def test_the_door_holds_the_chapters_and_nothing_else():
    assert {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")} <= DOOR
    assert {path.stem for path in CHAPTERS} | {path.parent.name for path in ROOT.glob("*/*.py")} == {*IMPORTS, "tests"}


def test_the_checks_see_imports_of_both_kinds():
    assert {"checkpoints.files", "torch", "re"} <= imported(ROOT / "checkpoints/pretrained.py")
    assert rooms_imported(ROOT / "model.py") == {"kernels"}


@each_file
def test_imports_point_down(path):
    found = rooms_imported(path)
    assert found <= set(IMPORTS[room_of(path)]), f"{relative(path)} imports {sorted(found - set(IMPORTS[room_of(path)]))}"


def test_the_table_of_imports_has_no_circle_and_no_idle_arrow():
    order = list(IMPORTS)
    for name, below in IMPORTS.items():
        assert all(order.index(other) < order.index(name) for other in below), name
    used = {name: {other for path in CHAPTERS + PARTS if room_of(path) == name for other in rooms_imported(path)}
            for name in IMPORTS}
    assert used == {name: set(below) for name, below in IMPORTS.items()}
    assert len(IMPORTS) <= MOST_ROOMS and sum(map(len, IMPORTS.values())) <= MOST_ARROWS


def test_files_do_not_import_each_other_in_a_circle():
    modules = {relative(path)[:-3].replace("/", ".").removesuffix(".__init__"): path for path in CHAPTERS + PARTS}
    left = {name: imported(path) & set(modules) - {name} for name, path in modules.items()}
    while free := [name for name, below in left.items() if not below & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


@pytest.mark.parametrize("path", [path for path in CHAPTERS + PARTS
                                  if room_of(path) not in ("bench", "pocket", "scripts", "experiments")], ids=relative)
def test_neither_the_pocket_factory_nor_the_tests_are_needed(path):
    assert not {name.partition(".")[0] for name in imported(path)} & {"pocket", "tests", "conftest", "scripts", "bench"}


@each_file
def test_only_declared_packages_are_imported(path):
    foreign = {name.partition(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - set(IMPORTS)
    optional = {package for package, folders in OPTIONAL.items() if path.relative_to(ROOT).parts[0] in folders}
    if room_of(path) != "bench":  # they time the peers where they are installed
        assert not foreign & TEST_ONLY, f"{relative(path)} imports {sorted(foreign & TEST_ONLY)}, which are for tests"
        assert foreign <= RUNTIME | optional, f"{relative(path)} imports {sorted(foreign - RUNTIME - optional)}"


@each_file
def test_what_windows_lacks_is_imported_where_it_is_used(path):
    names = {alias.name for node in parse(path).body if isinstance(node, ast.Import) for alias in node.names}
    assert not names & {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}


def test_a_command_imports_nothing_that_its_first_second_does_not_need():
    """FSDP, the compiler and Triton's take a second together. A PyTorch for GPUs needs Triton, and loads it."""
    code = "import sample, sys, twist; twist.load_speech_lm(); sample.load_voice(sample.SampleConfig()); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"},
                           capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch.distributed.fsdp", "torch._dynamo", *["triton"] * (torch.version.cuda is None)} & {*found}


@each_file
def test_progress_is_shown_in_one_way(path):
    """config.progress, which has something to say without a terminal, too."""
    calls = {getattr(node.func, "id", "") for node in ast.walk(parse(path)) if isinstance(node, ast.Call)}
    assert "tqdm" not in calls or relative(path) in ("config.py", "kernels/compile.py")  # kernels stand on nothing


@each_file
def test_no_error_is_swallowed_wholesale(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = [] if node.type is None else getattr(node.type, "elts", [node.type])
            names = {getattr(kind, "id", getattr(kind, "attr", None)) for kind in caught}
            assert names and not names & {"Exception", "BaseException"}, f"{relative(path)}:{node.lineno}"


@pytest.mark.parametrize("path", [path for path in CHAPTERS + PARTS if path.parent.name != "scripts"], ids=relative)
def test_importing_a_file_does_nothing_but_define(path):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for i, node in enumerate(parse(path).body):
        docstring = i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "LOADED")
        assert isinstance(node, allowed) or docstring or guard, f"{relative(path)}:{node.lineno}: {ast.unparse(node)[:60]}"


@pytest.mark.parametrize("path", CHAPTERS + PARTS + TESTS, ids=relative)
def test_every_file_begins_with_a_docstring_and_has_no_long_line(path):
    if path.name != "__init__.py" or path.read_text().strip():
        first = (ast.get_docstring(parse(path)) or "").partition("\n")[0]
        assert first.endswith(".") or first.endswith(":"), f"{relative(path)} begins {first!r}"
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        assert len(line) <= 130, f"{relative(path)}:{number} has {len(line)} characters"
        assert "\t" not in line and line == line.rstrip(), f"{relative(path)}:{number}: tab or space at the end"


def test_the_runtime_packages_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.match(r"\w+", line).group() for line in project["dependencies"]} == RUNTIME


# ---------------------------------------------------------------------------------------------- lines

def lines_of(paths):
    return sum(len(path.read_text().splitlines()) for path in paths if path.name != "stories.py")


def test_every_room_stays_within_its_lines():
    core = [path for path in PARTS if room_of(path) in CORE]
    found = {"chapters and core": lines_of([*CHAPTERS, *core])}
    found |= {room: lines_of((ROOT / room).rglob("*.py")) for room in ("bench", "pocket", "experiments")}
    found["pages"] = lines_of(path for path in (ROOT / "pages").iterdir() if path.suffix in (".py", ".js", ".css"))
    over = [f"{room}: {lines} lines" for room, lines in found.items() if lines > LINES[room]]
    for paths, most in ((CHAPTERS, LINES["each chapter"]), (core, LINES["each core file"])):
        over += [f"{relative(path)}: {lines_of([path])} lines" for path in paths if lines_of([path]) > most]
    assert not over


def test_the_loop_of_training_can_be_seen_at_once():
    loop = next(node for node in parse(ROOT / "train.py").body if getattr(node, "name", "") == "train")
    assert loop.end_lineno - loop.lineno < MOST_LINES_OF_THE_LOOP


# ---------------------------------------------------------------------------------------------- what the pages say

PAGES = [path for path in (ROOT / "README.md", ROOT / "GUIDE.md", *ROOT.glob("docs/*.md"), ROOT / "configs/README.md",
                           ROOT / "pocket/README.md", ROOT / "results/README.md") if path.exists()]
COMMAND = re.compile(r"(?:python|torchrun|scripts/\w+\.(?:sh|sbatch))\b[^\n`#|&]*")
OTHERS = {"nproc-per-node", "nnodes", "node-rank", "max-restarts", "standalone", "nodes", "index-url", "no-deps", "dist"}
LINK = re.compile(r"\]\(([^)\s]*)\)")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


@functools.cache
def options_of(module):
    """Options of `python -m module`, as written on a command line: those of the dataclass that it loads, or of its parser."""
    path, names = ROOT / (module.replace(".", "/") + ".py"), {"help"}
    for part in [path] if path.exists() else sorted(path.with_suffix("").glob("*.py")):  # a room's may stand in any of its files
        text = part.read_text()
        names |= {name.lstrip("-") for name in re.findall(r"add_argument\(\"(--[\w-]+)", text)}
        for name in re.findall(r"config\.load\((\w+)", text):
            for field in dataclasses.fields(getattr(importlib.import_module(relative(part)[:-3].replace("/", ".")), name)):
                option = field.name.replace("_", "-")
                names |= {option} | ({f"no-{option}"} if field.type is bool else set())
    return names


@pytest.mark.parametrize("path", [path for path in CHAPTERS + PARTS if "config.load(" in path.read_text()], ids=relative)
def test_every_option_of_a_command_explains_itself(path):
    for name in re.findall(r"config\.load\((\w+)", path.read_text()):
        options = getattr(importlib.import_module(relative(path)[:-3].replace("/", ".")), name)
        shown = config.help_text(options)
        assert not [field.name for field in dataclasses.fields(options) if f"  --{field.name.replace('_', '-')}=" not in shown]


def commands_in(text):
    """(module, [option names]) of every command of this repository that a page shows."""
    for match in COMMAND.finditer(text):
        words = match.group().split()
        script = next((word for word in words if word.endswith((".py", ".sh", ".sbatch"))), "")
        if words[1:2] == ["-m"] and words[2].partition(".")[0] in IMPORTS:
            script = words[2]
        elif not script:
            continue
        after = words[words.index(script) + 1:]
        options = [word[2:].partition("=")[0] for word in after if word.startswith("--")]
        assert script in IMPORTS or "." in script, script
        yield script, [option.rstrip(".,;:)") for option in options]


def test_commands_are_found_in_a_page():
    found = dict(commands_in("`torchrun --nnodes=2 train.py --init=twist --no-reshard`, `scripts/one_gpu.sh x.toml --seed=1`\n"
                             "python -m bench eval --repeats=3   # --device\npython -m venv .venv && python sample.py a.wav"))
    assert found == {"train.py": ["init", "no-reshard"], "scripts/one_gpu.sh": ["seed"], "bench": ["repeats"], "sample.py": []}
    assert {"init", "no-reshard", "tokenizer"} <= options_of("train") and "arch" in options_of("kernels.compile")


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_command_that_a_page_shows_exists_with_its_options(page):
    text = page.read_text()
    for script, options in commands_in(text):
        if script.endswith((".py", ".sh", ".sbatch")):
            assert (ROOT / script).exists(), f"{relative(page)} shows {script}"
        known = options_of("train" if script.endswith((".sh", ".sbatch")) else script.removesuffix(".py").replace("/", "."))
        assert set(options) <= known, f"{relative(page)}: {script} has no {sorted(set(options) - known)}"
    commands = [path.stem for path in CHAPTERS if path.name != "config.py"] + ["bench", "corpus", "pages", "experiments"]
    commands += ["kernels.compile", "kernels.tune"]
    everywhere = set.union(OTHERS, *map(options_of, commands))
    drawn = [line for line in text.splitlines() if "-->" not in line]  # arrows are no options
    mentioned = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", "\n".join(drawn))) - {"key"}
    mentioned -= {option for _, options in commands_in(text) for option in options}
    assert mentioned <= everywhere, f"{relative(page)} mentions {sorted(mentioned - everywhere)}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_benchmark_that_a_page_names_exists(page):
    assert set(re.findall(r"python -m bench (\w+)", page.read_text())) - {"NAME"} <= {*bench.__main__.BENCHMARKS}


def anchors_of(page):
    """What GitHub calls the headings of a page: lower case, spaces as hyphens, other punctuation left out."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        path, _, anchor = target.replace("\\", "").partition("#")
        there = page.parent / path if path else page
        assert target.startswith("https://") or there.exists(), f"{relative(page)} links to {target}"
        assert not anchor or anchor in anchors_of(there), f"{relative(page)} links to {target}"


def test_the_door_is_read_in_minutes():
    text = FENCED.sub("", (ROOT / "README.md").read_text())
    prose = [line for line in text.splitlines() if not line.startswith(("|", "!["))]
    assert len(LINK.sub("]", " ".join(prose)).split()) <= MOST_WORDS_AT_THE_DOOR


GUIDE = (ROOT / "GUIDE.md").read_text()


def test_the_guide_has_a_sentence_for_every_file_of_the_core():
    linked = {target.replace("\\", "") for target in LINK.findall(GUIDE)}
    files = {relative(path) for path in CHAPTERS + PARTS if path.parent == ROOT or room_of(path) in CORE}
    assert {path for path in files if not path.endswith("__init__.py")} <= linked


def test_the_guide_draws_the_house_as_it_is():
    drawn = re.findall(r"^floor (\d) +(.+)$", GUIDE, re.MULTILINE)
    floors = {name: int(number) for number, names in drawn for name in names.split()}
    assert set(floors) == set(IMPORTS)
    assert all(floors[below] < floors[name] for name, others in IMPORTS.items() for below in others)
    names = list(IMPORTS)
    for number, name in enumerate(names, start=1):
        marks = re.search(rf"^ *{number} {name} *([o. ]*)$", GUIDE, re.MULTILINE).group(1).split()
        assert {other for other, mark in zip(names, marks) if mark == "o"} == set(IMPORTS[name]) and len(marks) == number - 1


def test_the_guide_and_the_docs_name_nothing_that_does_not_exist():
    code = "\n".join(path.read_text() for path in CHAPTERS + PARTS + TESTS)
    for page in (page for page in PAGES if page.name == "GUIDE.md" or page.parent.name == "docs"):
        text = FENCED.sub("", page.read_text())
        for name in re.findall(r"`([A-Za-z_][\w.]*)`", text):
            assert re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", code), f"{relative(page)}: {name}"
        for path in re.findall(r"\b((?:tests|[a-z]+)/[\w/]+\.(?:py|toml|json))\b", text):
            assert (ROOT / path).exists() or (page.parent / path).exists(), f"{relative(page)}: {path}"
