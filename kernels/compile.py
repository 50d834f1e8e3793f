"""Compile every kernel variant for GPUs that are not here: registers, spills, shared memory, matrix instructions.

    kernel, types, constants --Triton--> PTX, cubin --cuobjdump--> registers, stack    -> a table and results/kernels.json

    python -m kernels.compile                  # sm_80 (A100), sm_86 (GeForce, A10, L4) and sm_90 (H100, H200)
    python -m kernels.compile --arch 90

A compiler accepts what a GPU refuses to launch (more shared memory than it has) or runs slowly (registers spilled to memory), and
Triton's interpreter accepts even more. Exit code 1 if any variant does so. tests/test_kernel_compilation.py runs this command.
"""
import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import flash_attention, flash_decoding, fused_cross_entropy

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # most that one program can have


@functools.cache
def variants(arch):
    """{name: what a compiler needs} of everything that the project launches on an architecture."""
    found = [*flash_attention.configurations(arch), *flash_decoding.configurations(), *fused_cross_entropy.configurations()]
    return {variant["name"]: variant for variant in found}


def compile_variant(arch, name):
    """One row of the table."""
    variant = variants(arch)[name]
    source = ASTSource(variant["kernel"], variant["signature"], variant["constexprs"], variant["attrs"])
    options = {key: variant[key] for key in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    wgmma, mma = (compiled.asm["ptx"].count(instruction) for instruction in ("wgmma.mma_async", "mma.sync"))
    return {"arch": f"sm_{arch}", "kernel": name, "registers": registers, "spilled_bytes": stack,
            "shared_bytes": compiled.metadata.shared, "wgmma": wgmma, "mma": mma, **options}


def faults(row):
    """What is wrong with a row, in words; empty if it will launch and keep its numbers in registers."""
    arch, found = int(row["arch"][3:]), []
    if row["spilled_bytes"]:
        found.append(f"{row['spilled_bytes']} bytes of registers spilled")
    if row["shared_bytes"] > SHARED_BYTES[arch]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, {SHARED_BYTES[arch]} are there")
    if "attention" in row["kernel"] and "_bf16" in row["kernel"]:  # a decoder's 16 rows are too few for wgmma, which takes 64
        wanted = "wgmma" if arch == 90 and "decode" not in row["kernel"] else "mma"
        if not row[wanted]:
            found.append(f"no {wanted} instruction")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", choices=sorted(SHARED_BYTES), default=sorted(SHARED_BYTES))
    parser.add_argument("--out", default="results", help="folder for kernels.json")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "") == "1":
        sys.exit("TRITON_INTERPRET=1 turns the compiler off; unset it")
    tasks = [(arch, name) for arch in options.arch for name in variants(arch)]
    with ProcessPoolExecutor() as pool:
        rows = list(tqdm(pool.map(compile_variant, *zip(*tasks)), total=len(tasks), unit="kernel", disable=None))
    wrong = [f"{row['arch']} {row['kernel']}: {fault}" for row in rows for fault in faults(row)]
    result = {"command": "python -m kernels.compile", "triton": triton.__version__, "torch": torch.__version__, "rows": rows}
    path = Path(options.out) / "kernels.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, path)
    widths = {key: max(len(str(row[key])) for row in [*rows, {key: key}]) for key in rows[0]}
    for row in ({key: key for key in widths}, *rows):
        print("  ".join(f"{row[key]!s:<{width}}" for key, width in widths.items()))
    print("\n".join(wrong) or f"{len(rows)} variants: nothing spills, everything fits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
