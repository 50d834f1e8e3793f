"""flash_attention.py and flash_decoding.py against float64: on the GPU where there is one, in Triton's interpreter otherwise."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import flash_attention, flash_decoding, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 in the interpreter is silently wrong
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# error relative to the norm: the interpreter's products are exact float32, rounded to the dtype at the same places as a GPU's
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
first_dtype_quickly = pytest.mark.parametrize(
    "dtype", [DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])], ids=str)


@pytest.fixture(autouse=True)
def triton_forced(monkeypatch):
    monkeypatch.setenv("TWIST_KERNELS", "triton")
    torch.manual_seed(0)


def draw(B, T, H, K, D, dtype, size=1.0):
    """q, k, v as the model has them: slices of one fused projection."""
    fused = (size * torch.randn(B, T, H + 2 * K, D)).to(DEVICE, dtype)
    return [x.detach().requires_grad_() for x in fused.split([H, K, K], dim=2)]


def starts_of(lengths):
    """document_starts (1, T) of documents of these lengths, one after the other."""
    begins = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return begins.repeat_interleave(torch.tensor(lengths))[None].to(DEVICE, torch.int32)


def both(q, k, v, **options):
    """(o, dq, dk, dv) of ours and of the reference in float64."""
    results, weights = [], torch.randn_like(q)
    for attention, convert in ((kernels.attention, lambda x: x), (reference.attention, torch.Tensor.double)):
        inputs = [convert(x.detach()).requires_grad_() for x in (q, k, v)]
        if convert(q) is q:
            inputs = [q, k, v]  # with their strides
        o = attention(*inputs, **options)
        results.append((o.detach(), *torch.autograd.grad(o, inputs, convert(weights))))
    return results


def assert_near(ours, expected, dtype):
    for got, value in zip(ours, expected):
        assert got.dtype == dtype and got.shape == value.shape
        size = value.norm().clamp(min=0.3 * value.numel() ** 0.5)  # the gradients of a first position's q and k are 0
        error = (got.double() - value).norm() / size
        assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@first_dtype_quickly
@pytest.mark.parametrize("T", [1, 31, 64, 65, 130, pytest.param(200, marks=pytest.mark.slow)])
def test_forward_and_all_gradients_equal_float64(T, dtype):
    q, k, v = draw(2, T, 2, 2, 64, dtype)
    assert_near(*both(q, k, v), dtype)


@first_dtype_quickly
@pytest.mark.parametrize("D", [32, 80, *(pytest.param(D, marks=pytest.mark.slow) for D in (96, 128))])
def test_every_head_dimension(D, dtype):
    q, k, v = draw(1, 140, 2, 2, D, dtype)
    assert_near(*both(q, k, v), dtype)


@first_dtype_quickly
@pytest.mark.parametrize("H, K", [(2, 1), (6, 2), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_query_heads_share_key_heads(H, K, dtype):
    q, k, v = draw(1, 140, H, K, 32, dtype)
    assert_near(*both(q, k, v), dtype)


def test_backward_makes_up_no_gradient_for_the_sums_of_exponentials():
    q, k, v = draw(1, 40, 3, 3, 32, torch.float32)
    o = kernels.attention(q, k, v)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    assert not [event.name for event in profile.events() if [1, 3, 40] in event.input_shapes and event.name == "aten::zero_"]


@each_dtype
@pytest.mark.parametrize("T", [1, 65, pytest.param(200, marks=pytest.mark.slow)])
def test_alibi(T, dtype):
    q, k, v = draw(1, T, 4, 2, 64, dtype)
    assert_near(*both(q, k, v, alibi_slopes=torch.rand(4, device=DEVICE)), dtype)


@first_dtype_quickly
@pytest.mark.parametrize("lengths", [[130], [1, 1, 63, 1, 64, 5], [127, 1, 2], [65, 140], *(
    pytest.param(lengths, marks=pytest.mark.slow) for lengths in ([1] * 70, [64, 64], [3, 130, 1, 1, 5]))],
                         ids=lambda lengths: "-".join(map(str, lengths[:6])))
def test_packed_documents(lengths, dtype):
    q, k, v = draw(1, sum(lengths), 2, 1, 64, dtype)
    starts = starts_of(lengths)
    ours, expected = both(q, k, v, document_starts=starts, alibi_slopes=torch.rand(2, device=DEVICE))
    assert_near(ours, expected, dtype)


def test_a_packed_document_is_what_it_is_alone():
    q, k, v = (x.detach() for x in draw(1, 133, 2, 1, 64, torch.float32))
    packed = kernels.attention(q, k, v, document_starts=starts_of([1, 70, 62]))
    for a, b in ((0, 1), (1, 71), (71, 133)):
        alone = kernels.attention(*(x[:, a:b] for x in (q, k, v)))
        torch.testing.assert_close(packed[:, a:b], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_documents_differ_from_row_to_row():
    q, k, v = draw(3, 100, 2, 2, 32, torch.float32)
    starts = torch.cat([starts_of([100]), starts_of([30, 70]), starts_of([99, 1])])
    assert_near(*both(q, k, v, document_starts=starts), torch.float32)


def test_rows_that_see_a_moving_window_are_right_too():
    """Ascending starts need not be documents: here every row sees 40 positions."""
    q, k, v = draw(1, 150, 2, 2, 64, torch.float32)
    starts = (torch.arange(150, device=DEVICE) - 39).clamp(min=0).int()[None]
    assert_near(*both(q, k, v, document_starts=starts), torch.float32)


@each_dtype
def test_scores_of_ten_thousand_do_not_overflow(dtype):
    q, k, v = draw(1, 70, 2, 2, 64, dtype)
    with torch.no_grad():
        q *= 30
        k *= 30 * 10  # q . k of some 1e5, times the scale 1e4
    assert both(q, k, v)[0][0].isfinite().all()
    if dtype == torch.float32:
        ours, expected = both(q, k, v)
        torch.testing.assert_close(ours[0].double(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["heads first", *(pytest.param(layout, marks=pytest.mark.slow) for layout in (
    "every second position", "D not contiguous"))])
def test_any_strides(layout):
    q, k, v = draw(2, 70, 4, 2, 32, torch.float32)
    if layout == "heads first":
        q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    elif layout == "every second position":
        q, k, v = (x.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_() for x in (q, k, v))
    else:
        q, k, v = (x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in (q, k, v))
    assert_near(*both(q, k, v), torch.float32)


def test_gradients_of_a_transposed_output_are_taken_as_they_come():
    q, k, v = draw(1, 40, 2, 2, 32, torch.float32)
    weights = torch.randn(1, 32, 2, 40, device=DEVICE)
    grads = [torch.autograd.grad((attention(q, k, v).transpose(1, 3) * weights).sum(), (q, k, v))
             for attention in (kernels.attention, reference.attention)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_a_scale_of_ones_own():
    q, k, v = draw(1, 40, 2, 2, 32, torch.float32)
    assert_near(*both(q, k, v, scale=0.5), torch.float32)


def test_the_same_input_gives_the_same_bits():
    q, k, v = draw(1, 130, 4, 2, 32, torch.float16)
    first, second = (torch.autograd.grad(kernels.attention(q, k, v).sum(), (q, k, v)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@each_dtype
@pytest.mark.parametrize("S, H, K, alibi", [(1, 2, 2, False), (7, 2, 1, True), (64, 4, 4, False), (300, 6, 2, True),
                                            (1000, 20, 1, False)])
def test_one_token_over_a_cache(S, H, K, alibi, dtype):
    _, k, v = draw(2, S + 20, H, K, 80, dtype)
    q, k, v = draw(2, 1, H, K, 80, dtype)[0].detach(), k[:, :S].detach(), v[:, :S].detach()
    slopes = torch.rand(H, device=DEVICE) if alibi else None
    expected = reference.attention(q.double(), k.double(), v.double(), alibi_slopes=slopes)
    assert_near([flash_decoding.decode(q, k, v, 80**-0.5, slopes)], [expected], dtype)
    assert_near([kernels.attention(q, k, v, alibi_slopes=slopes)], [expected], dtype)


@each_dtype
@pytest.mark.parametrize("last", [0, 200, *(pytest.param(last, marks=pytest.mark.slow) for last in (63, 299))])
@pytest.mark.parametrize("alibi", [False, True])
def test_one_token_over_as_much_of_a_cache_as_the_device_says(last, alibi, dtype):
    """What lies beyond is never read: there may be anything."""
    q, k, v = (x.detach() for x in draw(2, 300, 6, 2, 64, dtype))
    q, slopes = q[:, :1], torch.rand(6, device=DEVICE) if alibi else None
    expected = reference.attention(*(x[:, :last + 1].double() for x in (q, k, v)), alibi_slopes=slopes)
    k[:, last + 1:] = v[:, last + 1:] = float("nan")
    found = flash_decoding.decode(q, k, v, 64**-0.5, slopes, torch.tensor([last], device=DEVICE))
    assert_near([found], [expected], dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="compares rounding of a GPU's bfloat16")
@pytest.mark.parametrize("D", [64, 128])
def test_errors_in_bfloat16_are_those_of_sdpa(D):
    q, k, v = draw(2, 1024, 8, 8, D, torch.bfloat16)
    weights, results = torch.randn_like(q), []
    for convert, attention in ((lambda x: x, kernels.attention), (torch.Tensor.double, reference.attention),
                               (lambda x: x, lambda *qkv: F.scaled_dot_product_attention(
                                   *(x.transpose(1, 2) for x in qkv), is_causal=True).transpose(1, 2))):
        inputs = [convert(x.detach()).requires_grad_() for x in (q, k, v)]
        o = attention(*inputs)
        results.append((o.detach(), *torch.autograd.grad(o, inputs, convert(weights))))
    for ours, exact, theirs in zip(*results):
        assert (ours.double() - exact).norm() <= 1.1 * (theirs.double() - exact).norm()


@pytest.mark.slow
def test_the_operators_pass_opcheck():
    q, k, v = draw(1, 20, 2, 1, 32, torch.float32)
    slopes, starts = torch.rand(2, device=DEVICE), starts_of([3, 17])
    torch.library.opcheck(flash_attention.forward, (q, k, v, 0.2, None, None))
    torch.library.opcheck(flash_attention.forward, (q, k, v, 0.2, slopes, starts))
    o, lse = flash_attention.forward(q, k, v, 0.2, slopes, starts)
    torch.library.opcheck(flash_attention.backward,
                          (torch.randn_like(o), *(x.detach() for x in (q, k, v, o, lse)), 0.2, slopes, starts))
    torch.library.opcheck(flash_decoding.decode, (q[:, :1].detach(), k.detach(), v.detach(), 0.2, None))
    torch.library.opcheck(flash_decoding.decode,
                          (q[:, :1].detach(), k.detach(), v.detach(), 0.2, None, torch.tensor([3], device=DEVICE)))


@pytest.mark.slow
def test_a_function_around_it_compiles_without_a_break_and_may_be_recomputed():
    q, k, v = draw(1, 20, 2, 1, 32, torch.float32)
    starts = starts_of([3, 17])

    def block(q, k, v):
        return kernels.attention(q.tanh(), k, v, document_starts=starts).reshape(1, 20, -1).square().sum()

    wanted = torch.autograd.grad(block(q, k, v), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(torch.compile(block, fullgraph=True)(q, k, v), (q, k, v)), wanted)
    torch.testing.assert_close(torch.autograd.grad(checkpoint(block, q, k, v, use_reentrant=False), (q, k, v)), wanted)


def test_its_products_are_counted_as_a_full_square():
    q, k, v = draw(2, 20, 4, 2, 32, torch.float32)
    with FlopCounterMode(display=False) as counter:
        kernels.attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * (2 * 4 * 20 * 20 * 32)


def test_every_tile_divides_and_every_row_of_the_table_exists():
    for arch, table in flash_attention.TILES.items():
        assert set(table) == set(itertools.product(("forward", "keys", "queries"), (64, 128), (2, 4)))
        for D in flash_attention.HEAD_DIMS:
            launch = flash_attention.tile("forward", D, 2, arch)
            assert launch["BLOCK_D"] >= D and launch["BLOCK_M"] % 16 == 0 and launch["BLOCK_N"] % 16 == 0
