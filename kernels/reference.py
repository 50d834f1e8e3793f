"""The maths of kernels/ in plain PyTorch, for any float dtype: the explanation, and the oracle of the tests.

    attention      o_t = sum_s p_ts v_s,  p_t = softmax_s(scale q_t . k_s - slope (t - s)),  s <= t in the same document
    cross entropy  mean over rows of  log sum_v exp(x_v) - x_target
"""
import torch


def attention(q, k, v, *, scale=None, alibi_slopes=None, document_starts=None):
    """Arguments and result as kernels.attention. Memory grows with T * S: for reading and for tests."""
    B, T, H, D = q.shape
    S, group = k.shape[1], H // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)  # (B, S, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (D**-0.5 if scale is None else scale)
    query = torch.arange(S - T, S, device=q.device)[:, None]
    key = torch.arange(S, device=q.device)[None, :]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[None, :, None, None] * (query - key)
    hidden = (key > query)[None].expand(B, T, S)
    if document_starts is not None:
        hidden = hidden | (key[None] < document_starts[:, :, None])
    scores = scores.masked_fill(hidden[:, None], float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1), v)


def cross_entropy(logits, targets, *, ignore_index=-100):
    """Arguments and result as kernels.cross_entropy, in the dtype of the logits."""
    counts = targets != ignore_index
    chosen = logits.gather(1, targets.where(counts, 0)[:, None])[:, 0]
    losses = logits.logsumexp(dim=1) - chosen
    return losses[counts].mean()
