"""AdamW on float32 masters that lie apart, as bfloat16 weights and sixteen bits more: one Triton kernel a weight.

    master = float32 of the bits weight * 2^16 + low                                (training/optimizer.py says why)
    m' = m + (1 - beta_1) (g - m)          v' = beta_2 v + (1 - beta_2) g^2         g = gradient / scale, of clipping
    master' = (1 - lr decay) master - lr / (1 - beta_1^t) m' / (sqrt(v') / sqrt(1 - beta_2^t) + eps)

26 bytes a parameter are read and written, 28 of float32 gradients. In float32, factors rounded once from float64, root and
quotients to nearest: as exact as PyTorch's fused AdamW, whose order of operations differs between its versions and devices.
Beside that of CPUs, moments are the same bits in 9 of 10 cases, else at most two units of the last place (of the larger term)
away. bfloat16 is read and written as the sixteen bits that it is, which the interpreter computes rightly. `skip` and `scale` are
read on the device, where they were made: nobody waits to learn whether gradients are finite.
"""
import torch
import triton
import triton.language as tl

BLOCK, NUM_WARPS = 1024, 4  # eight numbers a thread: 16-byte loads of what has two bytes. Reasoned, not measured.


@triton.jit
def update_kernel(gradient, weight, low, exp_avg, exp_avg_sq, corrections, skip, scale, n, rest_1, beta_2, rest_2, decay, eps,
                  BLOCK: tl.constexpr):
    """Elements program_id(0) * BLOCK and on of flat tensors of n. skip, scale: () float32, or None."""
    # 1. Which elements; of an update that is skipped, none.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if skip is not None:
        n = tl.where(tl.load(skip) == 0, n, 0)
    mask = at < n
    # 2. Gradient and master in float32.
    g = tl.load(gradient + at, mask=mask, other=0)
    if gradient.dtype.element_ty == tl.int16:
        g = (g.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if scale is not None:
        g = tl.div_rn(g, tl.load(scale))
    upper = tl.load(weight + at, mask=mask, other=0).to(tl.int32) << 16
    master = (upper + tl.load(low + at, mask=mask, other=0)).to(tl.float32, bitcast=True)
    # 3. AdamW.
    m = tl.load(exp_avg + at, mask=mask, other=0.0)
    m += rest_1 * (g - m)  # rounds less than a sum of two products, which may cancel
    v = beta_2 * tl.load(exp_avg_sq + at, mask=mask, other=0.0) + rest_2 * g * g
    master -= decay * master
    master -= tl.div_rn(tl.load(corrections) * m, tl.div_rn(tl.sqrt_rn(v), tl.load(corrections + 1)) + eps)
    # 4. Apart again: the nearest bfloat16, ties away from zero, and the difference of the bits. NaN stays NaN.
    bits = master.to(tl.int32, bitcast=True)
    upper = (bits + tl.where(master == master, 0x8000, 0)) >> 16
    tl.store(weight + at, upper.to(tl.int16), mask=mask)
    tl.store(low + at, (bits - (upper << 16)).to(tl.int16), mask=mask)
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)


def update(tensors, steps, group, skip, scale):
    """One update of the weights of a parameter group, in place; arguments as optimizer.update_piece's, of all weights.

    Args: tensors: (gradient, weight, exp_avg, exp_avg_sq, low) of each, flat and packed. steps: () float32 of each.
    """
    lr, (beta_1, beta_2), eps = group["lr"], group["betas"], group["eps"]
    t = torch.stack(steps).double() + 1
    corrections = torch.stack([lr / (1 - beta_1**t), (1 - beta_2**t).sqrt()] * 2, dim=1).float()  # rows of one alignment
    for (gradient, weight, exp_avg, exp_avg_sq, low), correction in zip(tensors, corrections, strict=True):
        if n := len(weight):
            gradient = gradient if gradient.dtype == torch.float32 else gradient.view(torch.int16)
            with torch.cuda.device_of(weight):  # Triton launches on the current device, which need not be theirs
                update_kernel[(triton.cdiv(n, BLOCK),)](
                    gradient, weight.view(torch.int16), low, exp_avg, exp_avg_sq, correction, skip, scale, n, 1 - beta_1, beta_2,
                    1 - beta_2, lr * group["weight_decay"], eps, BLOCK=BLOCK, num_warps=NUM_WARPS)
