"""float32 that is float32, for what makes units and speech, whatever its caller has set.

PyTorch rounds the factors of float32 products where it may: to TF32's 10 bits on GPUs (convolutions unasked), to bfloat16 in
oneDNN on CPUs, and under autocast. A frame near the middle between two centres then becomes another unit.
"""
import functools
from contextlib import contextmanager

import torch
from torch import backends

PARTS = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.conv)


@contextmanager
def full_precision(device):
    """Inside, float32 products are float32 and autocast is off on that type of device; afterwards all is as it was."""
    def switch(precisions):
        # The older switches first, and in agreement: reading them is an error where the newer ones say something else.
        rounded = "medium" if precisions[1] == "bf16" else "high"
        torch.set_float32_matmul_precision(rounded if precisions[0] == "tf32" else "highest")
        backends.cudnn.allow_tf32 = precisions[2] == "tf32"
        for part, precision in zip(PARTS, precisions):
            part.fp32_precision = precision

    before = [part.fp32_precision for part in PARTS]
    switch(["ieee"] * len(PARTS))
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        switch(before)


def exactly(method):
    """A method of a network, in full precision."""
    @functools.wraps(method)
    def run(self, *arguments, **named):
        with full_precision(next(self.parameters()).device.type):
            return method(self, *arguments, **named)
    return run
