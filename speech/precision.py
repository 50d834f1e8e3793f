"""float32 that is float32, for what makes units and speech, whatever its caller has set; or another precision, if it is named.

PyTorch rounds the factors of float32 products where it may: to TF32's 10 bits on GPUs (convolutions unasked), to bfloat16 in
oneDNN on CPUs, and under autocast. A frame near the middle between two centres then becomes another unit.
"""
import functools
from contextlib import contextmanager

import torch
from torch import backends

PARTS = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.conv)
PRECISIONS = {"float32": None, "tf32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}  # what autocast makes


def check_precision(precision, device):
    """ValueError unless products of that precision can be had on the device."""
    if precision in ("tf32", "float16") and torch.device(device).type != "cuda":
        raise ValueError(f"--precision={precision} needs a CUDA GPU, and the tokenizer is to run on a CPU; choose "
                         "--precision=float32, which gives some units in a thousand another number")


@contextmanager
def full_precision(device, precision="float32"):
    """Inside, products on that type of device have that precision, norms and soft-max float32; afterwards all is as it was."""
    def switch(precisions):
        # The older switches first, and in agreement: reading them is an error where the newer ones say something else.
        rounded = "medium" if precisions[1] == "bf16" else "high"
        torch.set_float32_matmul_precision(rounded if precisions[0] == "tf32" else "highest")
        backends.cudnn.allow_tf32 = precisions[2] == "tf32"
        for part, precision in zip(PARTS, precisions):
            part.fp32_precision = precision

    before = [part.fp32_precision for part in PARTS]
    switch(["tf32" if precision == "tf32" else "ieee"] * len(PARTS))
    try:
        with torch.autocast(device, PRECISIONS[precision], enabled=PRECISIONS[precision] is not None):
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
