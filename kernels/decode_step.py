"""One more token with few operators: what model.forward computes for T = 1, without what a single token does not need.

    step = stepper(model, cache, table, slopes)        # after the prompt went through the model, which filled the cache
    logits = step(ids)                                 # (B, 1) -> (B, V), and the cache is a token longer
    advance = recorded(lambda ids: draw(step(ids)))    # on a GPU: the same, and drawing, in one launch of a CUDA graph

A small model's token is 25 products of a few microseconds each and, in model.py, far more of views, checks, masks and modules
of a microsecond or two. Here there are fewer: keys turn where the product has put them and go to the cache in one copy; the
query heads of one key head are queries of one attention, so nothing is repeated.

    on a CPU   the token's place is a number: attention sees the part of the cache that is filled. Each product runs on the packed
               weight or on the plain one (packed.py), whichever was faster when it was tried, once a shape and process.
    on a GPU   the place lies on the device, and shapes never change: attention sees the whole cache and a mask. So a token can be
               recorded once, as a graph of kernels, and a replay costs the host one launch instead of hundreds.

Shapes: B batch, C width, H query heads, K key heads, D head dimension, R dimensions that rotate, S length of the cache.
"""
import functools
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from kernels import choose, packed

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
FASTEST = {}  # (rows, N, C, bias, dtype, threads): whether the packed weight was faster
JOINED_BYTES = 2**22  # of a gate: up to here it is joined with its neighbour
TRIALS = 5  # of each way; the fastest counts


def usable(model):
    """Is this a whole model of one dtype, and attention at hand? Parts of weights (FSDP) have another type."""
    device, dtype = model.wte.weight.device.type, model.wte.weight.dtype
    return (dtype in DTYPES.get(device, ()) and not torch.is_autocast_enabled(device)
            and (device == "cuda" or choose("decode_attention", device)[0] == "torch")
            and all(type(p) is nn.Parameter and p.dtype == dtype and p.device.type == device for p in model.parameters()))


def seconds(function, *arguments):
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def faster_packed(case, plain, laid_out):
    """Which of two products of a case (rows, N, C, ...) is faster on this machine; tried once a process."""
    if case not in FASTEST:
        x = torch.randn(case[0], case[2]).to(case[4])
        ways = [[seconds(way, x) for _ in range(TRIALS)] for way in (plain, laid_out)]
        FASTEST[case] = min(ways[1]) < min(ways[0])
    return FASTEST[case]


def product(weight, bias, copy=None, rows=1):
    """A function (x (B, C), other (B, N) or None) -> x W^T + b + other. copy: the weight in oneDNN's layout, if there is one."""
    turned = weight.t()

    def plain(x, other=None):
        if bias is not None:
            return F.linear(x, weight, bias) if other is None else F.linear(x, weight, bias).add_(other)
        return torch.mm(x, turned) if other is None else torch.addmm(other, x, turned)

    def laid_out(x, other=None):
        if other is None:
            return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, copy, bias, "add")

    if copy is None:
        return plain
    case = rows, *weight.shape, bias is not None, weight.dtype, torch.get_num_threads()
    return laid_out if faster_packed(case, plain, laid_out) else plain


def norm(module):
    """A function (x) -> normalised x."""
    if isinstance(module, nn.LayerNorm):
        return functools.partial(F.layer_norm, normalized_shape=module.normalized_shape, weight=module.weight, bias=module.bias,
                                 eps=module.eps)
    if module.weight.dtype != torch.float32:  # its mean is float32's
        return module
    # x / sqrt(mean(x^2) + eps) * weight with the root of the width drawn out: four operators, of which rms_norm has twelve
    width = len(module.weight)
    scale, least = module.weight * width**0.5, torch.tensor((width * module.eps)**0.5, device=module.weight.device)
    return lambda x: (x * scale).div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(least))


