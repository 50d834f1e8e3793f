"""Weights -> a network: the one way, for language models, HuBERT and vocoders.

    {name: tensor}, read or drawn one at a time --fill--> parameters and buffers of a network that has its memory

The networks are made on the meta device, without memory; `to_empty` then gives them theirs, here or on a GPU, whole or in parts.
"""
import itertools

import torch


@torch.no_grad()
def fill(network, tensors, where, copy=torch.Tensor.copy_):
    """Copy (name, tensor) pairs into a network, one after the other, so that no more than one exists twice; returns the network.

    where: what an error calls the weights. copy(parameter, tensor): another way to copy, where a process keeps a part of each.
    Raises: ValueError for a tensor that is missing, unknown or of another shape.
    """
    left = dict(itertools.chain(network.named_parameters(), network.named_buffers()))
    for name, tensor in tensors:
        if name not in left or left[name].shape != tensor.shape:
            wanted = f"expected {tuple(left[name].shape)}" if name in left else "the network has no such tensor"
            raise ValueError(f"{where}: {name} of shape {tuple(tensor.shape)}, {wanted}; its config and the weights belong to "
                             "different models")
        copy(left.pop(name), tensor)
    if left:
        raise ValueError(f"{where} lacks {len(left)} tensors of the network, e.g. {min(left)}; its config and the weights belong "
                         "to different models")
    return network
