"""attention(), linear_cross_entropy() and cross_entropy(): the one place that checks arguments and chooses an implementation.

choose() is a pure function of what is asked for and returns (backend, reason); nothing is tried and swallowed. Backends:

    triton  our kernels, on CUDA GPUs and in Triton's interpreter for the tests: flash_attention.py, fused_cross_entropy.py,
            split_adamw.py (which training/optimizer.py calls by itself), and flash_decoding.py, which never runs unless
            TWIST_KERNELS=triton forces it, until it has been measured to be faster.
    torch   PyTorch's scaled_dot_product_attention, cross_entropy and fused AdamW, on any device.

The model's loss is linear_cross_entropy(); cross_entropy(), on given logits, is for callers outside. The same maths, written out
to be read, stands in reference.py. TWIST_KERNELS=triton|torch forces a backend; forcing one that cannot run is an error that says
why. Values (targets, document starts) are checked on CPUs only: on a GPU every look at them would wait for it. There a target out
of range makes the loss NaN, and nothing is read out of bounds.
"""
import importlib.util
import os

import torch
import torch.nn.functional as F

triton = importlib.util.find_spec("triton")  # not made for macOS and Windows

LOADED = triton is not None and (torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1")

if LOADED:  # importing it takes 0.15 s, and PyTorch without GPUs does not need it
    from kernels import flash_attention, flash_decoding, fused_cross_entropy, split_adamw  # noqa: F401

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that Triton's kernels take
OPERATIONS = ("attention", "decode_attention", "cross_entropy", "linear_cross_entropy", "split_adamw")


def interpreted():
    """Do Triton's kernels run on CPU tensors, slowly, one program after the other?"""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def capability():
    """Of the GPU, (9, 0) for Hopper."""
    return torch.cuda.get_device_capability()


# A constant for torch.compile, whose graph would end where the GPU is asked. torch.compiler.assume_constant_result would load it.
capability._dynamo_marked_constant = True


def choose(operation, device, dtype=None, head_dim=None, forced=None):
    """Which backend runs an operation, and why. Pure: the same arguments give the same answer.

    Args:
        operation: one of OPERATIONS. device: "cpu", "cuda", ... dtype, head_dim: of the tensors; None: any that Triton takes.
        forced: "triton" or "torch"; None: TWIST_KERNELS, and without it our own choice.
    Returns: (backend, reason).
    Raises: ValueError if what is forced does not exist or cannot run, with the reason.
    """
    forced = os.environ.get("TWIST_KERNELS", "") if forced is None else forced
    if forced not in ("", "triton", "torch"):
        raise ValueError(f"TWIST_KERNELS={forced}: no such backend, expected triton or torch")
    obstacle = None
    if triton is None:
        obstacle = "the package triton is not installed"
    elif device != "cuda" and not interpreted():
        obstacle = f"Triton's kernels need a CUDA GPU, not {device}"
    elif device == "cuda" and interpreted():
        obstacle = "TRITON_INTERPRET=1 is set"
    elif dtype == torch.bfloat16 and interpreted():
        obstacle = "Triton's interpreter computes bfloat16 wrongly"
    elif device == "cuda" and capability() < (8, 0):
        obstacle = "Triton's kernels need an Ampere GPU (compute capability 8.0) or a newer one"
    elif dtype not in (None, *DTYPES):
        obstacle = f"Triton's kernels do not take {dtype}"
    elif "attention" in operation and head_dim is not None and head_dim not in flash_attention.HEAD_DIMS:
        obstacle = f"no tiles for head dimension {head_dim} (there are {', '.join(map(str, flash_attention.HEAD_DIMS))})"
    if forced == "triton" and obstacle:
        raise ValueError(f"TWIST_KERNELS=triton cannot run {operation}: {obstacle}")
    if forced:
        return forced, "forced by TWIST_KERNELS"
    if obstacle:
        return "torch", obstacle
    if device != "cuda":
        return "torch", "the interpreter is for tests"
    if operation == "decode_attention":
        return "torch", "ours has not been measured to be faster"
    return "triton", "our kernels"


def explain(device=None, dtype=None, head_dim=None, brief=False):
    """What runs where, and why, as text of one line an operation; brief: one line for all that have the same answer."""
    device, lines = device or ("cuda" if torch.cuda.is_available() else "cpu"), {}
    for operation in OPERATIONS:
        answer = "{} ({})".format(*choose(operation, device, dtype, head_dim))
        lines.setdefault(answer if brief else operation, ([], answer))[0].append(operation)
    return "\n".join(f"{', '.join(operations)}: {answer}" for operations, answer in lines.values())


def autocast_to(*tensors):
    """As PyTorch's own attention and linear layers do under autocast: everything in its dtype."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def check_attention(q, k, v, scale, alibi_slopes, document_starts):
    """ValueError unless these can be the arguments of attention(); scale is a number."""
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


def attention(q, k, v, *, scale=None, alibi_slopes=None, document_starts=None):
    """Causal attention: softmax(scale q k^T + bias) v, position t seeing positions <= t of its document.

    Args:
        q: (B, T, H, D). k, v: (B, S, K, D) with S >= T and K dividing H: query head h reads key head h // (H / K).
            S > T when earlier keys come from a cache; the queries are then the last T of the S positions.
        scale: default D ** -0.5.
        alibi_slopes: (H,) float32; adds -slope * distance to the scores (Press et al. 2022).
        document_starts: (B, T) int32, position at which the document of row t begins; 0 everywhere is one document. S = T.
    Returns: (B, T, H, D) in the dtype of q.
    Raises: ValueError for shapes, dtypes and values that do not fit each other.
    """
    q, k, v = autocast_to(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_attention(q, k, v, scale, alibi_slopes, document_starts)
    T, S = q.shape[1], k.shape[1]
    operation = "attention" if T == S else "decode_attention"
    backend, _ = choose(operation, q.device.type, q.dtype, q.shape[-1])
    if backend == "triton" and T == S:
        return flash_attention.forward(q, k, v, scale, alibi_slopes, document_starts)[0]
    if backend == "triton" and T == 1:
        return flash_decoding.decode(q, k, v, scale, alibi_slopes)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, length, D)
    mask = None
    if alibi_slopes is not None or document_starts is not None or 1 < T < S:
        query = torch.arange(S - T, S, device=q.device)[:, None]
        key = torch.arange(S, device=q.device)[None, :]
        mask = torch.zeros(len(q), 1, T, S, device=q.device)
        if alibi_slopes is not None:
            mask = mask - alibi_slopes[None, :, None, None] * (query - key)
        hidden = (key > query)[None]
        if document_starts is not None:
            hidden = hidden | (key[None] < document_starts[:, :, None])
        mask = mask.masked_fill(hidden[:, None], float("-inf")).to(q.dtype)
    # choices and no comparisons, which of symbolic lengths would be symbols
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True if mask is None and T > 1 else False, scale=scale,
                                       enable_gqa=True if q.shape[1] != k.shape[1] else False)
    return y.transpose(1, 2)


def check_loss(x, weight, targets, ignore_index):
    """ValueError unless these can be the arguments of linear_cross_entropy(), or of cross_entropy(): then weight is None."""
    if x.ndim != 2 or targets.shape != x.shape[:1]:
        raise ValueError(f"got {tuple(x.shape)} and targets {tuple(targets.shape)}, expected (N, .) and (N,): flatten batch and "
                         "time first")
    if targets.dtype != torch.int64 or targets.device != x.device:
        raise ValueError(f"got {targets.dtype} targets on {targets.device}, expected int64 on {x.device}; convert them")
    if weight is not None and (weight.shape[1:] != x.shape[1:] or weight.dtype != x.dtype or weight.device != x.device):
        raise ValueError(f"got x {tuple(x.shape)} {x.dtype} on {x.device} and weight {tuple(weight.shape)} {weight.dtype} on "
                         f"{weight.device}: expected (N, C) and (V, C), as nn.Linear stores it, in one dtype on one device")
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    V = x.shape[1] if weight is None else len(weight)
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if bad.any():
        n = int(bad.nonzero()[0])
        raise ValueError(f"targets[{n}] is {int(targets[n])}: expected a class in [0, {V}), or {ignore_index} for none")


def cross_entropy(logits, targets, *, ignore_index=-100):
    """Mean of -log softmax(logits)[target] over the targets that count. float32 inside, whatever the logits' dtype.

    Args: logits (N, V); targets (N,) int64, ignore_index where there is none.
    Returns: () float32; NaN where no target counts.
    Raises: ValueError for shapes and dtypes that do not fit, and (on CPUs) for targets outside [0, V).
    """
    check_loss(logits, None, targets, ignore_index)
    if choose("cross_entropy", logits.device.type, logits.dtype)[0] == "triton":
        return fused_cross_entropy.cross_entropy(logits, targets, ignore_index)
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index)


def linear_cross_entropy(x, weight, targets, *, ignore_index=-100):
    """cross_entropy(x weight^T, targets); with Triton, all logits of a large vocabulary never exist at once.

    Args: x (N, C); weight (V, C); targets (N,) int64, ignore_index where there is none.
    Returns, raises: as cross_entropy.
    """
    x, weight = autocast_to(x, weight)
    check_loss(x, weight, targets, ignore_index)
    if choose("linear_cross_entropy", x.device.type, x.dtype)[0] == "triton":
        return fused_cross_entropy.linear_cross_entropy(x, weight, targets, ignore_index)
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=ignore_index)
