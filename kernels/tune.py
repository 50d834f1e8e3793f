"""Which options the kernels are fastest with on the GPU that is here: tiles, warps, pipeline stages, registers of a thread.

    candidates --compiled on all cores--> those that fit --same result as today's--> --timed in turns--> rows for the tables

    python -m kernels.tune                                    # all kernels at D 64 and 128, within a minute
    python -m kernels.tune --kernel=forward,queries --head-dim=64 --seconds=30
    TRITON_INTERPRET=1 python -m kernels.tune                 # without a GPU: are all results right? Tiny inputs, no times

A candidate stands in the kernel's own table while the operator around it is called, so that what is timed is what would run: keys
and queries within the whole backward pass. All are compiled before the first is timed, in processes that see no GPU; Triton's
cache on disk hands them over. Not timed, with the reason: what spills registers or wants too much shared memory, what does not
compile, what gives another result than today's row. Times: medians of ROUNDS in turns, each the median of what triton.testing's
do_bench finds, which empties the L2 cache before every call; bfloat16, causal. A row is proposed that beat today's in every round
and spills nothing with ALiBi and documents either; pasting it is by hand (docs/kernels.md).
"""
import argparse
import contextlib
import functools
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import CancelledError, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.testing import do_bench

from kernels import flash_attention, flash_decoding, fused_cross_entropy, interpreted
from kernels.compile import excesses, measured, show, write

KERNELS = {"forward": "forward_kernel", "keys": "keys_kernel", "queries": "queries_kernel", "decode": "part_kernel",
           "rows": "row_kernel"}
ROWS = {512: 65_536, 50_272: 4096}  # of logits, by V
ROUNDS = 5
MOST_ERROR = 0.01  # norm of the difference from today's result over the norm of that: a few roundings of bfloat16


def place(kernel, D, arch):
    """(table that a launch looks into, its key, how both are written); D is a head dimension, or V of rows."""
    if kernel == "rows":
        return vars(fused_cross_entropy), "TILES", "TILES of fused_cross_entropy.py"
    if kernel == "decode":
        return flash_decoding.BLOCKS, 2, "BLOCKS[2] of flash_decoding.py"
    return flash_attention.TILES[arch], (kernel, D, 2), f'TILES[{arch}]["{kernel}", {D}, 2] of flash_attention.py'


def candidates(kernel, D, arch):
    """Rows as the table has them, today's first."""
    table, key, _ = place(kernel, D, arch)
    today, others = table[key], []
    if kernel == "rows":
        today = next((tile for tile in today if tile[0] >= D), today[-1])
        others = product((512,), (1, 2, 4)) if D <= 512 else product((1024, 2048, 4096, 8192), (4, 8, 16))
    elif kernel == "decode":
        others = product((32, 64, 128), (4, 8), (2, 3))
    else:
        for own, walked, stages, capped in product((64, 128), (32, 64, 128), (2, 3), (False, True)):
            size, warps = (walked, own) if kernel == "keys" else (own, walked), own // 16  # a warp for 16 of its rows
            others.append((*size, warps, stages) + ({4: 168, 8: 128}[warps],) * capped)  # so that 3, or 2, programs run at once
    return list(dict.fromkeys([today, *others]))


@contextlib.contextmanager
def in_table(row, kernel, D, arch):
    table, key, _ = place(kernel, D, arch)
    before, table[key] = table[key], (row,) if kernel == "rows" else row
    try:
        yield
    finally:
        table[key] = before


def operator(kernel, D, draw, toy=False, everything=False):
    """What calls the operator around a kernel, on inputs of draw(*shape), for its results; everything: with ALiBi, documents."""
    if kernel == "rows":
        logits = draw(3 if toy else ROWS[D], D)
        targets, gradient = torch.arange(len(logits), device=logits.device) % D, torch.empty_like(logits)
        losses, statistics = (logits.new_empty(len(logits), *more, dtype=torch.float32) for more in ((), (2,)))
        return lambda: fused_cross_entropy.run_rows(logits, targets, -100, losses, statistics, gradient) or (losses, gradient)
    B, T, H = (1, 140, 2) if toy else (8, 2048, 16) if kernel == "decode" else (16, 1024, 16)
    slopes = draw(H, dtype=torch.float32) if everything else None
    if kernel == "decode":
        q, k, v = draw(B, 1, H, D), draw(B, T, H, D), draw(B, T, H, D)
        return lambda: (flash_decoding.decode(q, k, v, D**-0.5, slopes),)
    q, k, v = draw(B, T, 3 * H, D).split(H, dim=2)  # slices of a fused projection, as in the model
    given = D**-0.5, slopes, torch.zeros(B, T, dtype=torch.int32, device=q.device) if everything else None
    if kernel == "forward":
        return functools.partial(flash_attention.forward, q, k, v, *given)
    do, (o, lse) = draw(B, T, H, D), flash_attention.forward(q, k, v, *given)
    return functools.partial(flash_attention.backward, do, q, k, v, o, lse, *given)


def compiled(kernel, D, row, arch, capability, programs):
    """(what a candidate takes, why it is not timed, what is wrong with everything on). This process launches no kernel again."""
    torch.set_num_threads(1)
    launched, verdicts, target = {}, [], GPUTarget("cuda", capability, 32)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0,
                                      get_current_stream=lambda device: 0))
    flash_attention.architecture, flash_decoding.programs = lambda device: arch, lambda device: programs

    def compile_only(kernel, grid, *arguments, **constants):
        launched[kernel.fn.__name__] = kernel.warmup(*arguments, grid=grid, **constants)
    JITFunction.__getitem__ = lambda kernel, grid: functools.partial(compile_only, kernel, grid)
    try:
        for everything in (False, True):
            with in_table(row, kernel, D, arch):
                operator(kernel, D, functools.partial(torch.empty, dtype=torch.bfloat16), everything=everything)()
            takes = measured(launched[KERNELS[kernel]])
            verdicts.append(({key: takes[key] for key in ("registers", "shared_bytes")}, "; ".join(excesses(takes, arch))))
            if verdicts[0][1]:
                break
    except (TritonError, RuntimeError, subprocess.CalledProcessError) as error:
        return {}, f"does not compile: {error}".strip().partition("\n")[0], ""
    return *verdicts[0], verdicts[-1][1]


