"""Cross-entropy: one Triton kernel over rows of logits, and the linear head fused with it.

    loss_n = log sum_v exp(x_nv) - x_n,target           loss = sum_n loss_n / count,   count = how many targets count
    d loss / d x_nv = (softmax(x_n)_v - [v = target_n]) / count

One program takes one row and walks over it in tiles of BLOCK_V logits, each brought to float32 as it arrives:

              tile 0           tile 1           tile 2
    row n  [ x x x x x x x | x x x T x x x | x x x x - - - ]     T the target; - beyond V, read as -inf
              |                |                |
    (m, s) ---+--------------->+--------------->+---> loss = log s + (m - x_T)
           [ g g g g g g g | g g g g g g g | g g g g ]           second walk: g = (exp(x - m) / s - [v = T]) * factor

m is the largest logit so far and s = sum exp(x - m): when m grows, s is rescaled (steps 2 and 3). For loss and gradient in one
launch a row that fits in one tile is read once and stays in registers, a longer one is read twice. The log-sum-exp m + log s is
never formed: near 1e4 neighbouring float32 numbers lie 1e-3 apart, and that error would be in every loss and probability.

cross_entropy()          keeps for backward: the logits, which the caller has anyway, and m and s: 8 bytes a row. Writing
                         the gradient in forward would keep N * V more, and read and write it again to scale it; with m
                         and s backward is one read and one write, and forward does no gradient work for anybody.
linear_cross_entropy()   x (N, C), weight (V, C). The kernel writes the gradient over the logits, without 1 / count, which comes
                         in with the incoming gradient: in float16, 1 / 65536 would push small probabilities below what it
                         can hold. Three matrix products in all, none repeated; the last two are taken
    early, V > C         in forward, by chunks of rows (chunk_rows), so that all logits never exist. Keeps for backward: dx,
                         N * C elements of x's size, and dweight, 4 * V * C bytes; backward reads and writes both once more
                         for the factor, which is little beside products with a large V.
    late, V <= C         in backward, units being a small vocabulary: keeps x and, no larger than dx, the logits' gradient.
                         The factor goes into the weight, V * C elements, and nobody passes over dx a second time. Not in
                         float16, which cannot hold weight / 65536.
Both give first derivatives only; differentiating twice raises.

Sources: Milakov & Gimelshein 2018 (arXiv 1805.02867), algorithm 3: the running (m, s). Hsu et al. 2024, Liger Kernel
(arXiv 2410.10989), section 3.2: the gradient in forward, over the logits, by chunks of tokens. Wijmans et al. 2024, Cut
Your Losses (arXiv 2411.09009): why logits are the memory of a small model with a large vocabulary.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# (BLOCK_V, num_warps): the first row with BLOCK_V >= V holds a whole row of logits; a longer row takes several of the
# last. 16 logits a thread is two 16-byte loads of bfloat16 in flight for each and a small part of its registers. Beyond
# 4096 a wider tile would only have more threads wait for each other at each sum. Reasoned, not measured.
TILES = ((512, 1), (1024, 2), (2048, 4), (4096, 8))
ADDS_IN_FLOAT32 = "dtype_out" in torch.ops.aten.addmm.overloads()  # addmm with 16-bit factors and a float32 sum


@triton.jit
def finite(m):
    """m, or 0 where nothing but -inf was seen: exp(-inf - 0) is the 0 that exp(-inf - -inf) is not."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def row_kernel(logits, targets, losses, statistics, gradient, factor, V, logits_stride, gradient_stride, ignore_index,
               BLOCK_V: tl.constexpr, ONE_TILE: tl.constexpr):
    """Losses and statistics (m, s) of row program_id(0); with losses None, statistics are read instead of computed.

    With gradient not None, writes the gradient there, times factor[0] unless that is None; gradient may be logits. A target
    that does not count gives loss and gradient 0; one outside [0, V) gives NaN for both and touches nothing beyond its row.
    """
    # 1. Where the row is. int64: row * stride passes 2^31 at 65536 rows of 50272 logits.
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    target = tl.load(targets + row)
    counts = target != ignore_index
    inside = (target >= 0) & (target < V)
    column = tl.arange(0, BLOCK_V)
    x = tl.load(logits + column, mask=column < V, other=-float("inf")).to(tl.float32)  # (BLOCK_V,)

    if losses is not None:
        # The target's logit is read before the first sum over the tile, at which all threads meet: after the last such
        # meeting some thread may already be writing its gradient there.
        chosen = tl.load(logits + target, mask=counts & inside, other=float("nan")).to(tl.float32)
        # 2. First tile: largest logit and sum of exponentials.
        m = tl.max(x, 0)
        s = tl.sum(tl.exp(x - finite(m)), 0)
        # 3. Further tiles: the old sum is rescaled to the new maximum.
        if not ONE_TILE:
            for start in range(BLOCK_V, V, BLOCK_V):
                x = tl.load(logits + start + column, mask=start + column < V, other=-float("inf")).to(tl.float32)
                larger = tl.maximum(m, tl.max(x, 0))
                s = s * tl.exp(m - finite(larger)) + tl.sum(tl.exp(x - finite(larger)), 0)
                m = larger
        # 4. The loss. A row of -inf alone gives -inf + (-inf - -inf) = NaN, as in PyTorch; a target at -inf gives inf.
        tl.store(losses + row, tl.where(counts, tl.log(s) + (m - chosen), 0.0))
        tl.store(statistics + 2 * row, m)
        tl.store(statistics + 2 * row + 1, s)
    else:
        m = tl.load(statistics + 2 * row)
        s = tl.load(statistics + 2 * row + 1)

    # 5. The gradient, tile by tile; each thread overwrites only logits that it has read itself.
    if gradient is not None:
        gradient += row * gradient_stride
        scale = tl.where(inside, 1.0 if factor is None else tl.load(factor), float("nan"))
        for start in range(0, V, BLOCK_V):
            if not ONE_TILE:
                x = tl.load(logits + start + column, mask=start + column < V, other=-float("inf")).to(tl.float32)
            softmax = tl.exp(x - finite(m)) / s
            change = (softmax - tl.where(start + column == target.to(tl.int32), 1.0, 0.0)) * scale
            change = tl.where(counts, change, 0.0)  # a choice, not a product: logits that do not count may be NaN
            tl.store(gradient + start + column, change.to(gradient.dtype.element_ty), mask=start + column < V)


