"""Compile every kernel variant for GPUs that are not here: registers, spills, shared memory, matrix instructions.

    kernel, types, constants --Triton--> PTX, cubin --cuobjdump--> registers, stack    -> a table and results/kernels.json

    python -m kernels.compile                  # sm_80 (A100), sm_86 (GeForce, A10, L4) and sm_90 (H100, H200)
    python -m kernels.compile --arch 90

A compiler accepts what a GPU refuses to launch (more shared memory than it has) or runs slowly (registers spilled to memory), and
Triton's interpreter accepts even more. Exit code 1 if any variant does so. tests/test_kernel_compilation.py runs this command.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import flash_attention, flash_decoding, fused_cross_entropy, interpreted, split_adamw

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # most that one program can have
DTYPES = {2: "bf16", 4: "fp32"}  # by bytes per number; float16 is as bfloat16
STRIDES = {f"{tensor}_{axis}" for tensor in ("q", "k", "v", "do") for axis in "bth"}
# Types of arguments; those that are not here are constants, or addresses of the dtype that is compiled for.
ATTENTION = (dict.fromkeys(("LSE", "DELTA", "SLOPES", "ACC", "M", "L"), "*fp32") | dict.fromkeys(("STARTS", "ENDS"), "*i32")
             | dict.fromkeys(("T", "H", "GROUP", "S", "heads", "parts", "length", *STRIDES), "i32")
             | {"scale": "fp32", "LAST": "*i64"})
ROWS = (dict.fromkeys(("losses", "statistics", "factor"), "*fp32") | {"targets": "*i64"}
        | dict.fromkeys(("V", "logits_stride", "gradient_stride", "ignore_index"), "i32"))

UPDATE = (dict.fromkeys(("exp_avg", "exp_avg_sq", "corrections", "skip", "scale"), "*fp32")
          | dict.fromkeys(("weight", "low"), "*i16") | {"n": "i32"}
          | dict.fromkeys(("rest_1", "beta_2", "rest_2", "decay", "eps"), "fp32"))


def variant(name, kernel, dtype, constants, types=ATTENTION, sixteens=STRIDES):
    """What triton.compiler.ASTSource needs. sixteens: arguments that are multiples of 16, as all addresses are."""
    launch = {key: constants.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in constants}
    signature = {argument: "constexpr" if argument in constants else types.get(argument, f"*{dtype}")
                 for argument in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, (argument, kind) in enumerate(signature.items())
                  if kind[0] == "*" or argument in sixteens}
    return dict(name=name, kernel=kernel, signature=signature, constexprs=constants, attrs=attributes, launch=launch)


def attention_variants(arch):
    """Each row of the TILES of attention, plain and with everything switched on (there D = 80 stands for 128)."""
    for (name, D, itemsize), extras in product(flash_attention.TILES[arch], (False, True)):
        kernel, D = getattr(flash_attention, f"{name}_kernel"), 80 if extras and D == 128 else D
        constants = flash_attention.tile(name, D, itemsize, arch) | {"ALIBI": extras, "DOCUMENTS": extras}
        constants |= {} if extras else dict.fromkeys({"SLOPES", "STARTS", "ENDS"} & set(kernel.arg_names))
        name = f"attention_{name}_{D}_{DTYPES[itemsize]}{'_alibi_documents' if extras else ''}"
        yield variant(name, kernel, DTYPES[itemsize], constants)


def decoding_variants():
    """Both kernels, with eight query heads a key head."""
    for D, (itemsize, dtype), alibi in product((64, 80, 128), DTYPES.items(), (False, True)):
        constants = flash_decoding.constants(D, 8, itemsize) | {"ALIBI": alibi}
        constants |= {} if alibi else {"SLOPES": None, "LAST": None}
        name = f"decode_attention_{D}_{dtype}{'_alibi' if alibi else ''}"
        yield variant(name, flash_decoding.part_kernel, dtype, constants)
        if alibi:
            constants = dict(D=D, BLOCK_D=constants["BLOCK_D"], BLOCK_PARTS=flash_decoding.MOST_PARTS, num_warps=4, num_stages=3)
            yield variant(f"decode_join_{D}_{dtype}", flash_decoding.join_kernel, dtype, constants)


def row_variants():
    """Of cross-entropy. Aligned ones have V and strides divisible by 16: a thread loads 16 bytes at a time; others take any V."""
    tasks = {"loss": ["gradient", "factor"], "loss_gradient": ["factor"], "gradient": ["losses"]}  # with the arguments each lacks
    shapes = [(*tile, True) for tile in fused_cross_entropy.TILES] + [(*fused_cross_entropy.TILES[-1], False)]
    for dtype, (BLOCK_V, num_warps, one_tile), task, aligned in product(DTYPES.values(), shapes, tasks, (True, False)):
        constants = dict(BLOCK_V=BLOCK_V, ONE_TILE=one_tile, **dict.fromkeys(tasks[task]), num_warps=num_warps, num_stages=3)
        name = f"row_{task}_{dtype}_{BLOCK_V}{'' if one_tile else '_loop'}{'' if aligned else '_unaligned'}"
        sixteens = {"V", "logits_stride", "gradient_stride"} if aligned else ()
        yield variant(name, fused_cross_entropy.row_kernel, dtype, constants, ROWS, sixteens)


def update_variants():
    """Of split AdamW: gradients in both dtypes."""
    for dtype, bits in (("bf16", "*i16"), ("fp32", "*fp32")):
        constants = dict(BLOCK=split_adamw.BLOCK, num_warps=split_adamw.NUM_WARPS, num_stages=3)
        yield variant(f"split_adamw_{dtype}", split_adamw.update_kernel, dtype, constants, UPDATE | {"gradient": bits}, {"n"})


def variants(arch):
    """{name: what a compiler needs} of everything that the project launches on an architecture."""
    return {found["name"]: found for found in (*attention_variants(arch), *decoding_variants(), *row_variants(),
                                                *update_variants())}


def compile_variant(arch, name):
    """One row of the table."""
    variant = variants(arch)[name]
    source = ASTSource(variant["kernel"], variant["signature"], variant["constexprs"], variant["attrs"])
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant["launch"])
    return {"arch": f"sm_{arch}", "kernel": name, **measured(compiled), **variant["launch"]}


def measured(compiled):
    """What a compiled kernel takes, and its matrix instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    wgmma, mma = (compiled.asm["ptx"].count(instruction) for instruction in ("wgmma.mma_async", "mma.sync"))
    return {"registers": registers, "spilled_bytes": stack, "shared_bytes": compiled.metadata.shared, "wgmma": wgmma, "mma": mma}


