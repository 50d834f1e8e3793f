"""experiments/full_size.py: every launch line exists, is understood by its command, and says what it takes."""
import itertools
import re
import shlex
from pathlib import Path

import pytest

import bench.__main__
import config
import eval as evaluation
import hubert_units
import train
import twist
from bench.memory import SIZES
from checkpoints import pretrained
from experiments import declared, full_size

ROOT = Path(__file__).parent.parent
LINES = list(dict.fromkeys(line for *lines, _ in full_size.TWINS.values() for line in lines))
TRAINING = [line for line in LINES if line.startswith("scripts/")]
COMMANDS = {"hubert_units.py": (hubert_units.UnitsConfig, "audio"), "eval.py": (evaluation.EvalConfig, None)}
each_twin = pytest.mark.parametrize("name", full_size.TWINS)


def words(line):
    return shlex.split(line, comments=True)


def options_of(line):
    """Options of a line that trains, as train.py understands them."""
    launcher, *given = words(line)
    assert (ROOT / launcher).is_file() and (ROOT / given[0]).is_file(), line
    return train.load_options([str(ROOT / given[0]), *given[1:], "--dry-run"])[0]


def test_every_experiment_has_its_twin_and_a_published_result_with_its_status():
    assert set(full_size.TWINS) == set(declared.EXPERIMENTS)
    rows = [line.split("\t") for line in full_size.PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    assert {experiment for experiment, *_ in rows} == set(full_size.TWINS)
    assert {status for _, status, _ in rows} == {"verified", "second hand", "unverified", "not known"}


@each_twin
def test_the_text_of_a_twin_has_lines_hours_memory_and_results(name):
    text = full_size.text(name)
    training = [line for line in text.splitlines() if line.startswith("scripts/")]
    assert len(training) > 1 and all(re.search(r"  # [\d.]+ h on (one|8) H200$", line) for line in training)
    assert re.search(r"^memory, .*: [\d.]+ GB on \d", text, re.MULTILINE)
    assert re.search("^(verified|not known): ", text, re.MULTILINE)
    assert [words(line) for line in training] == [words(line) for line in full_size.TWINS[name] if line.startswith("scripts/")]


def test_every_line_that_trains_is_understood_and_has_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = {}
    for line in TRAINING:
        options = options_of(line)
        assert options.lm == "pocket" or (pretrained.SHIPPED / f"{options.lm.replace('/', '--')}.json").is_file(), line
        assert folders.setdefault(options.out, options) == options, f"{options.out} is the folder of two runs"
        end = options.out.rpartition("-")[2]
        assert options.init == (end if end in ("cold", "shuffled") else "twist"), line
    assert {"opt-125m-50hz-k200-cold", "opt-350m-100hz-k1000", "opt-1.3b-0.01-epochs", "bloom-560m-es-shuffled",
            "smollm2-360m-cold", "llama-13b"} <= {folder.removeprefix("runs/") for folder in folders}


@pytest.mark.parametrize("line", [line for line in TRAINING if "--lm=" in line and "--init" not in line])
def test_a_dry_run_with_another_text_lm_plans_for_it(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = []
    monkeypatch.setattr(train.memory, "plan_of", lambda learner, *_: seen.append(learner.parameters) or "")
    train.main([str(ROOT / words(line)[1]), *words(line)[2:], "--dry-run", "--device=cpu"])
    assert seen == [full_size.PARAMETERS[re.search(r"--lm=(\S+)", line)[1]]]


def test_every_other_line_is_understood_by_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in itertools.filterfalse(TRAINING.__contains__, LINES):
        program, *arguments = words(line)
        if program == "find":  # as docs/units.md has it, of another language
            assert line.replace("/es ", "/en ") in (ROOT / "docs/units.md").read_text()
        elif arguments[0] == "-m":
            assert arguments[1] == "bench" and config.load(bench.__main__.BenchConfig, arguments[2:], positional="what")
        else:
            options, positional = COMMANDS[arguments[0]]
            config.load(options, arguments[1:], positional=positional)
    assert "no effect" not in capsys.readouterr().err


@each_twin
def test_whatever_a_line_reads_was_made_by_a_line_above_or_is_yours(name):
    made = {"AUDIO", "benchmarks/", "unlabelled_data/es"}
    *lines, _ = full_size.TWINS[name]
    for line in lines:
        options = dict(re.findall(r"--([\w-]+)=(\S+)", line))
        if line.startswith("find"):
            made |= {line.split()[-1]}
        elif "hubert_units.py" in line:
            assert line.split()[2] in made and options.get("hold-out", "0.01") in {"0.01"} | made
            kmeans = options.get("kmeans")
            assert kmeans is None or kmeans in made or kmeans in hubert_units.download.KNOWN["kmeans"], line
            made |= {options["out"], f"{options['out']}/train", f"{options['out']}/val"}
        elif line.startswith("scripts/"):
            read = options_of(line)
            assert {*read.data, read.val_data} <= made or "slam" in line, line
            made |= {f"{read.out}/model"}
        elif "eval.py" in line:
            assert {options["model"], options["versus"], options["data"], options["train-data"]} <= made, line


def test_a_frame_rate_is_one_that_the_network_can_give():
    native = {"mhubert-base-25hz": 25, "hubert-base-ls960": 50}
    for rate, tokenizer in full_size.TOKENIZERS.items():
        assert rate / native[tokenizer] in (0.5, 1, 2)
        for k in (100, 200, 500, 1000):
            first = full_size.cell(rate, k)[0]
            assert ("--fit=" in first) == ((rate, k) not in full_size.CENTRES)


def test_hours_grow_with_updates_and_parameters():
    line = "scripts/one_gpu.sh configs/opt-350m.toml"
    whole, card = full_size.hours(line)
    assert (whole, card) == (13.4, "one H200") and full_size.hours(f"{line} --steps=40000 --out=x")[0] == pytest.approx(1.34)
    assert full_size.hours(f"{line} --lm=HuggingFaceTB/SmolLM2-360M")[0] == pytest.approx(whole * 315_117_120 / 305_712_128)
    for name, size in (("facebook/opt-125m", "OPT-125M"), ("facebook/opt-350m", "OPT-350M")):
        assert full_size.PARAMETERS[name] == sum(p.numel() for p in twist.empty(SIZES[size]).parameters())
