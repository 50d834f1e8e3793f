"""Bench of the kernels, rehearsed on the CPU: every way computes the same, refusals become notes, and the tables add up."""
import contextlib
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention
from triton.runtime.errors import OutOfResources

import kernels
from bench import kernels as kernel_bench
from bench import timing
from bench.__main__ import BenchConfig, machine, main, place
from bench.kernels import Case, causal
from checkpoints import files

OPTIONS = BenchConfig(device="cpu", repeats=1)
TINY = (causal(1, 32, 2, 32), causal(1, 32, 4, 32, "grouped heads", 2), causal(1, 32, 2, 32, "ALiBi"),
        causal(1, 32, 2, 32, "documents"), Case("decode", 2, 1, 4, 2, 32, 48))
each_case = pytest.mark.parametrize("case", TINY, ids=lambda case: case.kind)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)


def parts(case):
    """What attention_ways prepares: inputs, slopes, starts, mask, and the expected result."""
    *inputs, _ = kernel_bench.draw_inputs(case, "model", torch.float32, "cpu", torch.Generator().manual_seed(0))
    inputs = [x.detach() for x in inputs]
    ways, starts, mask = kernel_bench.attention_ways(case, torch.float32, "cpu")
    slopes = ways["reference"].keywords["alibi_slopes"]
    return inputs, slopes, starts, mask, ways["reference"](*inputs)


@pytest.mark.slow
def test_attention_on_the_cpu_gives_full_tables(quick):
    found = timing.tables(list(kernel_bench.bench_attention(OPTIONS, TINY)), "cpu")
    assert list(found) == ["versions", "rows", "summary", "losing"]
    assert {(row["kind"], row["mode"], row["way"]) for row in found["rows"]} == {
        (case.kind, mode, way) for case in TINY for way in ("ours", "default", "reference")
        for mode in ("forward", "forward+backward") if mode == "forward" or case.T > 1}
    assert all(row["ms"] > 0 and row["tflops"] > 0 and row["spread"] >= 0 for row in found["rows"])
    assert all(row["error"] < 1e-5 for row in found["rows"] if row["way"] != "reference")
    assert {row["peer"] for row in found["summary"]} == {"default", "reference"}
    assert all(row["note"].startswith("picks ") for row in found["rows"] if row["way"] == "default")


@pytest.mark.slow
def test_cross_entropy_on_the_cpu_gives_full_tables(quick):
    rows = list(kernel_bench.bench_cross_entropy(OPTIONS, ((16, 32, 100), (16, 0, 100))))
    assert [(row["shape"], row["way"]) for row in rows] == [
        ("16, 32, 100", "ours"), ("16, 32, 100", "eager"), ("16, 100", "ours"), ("16, 100", "eager")]
    assert all(row["ms"] > 0 for row in rows)


def test_all_ways_of_the_loss_give_the_same_gradients():
    for head, shape in ((True, (16, 32, 100)), (False, (16, 0, 100))):
        *inputs, targets = kernel_bench.draw_loss_inputs(*shape, torch.float32, "cpu", torch.Generator().manual_seed(0))
        ours, eager = (torch.autograd.grad(function(*inputs, targets), inputs)
                       for function in kernel_bench.loss_ways(head, "cpu").values())
        torch.testing.assert_close(ours, eager)


@each_case
def test_flex_attention_and_the_masked_backends_compute_what_the_reference_does(case):
    inputs, slopes, starts, mask, expected = parts(case)
    flex = kernel_bench.with_flex(flex_attention, case, slopes, starts, "cpu")
    torch.testing.assert_close(flex(*inputs), expected, atol=1e-5, rtol=1e-4)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, None):  # a CPU's flash backend takes masks
        torch.testing.assert_close(kernel_bench.with_backend(backend, case, mask)(*inputs), expected, atol=1e-5, rtol=1e-4)


