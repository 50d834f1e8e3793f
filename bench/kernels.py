"""The speeds of the kernels beside their peers: python -m bench attention, cross_entropy.

attention      ours        flash_attention.py and flash_decoding.py, called directly
               flash       PyTorch's scaled_dot_product_attention with its flash backend (FlashAttention-2) and no other
               cudnn       the same with cuDNN's
               default     the same as it comes; the note says which backend it picks
               flex        FlexAttention, compiled, with block masks for causal and documents and a score function for ALiBi
cross_entropy  ours        fused_cross_entropy.py: the head fused with its loss, and the loss of given logits
               eager       F.linear and F.cross_entropy of the logits in float32
               compiled    torch.compile of eager

bfloat16, random numbers; timing.py says how time is taken. "over flash" is flash's time over that of the row: above 1 is faster.

Layout: q, k, v are slices of one fused projection (B, T, H + 2 K, D), as the model makes them, and in decoding slices of its
cache; nobody copies. PyTorch's backends are timed on contiguous (B, H, T, D) too, which the model would have to copy for, without
the copy, and the faster counts. Masks, block masks and document starts are made before: a model makes them once for all layers.

Work: 4 H D for each pair of row and column in forward, 10 H D more in backward; causal pairs are counted halved, T^2 / 2, and
documents alike by their own lengths. The head and its loss: 6 N C V. Error: norm of the difference from reference.py in float64
over the norm of that, for one sequence of up to 512 of the case's kind (decoding: all keys); with backward the largest of o, dq,
dk and dv. Memory: most that one call allocates beside its inputs, gradients included.

--device=cpu times what runs there (kernels.attention as dispatched, PyTorch's default, reference.py; the loss as dispatched and
eager) by the wall clock on small cases. It rehearses these files; no figure of it says anything about the kernels.
"""
import contextlib
import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kernels
from bench.timing import attempt, enough_sets, measure, number, ratio, run_cases, timings, wanted
from kernels import reference

# ---------------------------------------------------------------------------------------------- attention

@dataclass(frozen=True)
class Case:
    kind: str  # "causal, D 64" | "grouped heads" | "ALiBi" | "documents" | "decode"
    B: int
    T: int  # rows: 1 in decoding
    H: int
    K: int  # key heads
    D: int
    S: int  # columns: T, or the cached keys

    @property
    def shape(self):
        heads = self.H if self.H == self.K else f"{self.H}/{self.K}"
        return f"{self.B}, {self.S}, {heads}, {self.D}"


def causal(B, T, H, D, kind=None, K=None):
    return Case(kind or f"causal, D {D}", B, T, H, K or H, D, T)


CASES = (causal(16, 512, 12, 64), causal(64, 512, 12, 64), causal(32, 1024, 12, 64), causal(32, 1024, 16, 64),
         causal(16, 2048, 32, 64), causal(16, 2048, 32, 128),
         causal(8, 2048, 32, 128, "grouped heads", 8), causal(32, 1024, 16, 64, "ALiBi"),  # BLOOM 560M
         causal(16, 2048, 12, 64, "documents"), causal(16, 2048, 32, 128, "documents"),
         *(Case("decode", B, 1, 12, 12, 64, S) for S in (512, 2048) for B in (1, 8, 64)))
SMALL_CASES = (causal(2, 256, 4, 32), causal(2, 256, 4, 64, "grouped heads", 2), causal(2, 128, 4, 64, "ALiBi"),
               causal(2, 256, 4, 64, "documents"), Case("decode", 2, 1, 4, 2, 64, 128))
PINNED = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "default": None}


