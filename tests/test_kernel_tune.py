"""python -m kernels.tune: its candidates, what it leaves out and proposes, and that compiled kernels are found again."""
import itertools
import json
import time

import pytest
import torch

pytest.importorskip("triton")

from kernels import flash_attention, flash_decoding, fused_cross_entropy, tune  # noqa: E402
from kernels.compile import attention_variants  # noqa: E402
from tests.test_kernel_compilation import python  # noqa: E402

CASES = [*itertools.product(("forward", "keys", "queries", "decode"), (64, 128)), *(("rows", V) for V in tune.ROWS)]


@pytest.mark.parametrize("arch", sorted(flash_attention.TILES))
def test_candidates_are_rows_of_the_tables_and_begin_with_todays(arch):
    found = {case: tune.candidates(*case, arch) for case in CASES}
    assert all(len(set(rows)) == len(rows) > 2 for rows in found.values())
    for kernel, D in itertools.product(("forward", "keys", "queries"), (64, 128)):
        assert found[kernel, D][0] == flash_attention.TILES[arch][kernel, D, 2]
    assert found["decode", 64][0] == flash_decoding.BLOCKS[2] and found["rows", 512][0] == (512, 1)
    assert found["rows", 50_272][0] == fused_cross_entropy.TILES[-1]
    # what compiles to more programs at once on an H100, and has never been timed
    assert (128, 64, 8, 2, 128) in found["queries", 64] and {(128, 64, 8, 3, 128), (64, 64, 4, 3)} <= {*found["forward", 64]}
    assert (64, 64, 4, 2, 168) in found["keys", 64]


def test_a_limit_on_registers_reaches_the_launch_and_the_compiler():
    limited = (128, 64, 8, 2, 96)
    with tune.in_table(limited, "queries", 64, 90):
        assert flash_attention.tile("queries", 64, 2, 90)["maxnreg"] == 96
        launches = {row["name"]: row["launch"] for row in attention_variants(90)}
    assert launches["attention_queries_64_bf16"] == {"num_warps": 8, "num_stages": 2, "maxnreg": 96}
    assert "maxnreg" not in launches["attention_keys_64_bf16"]
    assert flash_attention.TILES[90]["queries", 64, 2] != limited  # the table is as it was
    with tune.in_table((64, 4, 2, 64), "decode", 64, 90):
        assert flash_decoding.constants(64, 1, 2)["maxnreg"] == 64


TODAY, FAST, LUCKY, SPILLS, WRONG, UNFIT = (512, 1), (512, 2), (512, 4), (512, 8), (512, 16), (512, 32)
TIMES = {TODAY: [2.0, 2.0], FAST: [1.0, 1.5], LUCKY: [0.1, 2.5], SPILLS: [0.5, 0.5]}  # ms in each round


@pytest.fixture
def pretended(monkeypatch):
    """A GPU on which the candidates above take those times."""
    now = lambda: fused_cross_entropy.TILES[0]  # noqa: E731
    rounds = {row: iter(times) for row, times in TIMES.items()}
    monkeypatch.setattr(tune, "ROUNDS", 2)
    monkeypatch.setattr(tune, "candidates", lambda *_: [*TIMES, WRONG, UNFIT])
    monkeypatch.setattr(tune, "operator", lambda *_, **__: lambda: [torch.full((4,), float("nan") if now() == WRONG else 1.0)])
    monkeypatch.setattr(tune, "do_bench", lambda call, **_: next(rounds[now()]))
    told = {SPILLS: ({"registers": 9}, "", "8 bytes spilled"), UNFIT: ({}, "too much shared memory", "")}
    return {("rows", 512, row): verdict for row, verdict in told.items()}