def test_layouts_are_what_they_are_called():
    case, random = causal(2, 8, 4, 32, "grouped heads", 2), torch.Generator().manual_seed(0)
    q, k, v, do = kernel_bench.draw_inputs(case, "model", torch.float32, "cpu", random)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert q.stride() == v.stride() == (8 * 8 * 32, 8 * 32, 32, 1)
    q, k, v, do = kernel_bench.draw_inputs(case, "heads first", torch.float32, "cpu", random)
    assert all(x.transpose(1, 2).is_contiguous() for x in (q, k, v, do)) and k.shape == (2, 8, 2, 32)
    q, k, v, do = kernel_bench.draw_inputs(TINY[-1], "model", torch.float32, "cpu", random)
    assert q.shape == do.shape == (2, 1, 4, 32) and k.shape == (2, 48, 2, 32) and not k.is_contiguous()  # a slice of a cache


def test_documents_are_seeded_and_their_work_is_half_their_squares():
    case = causal(16, 2048, 1, 1, "documents")
    starts = kernel_bench.draw_starts(case)
    q = torch.zeros(16, 2048, 1, 1)
    kernels.check_attention(q, q, q, 1.0, None, starts)  # raises for starts that do not ascend
    assert starts.equal(kernel_bench.draw_starts(case))
    lengths = torch.cat([row.unique(return_counts=True)[1] for row in starts]).double()
    assert 400 < lengths.mean() < 560 and lengths.max() <= 960  # 512, less what the ends of the rows cut off
    assert kernel_bench.work(case, starts, "forward") == 4 * (lengths**2).sum() / 2
    assert kernel_bench.work(causal(3, 10, 2, 8), None, "forward+backward") == 14 * 3 * 2 * 8 * 10**2 / 2
    assert kernel_bench.work(Case("decode", 3, 1, 2, 2, 8, 10), None, "forward") == 4 * 3 * 2 * 8 * 10


def test_a_backend_that_refuses_leaves_its_reason_and_other_errors_are_errors():
    case = TINY[0]
    inputs, *_ = parts(case)
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
    ways = {name: (kernel_bench.with_backend(backend, case, None), [inputs]) for name, backend in backends.items()}
    found = timing.measure(ways, "cpu", 1)
    assert found["cudnn"].seconds is None and found["cudnn"].note and found["math"].seconds > 0
    row = timing.timings(found["cudnn"], 1.0)
    assert row == {"ms": "-", "spread": "-", "tflops": "-"}

    def wrong():
        raise RuntimeError("The size of tensor a must match")
    with pytest.raises(RuntimeError, match="size of tensor"):
        timing.attempt(wrong, ())

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB.\nmore")
    assert timing.attempt(full, ()) == (None, "CUDA out of memory. Tried to allocate 40 GiB.")

    def large():
        raise OutOfResources(300_000, 232_448, "shared memory")
    assert timing.attempt(large, ())[1].startswith("out of resource: shared memory")
    assert timing.attempt(torch.empty, (2**45,))[1].startswith("[enforce fail at alloc_cpu.cpp")  # a CPU's is of no kind


def failing(after, error):
    """A function of nothing that works so many times."""
    calls = []

    def call(*_):
        calls.append(1)
        if len(calls) > after:
            raise error
    return call


FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("after", range(6))
def test_a_way_that_runs_out_of_memory_at_any_moment_leaves_the_others_their_times(after):
    found = timing.measure({"a": (failing(after, FULL), [()]), "b": (lambda: None, [()])}, "cpu", 3)
    assert found["a"].seconds is None and found["a"].note == "CUDA out of memory" and found["b"].seconds > 0
    seconds, stopped = timing.take_turns({"a": failing(after, FULL), "b": lambda: None}, 7, "cpu")
    assert seconds["a"] == [] and len(seconds["b"]) == 7 and stopped == {"a": "CUDA out of memory"}
    with pytest.raises(torch.OutOfMemoryError, match="a: CUDA out of memory"):
        timing.side_by_side({"b": lambda: None, "a": failing(after, FULL)}, 7, "cpu")