def compile_all(tasks, seconds, *gpu):
    """{(kernel, D, row): what compiled() says}, on all cores; what has not begun after so many seconds is left."""
    found = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = {task: pool.submit(compiled, *task, *gpu) for task in tasks}
        wait(futures.values(), seconds)
        pool.shutdown(cancel_futures=True)
    for task, future in futures.items():
        try:
            found[task] = future.result()
        except (CancelledError, BrokenProcessPool) as error:
            found[task] = {}, "no time left" if isinstance(error, CancelledError) else "the compiler crashed", ""
    return found


def timed(kernel, D, arch, verdicts, draw, on_gpu, until):
    """A dictionary for each candidate, today's first; past `until` no candidate and no round is begun."""
    call, expected, rows, times = operator(kernel, D, draw, toy=not on_gpu), None, [], {}
    for row in candidates(kernel, D, arch):
        takes, note, caveat = verdicts.get((kernel, D, row), ({}, "", ""))
        note, error = note or ("no time left" if time.monotonic() > until else ""), "-"
        if not note:
            try:
                with in_table(row, kernel, D, arch):
                    results = [x.float() for x in call()]
            except (TritonError, torch.OutOfMemoryError) as refusal:
                note = str(refusal).partition("\n")[0]
            else:
                expected = expected or [x.clone() for x in results]  # rows gives the same tensors again
                error = float(f"{max(((a - b).norm() / b.norm()).item() for a, b in zip(results, expected)):.2g}")
                note = "" if error <= MOST_ERROR else "another result than today's"
        if not note:
            times[row] = []
        rows.append({"kernel": kernel, "D": D, "row": row, "ms": "-", "times_as_fast": "-", "wins": False, "error": error,
                     "registers": "-", "shared_bytes": "-", **takes, "with_everything": caveat, "note": note})
    for _ in range(ROUNDS * on_gpu):
        for row in times if time.monotonic() < until else ():
            with in_table(row, kernel, D, arch):
                times[row].append(do_bench(call, warmup=2, rep=10, return_mode="median"))
    today = times.get(rows[0]["row"], [])
    for found in rows:
        if mine := times.get(found["row"]):
            found["ms"] = round(statistics.median(mine), 4)
            found["times_as_fast"] = round(statistics.median(today) / found["ms"], 3) if today else "-"
            found["wins"] = bool(today) and all(a < b for a, b in zip(mine, today)) and not found["with_everything"]
    return rows


def proposal(rows, where):
    """The line that a kernel's table would take."""
    today, best = rows[0], min((row for row in rows if row["wins"]), key=lambda row: row["ms"], default=None)
    if best is None:
        return f"{where}: {today['row']} stays, {today['ms']} ms"
    return f"{where}: {best['row']}, {best['ms']} ms, {best['times_as_fast']} times as fast as {today['row']}, {today['ms']} ms"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default=",".join(KERNELS), help="some of these, with commas: %(default)s")
    parser.add_argument("--head-dim", default="64,128", help="64 (for all up to it), 128 or, by default, both")
    parser.add_argument("--seconds", type=float, default=50, help="after which nothing more is begun; half are for compiling")
    parser.add_argument("--json", type=Path, help="file of all rows; default: results/tune-GPU.json")
    options = parser.parse_args(argv)
    names, dims = options.kernel.split(","), options.head_dim.split(",")
    for name, given, known in (("kernel", names, KERNELS), ("head-dim", dims, ("64", "128"))):
        if set(given) - set(known):
            parser.error(f"--{name}={','.join(given)}: expected some of {','.join(known)}")
    on_gpu, end, verdicts = not interpreted(), time.monotonic() + options.seconds, {}
    if on_gpu and not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU to time kernels on; with TRITON_INTERPRET=1 their results are checked without one")
    device, card = torch.device("cuda" if on_gpu else "cpu"), torch.cuda.get_device_name() if on_gpu else "interpreter"
    arch = flash_attention.architecture(device)
    cases = [(name, D) for name in names for D in (ROWS if name == "rows" else map(int, dims))]
    if on_gpu:
        major, minor = torch.cuda.get_device_capability()
        tasks = [(*case, row) for case in cases for row in candidates(*case, arch)]
        verdicts = compile_all(tasks, options.seconds / 2, arch, 10 * major + minor, flash_decoding.programs(device))
    path = options.json or Path("results") / f"tune-{re.sub('[^a-z0-9]+', '-', card.lower()).removeprefix('nvidia-')}.json"
    draw, rows, lines = functools.partial(torch.randn, dtype=torch.bfloat16 if on_gpu else torch.float16, device=device), [], []
    for left, case in zip(range(len(cases), 0, -1), cases):
        now = time.monotonic()
        found = timed(*case, arch, verdicts, draw, on_gpu, now + (end - now) / left)
        rows, lines = rows + found, [*lines, proposal(found, place(*case, arch)[2])]
        write(path, {"gpu": card, "triton": triton.__version__, "torch": torch.__version__, "rows": rows, "proposals": lines})
        show(found)
    notes = [row["note"] for row in rows if row["note"]]
    print(f"{len(rows)} candidates on {card}, {len(notes)} of them not timed:", *sorted(set(notes)), sep="\n    ")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
