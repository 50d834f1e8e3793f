"""Causal attention that never holds the T x T scores, forward and backward, in Triton.

    s_ts = scale q_t . k_s - slope (t - s)     p_t = softmax of s_t over s <= t in t's document     o_t = sum_s p_ts v_s

A program owns a block of rows t (forward, dQ) or of columns s (dK, dV) of one head, and walks over the tiles it needs:

                 columns s ->                          .  no row of the tile sees a column: never visited
      rows t   D . . . . .     D  on the diagonal      o  every row sees every column: no mask
        |      o D . . . .        (masked)             x  in other documents: never visited
        v      x b D . . .     b  a document begins
               x x o D . .        in it (masked)       Documents are a band under the diagonal: the cost of a row is the
               x x o o D .                             length of its document, not its position.

Soft-max over tiles (one pass): with running maximum m, sum l and output acc of the columns so far,

    m' = max(m, max_s s)    l' = 2^(m - m') l + sum_s 2^(s - m')    acc' = 2^(m - m') acc + sum_s 2^(s - m') v_s

in base 2 (exp2 is what the hardware has), so scale and slope carry a factor log2(e). Kept for backward, per row and head: o in
its own dtype and  lse = m + log2 l  in float32, 4 bytes. Backward recomputes p = 2^(s - lse):

    delta_t = do_t . o_t     dp_ts = do_t . v_s     ds_ts = p_ts (dp_ts - delta_t)
    dv_s = sum_t p_ts do_t   dk_s = scale sum_t ds_ts q_t   dq_t = scale sum_s ds_ts k_s

dK and dV by columns, dQ by rows, in two kernels: two of seven products are done twice, and nothing is added by atomics, so the
same input gives the same bits. Query heads that share a key head (GQA) are a loop inside the program of that key head.
Products take the inputs' dtype and accumulate in float32; soft-max, lse and delta are float32.

Shapes: q, o (B, T, H, D); k, v (B, T, K, D); lse, delta (B, H, T). Any strides with a contiguous last dimension, so q, k, v may
be slices of one fused projection. D is padded to a power of two in registers.

Sources: Milakov & Gimelshein 2018 (soft-max in one pass); FlashAttention, Dao et al. 2022, algorithms 1 and 4; FlashAttention-2,
Dao 2023, sections 3.1 and 3.2 (rows over programs, masks on the diagonal only); ALiBi, Press et al. 2022.
"""
import functools

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

LOG2E = tl.constexpr(1.4426950408889634)  # a global that kernels read has to be a constexpr
LN2 = tl.constexpr(0.6931471805599453)
HEAD_DIMS = (32, 64, 80, 96, 128)

# Tiles: (BLOCK_M rows, BLOCK_N columns, warps, pipeline stages[, most registers]) by kernel, padded head dimension (up to 64 or
# 128) and bytes per number. Found by compiling: large ones that neither spill a register nor need more shared memory than the GPU
# has, whatever is switched on (python -m kernels.compile). Those of 90 for 16-bit numbers are the fastest that kernels.tune found
# on an H100: small ones, of which several programs run on a core at once (results/tune_h100-80gb-hbm3.json).
FLOAT32 = {("forward", 64, 4): (32, 32, 8, 2), ("forward", 128, 4): (16, 32, 8, 2),
           ("keys", 64, 4): (16, 32, 4, 2), ("keys", 128, 4): (16, 32, 8, 2),
           ("queries", 64, 4): (16, 32, 4, 2), ("queries", 128, 4): (16, 16, 8, 2)}
CONSUMER = {("forward", 64, 2): (128, 64, 8, 3), ("forward", 128, 2): (128, 64, 8, 2),
            ("keys", 64, 2): (32, 128, 8, 2), ("keys", 128, 2): (64, 64, 8, 2),
            ("queries", 64, 2): (128, 64, 8, 2), ("queries", 128, 2): (64, 64, 8, 2), **FLOAT32}
TILES = {86: CONSUMER,  # GeForce 30, 40, 50, A10, L4, L40: 99 KB of shared memory a program
         80: {**CONSUMER, ("forward", 128, 2): (128, 64, 8, 3)},  # A100: 163 KB
         90: {("forward", 64, 2): (64, 64, 4, 3), ("forward", 128, 2): (64, 64, 4, 3),  # H100, H200: 227 KB
              ("keys", 64, 2): (64, 64, 4, 3), ("keys", 128, 2): (64, 128, 8, 3),
              ("queries", 64, 2): (64, 64, 4, 3), ("queries", 128, 2): (64, 32, 4, 3), **FLOAT32}}


