"""Matrix products of float32 on CPUs by oneDNN, which on AMD's processors is a tenth faster than the BLAS behind F.linear.

    training     y = x W^T + b, dx = dy W     oneDNN, the weight as it lies
                 dW = dy^T x                  BLAS: oneDNN would first copy dy^T
    scoring      y = x W^T + b                oneDNN, the weight laid out for it once, while `packed(model)` lasts

Elsewhere (GPUs, other dtypes, autocast, few rows, PyTorch without oneDNN) Linear is nn.Linear, whose parameters it has. The two
operators are the ones that torch.compile emits; they are not in PyTorch's public interface, so their absence changes speed alone.

Shapes: (..., C) inputs, (N, C) weights, (..., N) outputs.
"""
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
ROWS = 1024  # of the inputs for which weights are laid out; any number works
FEWEST = 128  # rows below which laying out the weight at every call costs more than it saves


def product(x, weight, bias=None):
    """x W^T + b. weight: as it is, transposed views included, or as `pack` returns it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack(weight):
    """The weight in oneDNN's own layout; follows no later change of the weight."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


class Product(torch.autograd.Function):
    """`product` with gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = product(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dw = rows.t().mm(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return dx, dw, rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None


class Linear(nn.Linear):
    packed = None  # the weight as `pack` returns it, while scoring

    def forward(self, x):
        if self.packed is not None and not torch.is_grad_enabled():
            return product(x, self.packed, self.bias)
        if (AVAILABLE and torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
                and x.numel() >= FEWEST * x.shape[-1] and not torch.is_autocast_enabled("cpu")):
            return Product.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


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
