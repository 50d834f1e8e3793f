"""Faster linear layers on a CPU, while no gradient is needed: each weight laid out once, for oneDNN, and not at every call.

    with packed(model):      # scoring, encoding, sampling
        y = model(x)         # every x W^T + b by oneDNN on the packed W; the layers, their names and weights stay as they are

A matrix product first copies its operands into blocks that suit the processor. The fewer rows x has, the more of the time goes
into copying W, which is the same at every call: with few rows packing more than halves the time, and where F.linear's library
favours another maker's processors it helps at any number of rows. `python -m bench cpu` measures both at the shapes of our
commands. The operators are those that torch.compile emits for frozen models; they are outside PyTorch's public interface, so
their absence changes the speed alone. Training never comes here.

Shapes: x (..., C), W (N, C).
"""
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
ROWS = 1024  # of x for which weights are laid out; any number works
LEAST_WORK = 2**19  # multiplications below which the operator's own cost outweighs what it saves
MOST_BYTES = 4 * 2**30  # of packed copies; layers beyond stay as they are


def product(layer, weight, x):
    """What layer's F.linear computes; weight: its own in oneDNN's layout."""
    plain = layer.weight.flatten(1)
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or x.numel() * len(plain) < LEAST_WORK:
        return F.linear(x, plain, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")


@contextmanager
def packed(model):
    """Inside, the float32 linear layers of a model on a CPU run on packed weights; its weights must not change meanwhile.

    A layer is nn.Linear, or has a method `product` that does F.linear(x, weight.flatten(1), bias). On other devices, in other
    dtypes and in a PyTorch without oneDNN nothing happens. Packed weights take as much memory as the weights themselves.
    """
    changed, size = [], 0
    try:
        for layer in model.modules():
            method = "product" if hasattr(layer, "product") else "forward"
            if AVAILABLE and (method == "product" or isinstance(layer, nn.Linear)) and not torch.compiler.is_compiling():
                size += layer.weight.nbytes
                if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 and size <= MOST_BYTES:
                    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().flatten(1).contiguous(), ROWS)
                    setattr(layer, method, partial(product, layer, weight))
                    changed.append((layer, method))
        yield model
    finally:
        for layer, method in changed:
            delattr(layer, method)  # the class's own is back