def draw_starts(case):
    """(B, T) int32: documents of T / 4 on average, T / 32 to 15 T / 32, seeded; the last of a row is cut off by its end."""
    random, starts = torch.Generator().manual_seed(0), torch.zeros(case.B, case.T, dtype=torch.int32)
    for row in starts:
        start = 0
        while start < case.T:
            row[start:] = start
            start += int(torch.randint(max(1, case.T // 32), max(2, 15 * case.T // 32 + 1), (), generator=random))
    return starts


def work(case, starts, mode):
    """FLOP of one call."""
    pairs = case.B * case.S if case.T == 1 else case.B * case.T**2 / 2
    if starts is not None:  # half the square of each document
        pairs = (torch.arange(case.T) - starts.cpu() + 0.5).sum().item()
    return pairs * case.H * case.D * (4 if mode == "forward" else 14)


def draw_inputs(case, layout, dtype, device, random):
    """q, do (B, T, H, D); k, v (B, S, K, D), of random numbers. Layout "model" or "heads first": see the head of this file."""
    draw = functools.partial(torch.randn, dtype=dtype, device=device, generator=random)
    heads = [case.H, case.K, case.K]
    if layout == "heads first":
        found = [draw(case.B, H, length, case.D).transpose(1, 2) for H, length in zip(heads, (case.T, case.S, case.S))]
        do = draw(case.B, case.H, case.T, case.D).transpose(1, 2)
    elif case.kind == "decode":
        cache = [draw(case.B, case.S + 64, case.K, case.D)[:, :case.S] for _ in "kv"]
        found, do = [draw(case.B, 1, case.H, case.D), *cache], draw(case.B, 1, case.H, case.D)
    else:
        found = draw(case.B, case.T, sum(heads), case.D).split(heads, dim=2)
        do = draw(case.B, case.T, case.H, case.D)
    return *(x.detach().requires_grad_() for x in found), do


def bias(slopes, starts, case, dtype, device):
    """What backends that know neither ALiBi nor documents get as attn_mask (B or 1, H or 1, T, T)."""
    if slopes is None and starts is None:
        return None
    positions = torch.arange(case.T, device=device)
    distance = (positions[:, None] - positions)[None]  # (1, T, T)
    hidden = distance < 0
    if starts is not None:
        hidden = hidden | (positions < starts[:, :, None])
    mask = torch.zeros(1, 1, 1, 1, device=device) if slopes is None else -slopes[None, :, None, None] * distance
    return mask.masked_fill(hidden[:, None], float("-inf")).to(dtype)


def with_backend(backend, case, mask):
    """PyTorch's attention of (B, length, heads, D), pinned to a backend unless that is None."""
    def call(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and case.T > 1,
                                               enable_gqa=case.H != case.K)
        return y.transpose(1, 2)
    return call


def with_flex(operator, case, slopes, starts, device):
    """FlexAttention of (B, length, heads, D); operator is flex_attention, compiled or not."""
    def visible(b, h, row, column):
        return row >= column if starts is None else (row >= column) & (column >= starts[b, row])

    def sloped(score, b, h, row, column):
        return score - slopes[h] * (row - column)

    block_mask = None
    if case.T > 1:
        block_mask = create_block_mask(visible, None if starts is None else case.B, None, case.T, case.S, device)

    def call(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return operator(q, k, v, score_mod=None if slopes is None else sloped, block_mask=block_mask,
                        enable_gqa=case.H != case.K).transpose(1, 2)
    return call


def with_ours(case, slopes, starts, device):
    """Our kernels, without the choice; on CPUs, outside Triton's interpreter, what the choice gives."""
    def call(q, k, v):
        if device == "cpu" and not kernels.interpreted():
            return kernels.attention(q, k, v, alibi_slopes=slopes, document_starts=starts)
        if case.T < case.S:
            return kernels.flash_decoding.decode(q, k, v, case.D**-0.5, slopes)
        return kernels.flash_attention.forward(q, k, v, case.D**-0.5, slopes, starts)[0]
    return call


def forward(function):
    @torch.no_grad()
    def call(*inputs):
        function(*inputs[:3])
    return call


def forward_backward(function):
    def call(q, k, v, do):
        torch.autograd.grad(function(q, k, v), (q, k, v), do)
    return call


def attention_ways(case, dtype, device):
    """({way: function of q, k, v}, document starts or None, mask of PyTorch's attention or None)."""
    slopes = 2 ** (-8 * torch.arange(1, case.H + 1, device=device) / case.H) if case.kind == "ALiBi" else None
    starts = draw_starts(case).to(device) if case.kind == "documents" else None
    mask = bias(slopes, starts, case, dtype, device)
    ways = {"ours": with_ours(case, slopes, starts, device)}
    if device == "cuda":
        ways |= {name: with_backend(backend, case, mask) for name, backend in PINNED.items()}
        compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        ways["flex"] = with_flex(compiled, case, slopes, starts, device)
    else:
        ways["default"] = with_backend(None, case, mask)
    ways["reference"] = functools.partial(reference.attention, alibi_slopes=slopes, document_starts=starts)
    return ways, starts, mask


def picked(case, mask, q, k, v, _do):
    """The name of the backend that PyTorch takes by default."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, mask is None and case.T > 1, enable_gqa=case.H != case.K)
    return f"picks {SDPBackend(choice).name}"


def attention_errors(case, dtype, device):
    """{way: {mode: error against float64}} on one short sequence of the same kind; nothing for ways that refuse."""
    small = replace(case, B=1, T=min(case.T, 512), S=min(case.S, 512) if case.T > 1 else case.S)
    ways, _, _ = attention_ways(small, dtype, device)
    *inputs, do = draw_inputs(small, "model", dtype, device, torch.Generator(device).manual_seed(1))

    def results(function, q, k, v, do):
        if case.T == 1:
            with torch.no_grad():
                return [function(q, k, v)]
        o = function(q, k, v)
        return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]

    expected = results(ways.pop("reference"), *(x.detach().double().requires_grad_() for x in inputs), do.double())
    ways.pop("flex", None)  # compiling it for a second shape takes longer than all timings of the case
    errors = {}
    for way, function in ways.items():
        found, _ = attempt(results, (function, *inputs, do))
        if found is not None:
            relative = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected)]
            errors[way] = {"forward": relative[0], "forward+backward": max(relative)}
    return errors


def attention_rows(case, options, rounds):
    """A row for each mode and way."""
    device = options.device
    dtype, random, rows = torch.bfloat16 if device == "cuda" else torch.float32, torch.Generator(device).manual_seed(0), []
    torch.compiler.reset()  # each case is compiled for itself, and none counts as the ninth recompilation of a function
    errors = attention_errors(case, dtype, device)
    ways, starts, mask = attention_ways(case, dtype, device)
    if device == "cuda":
        ways.pop("reference")
    ways = wanted(options, ways)
    sets = {layout: enough_sets(lambda layout=layout: draw_inputs(case, layout, dtype, device, random), device)
            for layout in ("model", "heads first")}
    modes = {"forward": forward} if case.T == 1 else {"forward": forward, "forward+backward": forward_backward}
    for mode, wrap in modes.items():
        measured = measure({(way, layout): (wrap(function), sets[layout]) for way, function in ways.items() for layout in sets
                            if layout == "model" or way in PINNED}, device, rounds)
        best = {way: min((layout for layout in sets if (way, layout) in measured),
                         key=lambda layout: measured[way, layout].seconds or float("inf")) for way in ways}
        for way, layout in best.items():
            found = measured[way, layout]
            notes = [found.note] if found.note else []
            if way == "default":
                notes.append(picked(case, mask, *sets[layout][0]))
            rows.append({"kind": case.kind, "shape": case.shape, "mode": mode, "way": way, "layout": layout,
                         **timings(found, work(case, starts, mode)),
                         **{f"over_{peer}": number(ratio(measured[peer, best[peer]].seconds, found.seconds), 3)
                            for peer in ("flash", "cudnn", "default") if peer in ways},
                         "error": number(errors.get(way, {}).get(mode), 3), "note": "; ".join(notes)})
    return rows


def bench_attention(options, cases=None):
    """Rows of (kind, shape B, T or cached keys, H, D, mode, way, ...), of which tables() makes the rest."""
    cases = cases or (CASES if options.device == "cuda" else SMALL_CASES)
    return run_cases("attention", options, {f"{case.kind}; {case.shape}": case for case in cases}, attention_rows)


# ---------------------------------------------------------------------------------------------- cross-entropy

LOSSES = ((65_536, 768, 512), (16_384, 2048, 512), (16_384, 768, 50_272), (65_536, 768, 50_272), (16_384, 2048, 151_936),
          (16_384, 4096, 151_936),  # N, C, V of head and loss; eager holds three float32 of N V, 40 GB at (65536, 50272)
          (65_536, 0, 512), (16_384, 0, 50_272), (16_384, 0, 151_936))  # N, 0, V of the loss of given logits
SMALL_LOSSES = (512, 64, 512), (128, 64, 5000), (512, 0, 512), (128, 0, 5000)


def eager_head(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def eager_loss(logits, targets):
    return F.cross_entropy(logits.float(), targets)


def loss_ways(head, device):
    """{way: function of (x, weight, targets) or of (logits, targets)}."""
    eager = eager_head if head else eager_loss
    name = "linear_cross_entropy" if head else "cross_entropy"
    direct = device == "cuda" or kernels.interpreted()
    ways = {"ours": getattr(kernels.fused_cross_entropy if direct else kernels, name), "eager": eager}
    if device == "cuda":
        ways["compiled"] = torch.compile(eager, fullgraph=True, dynamic=False)
    return ways


def loss_and_gradients(function):
    def call(*inputs):
        torch.autograd.grad(function(*inputs), inputs[:-1])
    return call


def draw_loss_inputs(N, C, V, dtype, device, random):
    """x (N, C), weight (V, C) that make logits of variance 1, or with C = 0 logits (N, V); targets (N,)."""
    draw = functools.partial(torch.randn, dtype=dtype, device=device, generator=random)
    found = (draw(N, C), draw(V, C).mul_(C**-0.5)) if C else (draw(N, V),)
    targets = torch.randint(V, (N,), device=device, generator=random)
    return *(x.requires_grad_() for x in found), targets


def loss_name(N, C, V):
    return f"{'head and loss' if C else 'loss'}, V {V}; " + (f"{N}, {C}, {V}" if C else f"{N}, {V}")


def loss_rows(case, options, rounds):
    """A row for each way."""
    (N, C, V), device = case, options.device
    kind, shape = loss_name(*case).split("; ")
    dtype, random = torch.bfloat16 if device == "cuda" else torch.float32, torch.Generator(device).manual_seed(0)
    torch.compiler.reset()
    sets = enough_sets(lambda: draw_loss_inputs(N, C, V, dtype, device, random), device)
    ways = wanted(options, loss_ways(C > 0, device))
    measured = measure({way: (loss_and_gradients(function), sets) for way, function in ways.items()}, device, rounds)
    rows = []
    for way, found in measured.items():
        row = {"kind": kind, "shape": shape, "mode": "forward+backward", "way": way,
               **timings(found, 6 * N * C * V if C else None),
               **{f"over_{peer}": number(ratio(measured[peer].seconds, found.seconds), 3)
                  for peer in ("eager", "compiled") if peer in measured}}
        if device == "cuda":
            eager = measured["eager"].extra_bytes if "eager" in measured else None
            row |= {"extra_gib": number(ratio(found.extra_bytes, 2**30), 3),
                    "memory_over_eager": number(ratio(found.extra_bytes, eager), 3)}
        rows.append(row | {"note": found.note})
    return rows


def bench_cross_entropy(options, cases=None):
    """Rows of (kind, shape N, C, V or N, V, way, ...), of which tables() makes the rest."""
    cases = cases or (LOSSES if options.device == "cuda" else SMALL_LOSSES)
    return run_cases("cross_entropy", options, {loss_name(*case): case for case in cases}, loss_rows)
