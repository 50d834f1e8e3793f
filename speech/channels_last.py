"""Convolutions in time that keep channels last on a CPU, where oneDNN then reads and writes them as they lie.

    x (B, C, S), in memory (B, S, C) --as (B, C, 1, S) with channels last--> conv2d --> (B, C', S'), in memory (B, S', C')

PyTorch's conv1d has each row of samples in one piece; oneDNN computes on blocks of channels, and so rearranges every input and
every output. In this order neither is needed, operators on single elements keep it, and a chain of convolutions takes a half to
three quarters of the time (python -m bench vocoder). Elsewhere these are PyTorch's own. Weights are the same tensors; lay_out()
has them rearranged once and not in every call.
"""
import torch.nn as nn
from torch.nn import functional


class Conv1d(nn.Conv1d):
    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        return functional.conv2d(x[:, :, None], self.weight[:, :, None], self.bias, padding=(0, *self.padding),
                                 dilation=(1, *self.dilation))[:, :, 0]


class ConvTranspose1d(nn.ConvTranspose1d):
    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        return functional.conv_transpose2d(x[:, :, None], self.weight[:, :, None], self.bias, stride=(1, *self.stride),
                                           padding=(0, *self.padding))[:, :, 0]


def lay_out(model):
    """The same model; weights of these convolutions that lie on a CPU have channels last in memory, too."""
    for layer in model.modules():
        if isinstance(layer, (Conv1d, ConvTranspose1d)) and layer.weight.device.type == "cpu":
            layer.weight.data = layer.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    return model