def run_rows(logits, targets, ignore_index, losses, statistics, gradient=None, factor=None):
    """Launch row_kernel on logits (N, V) with stride(1) = 1, targets (N,) int64, losses (N,) or None, statistics (N, 2)."""
    N, V = logits.shape
    assert V == 1 or logits.stride(1) == 1, f"row_kernel reads neighbours in memory; these logits have strides {logits.stride()}"
    BLOCK_V, num_warps = next((tile for tile in TILES if tile[0] >= V), TILES[-1])
    if N:
        with torch.cuda.device_of(logits):  # Triton launches on the current device, which need not be theirs
            row_kernel[(N,)](logits, targets, losses, statistics, gradient, factor, V, logits.stride(0),
                             0 if gradient is None else gradient.stride(0), ignore_index,
                             BLOCK_V=BLOCK_V, ONE_TILE=V <= BLOCK_V, num_warps=num_warps)


def per_target(value, targets, ignore_index):
    """value divided by how many targets count, float32, without waiting for the device to say how many."""
    return value.float() / (targets != ignore_index).sum().clamp(min=1)


@torch.library.custom_op("nanotwist::cross_entropy", mutates_args=())
def cross_entropy_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    statistics = logits.new_empty(len(targets), 2, dtype=torch.float32)
    run_rows(logits, targets, ignore_index, losses, statistics)
    return losses.sum() / (targets != ignore_index).sum(), statistics


@cross_entropy_forward.register_fake
def _(logits, targets, ignore_index):
    return logits.new_empty((), dtype=torch.float32), logits.new_empty(logits.shape[0], 2, dtype=torch.float32)


@torch.library.custom_op("nanotwist::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(grad_loss: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor, ignore_index: int) -> Tensor:
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)  # rows packed, whatever logits' stride
    run_rows(logits, targets, ignore_index, None, statistics, gradient, per_target(grad_loss, targets, ignore_index))
    return gradient


@cross_entropy_backward.register_fake
def _(grad_loss, logits, targets, statistics, ignore_index):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def keep_statistics(ctx, inputs, output):
    logits, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.set_materialize_grads(False)


@functools.partial(cross_entropy_forward.register_autograd, setup_context=keep_statistics)
def _(ctx, grad_loss, _grad_statistics):
    logits, targets, statistics = ctx.saved_tensors
    return cross_entropy_backward(grad_loss, logits, targets, statistics, ctx.ignore_index), None, None


