"""What attention and cross-entropy cannot mean: one sentence as a ValueError, before anything is launched.

Values are looked at on CPUs only, where it costs nothing: a GPU would have to be waited for.
"""
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that Triton's kernels take


def check_attention(q, k, v, scale, alibi_slopes, document_starts):
    """The arguments of kernels.attention."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention takes q (B, T, H, D) and k, v (B, S, K, D), got {tuple(q.shape)}, {tuple(k.shape)} and "
                         f"{tuple(v.shape)}")
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} key heads evenly")
    if S < T or T < 1:
        raise ValueError(f"attention of {T} queries over {S} keys: every query needs the keys up to its own position")
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must share a dtype and a device, got {q.dtype} on {q.device}, {k.dtype} on {k.device}, "
                         f"{v.dtype} on {v.device}")
    if not scale > 0:
        raise ValueError(f"scale = {scale}: expected a positive number")
    if alibi_slopes is not None and (alibi_slopes.shape != (H,) or alibi_slopes.dtype != torch.float32):
        raise ValueError(f"alibi_slopes must be ({H},) float32, got {tuple(alibi_slopes.shape)} {alibi_slopes.dtype}")
    if document_starts is None:
        return
    if document_starts.shape != (B, T) or document_starts.dtype != torch.int32 or S != T:
        raise ValueError(f"document_starts must be ({B}, {T}) int32 and go with as many keys as queries, got "
                         f"{tuple(document_starts.shape)} {document_starts.dtype} and {S} keys")
    if document_starts.device.type == "cpu" and not torch.compiler.is_compiling():
        ascending = (document_starts[:, 1:] >= document_starts[:, :-1]).all() and (document_starts >= 0).all()
        if not ascending or (document_starts > torch.arange(T)).any():
            raise ValueError("document_starts must ascend along each row, from 0, and never lie beyond their own position")


def check_targets(rows, targets):
    """rows (N, .) and targets (N,) int64, on one device."""
    if rows.ndim != 2 or targets.shape != rows.shape[:1]:
        raise ValueError(f"got {tuple(rows.shape)} and targets {tuple(targets.shape)}, expected (N, .) and (N,): flatten batch "
                         "and time first")
    if targets.dtype != torch.int64 or targets.device != rows.device:
        raise ValueError(f"got {targets.dtype} targets on {targets.device}, expected int64 on {rows.device}; convert them")


def check_range(targets, V, ignore_index):
    """targets in [0, V), or ignore_index."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if bad.any():
        n = int(bad.nonzero()[0])
        raise ValueError(f"targets[{n}] is {int(targets[n])}: expected a class in [0, {V}), or {ignore_index} for none")