def test_the_row_that_won_every_round_and_never_spills_is_proposed(pretended):
    rows = tune.timed("rows", 512, 90, pretended, None, True, time.monotonic() + 60)
    found = {row["row"]: row for row in rows}
    assert [found[row]["ms"] for row in (TODAY, FAST, SPILLS)] == [2.0, 1.25, 0.5] and found[SPILLS]["registers"] == 9
    assert [row for row in found if found[row]["wins"]] == [FAST] and found[FAST]["times_as_fast"] == 1.6
    assert found[WRONG]["note"] == "another result than today's" and found[UNFIT]["note"] == "too much shared memory"
    tune.show(rows)  # of the same columns, whatever became of a row
    assert found[WRONG]["ms"] == found[UNFIT]["ms"] == "-"
    assert tune.proposal(rows, "TILES") == f"TILES: {FAST}, 1.25 ms, 1.6 times as fast as {TODAY}, 2.0 ms"
    assert tune.proposal([rows[0]], "TILES") == f"TILES: {TODAY} stays, 2.0 ms"
    assert fused_cross_entropy.TILES[0] == TODAY and len(fused_cross_entropy.TILES) > 1


def test_when_its_seconds_are_spent_nothing_more_is_begun(pretended):
    rows = tune.timed("rows", 512, 90, pretended, None, True, time.monotonic() - 1)
    assert {row["note"] for row in rows} == {"no time left", "too much shared memory"}
    assert tune.proposal(rows, "TILES") == f"TILES: {TODAY} stays, - ms"


def test_what_cannot_be_tuned_is_refused_in_a_sentence(monkeypatch, capsys):
    for option, words in (("--kernel=forward,sideways", "expected some of forward,keys"), ("--head-dim=80", "some of 64,128")):
        with pytest.raises(SystemExit):
            tune.main([option])
        assert words in capsys.readouterr().err
    monkeypatch.setattr(tune, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU.*TRITON_INTERPRET=1"):
        tune.main([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kernel, D", [("decode", "64"), pytest.param("forward,keys,queries,rows", "64", marks=pytest.mark.slow),
                                       pytest.param("decode", "128", marks=pytest.mark.slow)])
def test_in_the_interpreter_every_candidate_is_right_and_nothing_is_timed(kernel, D, tmp_path, capsys):
    tune.main([f"--kernel={kernel}", f"--head-dim={D}", f"--json={tmp_path}/tune.json", "--seconds=600"])
    found = json.loads((tmp_path / "tune.json").read_text())
    assert {row["kernel"] for row in found["rows"]} == set(kernel.split(",")) and found["gpu"] == "interpreter"
    assert all(row["error"] < 1e-3 and row["ms"] == "-" and not row["note"] for row in found["rows"])
    assert capsys.readouterr().out.splitlines()[-len(found["proposals"]):] == found["proposals"]


@pytest.mark.slow
def test_what_other_processes_compiled_is_found_and_what_does_not_fit_is_told(tmp_path):
    finished = python("-c", """
import triton
from kernels import tune
tasks = [("rows", 512, (512, 2)), ("forward", 64, (64, 32, 4, 2)), ("decode", 64, (128, 4, 9)), ("decode", 64, (60, 4, 2))]
told = tune.compile_all(tasks, 500, 90, 90, 264)
for task in tasks:
    print([bool(told[task][0].get("registers")), *told[task][1:]])
hits = []
triton.knobs.compilation.listener = lambda **found: hits.append(found["cache_hit"])
for task in tasks[:2]:
    tune.compiled(*task, 90, 90, 264)
print(len(hits), all(hits))
print(list(tune.compile_all(tasks[:1], 0, 90, 90, 264).values()) in ([({}, "no time left", "")], [told[tasks[0]]]))
""", TRITON_CACHE_DIR=str(tmp_path))
    lines = finished.stdout.splitlines()
    assert lines[:2] == ["[True, '', '']"] * 2, finished.stderr[-3000:]
    assert "shared memory" in lines[2] and "does not compile" in lines[3]
    assert lines[4:] == ["3 True", "True"]  # forward plain, and with ALiBi and documents
