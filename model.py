"""One decoder-only transformer for every family of text LM, and sampling from it.

    ids (B, T) -> table (B, T, C) [+ positions] -> L blocks of attention and feed-forward -> norm -> head -> logits (B, T, V)

What differs between OPT, GPT-2, GPT-NeoX, BLOOM, LLaMA, Qwen and their kin is two dozen fields of TransformerConfig; which file
spells them how is the business of checkpoints/families.py. No files and no ranks here.
Shapes: B batch, T tokens (units), C width, H query heads, K key heads, D head dimension, V vocabulary, L layers.

Sources: Vaswani et al. 2017; LLaMA, Touvron et al. 2023, section 2.2; OPT, Zhang et al. 2022; rotary positions, Su et al.
2021, section 3.4, on a part of each head and with parallel branches, GPT-NeoX, Black et al. 2022, section 2; ALiBi, Press et
al. 2022; norm after the embedding, BLOOM 2022, section 3.2; norms of q and k, Qwen3 2025, section 2; nucleus sampling,
Holtzman et al. 2020.
"""
import contextlib
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import kernels
from kernels import decode_step
from kernels.draw import Draw

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "swiglu": F.silu}


@dataclass(frozen=True)
class TransformerConfig:
    vocab_size: int  # V, rows of the embedding table
    block_size: int = 2048  # longest sequence; rows of a learned position table
    n_layer: int = 12
    n_head: int = 12  # H
    n_kv_head: int = 12  # K, divides H; fewer than H: several query heads share a key head
    n_embd: int = 768  # C
    head_dim: int = 64  # D, not always C / H
    n_inner: int = 3072  # hidden width of the feed-forward network
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5
    norm_order: str = "pre"  # pre | post: the norm before each branch, or after the sum (OPT-350M)
    parallel_residual: bool = False  # attention and feed-forward read the same x, side by side (GPT-NeoX)
    position: str = "learned"  # learned | rope | alibi
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_fraction: float = 1.0  # share of each head that rotates (GPT-NeoX: a quarter)
    rope_scaling: tuple[float, float, float, int] | None = None  # LLaMA 3.1: factor, low, high, original positions
    mlp: str = "relu"  # relu | gelu | gelu_tanh | swiglu
    attention_bias: bool = True  # on q, k and v
    out_bias: bool | None = None  # on attention's output; None: as attention_bias (Qwen2 has the one without the other)
    mlp_bias: bool = True
    qk_norm: bool = False  # RMS norm of every query and key head, before it rotates (Qwen3)
    tie_embeddings: bool = True  # the head is the embedding table
    embed_dim: int = 0  # width of the table when it is projected to C and back (OPT-350M); 0: C
    embed_norm: bool = False  # a norm right after the table (BLOOM)
    init_std: float = 0.02  # of every matrix of a fresh model
    family: str = "opt"  # whose tensor names an export uses

    def __post_init__(self):
        if not self.embed_dim:
            object.__setattr__(self, "embed_dim", self.n_embd)
        if self.out_bias is None:
            object.__setattr__(self, "out_bias", self.attention_bias)
        for name, known in (("norm", ("layernorm", "rmsnorm")), ("norm_order", ("pre", "post")),
                            ("position", ("learned", "rope", "alibi")), ("mlp", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r} is not supported, expected one of {', '.join(known)}")
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction = {self.rope_fraction} is not supported, expected more than 0 and at most 1")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads cannot share {self.n_kv_head} key heads evenly; check config.json")

    def initial(self, name, tensor, generator):
        """Fills and returns a tensor of a fresh model: matrices and tables ~ N(0, init_std), biases 0, norms 1."""
        if tensor.ndim >= 2:
            return tensor.normal_(0.0, self.init_std, generator=generator)
        return tensor.fill_(0.0 if name.endswith("bias") else 1.0)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean in float32, cast back before the product as LLaMA does."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def make_norm(config):
    norm = {"layernorm": nn.LayerNorm, "rmsnorm": RMSNorm}[config.norm]
    return norm(config.n_embd, eps=config.norm_eps)


def rotary_frequencies(config, device):
    """Radians per position of each rotating pair, (R / 2,) float32, for the R dimensions of a head that rotate."""
    width = int(config.head_dim * config.rope_fraction)
    frequency = config.rope_theta ** -(torch.arange(0, width, 2, device=device).float() / width)
    if config.rope_scaling is None:
        return frequency
    # LLaMA 3.1 stretches the long waves by `factor` and leaves the short ones; between the two bounds it goes from one
    # to the other linearly in the number of turns that the original context holds.
    factor, low, high, original = config.rope_scaling
    turns = original * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


