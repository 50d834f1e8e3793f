"""Which numbers a model computes with, and a sentence for the user that says why.

    training   products in bfloat16 where a GPU or the processor multiplies it in hardware: emulated it is slower than float32
    weights    of a model that is only run: bfloat16 on such a GPU; elsewhere float32 while it fits the memory, bfloat16 beyond
"""
import os
import re
from pathlib import Path

import torch

from kernels.packed import MOST_BYTES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # of processors with products of bfloat16: x86's two, Arm's
LIMITS = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")  # of oneDNN's instructions that leave it those; others do not
HEADROOM = 1.1  # of float32 weights, for the cache and what else comes and goes


def processor_bfloat16(cpuinfo, limit=""):
    """The flag by which a processor says that it multiplies bfloat16, "" without. limit: the value of ONEDNN_MAX_CPU_ISA."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = found.group(1).split() if found and (not limit or any(word in limit.upper() for word in LIMITS)) else ()
    return next((flag for flag in FLAGS if flag in flags), "")


def hardware_bfloat16(device):
    """What multiplies bfloat16 there: a processor's flag or a GPU's capability; "" where nothing is known to, as on Apple's."""
    kind, cpuinfo = torch.device(device).type, Path("/proc/cpuinfo")
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor}" if major >= 8 else ""
    known = kind == "cpu" and cpuinfo.is_file()
    return processor_bfloat16(cpuinfo.read_text(errors="replace"), os.environ.get("ONEDNN_MAX_CPU_ISA", "")) if known else ""


def free_memory(device, processes=1):
    """Bytes that are left there, half of all where the system does not say; processes: that share it, if it is not a GPU's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    said = re.search(r"^MemAvailable: *(\d+) kB", meminfo.read_text() if meminfo.is_file() else "", re.MULTILINE)
    free = 1024 * int(said.group(1)) if said else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(free, container_memory(Path("/sys/fs/cgroup"))) // processes


def container_memory(folder):
    """Bytes that a container's limit leaves (cgroup 2, then 1), of which what files fill can be had again; inf without."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        if (folder / limit).is_file() and (most := (folder / limit).read_text().strip()).isdigit():
            files = re.search(r"^inactive_file (\d+)", (folder / limit).with_name("memory.stat").read_text(), re.MULTILINE)
            return max(0, int(most) - int((folder / used).read_text()) + int(files.group(1) if files else 0))
    return float("inf")


def training_dtype(name, hardware):
    """--dtype=auto | float32 | bfloat16 -> (name of the dtype of products, why). hardware: as hardware_bfloat16 says."""
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype={name}: expected auto, float32 or bfloat16")
    why = "as asked for"
    if name == "auto" and hardware:
        name, why = "bfloat16", f"multiplied in hardware ({hardware})"
    elif name == "auto":
        name, why = "float32", "no hardware for bfloat16 is known here"
    elif name == "bfloat16" and not hardware:
        why += ", emulated: no hardware for it is known here, float32 would be faster"
    return name, f"products in {name}: {why}"


def weights_dtype(name, device, parameters, free=None, hardware=None):
    """--dtype=auto | a key of DTYPES -> (name of the dtype of the weights of models that are only run, why).

    Args: parameters: of all models. free: bytes, hardware: as hardware_bfloat16 says; None asks the machine.
    """
    if name not in ("auto", *DTYPES):
        raise ValueError(f"--dtype={name}: expected auto, {', '.join(DTYPES)}")
    hardware, kind = hardware_bfloat16(device) if hardware is None else hardware, torch.device(device).type
    if name == "auto" and kind == "cuda" and hardware:
        name, why = "bfloat16", f"multiplied in hardware ({hardware})"
    elif name == "auto":
        free, size = free_memory(device) if free is None else free, 4 * parameters
        needed = HEADROOM * size + (min(size, MOST_BYTES) if kind == "cpu" else 0)  # packed.py makes copies there
        name = "float32" if needed <= free else "bfloat16"
        why = f"float32 takes {needed / 1e9:.2g} GB of the {free / 1e9:.2g} GB that are free"
    else:
        slow = kind == "cpu" and (name == "float16" or name == "bfloat16" and not hardware)
        why = "as asked for" + ", slow: no hardware for it is known here" * slow
    return name, f"weights in {name}: {why}"
