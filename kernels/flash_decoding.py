"""Attention of one new token over a KV cache, in Triton: the keys are divided so that the whole GPU has work.

    o = sum_s softmax_s(scale q . k_s - slope (S - 1 - s)) v_s,   all S cached positions are seen

    (or those up to a number on the device, LAST; S is LAST + 1 then)

With one row of queries a head is a single program, and a small batch leaves most of the GPU idle while it reads the cache. So the
keys of a head are cut into parts, and a second kernel joins them:

    part 0       part 1       part 2        each part: m = max s, l = sum 2^(s - m), acc = sum 2^(s - m) v     (float32)
    [k k k k k] [k k k k k] [k k k . .]     all parts: M = max m, o = sum 2^(m - M) acc / sum 2^(m - M) l
        \\________  |  ________/
                  o

The query heads of one key head (GQA) are the rows of one tile, so that its keys are read once; a tensor core wants 16 rows.
Shapes: q, o (B, 1, H, D); k, v (B, S, K, D), slices of a longer cache.

Source: Flash-Decoding, Dao et al. 2023 (pytorch.org/blog/flash-decoding).
"""
import functools

import torch
import triton
import triton.language as tl

from kernels.flash_attention import LOG2E, load_rows, precision, rows_contiguous

BLOCKS = {2: (64, 4, 2), 4: (16, 8, 2)}  # keys a tile, warps, stages[, registers] by bytes per number: nothing spills
MOST_PARTS = 64  # of a head: all are in one program's registers when they are joined
PROGRAMS_PER_CORE = 2  # what the parts aim at: while one waits for memory the other computes


@triton.jit
def part_kernel(Q, K, V, ACC, M, L, SLOPES, LAST, scale, q_b, q_h, k_b, k_t, k_h, v_b, v_t, v_h, S, heads, GROUP, parts, length,
                D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, ALIBI: tl.constexpr,
                PRECISION: tl.constexpr):
    # 1. Which part of which key head; `length` keys a part. The rows are the query heads that share it.
    part = tl.program_id(0) % parts
    kh = tl.program_id(0) // parts % heads
    b = (tl.program_id(0) // parts // heads).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    q = load_rows(Q + b * q_b + kh * GROUP * q_h, group, q_h, GROUP, D, BLOCK_D, True)
    slopes = tl.load(SLOPES + kh * GROUP + group, mask=group < GROUP, other=0.0) * LOG2E if ALIBI else group
    K += b * k_b + kh * k_h
    V += b * v_b + kh * v_h

    # 2. The one-pass soft-max of flash_attention.py over the part: m is finite after its first tile. A part without keys keeps
    # m = -inf, l = 0 and acc = 0.
    if LAST is not None:
        S = tl.minimum(S, tl.load(LAST).to(tl.int32) + 1)
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    end = tl.minimum((part + 1) * length, S)
    for n in tl.range(part * length, end, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        k = load_rows(K, cols, k_t, end, D, BLOCK_D, True)
        v = load_rows(V, cols, v_t, end, D, BLOCK_D, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if ALIBI:
            s += slopes[:, None] * (cols[None, :] - (S - 1))
        s = tl.where(cols[None, :] < end, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new_m[:, None])
        shrink = tl.exp2(m - new_m)
        l = l * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = new_m

    # 3. Undivided, for the join.
    at = ((b * heads + kh) * GROUP + group) * parts + part
    tl.store(M + at, m, mask=group < GROUP)
    tl.store(L + at, l, mask=group < GROUP)
    d = tl.arange(0, BLOCK_D)
    tl.store(ACC + at[:, None] * D + d[None, :], acc, mask=(group[:, None] < GROUP) & (d[None, :] < D))


@triton.jit
def join_kernel(ACC, M, L, O, parts, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """One program a query head."""
    at = tl.program_id(0).to(tl.int64) * parts + tl.arange(0, BLOCK_PARTS)
    given = tl.arange(0, BLOCK_PARTS) < parts
    d = tl.arange(0, BLOCK_D)
    m = tl.load(M + at, mask=given, other=float("-inf"))
    weight = tl.exp2(m - tl.max(m, 0))
    total = tl.sum(weight * tl.load(L + at, mask=given, other=0.0), 0)
    acc = tl.load(ACC + at[:, None] * D + d[None, :], mask=given[:, None] & (d[None, :] < D), other=0.0)
    o = tl.sum(acc * weight[:, None], 0) / total
    tl.store(O + tl.program_id(0).to(tl.int64) * D + d, o.to(O.dtype.element_ty), mask=d < D)


def constants(D, group, itemsize):
    """Constants of a launch of part_kernel."""
    sizes = dict(zip(("BLOCK_N", "num_warps", "num_stages", "maxnreg"), BLOCKS[itemsize]))
    return dict(D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK_G=max(16, triton.next_power_of_2(group)), **sizes,
                PRECISION=precision(itemsize))


@functools.cache
def programs(device):
    """How many programs the parts of all heads should be."""
    if device.type != "cuda":
        return 16  # the interpreter: enough to have several parts in the tests
    return PROGRAMS_PER_CORE * torch.cuda.get_device_properties(device).multi_processor_count


@torch.library.custom_op("nanotwist::decode_attention", mutates_args=())
def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, alibi_slopes: torch.Tensor | None,
           last: torch.Tensor | None = None) -> torch.Tensor:
    """o (B, 1, H, D) for q (B, 1, H, D) and k, v (B, S, K, D); no gradient.

    last: (1,) int64, position of the last key that is seen, where the host does not know it; None: the last of S.
    """
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    (B, _, H, D), (S, heads) = q.shape, k.shape[1:3]
    launch = constants(D, H // heads, q.element_size())
    tiles = triton.cdiv(S, launch["BLOCK_N"])
    length = triton.cdiv(tiles, min(tiles, max(1, programs(q.device) // (B * heads)), MOST_PARTS)) * launch["BLOCK_N"]
    parts = triton.cdiv(S, length)
    acc = q.new_empty(B, H, parts, D, dtype=torch.float32)
    m, l = (q.new_empty(B, H, parts, dtype=torch.float32) for _ in "ml")
    o = q.new_empty(B, 1, H, D)
    with torch.cuda.device_of(q):
        part_kernel[(B * heads * parts,)](
            q, k, v, acc, m, l, alibi_slopes, last, scale * LOG2E.value, q.stride(0), q.stride(2), *k.stride()[:3],
            *v.stride()[:3], S, heads, H // heads, parts, length, ALIBI=alibi_slopes is not None, **launch)
        join_kernel[(B * H,)](acc, m, l, o, parts, D=D, BLOCK_D=launch["BLOCK_D"], BLOCK_PARTS=triton.next_power_of_2(parts))
    return o


@decode.register_fake
def _(q, k, v, scale, alibi_slopes, last=None):
    return q.new_empty(q.shape)
