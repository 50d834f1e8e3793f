"""docs/scale.md is a calculation: every line and table of it is computed again, and what it takes from the code is compared."""
import json
import re
import tomllib
from pathlib import Path

import pytest

import twist
from bench.memory import SIZES
from corpus.shards import SHARD_UNITS
from training import logs

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/scale.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
LINES = [line for block in BLOCKS for line in block.splitlines() if line]
KINDS = ("published", "measured", "estimate", "choice", "code")  # where an input comes from


@pytest.fixture(scope="module")
def plan():
    """{name: value} of the page's lines, which build on each other."""
    values = {}
    for line in LINES:
        exec(line, values)  # our own page
    return values


def table(head):
    """Rows of numbers of the table whose first line begins so; text that is none stays text."""
    rows = PAGE[PAGE.index(f"| {head}"):].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip().replace(",", "") for cell in row.strip("|").split("|")] for row in rows]
    return [[float(cell) if re.fullmatch(r"[\d.]+", cell) else cell for cell in row] for row in cells]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.partition(" ")[0])
def test_every_line_says_where_it_comes_from_or_what_comes_out(line, plan):
    name, rest = line.split(" = ", 1)
    expression, said = rest.split("  # ")
    result = re.match(r"= ([\d.e+-]+)", said)
    assert result or said.startswith(KINDS) and not re.search(r"[a-z_]{3,}", expression)  # what is computed says the result
    assert not result or plan[name] == pytest.approx(float(result[1]), rel=6e-3)


def test_what_the_page_takes_from_the_code_is_there(plan):
    config, run = SIZES["LLaMA-7B"], tomllib.loads((ROOT / "configs/llama-7b.toml").read_text())
    assert plan["shard_units"] == SHARD_UNITS
    assert plan["peak"] == 1e12 * logs.PEAK_TFLOPS["H100"] == 1e12 * logs.PEAK_TFLOPS["H200"]
    assert plan["parameters"] == sum(parameter.numel() for parameter in twist.empty(config).parameters())
    assert plan["flops_per_unit"] == logs.flops_per_unit(config, plan["parameters"], run["block_size"])
    assert (plan["ids_per_step"], plan["steps"], plan["micro_rows"]) == (run["tokens_per_step"], run["steps"], run["micro_batch"])
    planned = json.loads((ROOT / "results/memory.json").read_text())["fits"]
    for gpus, spread, state, most in table("GPUs | spread"):
        row = next(row for row in planned if (row["size"], row["processes"], row["optimizer"], row["gpu_gb"]) == (
            "LLaMA-7B", gpus, "adamw", 80))
        assert (row["spread"], row["state_gb"], f"{row['none']} {row['selective']} {row['full']}") == (spread, state, most)


def test_the_tables_are_computed_from_the_lines_above_them(plan):
    for speed, hours, cheap, dear, threads, read in table("times real time"):
        assert hours == plan["hours"] / speed and (cheap, dear) == (2 * hours, 4 * hours)
        assert threads == pytest.approx(speed / plan["decoded_per_core"], abs=0.051)
        assert read == pytest.approx(speed / 3600 * plan["flac_bytes_per_hour"] / 1e6, abs=0.051)
    for gpus, rows, seconds, hours, price in table("GPUs | rows each"):
        assert rows == plan["ids_per_step"] / 472 / gpus
        step = plan["ids_per_step"] * plan["flops_per_unit"] / (gpus * plan["mfu"] * plan["peak"])
        assert (seconds, hours) == (round(step, 2), round(step * plan["steps"] / 3600))
        assert price == round(gpus * step * plan["steps"] / 3600 * plan["gpu_price"])


def test_the_measured_tables_are_those_of_the_results():
    listed = json.loads((ROOT / "results/listing.json").read_text())["rows"]
    assert [row[1:] for row in table("`python -m bench listing`")] == [
        [f"{row['mb']} MB", row["seconds"], row["processor_seconds"]] for row in listed]
    large = json.loads((ROOT / "results/loader.json").read_text())["rows"][-1]
    assert [row[1] for row in table("`python -m bench loader`")] == [
        large["seconds_to_first_batch"], f"{large['mb_to_first_batch']} MB", f"{large['mb']} MB",
        large["million_units_per_second"]]
