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
LIMITS = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")  # of oneDNN that exclude those
HEADROOM = 1.1  # of float32 weights, for the cache and what else comes and goes


def processor_bfloat16(cpuinfo, limit=""):
    """The flag by which a processor says that it multiplies bfloat16, "" without. limit: what oneDNN is kept to."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = found.group(1).split() if found and limit.upper() not in LIMITS else ()
    return next((flag for flag in FLAGS if flag in flags), "")


def hardware_bfloat16(device):
    """What multiplies bfloat16 there: a processor's flag or a GPU's capability; "" where nothing is known to, as on Apple's."""
    kind, cpuinfo = torch.device(device).type, Path("/proc/cpuinfo")
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor}" if major >= 8 else ""
    if kind != "cpu" or not cpuinfo.is_file():
        return ""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")  # its older name, which counts
    return processor_bfloat16(cpuinfo.read_text(errors="replace"), limit)


def free_memory(device, processes=1):
    """Bytes that are left there, half of all where the system does not say; processes: that share it, if it is not a GPU's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo, groups = (said(Path(name)) for name in ("/proc/meminfo", "/proc/self/cgroup"))
    available = re.search(r"^MemAvailable: *(\d+) kB", meminfo, re.MULTILINE)
    free = 1024 * int(available.group(1)) if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(min(free, group_memory(Path("/sys/fs/cgroup"), groups)) // processes, address_space(Path("/proc/self/statm")))


def said(path):
    """What a file of the system holds; "" where there is none, or none that may be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def group_memory(folder, groups):
    """Bytes that the limits of a container, a batch system or a service leave; inf without. What files fill can be had again.

    folder: where groups of processes are seen; groups: this process's, as /proc/self/cgroup lists them. A limit holds for all
    groups below its own; in a container the list may give names from outside, and its own group is the topmost that is seen.
    """
    listed = re.findall(r"^\d+:([^:]*):(.*)$", groups, re.MULTILINE)
    own = {kind: path.strip("/") for kinds, path in listed for kind in kinds.split(",")}
    left = [float("inf")]
    for top, kind, limit, used in ((folder, "", "memory.max", "memory.current"),  # of version 2, then 1
                                   (folder, "", "memory.high", "memory.current"),  # beyond it a process is slowed to a halt
                                   (folder / "memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")):
        for group in ((lowest := top / own.get(kind, "")), *lowest.parents):
            most, taken, files = (said(group / name) for name in (limit, used, "memory.stat"))
            if most.isdigit():  # a sandbox may show a limit without the rest
                files = re.search(r"^inactive_file (\d+)", files, re.MULTILINE)
                left.append(max(0, int(most) - int(taken or 0) + int(files.group(1) if files else 0)))
    return min(left)


def address_space(statm):
    """Bytes that `ulimit -v`, as some batch systems set it, leaves this process; inf without. statm: what it has, in pages."""
    if not statm.is_file():
        return float("inf")
    import resource  # Windows has none
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return float("inf") if most == resource.RLIM_INFINITY else max(0, most - used)


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
