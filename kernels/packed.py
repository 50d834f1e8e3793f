"""Faster linear layers on a CPU, while no gradient is needed: each weight laid out once, for oneDNN, and not at every call.

    with packed(model):      # scoring, encoding, sampling
        y = model(x)         # every x W^T + b by oneDNN on the packed W; the layers, their names and weights stay as they are

A matrix product first copies its operands into blocks that suit the processor. The fewer rows x has, the more of the time goes
into copying W, which is the same at every call: with few rows packing more than halves the time, and where F.linear's library
favours another maker's processors it helps at any number of rows. `python -m bench cpu` measures both in what our commands do.
The operators are those that torch.compile emits for frozen models; they are outside PyTorch's public interface, so their absence
changes the speed alone. Training never comes here.

Memory that is freed is kept: glibc gives large blocks back to the system, which clears every page before it gives it out again.
Batches of many short sequences then spend up to half of their time on that.

Shapes: x (..., C), W (N, C).
"""
import ctypes
import sys
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
BFLOAT16 = AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()
ROWS = 1024  # of x for which weights are laid out; any number works
LEAST_WORK = 2**19  # multiplications below which the operator's own cost outweighs what it saves
MOST_BYTES = 4 * 2**30  # of packed copies; layers beyond stay as they are
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory():
    """From now on glibc's malloc gives nothing back: the process holds on to the most that it ever used."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most of older versions
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def product(layer, weight, x):
    """What layer's F.linear computes; weight: its own in oneDNN's layout."""
    plain = layer.weight.flatten(1)
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or x.numel() * len(plain) < LEAST_WORK:
        return F.linear(x, plain, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")


def laid_out(weight):
    """(N, C) -> the same in oneDNN's layout; None where it takes none."""
    able = AVAILABLE and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and BFLOAT16)
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS) if able else None


@contextmanager
def packed(model):
    """Inside, the linear layers of a model on a CPU run on packed weights; its weights must not change meanwhile.

    A layer is nn.Linear, or has a method `product` that does F.linear(x, weight.flatten(1), bias). On other devices, in
    dtypes that oneDNN does not multiply there and in a PyTorch without it nothing happens. Packed weights take as much memory as
    the weights themselves.
    """
    changed, size = [], 0
    keep_freed_memory()
    try:
        for layer in model.modules():
            method = "product" if hasattr(layer, "product") else "forward"
            weight = layer.weight if method == "product" or isinstance(layer, nn.Linear) else None
            if type(weight) is not nn.Parameter or weight.device.type != "cpu":
                continue  # a part of a weight, which FSDP makes whole, has another type
            size += weight.nbytes
            if size > MOST_BYTES or method in vars(layer):  # there: packed already
                continue
            if (copy := laid_out(weight.flatten(1))) is not None:
                setattr(layer, method, partial(product, layer, copy))
                changed.append((layer, method))
        yield model
    finally:
        for layer, method in changed:
            delattr(layer, method)  # the class's own is back
