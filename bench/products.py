"""Matrix products on CPUs: GFLOP/s of oneDNN's beside those of F.linear, at the shapes of linear layers.

    python -m bench cpu

Medians, taking turns; cpu/ says what is used where. Shapes: M rows, C inputs, N outputs.
"""
import cpu
import torch
import torch.nn.functional as F

from bench.timing import side_by_side

LINEAR = ((2048, 192, 512), (1024, 512, 2048), (1024, 2048, 512), (512, 768, 3072))  # rows, inputs C, outputs N


def products(M, C, N):
    """{(product, way): function}"""
    random = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=random) for shape in ((M, C), (N, C), (M, N)))
    packed = cpu.pack(weight)
    return {("x W^T", "F.linear"): lambda: F.linear(x, weight), ("x W^T", "oneDNN"): lambda: cpu.product(x, weight),
            ("x W^T", "oneDNN, packed"): lambda: cpu.product(x, packed),
            ("dy W", "F.linear"): lambda: dy.mm(weight), ("dy W", "oneDNN"): lambda: cpu.product(dy, weight.t()),
            ("dy^T x", "F.linear"): lambda: dy.t().mm(x), ("dy^T x", "oneDNN"): lambda: cpu.product(dy.t(), x.t())}


def bench_cpu(options):
    """Rows of (rows, C, N, product, way, GFLOP/s, over F.linear's)."""
    found = []
    for M, C, N in LINEAR:
        ways = products(M, C, N)
        seconds = side_by_side(ways, 10 * options.repeats, "cpu")
        found += [{"rows": M, "C": C, "N": N, "product": what, "way": way, "gflops": round(2e-9 * M * C * N / seconds[what, way]),
                   "over_linear": round(seconds[what, "F.linear"] / seconds[what, way], 2)} for what, way in ways]
    return found