def rotary_table(first, length, config, device):
    """cos and -+sin (T, 1, R) of the rotary angles of positions first .. first + length - 1, float32.

    Dimension i turns together with i + R / 2 (the half-split layout of the published files): a pair (a, b) becomes
    (a cos - b sin, b cos + a sin), so the sines of the first half are negative.
    """
    angle = torch.arange(first, first + length, device=device).float()[:, None] * rotary_frequencies(config, device)
    cos, sin = angle[:, None, :].cos(), angle[:, None, :].sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, table):
    """Rotate the first R dimensions of x (B, T, heads, D) by the angles of its positions."""
    cos, sin = (part.to(x.dtype) for part in table)
    R = cos.shape[-1]
    turning, still = x.split([R, x.shape[-1] - R], dim=-1)
    turning = turning * cos + turning.roll(R // 2, dims=-1) * sin
    return torch.cat([turning, still], dim=-1) if still.shape[-1] else turning


def alibi_slopes(heads, device):
    """ALiBi's slope of each head, (H,) float32: how much a score falls per position of distance.

    For 2^n heads they are the powers 1 .. 2^n of 2^(-8 / 2^n); other counts fill up with every second slope of twice 2^n.
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]
    return torch.stack([torch.full((), slope, device=device) for slope in slopes])  # a copy of a list would wait for the GPU


class KVCache:
    """Keys and values of the tokens already seen, one (B, length, 2, K, D) buffer a layer, in the dtype they come in."""

    def __init__(self, config, length):
        self.both = [None] * config.n_layer
        self.room = length  # tokens that fit
        self.length = 0  # tokens held; the model advances it once a forward

    def extend(self, layer, k, v):
        """Append k, v (B, T, K, D) of one layer; returns all keys and values so far."""
        end = self.length + k.shape[1]
        if self.both[layer] is None:
            self.both[layer] = k.new_empty(len(k), self.room, 2, *k.shape[2:])
        both = self.both[layer]
        both[:, self.length:end, 0] = k
        both[:, self.length:end, 1] = v
        return both[:, :end, 0], both[:, :end, 1]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, config.n_head, config.n_kv_head, config.head_dim
        width = config.n_head * config.head_dim
        self.qkv = nn.Linear(config.n_embd, width + 2 * config.n_kv_head * config.head_dim, bias=config.attention_bias)
        self.out = nn.Linear(width, config.n_embd, bias=config.out_bias)
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None for _ in "qk")

    def forward(self, x, table, slopes, document_starts, cache):
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_dim)
        turning, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=2)  # (B, T, H + K | K, D)
        if self.q_norm is not None:
            q, k = turning.split([self.heads, self.kv_heads], dim=2)
            turning = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        if table is not None:
            turning = rotate(turning, table)
        q, k = turning.split([self.heads, self.kv_heads], dim=2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.out(kernels.attention(q, k, v, alibi_slopes=slopes, document_starts=document_starts).reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        self.gate = nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_bias) if config.mlp == "swiglu" else None
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x):
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


# What selective recomputation keeps, by operator: the outputs of matrix products and of attention. Norms, activations and
# products with gates are cheap to compute again.
KEPT = {"aten::mm", "aten::addmm", "nanotwist::attention",
        "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"}


def keep_products(_context, operator, *_, **__):
    return CheckpointPolicy.MUST_SAVE if operator.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    recompute = "none"  # none | selective | full: what backward computes again instead of finding it in memory

    def __init__(self, config, layer):
        super().__init__()
        self.post, self.parallel = config.norm_order == "post", config.parallel_residual
        self.ln_1, self.attn = make_norm(config), Attention(config, layer)
        self.ln_2, self.mlp = make_norm(config), FeedForward(config)

    def forward(self, x, *position_and_cache):
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(x, *position_and_cache)
        selective = {"context_fn": partial(create_selective_checkpoint_contexts, keep_products)}
        return checkpoint(self.compute, x, *position_and_cache, use_reentrant=False, preserve_rng_state=False,
                          **(selective if self.recompute == "selective" else {}))  # torch.compile takes no idle context_fn

    def compute(self, x, *position_and_cache):
        if self.post:
            x = self.ln_1(x + self.attn(x, *position_and_cache))
            return self.ln_2(x + self.mlp(x))
        y = x + self.attn(self.ln_1(x), *position_and_cache)
        return y + self.mlp(self.ln_2(x if self.parallel else y))


def table(rows, width):
    """nn.Embedding. Its own constructor, drawing where there is no memory (meta), imports all of PyTorch's compiler."""
    weight = torch.empty(rows, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = table(config.vocab_size, config.embed_dim)
        self.wpe = table(config.block_size, config.n_embd) if config.position == "learned" else None
        projected = config.embed_dim != config.n_embd
        self.project_in = nn.Linear(config.embed_dim, config.n_embd, bias=False) if projected else None
        self.ln_embed = make_norm(config) if config.embed_norm else None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config) if config.norm_order == "pre" else None
        self.project_out = nn.Linear(config.n_embd, config.embed_dim, bias=False) if projected else None
        tied = config.tie_embeddings
        self.lm_head = None if tied else nn.Linear(config.embed_dim, config.vocab_size, bias=False)

    def forward(self, ids, targets=None, cache=None, document_starts=None):
        """Logits of the next token at every position, or the mean loss.

        The loss is computed in here because under FSDP the head's weight is whole only inside forward.

        Args:
            ids: (B, T) int64 in [0, V).
            targets: (B, T) int64; -100 where there is none.
            cache: KVCache holding the tokens before these; advanced by T.
            document_starts: (B, T) int32, where in the row the document of each token begins. Documents do not see each
                other and each counts its positions from 0, so a packed row gives the logits of its documents alone.
        Returns: (B, T, V) logits in the activation dtype, or () float32: mean cross-entropy in nats per token.
        Raises: ValueError if the sequence is longer than block_size, or document_starts come with a cache.
        """
        config, T = self.config, ids.shape[1]
        first = cache.length if cache is not None else 0
        if first + T > config.block_size:
            raise ValueError(f"{first + T} tokens, but this model was made for at most {config.block_size}; "
                             "give a shorter sequence")
        if cache is not None and document_starts is not None:
            raise ValueError("packed documents go with training and scoring, not with a KV cache; give one of the two")
        x = self.wte(ids)  # (B, T, embed_dim)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.wpe is not None:
            positions = torch.arange(first, first + T, device=ids.device)
            x = x + self.wpe(positions if document_starts is None else positions - document_starts)
        if self.ln_embed is not None:
            x = self.ln_embed(x)
        table = rotary_table(first, T, config, ids.device) if config.position == "rope" else None
        slopes = alibi_slopes(config.n_head, ids.device) if config.position == "alibi" else None
        for block in self.h:
            x = block(x, table, slopes, document_starts, cache)
        if cache is not None:
            cache.length += T
        if self.ln_f is not None:
            x = self.ln_f(x)
        if self.project_out is not None:
            x = self.project_out(x)
        head = self.wte.weight if self.lm_head is None else self.lm_head.weight
        if targets is None:
            return F.linear(x, head)
        return kernels.linear_cross_entropy(x.reshape(-1, x.shape[-1]), head, targets.reshape(-1))


@torch.inference_mode()
def generate(model, ids, max_new_tokens, temperature=0.8, top_k=None, top_p=None, generator=None, eos=None, banned=()):
    """Continue every row of ids, one token a step, with a KV cache.

    Args:
        ids: (B, T) int64, T >= 1. temperature: 0 takes the likeliest token.
        generator: torch.Generator on the model's device; the same seed gives the same continuation.
        eos: a row that draws it is finished and filled up with it. banned: ids that are never drawn.
    Returns: (B, T + n) int64, n <= max_new_tokens (fewer when every row is finished).
    """
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"expected a prompt of shape (B, T) with at least one token, got {tuple(ids.shape)}")
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"expected temperature >= 0, top_k >= 1 and 0 < top_p <= 1, got {temperature}, {top_k}, {top_p}")
    total = ids.shape[1] + max_new_tokens
    if total > model.config.block_size + 1:
        raise ValueError(f"{ids.shape[1]} prompt tokens and {max_new_tokens} new ones are more than the "
                         f"{model.config.block_size} that this model was made for; ask for fewer")
    if not max_new_tokens:
        return ids
    cache = KVCache(model.config, total + -total % 16)  # GPUs' attention wants masks of such a width
    # compiled blocks would be compiled for every length of the cache; without them, the compiler need not be imported
    with torch.compiler.set_stance("force_eager") if model.h[0]._compiled_call_impl else contextlib.nullcontext():
        logits = model(ids, cache=cache)[:, -1]  # (B, V)
        if not logits.isfinite().all():  # looked at once: looking takes a GPU's time
            raise ValueError(f"the model's numbers are not finite in {str(model.wte.weight.dtype).removeprefix('torch.')}: "
                             "its weights are damaged, or it needs --dtype=bfloat16 or float32")
        draw = Draw(logits, temperature, top_k, top_p, generator, eos, banned)
        drawn, advance = [draw(logits)], one_more(model, cache, draw)
        while len(drawn) < max_new_tokens and not draw.ended(len(drawn)):
            drawn.append(advance(drawn[-1]))
    return torch.cat([ids, draw.whole(drawn)], dim=1)


def one_more(model, cache, draw):
    """A function (ids (B, 1) -> the next ids (B, 1)) that continues from a cache, in few operators where that can be."""
    if not decode_step.usable(model):
        return lambda ids: draw(model(ids, cache=cache)[:, -1])
    config, device = model.config, model.wte.weight.device
    step = decode_step.stepper(model, cache,
                               rotary_table(0, cache.room, config, device) if config.position == "rope" else None,
                               alibi_slopes(config.n_head, device) if config.position == "alibi" else None)
    return decode_step.recorded(lambda ids: draw(step(ids)), draw.generator) if device.type == "cuda" else (
        lambda ids: draw(step(ids)))