def test_summary_has_geometric_means_and_every_lost_case():
    times = {("causal, D 64", "a"): (1, 2, 4), ("causal, D 64", "b"): (2, 1, "-"), ("documents", "c"): (1, 3, 1)}
    rows = [{"kind": kind, "shape": shape, "mode": "forward", "way": way, "ms": ms}
            for (kind, shape), all_ms in times.items() for way, ms in zip(("ours", "flash", "flex"), all_ms)]
    summary, losing = timing.compare(rows, ("flash", "flex"))
    means = {(row["peer"], row["cases_of"]): (row["cases"], row["ours_over_peer"], row["lost"]) for row in summary}
    assert means == {("flash", "causal"): (2, 1.0, 1), ("flash", "causal, D 64"): (2, 1.0, 1),
                     ("flash", "documents"): (1, 3.0, 0),
                     ("flex", "causal"): (1, 4.0, 0), ("flex", "causal, D 64"): (1, 4.0, 0), ("flex", "documents"): (1, 1.0, 0)}
    assert losing == [{"kind": "causal, D 64", "shape": "b", "mode": "forward", "peer": "flash", "ours_over_peer": 0.5}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("what", ["attention", "cross_entropy", "train", "units"])
def test_without_a_gpu_the_benchmark_says_so_in_a_sentence(what, tmp_path):
    with pytest.raises(ValueError, match=f"python -m bench {what} needs a CUDA GPU.*--device=cpu"):
        main([what, "--device=cuda", f"--out={tmp_path}"])
    with pytest.raises(ValueError, match="expected one of cpu, cuda"):
        main([what, "--device=tpu", f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_is_written_beside_the_figures_of_a_gpu(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernel_bench, "SMALL_LOSSES", ((8, 0, 20),))
    main(["cross_entropy", "--device=cpu", "--repeats=1", f"--out={tmp_path}"])
    assert [path.name for path in tmp_path.iterdir()] == ["cross_entropy_cpu.json"]
    result = files.read_json(tmp_path / "cross_entropy_cpu.json")
    assert set(result) >= {"versions", "rows", "summary", "losing", "machine", "command"}
    assert result["machine"].endswith("threads")
    titles = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line[0] != " " and ": " in line]
    assert titles == ["versions", "rows", "summary", "losing"]


@pytest.mark.slow
def test_rows_are_written_as_they_come_and_a_case_without_memory_is_one(quick, tmp_path, monkeypatch, capsys):
    def rows(case, *rest, loss_rows=kernel_bench.loss_rows):
        written = [path.name for path in tmp_path.iterdir()]
        assert written == ([] if case[0] == 8 else ["cross_entropy_cpu.json"])
        if case[0] == 9:
            raise FULL
        if case[0] == 11:
            raise KeyboardInterrupt
        return loss_rows(case, *rest)
    monkeypatch.setattr(kernel_bench, "SMALL_LOSSES", ((8, 0, 20), (9, 4, 20), (10, 0, 20), (11, 0, 20)))
    monkeypatch.setattr(kernel_bench, "loss_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        main(["cross_entropy", "--device=cpu", "--repeats=1", f"--out={tmp_path}"])
    found = files.read_json(tmp_path / "cross_entropy_cpu.json")["rows"]
    assert [row["shape"] for row in found] == ["8, 20", "8, 20", "9, 4, 20", "10, 20", "10, 20"]
    assert found[2]["note"] == "CUDA out of memory" and found[2]["ms"] == "-" and found[3]["ms"] > 0
    assert "CUDA out of memory" in capsys.readouterr().out  # shown, too, whatever ended the command


def test_a_part_of_the_cases_and_ways_has_a_file_of_its_own(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_bench, "SMALL_LOSSES", ((8, 0, 20), (8, 4, 20), (8, 0, 30)))
    main(["cross_entropy", "--device=cpu", "--repeats=1", "--cases=head", "--ways=ours", f"--out={tmp_path}"])
    (path,) = tmp_path.iterdir()
    assert path.name == "cross_entropy_cpu_head_ours.json"
    assert [(row["shape"], row["way"]) for row in files.read_json(path)["rows"]] == [("8, 4, 20", "ours")]
    with pytest.raises(ValueError, match="expected words out of loss, V 20; 8, 20"):
        main(["cross_entropy", "--device=cpu", "--cases=flash", f"--out={tmp_path}"])
    with pytest.raises(ValueError, match="expected some of ours, eager"):
        main(["cross_entropy", "--device=cpu", "--ways=flash", f"--out={tmp_path}"])


@pytest.mark.parametrize("what, device, name", [("attention", "cuda", "attention_h200-141gb.json"),
                                                ("train", "cpu", "train.json"), ("train", "cuda", "train_h200-141gb.json"),
                                                ("units", "cpu", "units.json"), ("attention", "cpu", "attention_cpu.json")])
def test_figures_of_another_machine_are_not_written_over(what, device, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200 141GB")
    assert place(what, BenchConfig(device=device, out="results")).as_posix() == f"results/{name}"
    assert ("H200" in machine(device)) == (device == "cuda")


class Pretended:
    """The parts of torch.cuda that measure() uses, without a GPU: a replay takes 3 ms, and events read that clock."""

    def __init__(self):
        self.now, self.replayed = 0.0, 0

    def install(self, monkeypatch, fails=()):
        pretended, self.fails = self, fails

        class Graph:
            def replay(graph):
                pretended.now += 0.003  # seconds for all sets
                pretended.replayed += 1

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(event):
                event.at = pretended.now

            def elapsed_time(event, other):
                return (other.at - event.at) * 1000

            def synchronize(event):
                pass

        class Stream:
            def wait_stream(stream, other):
                assert other == "current"

        @contextlib.contextmanager
        def capturing(graph, pool, stream):
            assert isinstance(graph, Graph) and isinstance(stream, Stream) and pool == "pool"
            yield
            if pretended.fails:
                raise RuntimeError(pretended.fails)

        for name, value in {"CUDAGraph": Graph, "Event": Event, "Stream": Stream, "graph": capturing,
                            "graph_pool_handle": lambda: "pool", "current_stream": lambda: "current",
                            "stream": contextlib.nullcontext, "synchronize": lambda: None, "memory_allocated": lambda: 100,
                            "max_memory_allocated": lambda: 175, "reset_peak_memory_stats": lambda: None}.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_graph_is_divided_by_its_sets_and_memory_by_nothing(monkeypatch):
    pretended, calls = Pretended(), []
    pretended.install(monkeypatch)
    found = timing.measure({"a": (calls.append, [(1,), (2,), (3,)])}, "cuda", rounds=5)["a"]
    assert calls == [1, 1, 1, 2, 3]  # warmed up twice, then captured once with every set
    assert math.isclose(found.seconds, 0.001) and found.spread < 1e-9 and found.extra_bytes == 75 and found.note == ""
    assert pretended.replayed == 1 + 2 + 5 * round(timing.SAMPLE_SECONDS / 0.003)


def test_what_cannot_be_captured_is_called_plainly_and_says_so(monkeypatch):
    pretended = Pretended()
    pretended.install(monkeypatch, fails="CUDA error: operation not permitted when stream is capturing")

    def call(_):
        pretended.now += 0.002
    found = timing.measure({"a": (call, [(1,), (2,)])}, "cuda", rounds=3)["a"]
    assert math.isclose(found.seconds, 0.002) and "plain calls" in found.note
    pretended.install(monkeypatch, fails="an error of another kind")
    with pytest.raises(RuntimeError, match="another kind"):
        timing.measure({"a": (call, [(1,), (2,)])}, "cuda", rounds=3)
    monkeypatch.setattr(timing, "capture", failing(0, FULL))
    assert timing.measure({"a": (call, [(1,), (2,)])}, "cuda", rounds=3)["a"].note == "CUDA out of memory"


def test_there_are_more_sets_than_a_cache_holds():
    made = timing.enough_sets(lambda: [torch.empty(2**22)], "cuda")  # 16 MiB
    assert len(made) == timing.CACHE_BYTES // 2**24 == 8
    assert len(timing.enough_sets(lambda: [torch.empty(2**20, device="meta")], "cpu")) == 1  # Triton's interpreter is slow
    assert len(timing.enough_sets(lambda: [torch.empty(16)], "cuda")) == timing.MOST_SETS


def test_every_case_is_one_that_our_kernels_take():
    for case in kernel_bench.CASES:
        assert case.D in kernels.flash_attention.HEAD_DIMS and case.H % case.K == 0 and case.S >= case.T
        assert case.T == case.S or case.T == 1
    assert replace(TINY[1], B=8).shape == "8, 32, 4/2, 32"
