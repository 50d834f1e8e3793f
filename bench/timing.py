"""What a call costs on a GPU, and the tables of it: the clockwork of python -m bench.

    ways x sets of inputs --warm-up--> which ways refuse --CUDA graphs, taking turns--> medians --> ratios, and what we lose

One CUDA graph calls a way on every set of inputs in turn, so that no launch is waited for; its replay, divided by the number of
sets, is one call. At least SETS sets, and together more than an L2 cache holds, unless that takes over MOST_SETS. A sample is as
many replays in a row as take SAMPLE_SECONDS. The ways take turns: medians of ROUNDS samples, and the interquartile range over the
median as their spread. A way that cannot be captured is called plainly between CUDA events, and its note says so; one that finds
no memory, registers or compiler at any point drops out, with the reason as its note. On CPUs: plain calls, one set of inputs and
the wall clock. All this is for the kernels; whole operations go side_by_side().
"""
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import statistics
import time
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch

import config
import kernels

ROUNDS = 20  # samples of each way on a GPU
SAMPLE_SECONDS = 0.01  # at least, by repeating the replay
OF_GPUS = ("attention", "cross_entropy")  # measured on one; on a CPU they are only rehearsed
SETS, MOST_SETS, CACHE_BYTES = 4, 64, 2**27  # sets of inputs; as many as fill twice the L2 cache of an H100 or H200
NO_MEMORY = "allocate memory"  # what PyTorch says on CPUs; on GPUs the kind of the error says it
REFUSALS = ("No available kernel", "No viable backend", "cuDNN", "cudnn", "mha_graph")  # of backends that cannot run a case


@dataclass(frozen=True)
class Measured:
    seconds: float | None = None  # median of one call; None: it does not run
    spread: float | None = None  # interquartile range over the median
    extra_bytes: int | None = None  # most that a call allocated beside its inputs; None on CPUs
    note: str = ""


def check_device(what, device):
    """ValueError unless the benchmark can run there."""
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device={device}: expected cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"python -m bench {what} needs a CUDA GPU for --device=cuda and there is none here; --device=cpu times "
                         "only what runs on CPUs")
    if device == "cuda" and what in OF_GPUS:
        kernels.choose(what, device, torch.bfloat16, forced="triton")  # says what stands in the way


def take_turns(ways, rounds, device):
    """{name: function} -> ({name: seconds of each round}, {name: why it stopped}), the functions called in turn."""
    def once(function):
        begin = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds, stopped = {name: [] for name in ways}, {}
    for _ in range(rounds):
        for name, function in ways.items():
            taken, why = (None, stopped[name]) if name in stopped else attempt(once, (function,))
            if why:
                seconds[name], stopped[name] = [], why
            else:
                seconds[name].append(taken)
    return seconds, stopped


def side_by_side(ways, repeats, device):
    """{name: function} -> {name: median seconds}; one round before the first is not counted. Raises if one does not run."""
    seconds, stopped = take_turns(ways, repeats + 1, device)
    for name, why in stopped.items():
        raise torch.OutOfMemoryError(f"{name}: {why}")
    return {name: statistics.median(seconds[name][1:]) for name in ways}


def triton_errors():
    """Triton's own, of too many registers, too much shared memory or its compiler: they are no RuntimeErrors."""
    return () if kernels.triton is None else (importlib.import_module("triton.errors").TritonError,)


def attempt(function, inputs):
    """(result, None), or (None, why) where a backend, a compiler or the memory refuses. Errors of other kinds stay errors."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return function(*inputs), None
        except (RuntimeError, *triton_errors()) as error:
            message = str(error)
            refused = any(word in message for word in REFUSALS)
            kinds = torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException, *triton_errors()
            if not refused and NO_MEMORY not in message and not isinstance(error, kinds):
                raise
            reasons = [message.strip().partition("\n")[0] or type(error).__name__]
    if refused:  # PyTorch warns of what each backend lacks, among them those that were switched off for pinning
        found = [str(warning.message).partition(" (Triggered")[0] for warning in said]
        found = [line for line in found if not line.endswith("because:") and "runtime disabled" not in line]
        reasons = list(dict.fromkeys(found)) or reasons
    return None, "; ".join(reasons)


def warm_up(function, inputs, device):
    """Two calls, the first of which compiles and plans: (bytes that the second allocated at most, None) or (None, why not)."""
    _, refusal = attempt(function, inputs)
    if refusal or device == "cpu":
        return None, refusal
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, refusal = attempt(function, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, refusal


def call_all(function, sets):
    for inputs in sets:
        function(*inputs)


def capture(function, sets, stream, pool):
    """(what replays a CUDA graph of all calls, "") or (what makes them plainly, why)."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            call_all(function, sets)
    except RuntimeError as error:
        if "captur" not in str(error).lower():
            raise
        return functools.partial(call_all, function, sets), "cannot be captured: plain calls between events"
    return graph.replay, ""


