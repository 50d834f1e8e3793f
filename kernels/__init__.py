"""The one place where an implementation is chosen: attention() and cross_entropy() for the model.

choose() is a pure function of what is asked for and returns (backend, reason); nothing is tried and swallowed.
Backends: `torch` is PyTorch's fused scaled_dot_product_attention and cross_entropy, on any device. The same maths,
written out to be read, stands in reference.py. TWIST_KERNELS=torch forces a backend; forcing one that cannot run is an
error that says why.
"""
import os

import torch
import torch.nn.functional as F

BACKENDS = ("torch",)


def choose(operation, device):
    """(backend, reason) for an operation on a device type."""
    forced = os.environ.get("TWIST_KERNELS", "")
    if forced and forced not in BACKENDS:
        raise ValueError(f"TWIST_KERNELS={forced}: no such backend for {operation}; this version has {', '.join(BACKENDS)}")
    if forced:
        return forced, "forced by TWIST_KERNELS"
    return "torch", f"PyTorch's fused {operation} on {device}"


def explain(device=None):
    """What runs where, and why, as text of one line an operation."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return "\n".join(f"{operation}: {backend} ({reason})" for operation in ("attention", "cross_entropy")
                     for backend, reason in [choose(operation, device)])


def attention(q, k, v, *, scale=None, alibi_slopes=None, document_starts=None):
    """Causal attention: softmax(scale q k^T + bias) v, position t seeing positions <= t of its document.

    Args:
        q: (B, T, H, D). k, v: (B, S, K, D) with S >= T and K dividing H: query head h reads key head h // (H / K).
            S > T when earlier keys come from a cache; the queries are then the last T of the S positions.
        scale: default D ** -0.5.
        alibi_slopes: (H,) float32; adds -slope * distance to the scores (Press et al. 2022).
        document_starts: (B, T) int32, position at which the document of row t begins; 0 everywhere is one document.
    Returns: (B, T, H, D) in the dtype of q.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} key heads evenly")
    choose("attention", q.device.type)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, length, D)
    mask = None
    if alibi_slopes is not None or document_starts is not None or 1 < T < S:
        query = torch.arange(S - T, S, device=q.device)[:, None]
        key = torch.arange(S, device=q.device)[None, :]
        mask = torch.zeros(B, 1, T, S, device=q.device)
        if alibi_slopes is not None:
            mask = mask - alibi_slopes.float()[None, :, None, None] * (query - key)
        hidden = (key > query)[None]
        if document_starts is not None:
            hidden = hidden | (key[None] < document_starts[:, :, None])
        mask = mask.masked_fill(hidden[:, None], float("-inf")).to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, scale=scale,
                                       enable_gqa=H != K)
    return y.transpose(1, 2)


def cross_entropy(logits, targets, *, ignore_index=-100):
    """Mean of -log softmax(logits)[target] over the targets that count. float32 inside, whatever the logits' dtype.

    Args: logits (N, V); targets (N,) int64, ignore_index where there is none. Returns: () float32.
    """
    choose("cross_entropy", logits.device.type)
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index)
