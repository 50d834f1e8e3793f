"""Faster float32 on CPUs: matrix products by oneDNN, and memory that is kept when it is freed.

    training     y = a(x W^T + b), dx = dy W    oneDNN, the weight as it lies; a: ReLU or nothing
                 dW = dy^T x                    oneDNN where C > N, else MKL
    scoring      y = a(x W^T + b), or times z   oneDNN, the weight laid out for it once, while `packed(model)` lasts

    python -m bench cpu       # each product beside that of F.linear

Where the processor is not Intel's, oneDNN's products are mostly faster than those of MKL, which are behind F.linear. Elsewhere
(GPUs, other dtypes, autocast, torch.compile, few rows, PyTorch without oneDNN) Linear is nn.Linear, whose parameters it has, and
then the activation. The operators are those that torch.compile emits; they are not in PyTorch's public interface, so their
absence changes speed alone.

Shapes: (..., C) inputs, (N, C) weights, (..., N) outputs.
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
ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "silu": F.silu, "gelu": F.gelu,
               "gelu_tanh": partial(F.gelu, approximate="tanh")}
FUSED = {None: ("none", ""), "relu": ("relu", ""), "silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
ROWS = 1024  # of the inputs for which weights are laid out; any number works
FEWEST = 128  # rows below which laying out the weight at every call costs more than it saves
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory():
    """Keep glibc's malloc from giving freed blocks back to the system.

    It does with large ones, and with what lies last, and the system clears every page before it gives it out again, which
    takes longer than many an operation on it. The process then holds on to the most that it ever used.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most of older versions
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def product(x, weight, bias=None, activation=None, times=None):
    """activation(x W^T + b), or (x W^T + b) * times. weight: as it is, transposed views included, or as `pack` returns it."""
    if times is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, times, weight, bias, "mul")
    name, algorithm = FUSED[activation]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


def pack(weight):
    """The weight in oneDNN's own layout; follows no later change of the weight."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


class Product(torch.autograd.Function):
    """`product` with gradients; activation None or relu, whose gradient needs only what it gave."""

    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        y = product(x, weight, bias, activation)
        ctx.save_for_backward(x, weight, y if activation == "relu" else None)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, y = ctx.saved_tensors
        if y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        N, C = weight.shape
        x, dy_rows = x.reshape(-1, C), dy.reshape(-1, N)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, weight.t())
        if ctx.needs_input_grad[1]:  # oneDNN copies the left operand into the right order, which pays if it is the smaller one
            dw = product(dy_rows.t(), x.t()) if C > N else dy_rows.t().mm(x)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = dy_rows.sum(0)
        return dx, dw, db, None


class Linear(nn.Linear):
    """nn.Linear, then an activation or a product with another tensor, in one operator where oneDNN has one."""

    packed = None  # the weight as `pack` returns it, while scoring

    def trains_here(self, x):
        return (AVAILABLE and torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.device.type == "cpu"
                and x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
                and x.numel() >= FEWEST * x.shape[-1])

    def forward(self, x, activation=None, times=None):
        """activation(x W^T + b), or (x W^T + b) * times, (..., N).

        Args: x (..., C). activation: a name in ACTIVATIONS. times: (..., N); one of the two, or neither.
        """
        if self.packed is not None and not torch.is_grad_enabled():
            return product(x, self.packed, self.bias, activation, times)
        if not self.trains_here(x):
            y = ACTIVATIONS[activation](F.linear(x, self.weight, self.bias))
        elif activation == "relu":
            y = Product.apply(x, self.weight, self.bias, activation)
        else:
            y = ACTIVATIONS[activation](Product.apply(x, self.weight, self.bias, None))
        return y if times is None else y * times


@contextmanager
def packed(model):
    """Inside, a model that does not change and takes no gradients runs on packed weights: twice the memory of its matrices."""
    layers = [layer for layer in model.modules() if isinstance(layer, Linear) and AVAILABLE
              and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32]
    try:
        for layer in layers:
            layer.packed = pack(layer.weight)
        yield model
    finally:
        for layer in layers:
            layer.packed = None
