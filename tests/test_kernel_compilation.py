"""The compiler's view of every kernel, for GPUs that are not here: nothing spills, everything fits, tensor cores are used."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
SAMPLE = ("attention_forward_64_bf16", "decode_attention_64_bf16", "row_loss_gradient_bf16_512",  # one of each kernel file
          "split_adamw_bf16")


def python(*arguments, **environment):
    # in a process of its own: here the interpreter is on, and a crash of the compiler would end the tests
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def run(*arguments, **environment):
    return python("-m", "kernels.compile", *arguments, **environment)


def test_a_variant_of_each_kernel_file_compiles_and_has_no_fault():
    finished = python("-c", f"""
from kernels.compile import compile_variant, faults
for name in {SAMPLE}:
    print(name, faults(compile_variant(90, name)))""")
    assert finished.stdout.splitlines() == [f"{name} []" for name in SAMPLE], finished.stderr[-3000:]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    finished = run("--out", str(folder))
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return json.loads((folder / "kernels.json").read_text())["rows"]


@pytest.mark.slow
def test_every_variant_fits_every_architecture(table):
    most = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}
    assert {row["arch"] for row in table} == set(most)
    for row in table:
        assert row["spilled_bytes"] == 0 and row["registers"] <= 255 and row["shared_bytes"] <= most[row["arch"]], row


@pytest.mark.slow
def test_products_of_16_bit_numbers_run_on_tensor_cores(table):
    attention = [row for row in table if row["kernel"].startswith("attention_") and "bf16" in row["kernel"]]
    assert len(attention) >= 3 * 3 * 2 * 2  # architectures, kernels, head dimensions, plain and with everything
    for row in attention:
        assert (row["wgmma"] > 0 and row["mma"] == 0) if row["arch"] == "sm_90" else row["mma"] > 0, row


@pytest.mark.slow
def test_the_stored_table_is_of_the_same_variants(table):
    stored = json.loads((ROOT / "results" / "kernels.json").read_text())["rows"]
    assert [(row["arch"], row["kernel"]) for row in stored] == [(row["arch"], row["kernel"]) for row in table]


@pytest.mark.slow
def test_the_interpreter_must_be_off():
    finished = run(TRITON_INTERPRET="1")
    assert finished.returncode == 1 and "TRITON_INTERPRET" in finished.stderr