def excesses(row, arch):
    """What a row takes too much of, in words; empty if it will launch and keep its numbers in registers."""
    found = [f"{row['spilled_bytes']} bytes of registers spilled"] if row["spilled_bytes"] else []
    if row["shared_bytes"] > SHARED_BYTES[arch]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, {SHARED_BYTES[arch]} are there")
    return found


def faults(row):
    """All that is wrong with a row, in words."""
    arch = int(row["arch"][3:])
    found = excesses(row, arch)
    if "attention" in row["kernel"] and "_bf16" in row["kernel"]:  # a decoder's 16 rows are too few for wgmma, which takes 64
        wanted = "wgmma" if arch == 90 and "decode" not in row["kernel"] else "mma"
        if not row[wanted]:
            found.append(f"no {wanted} instruction")
    return found


def write(path, result):
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(path)


def show(rows):
    """As a table, with the columns of the first row."""
    widths = {key: max(len(str(row[key])) for row in [*rows, {key: key}]) for key in rows[0]}
    for row in ({key: key for key in widths}, *rows):
        print("  ".join(f"{row[key]!s:<{width}}" for key, width in widths.items()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", choices=sorted(SHARED_BYTES), default=sorted(SHARED_BYTES))
    parser.add_argument("--out", default="results", help="folder for kernels.json")
    options = parser.parse_args(argv)
    if interpreted():
        sys.exit("TRITON_INTERPRET=1 turns the compiler off; unset it")
    tasks = [(arch, name) for arch in options.arch for name in variants(arch)]
    with ProcessPoolExecutor() as pool:
        rows = list(tqdm(pool.map(compile_variant, *zip(*tasks)), total=len(tasks), unit="kernel", disable=None))
    wrong = [f"{row['arch']} {row['kernel']}: {fault}" for row in rows for fault in faults(row)]
    result = {"command": "python -m kernels.compile", "triton": triton.__version__, "torch": torch.__version__, "rows": rows}
    write(Path(options.out) / "kernels.json", result)
    show(rows)
    print("\n".join(wrong) or f"{len(rows)} variants: nothing spills, everything fits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
