"""The plan of the house: imports point down, commands need no test-only package, every file can be read alone."""
import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Who may import whom, from the bottom up: a chapter imports only what stands above it in this table and in its own row.
IMPORTS = {
    "config": (),
    "audio": (),
    "pickles": (),
    "archive": (),
    "download": ("archive",),
    "families": (),
    "checkpoint": ("pickles", "download"),
    "journal": ("checkpoint",),  # the one writer of whole files
    "unit_files": (),
    "data": ("journal", "unit_files", "checkpoint", "config"),
    "loader": ("data",),
    "kernels": (),
    "cpu": (),
    "distributed": (),
    "state": ("distributed", "checkpoint"),
    "logs": (),
    "optimizer": (),
    "pretrained": ("checkpoint", "families"),
    "model": ("kernels", "cpu"),
    "hubert": ("pretrained", "audio", "cpu"),
    "kmeans": (),
    "hubert_units": ("hubert", "kmeans", "checkpoint", "download", "audio", "data", "distributed", "config"),
    "vocoder": ("pretrained", "checkpoint", "audio", "data", "config"),
    "twist": ("model", "pretrained", "checkpoint", "config"),
    "memory": ("model", "twist"),
    "sample": ("twist", "model", "hubert_units", "vocoder", "data", "audio", "config"),
    "train": ("twist", "model", "data", "loader", "distributed", "state", "logs", "optimizer", "memory", "sample", "kernels",
              "checkpoint", "config", "cpu"),
    "benchmarks": (),
    "accuracy": (),
    "likelihood": ("cpu",),
    "continuations": ("model",),
    "published": (),
    "reports": ("checkpoint",),
    "pair_scores": ("benchmarks", "accuracy", "reports"),
    "eval": ("pair_scores", "benchmarks", "accuracy", "likelihood", "continuations", "published", "reports", "twist",
             "hubert_units", "data", "download", "distributed", "checkpoint", "config", "cpu"),
}
IMPORTS["bench_memory"] = tuple(IMPORTS)
IMPORTS["bench_scoring"] = tuple(IMPORTS)
IMPORTS["bench_training"] = tuple(IMPORTS)
IMPORTS["bench"] = tuple(IMPORTS)  # measures everything
TEST_ONLY = {"transformers", "sklearn", "joblib", "torchaudio", "fairseq", "pytest", "hypothesis", "scipy", "pandas"}
OPTIONAL = {"matplotlib": ("scripts", "pocket"), "wandb": ("logs.py",)}  # extras: plots, a service
RUNTIME = {"torch", "numpy", "soundfile", "tqdm", "safetensors", "triton"}  # as in pyproject.toml


def relative(path):
    return str(path.relative_to(ROOT))


CHAPTERS = sorted(path for path in ROOT.glob("*.py") if path.name != "conftest.py")
PARTS = sorted(path for folder in ("kernels", "pocket", "scripts") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
each_file = pytest.mark.parametrize("path", CHAPTERS + PARTS, ids=relative)


@functools.cache
def parse(path):
    return ast.parse(path.read_text(), str(path))


def imported(path):
    """First words of all imports in a file, those inside functions too."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            found.add(node.module.partition(".")[0])
    return found


def test_the_checks_see_the_chapters():
    assert set(IMPORTS) - {"kernels"} <= {path.stem for path in CHAPTERS}
    assert {path.stem for path in CHAPTERS} <= set(IMPORTS)  # a new chapter needs its place in the table
    assert {"checkpoint", "torch", "re"} <= imported(ROOT / "pretrained.py")  # and they see imports of both kinds
    assert {"kernels", "dataclasses"} <= imported(ROOT / "model.py")


@pytest.mark.parametrize("path", CHAPTERS + sorted((ROOT / "kernels").glob("*.py")), ids=relative)
def test_imports_between_chapters_point_down(path):
    name = path.stem if path.parent == ROOT else "kernels"
    found = (imported(path) & set(IMPORTS)) - ({"kernels"} if name == "kernels" else set())
    assert found <= set(IMPORTS[name]), f"{relative(path)} imports {sorted(found - set(IMPORTS[name]))}"


def test_the_table_of_imports_has_no_circle():
    order = list(IMPORTS)
    for name, below in IMPORTS.items():
        assert all(order.index(other) < order.index(name) for other in below), name


@pytest.mark.parametrize("path", CHAPTERS, ids=relative)
def test_a_chapter_needs_neither_the_pocket_factory_nor_the_tests(path):
    assert not imported(path) & {"pocket", "tests", "conftest", "scripts"}


@each_file
def test_only_declared_packages_are_imported(path):
    ours = set(IMPORTS) | {"pocket", "scripts"}
    foreign = imported(path) - set(sys.stdlib_module_names) - ours
    optional = {package for package, folders in OPTIONAL.items() if path.relative_to(ROOT).parts[0] in folders}
    if not path.stem.startswith("bench"):  # they time the peers where they are installed
        assert not foreign & TEST_ONLY, f"{relative(path)} imports {sorted(foreign & TEST_ONLY)}, which are for tests"
        assert foreign <= RUNTIME | optional, f"{relative(path)} imports {sorted(foreign - RUNTIME - optional)}"


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
        guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "triton is not None")
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