@triton.jit
def load_rows(pointer, rows, stride, T, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows of a (T, D) matrix, padded to BLOCK_D with zeros; where BOUNDED, rows from T on are zeros."""
    d = tl.arange(0, BLOCK_D)
    at = pointer + rows[:, None] * stride + d[None, :]
    if BOUNDED:
        return tl.load(at, mask=(rows[:, None] < T) & (d[None, :] < D), other=0.0)
    if D < BLOCK_D:
        return tl.load(at, mask=d[None, :] < D, other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(pointer, rows, stride, tile, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    tl.store(pointer + rows[:, None] * stride + d[None, :], tile.to(pointer.dtype.element_ty),
             mask=(rows[:, None] < T) & (d[None, :] < D))


@triton.jit
def row_ranges(STARTS, b, first_row, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Where the columns of a block of rows begin, are first seen by every row, meet the diagonal, and end."""
    diagonal = first_row // BLOCK_N * BLOCK_N
    end = tl.minimum(first_row + BLOCK_M, T)
    if DOCUMENTS:
        begin = tl.maximum(tl.minimum(tl.load(STARTS + b * T + first_row), first_row), 0) // BLOCK_N * BLOCK_N
        seen_by_all = tl.minimum(tl.cdiv(tl.load(STARTS + b * T + end - 1), BLOCK_N) * BLOCK_N, diagonal)
    else:
        begin, seen_by_all = 0, 0
    return begin, seen_by_all, diagonal, end


@triton.jit
def scores(q, k, rows, cols, starts, slope, scale, MASKED: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr,
           PRECISION: tl.constexpr):
    """(rows, cols) float32, in units of log 2; -inf where the row does not see the column."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if ALIBI:
        s += slope * (cols[None, :] - rows[:, None])
    if MASKED:
        visible = rows[:, None] >= cols[None, :]
        if DOCUMENTS:
            visible &= cols[None, :] >= starts[:, None]
        s = tl.where(visible, s, float("-inf"))
    return s


# ------------------------------------------------------------------------------------------------ forward, by rows

@triton.jit
def forward_columns(acc, m, l, q, K, V, k_t, v_t, rows, starts, slope, scale, first, last, T,
                    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, ALIBI: tl.constexpr,
                    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr):
    """The one-pass soft-max over columns first .. last; only masked tiles can reach beyond T."""
    for n in tl.range(first, last, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        k = load_rows(K, cols, k_t, T, D, BLOCK_D, MASKED)
        s = scores(q, k, rows, cols, starts, slope, scale, MASKED, ALIBI, DOCUMENTS, PRECISION)
        new_m = tl.maximum(m, tl.max(s, 1))
        # a row may see nothing of a tile before its document: then new_m is -inf, and -inf - -inf would be NaN
        used_m = tl.where(new_m == float("-inf"), 0.0, new_m) if MASKED and DOCUMENTS else new_m
        p = tl.exp2(s - used_m[:, None])
        shrink = tl.exp2(m - used_m)
        l = l * shrink + tl.sum(p, 1)
        v = load_rows(V, cols, v_t, T, D, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = new_m
    return acc, m, l


@triton.jit
def forward_kernel(Q, K, V, O, LSE, SLOPES, STARTS, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, H, GROUP,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr):
    # 1. Which rows of which head. The last rows have the most columns and start first; heads of a sequence are neighbours,
    #    so that its keys stay in the cache.
    blocks = tl.cdiv(T, BLOCK_M)
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    h = tl.program_id(0) // blocks % H
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    rows = first_row + tl.arange(0, BLOCK_M)
    q = load_rows(Q + b * q_b + h * q_h, rows, q_t, T, D, BLOCK_D, True)
    slope = tl.load(SLOPES + h) * LOG2E if ALIBI else 0.0
    starts = tl.load(STARTS + b * T + rows, mask=rows < T, other=0) if DOCUMENTS else rows
    begin, seen_by_all, diagonal, end = row_ranges(STARTS, b, first_row, T, BLOCK_M, BLOCK_N, DOCUMENTS)

    # 2. Tiles where documents begin, tiles that all rows see, tiles on the diagonal.
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if DOCUMENTS:
        acc, m, l = forward_columns(acc, m, l, q, K, V, k_t, v_t, rows, starts, slope, scale, begin, seen_by_all, T,
                                    D, BLOCK_D, BLOCK_N, True, ALIBI, True, PRECISION)
        seen_by_all = tl.maximum(seen_by_all, begin)
    acc, m, l = forward_columns(acc, m, l, q, K, V, k_t, v_t, rows, starts, slope, scale, seen_by_all, diagonal, T,
                                D, BLOCK_D, BLOCK_N, False, ALIBI, DOCUMENTS, PRECISION)
    acc, m, l = forward_columns(acc, m, l, q, K, V, k_t, v_t, rows, starts, slope, scale, diagonal, end, T,
                                D, BLOCK_D, BLOCK_N, True, ALIBI, DOCUMENTS, PRECISION)

    # 3. Divide once, at the end, and keep the log-sum-exp.
    store_rows(O + (b * T * H + h) * D, rows, H * D, acc / l[:, None], T, D, BLOCK_D)
    tl.store(LSE + (b * H + h) * T + rows, m + tl.log2(l), mask=rows < T)


# ------------------------------------------------------------------------------------------------ backward

@triton.jit
def delta_kernel(O, DO, DELTA, do_b, do_t, do_h, T, H, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta = sum over D of do * o, in float32."""
    blocks = tl.cdiv(T, BLOCK_M)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(0) // blocks % H
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    o = load_rows(O + (b * T * H + h) * D, rows, H * D, T, D, BLOCK_D, True).to(tl.float32)
    do = load_rows(DO + b * do_b + h * do_h, rows, do_t, T, D, BLOCK_D, True).to(tl.float32)
    tl.store(DELTA + (b * H + h) * T + rows, tl.sum(o * do, 1), mask=rows < T)


@triton.jit
def key_rows(dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, STARTS, q_t, q_h, do_t, do_h, cols, scale, first, last, T, GROUP,
             D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, ALIBI: tl.constexpr,
             DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr):
    """What rows first .. last add to dk and dv of a block of columns. Tiles stand transposed: (columns, rows)."""
    tiles = tl.cdiv(tl.maximum(last - first, 0), BLOCK_M)
    for i in tl.range(0, GROUP * tiles):
        h = i // tiles
        rows = first + i % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load_rows(Q + h * q_h, rows, q_t, T, D, BLOCK_D, True)
        do = load_rows(DO + h * do_h, rows, do_t, T, D, BLOCK_D, True)
        lse = tl.load(LSE + h * T + rows, mask=rows < T, other=float("inf"))  # rows beyond T: p = 2^(s - inf) = 0
        delta = tl.load(DELTA + h * T + rows, mask=rows < T, other=0.0)
        slope = tl.load(SLOPES + h) * LOG2E if ALIBI else 0.0
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if ALIBI:
            s += slope * (cols[:, None] - rows[None, :])
        if MASKED:
            visible = rows[None, :] >= cols[:, None]
            if DOCUMENTS:
                visible &= cols[:, None] >= tl.load(STARTS + rows, mask=rows < T, other=0)[None, :]
            s = tl.where(visible, s, float("-inf"))
        p = tl.exp2(s - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def keys_kernel(Q, K, V, DO, DK, DV, LSE, DELTA, SLOPES, STARTS, ENDS, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
                do_b, do_t, do_h, T, H, GROUP, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr):
    # 1. Which columns of which key head; the first columns have the most rows and start first.
    blocks = tl.cdiv(T, BLOCK_N)
    first_col = tl.program_id(0) % blocks * BLOCK_N
    heads = H // GROUP
    kh = tl.program_id(0) // blocks % heads
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    cols = first_col + tl.arange(0, BLOCK_N)
    k = load_rows(K + b * k_b + kh * k_h, cols, k_t, T, D, BLOCK_D, True)
    v = load_rows(V + b * v_b + kh * v_h, cols, v_t, T, D, BLOCK_D, True)
    if DOCUMENTS:
        STARTS += b * T

    # 2. Rows on the diagonal, rows that see all columns, rows in which the columns' documents end.
    first = first_col // BLOCK_M * BLOCK_M
    below = tl.cdiv(first_col + BLOCK_N, BLOCK_M) * BLOCK_M
    if DOCUMENTS:
        seeing_all = tl.maximum(tl.load(ENDS + b * T + first_col) // BLOCK_M * BLOCK_M, below)
        end = tl.load(ENDS + b * T + tl.minimum(first_col + BLOCK_N, T) - 1)
    else:
        seeing_all, end = T, T
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if ALIBI:
        SLOPES += kh * GROUP
    Q += b * q_b + kh * GROUP * q_h
    DO += b * do_b + kh * GROUP * do_h
    LSE += (b * H + kh * GROUP) * T
    DELTA += (b * H + kh * GROUP) * T
    dk, dv = key_rows(dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, STARTS, q_t, q_h, do_t, do_h, cols, scale, first,
                      tl.minimum(below, T), T, GROUP, D, BLOCK_D, BLOCK_M, True, ALIBI, DOCUMENTS, PRECISION)
    dk, dv = key_rows(dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, STARTS, q_t, q_h, do_t, do_h, cols, scale, below,
                      seeing_all, T, GROUP, D, BLOCK_D, BLOCK_M, False, ALIBI, DOCUMENTS, PRECISION)
    if DOCUMENTS:
        dk, dv = key_rows(dk, dv, k, v, Q, DO, LSE, DELTA, SLOPES, STARTS, q_t, q_h, do_t, do_h, cols, scale, seeing_all,
                          end, T, GROUP, D, BLOCK_D, BLOCK_M, True, ALIBI, True, PRECISION)

    # 3. scale still has its factor log2(e).
    store_rows(DK + (b * T * heads + kh) * D, cols, heads * D, dk * (scale * LN2), T, D, BLOCK_D)
    store_rows(DV + (b * T * heads + kh) * D, cols, heads * D, dv, T, D, BLOCK_D)


@triton.jit
def query_columns(dq, q, do, lse, delta, K, V, k_t, v_t, rows, starts, slope, scale, first, last, T,
                  D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, ALIBI: tl.constexpr,
                  DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr):
    """What columns first .. last add to dq of a block of rows."""
    for n in tl.range(first, last, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        k = load_rows(K, cols, k_t, T, D, BLOCK_D, MASKED)
        v = load_rows(V, cols, v_t, T, D, BLOCK_D, MASKED)
        s = scores(q, k, rows, cols, starts, slope, scale, MASKED, ALIBI, DOCUMENTS, PRECISION)
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def queries_kernel(Q, K, V, DO, DQ, LSE, DELTA, SLOPES, STARTS, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
                   do_b, do_t, do_h, T, H, GROUP, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr):
    """dQ, by rows: the walk of the forward kernel."""
    blocks = tl.cdiv(T, BLOCK_M)
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    h = tl.program_id(0) // blocks % H
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    rows = first_row + tl.arange(0, BLOCK_M)
    q = load_rows(Q + b * q_b + h * q_h, rows, q_t, T, D, BLOCK_D, True)
    do = load_rows(DO + b * do_b + h * do_h, rows, do_t, T, D, BLOCK_D, True)
    lse = tl.load(LSE + (b * H + h) * T + rows, mask=rows < T, other=float("inf"))
    delta = tl.load(DELTA + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    slope = tl.load(SLOPES + h) * LOG2E if ALIBI else 0.0
    starts = tl.load(STARTS + b * T + rows, mask=rows < T, other=0) if DOCUMENTS else rows
    begin, seen_by_all, diagonal, end = row_ranges(STARTS, b, first_row, T, BLOCK_M, BLOCK_N, DOCUMENTS)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if DOCUMENTS:
        dq = query_columns(dq, q, do, lse, delta, K, V, k_t, v_t, rows, starts, slope, scale, begin, seen_by_all, T,
                           D, BLOCK_D, BLOCK_N, True, ALIBI, True, PRECISION)
        seen_by_all = tl.maximum(seen_by_all, begin)
    dq = query_columns(dq, q, do, lse, delta, K, V, k_t, v_t, rows, starts, slope, scale, seen_by_all, diagonal, T,
                       D, BLOCK_D, BLOCK_N, False, ALIBI, DOCUMENTS, PRECISION)
    dq = query_columns(dq, q, do, lse, delta, K, V, k_t, v_t, rows, starts, slope, scale, diagonal, end, T,
                       D, BLOCK_D, BLOCK_N, True, ALIBI, DOCUMENTS, PRECISION)
    store_rows(DQ + (b * T * H + h) * D, rows, H * D, dq * (scale * LN2), T, D, BLOCK_D)


# ------------------------------------------------------------------------------------------------ launches

@functools.cache
def architecture(device):
    """The key of TILES for a device: the nearest GPU that has no more shared memory."""
    if device.type != "cuda":
        return 80  # the interpreter
    capability = torch.cuda.get_device_capability(device)
    return 90 if (9, 0) <= capability < (12, 0) else 80 if capability in ((8, 0), (8, 7)) else 86


def tile(kernel, D, itemsize, arch):
    """Constants of a launch: sizes, BLOCK_M, BLOCK_N, num_warps, num_stages, maybe maxnreg, and how products are rounded."""
    values = TILES[arch][kernel, 64 if D <= 64 else 128, itemsize]
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg"), values), D=D,
                BLOCK_D=triton.next_power_of_2(D), PRECISION=precision(itemsize))


def precision(itemsize):
    """float32 products stay float32; tensor cores would round them to 10 bits. Irrelevant for 16-bit numbers."""
    return "ieee" if itemsize == 4 else "tf32"


def shared_arguments(q, k, v, alibi_slopes, document_starts):
    """What all kernels take after their pointers, and which of their parts are switched on."""
    T, H = q.shape[1:3]
    apart = max(x.stride(1) for x in (q, k, v))  # numbers from one position to the next
    if T * apart >= 2**31:
        raise ValueError(f"{T} positions, {apart} numbers apart: the kernels count in 32 bits; give shorter sequences")
    numbers = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    return numbers, (T, H, H // k.shape[2]), dict(ALIBI=alibi_slopes is not None, DOCUMENTS=document_starts is not None)


def rows_contiguous(x):
    """Kernels step through the last dimension one by one."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("nanotwist::attention", mutates_args=())
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, alibi_slopes: torch.Tensor | None,
            document_starts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse); the arguments are those of kernels.attention that choose() lets through, with S = T."""
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    (B, T, H, D), itemsize = q.shape, q.element_size()
    o, lse = q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)
    strides, sizes, switches = shared_arguments(q, k, v, alibi_slopes, document_starts)
    launch = tile("forward", D, itemsize, architecture(q.device))
    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be theirs
        forward_kernel[(triton.cdiv(T, launch["BLOCK_M"]) * B * H,)](
            q, k, v, o, lse, alibi_slopes, document_starts, scale * LOG2E.value, *strides, *sizes, **switches, **launch)
    return o, lse


@forward.register_fake
def _(q, k, v, scale, alibi_slopes, document_starts):
    B, T, H, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("nanotwist::attention_backward", mutates_args=())
def backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
             scale: float, alibi_slopes: torch.Tensor | None,
             document_starts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous."""
    do, q, k, v = (rows_contiguous(x) for x in (do, q, k, v))
    (B, T, H, D), heads, itemsize = q.shape, k.shape[2], q.element_size()
    dq, dk, dv = q.new_empty(B, T, H, D), k.new_empty(B, T, heads, D), v.new_empty(B, T, heads, D)
    delta, ends = torch.empty_like(lse), None
    if document_starts is not None:  # a column's document ends where the first row stands whose document begins after it
        columns = torch.arange(T, device=q.device, dtype=torch.int32).expand(B, T)
        ends = torch.searchsorted(document_starts, columns.contiguous(), right=True, out_int32=True)
    strides, sizes, switches = shared_arguments(q, k, v, alibi_slopes, document_starts)
    scale, do_strides = scale * LOG2E.value, do.stride()[:3]
    arch, given = architecture(q.device), (alibi_slopes, document_starts)
    by_keys, by_queries = (tile(name, D, itemsize, arch) for name in ("keys", "queries"))
    with torch.cuda.device_of(q):
        delta_kernel[(triton.cdiv(T, 64) * B * H,)](o, do, delta, *do_strides, T, H, D=D, BLOCK_D=by_keys["BLOCK_D"], BLOCK_M=64)
        keys_kernel[(triton.cdiv(T, by_keys["BLOCK_N"]) * B * heads,)](
            q, k, v, do, dk, dv, lse, delta, *given, ends, scale, *strides, *do_strides, *sizes, **switches, **by_keys)
        queries_kernel[(triton.cdiv(T, by_queries["BLOCK_M"]) * B * H,)](
            q, k, v, do, dq, lse, delta, *given, scale, *strides, *do_strides, *sizes, **switches, **by_queries)
    return dq, dk, dv


@backward.register_fake
def _(do, q, k, v, o, lse, scale, alibi_slopes, document_starts):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def keep_for_backward(ctx, inputs, output):
    q, k, v, ctx.scale, alibi_slopes, document_starts = inputs
    ctx.save_for_backward(q, k, v, *output, alibi_slopes, document_starts)
    ctx.set_materialize_grads(False)  # of lse, zeros that nobody reads


@functools.partial(forward.register_autograd, setup_context=keep_for_backward)
def _(ctx, do, dlse):
    q, k, v, o, lse, alibi_slopes, document_starts = ctx.saved_tensors
    return *backward(do, q, k, v, o, lse, ctx.scale, alibi_slopes, document_starts), None, None, None


@register_flop_formula(torch.ops.nanotwist.attention)
def _(q_shape, k_shape, v_shape, *_, **__):
    """Products of the whole T x T, as the convention for model FLOPs has it; half of them are not done."""
    B, T, H, D = q_shape
    return 4 * B * H * T * T * D


@register_flop_formula(torch.ops.nanotwist.attention_backward)
def _(do_shape, q_shape, *_, **__):
    B, T, H, D = q_shape
    return 8 * B * H * T * T * D