@torch.inference_mode()
def stepper(model, cache, table=None, slopes=None, on_device=None):
    """See above. The state after the prompt is that of `cache`: as model.py fills it, `both` a (B, room, 2, K, D) of every layer.

    Args: table: cos, sin (room, 1, R) of all positions, where the model has rotary ones. slopes: (H,), where it has ALiBi's.
        on_device: whether the token's place lies there; default: on GPUs.
    """
    config, both = model.config, cache.both[0]
    rows, room, dtype, device = len(both), cache.room, both.dtype, both.device
    if device.type == "cpu":  # whose attention is several times slower in bfloat16
        cache.both = [both.float() for both in cache.both]
    H, K, D = config.n_head, config.n_kv_head, config.head_dim
    on_device = device.type == "cuda" if on_device is None else on_device
    ours = device.type == "cuda" and choose("decode_attention", "cuda", dtype, D)[0] == "triton"

    def linear(layer):
        if layer is None:
            return None
        laid_out = vars(layer).get("forward")  # packed.py puts it there
        copy = laid_out.args[1] if isinstance(laid_out, functools.partial) and laid_out.func is packed.product else None
        return product(layer.weight, layer.bias, copy, rows)

    def opening(mlp):
        """x -> what its last product takes. Gate and up are one product where a copy of both is small."""
        up, activation = linear(mlp.up), mlp.activation
        if mlp.gate is None:
            return lambda x: activation(up(x))
        gate = linear(mlp.gate)
        if mlp.gate.weight.nbytes > JOINED_BYTES:
            return lambda x: activation(gate(x)).mul_(up(x))
        weight = torch.cat([mlp.gate.weight, mlp.up.weight])
        bias = None if mlp.up.bias is None else torch.cat([mlp.gate.bias, mlp.up.bias])
        joined = product(weight, bias, packed.laid_out(weight) if device.type == "cpu" else None, rows)

        def halves(x):
            gate, up = joined(x).chunk(2, 1)
            return activation(gate).mul_(up)

        return halves

    layers = [(norm(block.ln_1), linear(block.attn.qkv), block.attn.q_norm and norm(block.attn.q_norm),
               block.attn.k_norm and norm(block.attn.k_norm), linear(block.attn.out), norm(block.ln_2), opening(block.mlp),
               linear(block.mlp.down), block.post, block.parallel,
               both.view(rows, room, 2 * K, D), *both.permute(2, 0, 3, 1, 4)) for block, both in zip(model.h, cache.both)]
    head = product(model.wte.weight if model.lm_head is None else model.lm_head.weight, None)
    project_in, project_out = linear(model.project_in), linear(model.project_out)
    embedded, last = model.ln_embed and norm(model.ln_embed), model.ln_f and norm(model.ln_f)
    if table is not None:
        table, R = [part.to(dtype) for part in table], table[0].shape[-1]
        turns = [] if on_device else [*zip(*(part.unbind(0) for part in table))]  # of each place
    slope = torch.zeros(1, 1, 1, 1, device=device) if slopes is None else slopes.view(1, K, H // K, 1)
    place, keys_at = torch.tensor([cache.length], device=device), torch.arange(room, device=device)
    if on_device:  # what is masked is multiplied by 0, and must be numbers
        for both in cache.both:
            both[:, cache.length:].zero_()
    bias = (slope * (keys_at - room + 1)).to(cache.both[0].dtype)  # of the keys before a token at the end, nearest last

    def here():
        """What a token's place decides for all layers: the place, cos and sin, what is added to the scores."""
        if not on_device:
            at = cache.length
            return at, table and turns[at], None if slopes is None else bias[..., room - at - 1:]
        mask = (slope * (keys_at - place)).masked_fill(keys_at > place, float("-inf"))
        return place, table and [part.index_select(0, place)[0] for part in table], mask.to(cache.both[0].dtype)

    def attention(x, other, layer, at, turn, mask):
        _, qkv, q_norm, k_norm, out, *_, both, keys, values = layer
        heads = qkv(x).view(rows, H + 2 * K, D)
        if q_norm:
            q, k, v = heads.split([H, K, K], 1)
            heads = torch.cat([q_norm(q), k_norm(k), v], 1)
        if table is not None:
            turning = heads[:, :H + K, :R]
            rolled = turning.roll(R // 2, -1)
            turning.mul_(turn[0]).addcmul_(rolled, turn[1])
        q, kv = heads.narrow(1, 0, H), heads.narrow(1, H, 2 * K)
        if not on_device:
            both.select(1, at).copy_(kv)
            keys, values = keys.narrow(2, 0, at + 1), values.narrow(2, 0, at + 1)  # (B, K, S, D)
        else:
            both.index_copy_(1, at, kv[:, None].to(both.dtype))
        if ours:
            k, v = (part.transpose(1, 2) for part in (keys, values))
            y = kernels.flash_decoding.decode(q[:, None], k, v, D**-0.5, slopes, at)
        else:
            y = F.scaled_dot_product_attention(q.view(rows, K, H // K, D).to(keys.dtype), keys, values, mask).to(dtype)
        return out(y.reshape(rows, H * D), other)

    def step(ids):
        x, now = F.embedding(ids[:, 0], model.wte.weight), here()
        if project_in:
            x = project_in(x)
        if model.wpe is not None:
            x = x + (F.embedding(place, model.wpe.weight) if on_device else model.wpe.weight[cache.length])
        if embedded:
            x = embedded(x)
        for layer in layers:
            ln_1, ln_2, opened, down, post, parallel = layer[0], *layer[5:10]
            if post:
                x = ln_1(attention(x, x, layer, *now))
                x = ln_2(down(opened(x), x))
            else:
                y = attention(ln_1(x), x, layer, *now)
                x = down(opened(ln_2(x if parallel else y)), y)
        cache.length += 1  # counts no replays
        if on_device:
            place.add_(1)
        if last:
            x = last(x)
        return head(project_out(x) if project_out else x)

    return step


def recorded(function, generator=None):
    """ids -> function(ids), which draws ids of the same shape on a GPU, from the second call on as a replay of its kernels.

    The first call is a common one, in which libraries allocate what they need; the second records, which runs nothing, and
    replays. generator: that the function draws with, if it is not the GPU's own.
    """
    calls, graph, held, drawn = 0, torch.cuda.CUDAGraph(), None, None

    def advance(ids):
        nonlocal calls, held, drawn
        calls += 1
        if calls == 1:
            return function(ids)
        if calls == 2:
            held = ids.clone()
            if generator is not None:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph):
                drawn = function(held)
        held.copy_(ids)
        graph.replay()
        return drawn.clone()

    return advance