def clock(go, device, times):
    """Seconds of one go()."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            go()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / times
    start = time.perf_counter()
    for _ in range(times):
        go()
    return (time.perf_counter() - start) / times


def measure(ways, device, rounds):
    """{way: (function, sets of inputs)} -> {way: Measured}, the ways taking turns."""
    found, runners, samples = {}, {}, {}

    def tried(way, function, *arguments):
        result, refusal = attempt(function, arguments)
        if refusal:  # out of memory, mostly
            found[way] = Measured(note=refusal)
            runners.pop(way), samples.pop(way, None)
        return result

    on_stream = contextlib.nullcontext()
    if device == "cuda":  # one stream of our own for all: graphs cannot be captured on the default stream
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        on_stream = torch.cuda.stream(stream)
    with on_stream:
        for way, (function, sets) in ways.items():  # all before the first capture, which then gets the memory that they leave
            extra_bytes, refusal = warm_up(function, sets[0], device)
            found[way] = Measured(extra_bytes=extra_bytes, note=refusal or "")
            if refusal is None:
                runners[way] = functools.partial(call_all, function, sets)
        if device == "cuda":
            for way in list(runners):  # graphs share their memory: they run one at a time, and nothing is read from them
                if captured := tried(way, capture, *ways[way], stream, pool):
                    runners[way], note = captured
                    found[way] = replace(found[way], note=note)
        for way, go in list(runners.items()):
            tried(way, go)
            if way in runners and (taken := tried(way, clock, go, device, 2)) is not None:
                samples[way] = max(1, min(200, round(SAMPLE_SECONDS / taken))), []
        for _ in range(rounds):
            for way, go in list(runners.items()):
                times, seconds = samples[way]
                if (taken := tried(way, clock, go, device, times)) is not None:
                    seconds.append(taken / len(ways[way][1]))
    if device == "cuda":
        torch.cuda.synchronize()
    for way, (_, seconds) in samples.items():
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
        found[way] = replace(found[way], seconds=median, spread=(high - low) / median)
    return found


def enough_sets(make, device):
    """Sets of inputs from make(), which draws new ones at each call."""
    sets = [make()]
    size = sum(x.numel() * x.element_size() for x in sets[0])
    count = max(SETS, min(MOST_SETS, -(-CACHE_BYTES // size))) if device == "cuda" else 1
    return sets + [make() for _ in range(count - 1)]


# ---------------------------------------------------------------------------------------------- tables

def number(value, digits=4):
    return "-" if value is None else float(f"{value:.{digits}g}")


def ratio(a, b):
    return None if a is None or b is None else a / b


def timings(measured, flops):
    """Columns that every way has; flops None: no rate."""
    return {"ms": number(ratio(measured.seconds, 1e-3)), "spread": number(measured.spread, 2),
            "tflops": number(ratio(flops, measured.seconds and measured.seconds * 1e12))}


def compare(rows, peers):
    """(summary, losing): geometric means of peer's time / ours by peer, mode and kind of case, and the cases below 1.

    A kind is "group, part"; there is a row for each kind and for each group of several.
    """
    ms = {(row["kind"], row["shape"], row["mode"], row["way"]): row["ms"] for row in rows}
    found = [{"kind": kind, "shape": shape, "mode": mode, "peer": peer, "ours_over_peer": ms[kind, shape, mode, peer] / ours}
             for (kind, shape, mode, way), ours in ms.items() if way == "ours" and ours != "-"
             for peer in peers if ms.get((kind, shape, mode, peer), "-") != "-"]
    kinds = dict.fromkeys(row["kind"] for row in found)
    groups = dict.fromkeys(name for kind in kinds for name in (kind.partition(",")[0], kind))
    summary = []
    for peer in peers:
        for mode in dict.fromkeys(row["mode"] for row in found):
            for group in groups:
                ratios = [row["ours_over_peer"] for row in found if row["peer"] == peer and row["mode"] == mode
                          and group in (row["kind"], row["kind"].partition(",")[0])]
                if ratios:
                    summary.append({"peer": peer, "mode": mode, "cases_of": group, "cases": len(ratios),
                                    "ours_over_peer": number(statistics.geometric_mean(ratios), 3),
                                    "lost": sum(value < 1 for value in ratios)})
    losing = [row | {"ours_over_peer": number(row["ours_over_peer"], 3)} for row in found if row["ours_over_peer"] < 1]
    return summary, losing


def chosen(options, names):
    """Those whose name, without its commas, holds one of the words of --cases; all, where it gives none. {name: case}."""
    found = {name: case for name, case in names.items()
             if not options.cases or any(word in name.replace(",", "") for word in options.cases)}
    if not found:
        raise ValueError(f"--cases={','.join(options.cases)}: expected words out of {'; '.join(names)}")
    return found


def wanted(options, ways):
    """The ways that --ways names, all by default: {name: function} -> the same."""
    unknown = set(options.ways) - set(ways)
    if unknown:
        raise ValueError(f"--ways={','.join(options.ways)}: expected some of {', '.join(ways)}")
    return {name: function for name, function in ways.items() if not options.ways or name in options.ways}


def run_cases(what, options, cases, rows_of):
    """Yields the rows of rows_of(case, options, rounds) as soon as each case has them.

    cases: {"kind; shape": case}. One that finds no memory, for its inputs, say, leaves a row that says so.
    """
    for name, case in config.progress(chosen(options, cases).items(), desc=what):
        rounds = max(ROUNDS, options.repeats) if options.device == "cuda" else options.repeats
        rows, why = attempt(rows_of, (case, options, rounds))
        kind, _, shape = name.partition("; ")
        yield from rows if why is None else [{"kind": kind, "shape": shape, "mode": "-", "way": "all", "ms": "-", "note": why}]
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def tables(rows, device):
    """{name of a table: its rows} of what run_cases gave, the losing shapes last."""
    summary, losing = compare(rows, [way for way in dict.fromkeys(row["way"] for row in rows) if way != "ours"])
    versions = {"gpu": torch.cuda.get_device_name() if device == "cuda" else "none", "torch": torch.__version__,
                "triton": "none" if kernels.triton is None else importlib.metadata.version("triton"),
                "cuda": torch.version.cuda or "none", "cudnn": torch.backends.cudnn.version() or "none"}
    return {"versions": [versions], "rows": rows, "summary": summary, "losing": losing}