def chunk_rows(N, V, itemsize):
    """Rows of logits held at once: 4096, so that the products stay efficient; more where 256 MB hold them; chunks of N even."""
    rows = max(4096, 2**28 // (V * itemsize))
    return -(-N // max(1, -(-N // rows)))


def add_product(total, a, b):
    """total += a b, the sum in float32: of 16-bit factors as they are, where PyTorch can, else of wider copies."""
    if ADDS_IN_FLOAT32 and a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def aligned(rows, V, like):
    """(rows, V) whose rows begin at multiples of 16 elements, which the matrix products want whatever V is."""
    return like.new_empty(rows, -(-V // 16) * 16)[:, :V]


def scaled(gradient, factor, dtype):
    """gradient * factor in dtype, multiplied in float32: shape (1,) counts for the type, () would be rounded to 16 bits first."""
    return torch.mul(gradient, factor.view(1), out=torch.empty(gradient.shape, dtype=dtype, device=gradient.device))


@torch.library.custom_op("nanotwist::linear_cross_entropy", mutates_args=())
def linear_forward(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, x_gradient: bool, weight_gradient: bool,
                   late: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dweight), still without their factor; late: (loss, gradient of the logits (N, V), nothing)."""
    (N, _), V = x.shape, weight.shape[0]
    chunk = max(1, N if late else chunk_rows(N, V, x.element_size()))
    losses = x.new_empty(N, dtype=torch.float32)
    statistics = x.new_empty(chunk, 2, dtype=torch.float32)
    buffer = aligned(chunk, V, x)  # one for all chunks: a fresh one each would stand beside the last for a moment
    dx = x.new_empty(x.shape if x_gradient and not late else (0,))
    dweight = x.new_zeros(weight.shape if weight_gradient and not late else (0,), dtype=torch.float32)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        logits = buffer[:rows.stop - start]  # (n, V), the gradient from run_rows on
        torch.mm(x[rows], weight.t(), out=logits)
        gradient = logits if x_gradient or weight_gradient else None
        run_rows(logits, targets[rows], ignore_index, losses[rows], statistics, gradient)
        if x_gradient and not late:
            torch.mm(logits, weight, out=dx[rows])
        if weight_gradient and not late:
            add_product(dweight, logits.t(), x[rows])
    return losses.sum() / (targets != ignore_index).sum(), buffer[:N] if late else dx, dweight


@linear_forward.register_fake
def _(x, weight, targets, ignore_index, x_gradient, weight_gradient, late):
    dx = aligned(x.shape[0], weight.shape[0], x) if late else x.new_empty(x.shape if x_gradient else (0,))
    return (x.new_empty((), dtype=torch.float32), dx,
            x.new_empty(weight.shape if weight_gradient and not late else (0,), dtype=torch.float32))


@torch.library.custom_op("nanotwist::linear_cross_entropy_backward", mutates_args=())
def linear_backward(factor: Tensor, gradient: Tensor, x: Tensor, weight: Tensor, x_gradient: bool,
                    weight_gradient: bool) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of linear_forward with late; nothing for what is not wanted."""
    dx = torch.mm(gradient, scaled(weight, factor, weight.dtype)) if x_gradient else x.new_empty(0)
    dweight = x.new_zeros(weight.shape if weight_gradient else (0,), dtype=torch.float32)
    if weight_gradient:
        add_product(dweight, gradient.t(), x)
    return dx, scaled(dweight, factor, weight.dtype)


@linear_backward.register_fake
def _(factor, gradient, x, weight, x_gradient, weight_gradient):
    return x.new_empty(x.shape if x_gradient else (0,)), weight.new_empty(weight.shape if weight_gradient else (0,))


@register_flop_formula(torch.ops.nanotwist.linear_cross_entropy)
def _(x_shape, weight_shape, targets_shape, ignore_index, x_gradient, weight_gradient, *_, **__):
    """Of forward and backward, whichever multiplies."""
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0] * (1 + x_gradient + weight_gradient)


def keep_gradients(ctx, inputs, output):
    x, weight, targets, ctx.ignore_index, ctx.x_gradient, ctx.weight_gradient, late = inputs
    ctx.dtype = weight.dtype
    ctx.set_materialize_grads(False)  # of the other outputs, zeros of whole size that nobody reads
    ctx.save_for_backward(targets, *output[1:], *((x, weight) if late else ()))


@functools.partial(linear_forward.register_autograd, setup_context=keep_gradients)
def _(ctx, grad_loss, _grad_dx, _grad_dweight):
    targets, dx, dweight, *factors = ctx.saved_tensors
    factor = per_target(grad_loss, targets, ctx.ignore_index)
    if factors:
        dx, dweight = linear_backward(factor, dx, *factors, ctx.x_gradient, ctx.weight_gradient)
    else:
        dx, dweight = scaled(dx, factor, ctx.dtype), scaled(dweight, factor, ctx.dtype)
    return dx if ctx.x_gradient else None, dweight if ctx.weight_gradient else None, None, None, None, None, None


def cross_entropy(logits, targets, ignore_index=-100):
    """As kernels.cross_entropy, which checks the arguments. Rows at any stride; they are left as they are."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return cross_entropy_forward(logits, targets.contiguous(), ignore_index)[0]


def linear_cross_entropy(x, weight, targets, ignore_index=-100):
    """As kernels.linear_cross_entropy, which checks the arguments."""
    x_gradient, weight_gradient = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight))
    late = bool((x_gradient or weight_gradient) and weight.shape[0] <= weight.shape[1] and x.dtype != torch.float16)
    return linear_forward(x, weight, targets.contiguous(), ignore_index, x_gradient, weight_gradient, late)[0]
