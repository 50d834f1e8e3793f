"""kernels/fused_cross_entropy.py against float64: on the GPU where there is one, in Triton's interpreter otherwise."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import fused_cross_entropy, reference
from kernels.compile import row_variants

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 in the interpreter is silently wrong
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LOSS_TOLERANCE = 4e-6
EPSILON = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # relative rounding; float32: of a few operations
INFINITY = float("inf")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def quiet(recwarn):
    """log(0), inf - inf: the interpreter's NumPy warns of what a GPU computes silently and these tests ask for."""
    torch.manual_seed(0)


def loss_and_gradient(logits, targets, incoming=1.0, ignore_index=-100):
    logits = logits.detach().requires_grad_()
    loss = fused_cross_entropy.cross_entropy(logits, targets, ignore_index)
    return loss.detach(), torch.autograd.grad(loss, logits, torch.tensor(incoming, device=DEVICE))[0]


def expected(logits, targets, incoming=1.0, ignore_index=-100):
    logits = logits.detach().double().requires_grad_()
    loss = reference.cross_entropy(logits, targets, ignore_index=ignore_index)
    return loss.detach(), torch.autograd.grad(incoming * loss, logits)[0]


def assert_equal(got, wanted, dtype, incoming=1.0):
    """(loss, gradient) against float64's; every row's gradient is at most incoming / count."""
    loss, gradient = got
    assert loss.dtype == torch.float32 and loss.shape == () and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), wanted[0], rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE, equal_nan=True)
    torch.testing.assert_close(gradient.double(), wanted[1], rtol=2 * EPSILON[dtype], atol=incoming * 1e-7, equal_nan=True)


def draw(N, V, dtype, size=3.0):
    return (size * torch.randn(N, V)).to(DEVICE, dtype), torch.randint(0, V, (N,)).to(DEVICE)


@each_dtype
@pytest.mark.parametrize("N, V", [(9, 2), (9, 100), (9, 502), (9, 512), (9, 1000), (5, 2048), (3, 4097), (3, 50272)])
def test_loss_and_gradient_equal_float64(N, V, dtype):
    logits, targets = draw(N, V, dtype)
    targets[1] = -100
    targets[-1] = V - 1
    before = logits.clone()
    incoming = 1024.0  # as a loss scale: small probabilities stay within float16
    assert_equal(loss_and_gradient(logits, targets, incoming), expected(logits, targets, incoming), dtype, incoming)
    assert torch.equal(logits, before)  # nothing is written over


def test_any_number_can_stand_for_ignored_targets():
    logits, targets = draw(8, 20, torch.float32)
    targets[:3] = 7
    assert_equal(loss_and_gradient(logits, targets, ignore_index=7), expected(logits, targets, ignore_index=7), torch.float32)


@each_dtype
@pytest.mark.parametrize("V", [100, 5000])
def test_logits_of_ten_thousand_lose_no_digit(V, dtype):
    logits, targets = draw(6, V, dtype, size=1.0)
    logits[0] += 10000
    logits[1] -= 10000
    logits[2, targets[2]] = 10000  # certain and right
    logits[3, (targets[3] + 1) % V] = 10000  # certain and wrong
    logits[4, ::2] = -10000
    assert_equal(loss_and_gradient(logits, targets, 64.0), expected(logits, targets, 64.0), dtype, 64.0)


@pytest.mark.parametrize("V, hidden", [(100, slice(0, 60)), (100, slice(40, 99)), (9000, slice(0, 4500)),
                                       (9000, slice(4000, 8995))], ids=str)
def test_logits_of_minus_infinity_are_classes_that_cannot_be(V, hidden):
    logits, targets = draw(4, V, torch.float32)
    logits[:, hidden] = -INFINITY
    targets[:] = V - 1
    targets[0] = -100
    assert_equal(loss_and_gradient(logits, targets), expected(logits, targets), torch.float32)


@pytest.mark.parametrize("V", [10, 5000])
def test_an_impossible_target_costs_infinity_and_a_row_without_a_class_is_nan_as_in_pytorch(V):
    logits, targets = draw(2, V, torch.float32)
    logits[0, targets[0]] = -INFINITY
    for row in (0, 1):
        chosen = targets.where(torch.arange(2, device=DEVICE) == row, -100)
        theirs = logits.clone().requires_grad_()
        loss = F.cross_entropy(theirs, chosen)
        loss.backward()
        got, gradient = loss_and_gradient(logits, chosen)
        torch.testing.assert_close(got, loss.detach(), equal_nan=True)
        torch.testing.assert_close(gradient, theirs.grad, rtol=1e-5, atol=1e-7, equal_nan=True)
        logits[1] = -INFINITY
    assert got.isnan() and gradient[1].isnan().all() and (gradient[0] == 0).all()


def test_rows_that_do_not_count_may_hold_anything():
    logits, targets = draw(4, 30, torch.float32)
    logits[0], logits[1], targets[:2] = float("nan"), INFINITY, -100
    loss, gradient = loss_and_gradient(logits, targets)
    torch.testing.assert_close(loss.double(), expected(logits[2:], targets[2:])[0], rtol=1e-6, atol=1e-6)
    assert (gradient[:2] == 0).all()


def test_no_target_that_counts_gives_nan_and_no_gradient_as_in_pytorch():
    logits, targets = draw(3, 20, torch.float32)
    targets[:] = -100
    loss, gradient = loss_and_gradient(logits, targets)
    assert loss.isnan() and (gradient == 0).all() and fused_cross_entropy.cross_entropy(logits[:0], targets[:0]).isnan()
    x, weight = torch.randn(3, 8, device=DEVICE, requires_grad=True), torch.randn(20, 8, device=DEVICE, requires_grad=True)
    for head in (weight, weight[:5]):  # multiplied early and late
        loss = fused_cross_entropy.linear_cross_entropy(x, head, targets)
        assert loss.isnan() and not any(grad.any() for grad in torch.autograd.grad(loss, (x, weight)))
        assert fused_cross_entropy.linear_cross_entropy(x[:0], head, targets[:0]).isnan()


@each_dtype
@pytest.mark.parametrize("V", [100, 5000])
def test_rows_may_lie_apart_and_transposed_logits_are_understood(V, dtype):
    wide, targets = draw(5, V + 28, dtype)
    targets %= V
    for logits in (wide[:, :V], wide[:, 3:V + 3], wide[:, :V].t().contiguous().t(), wide[:1, :V].expand(5, V)):
        assert_equal(loss_and_gradient(logits, targets, 64.0), expected(logits, targets, 64.0), dtype, 64.0)


@pytest.mark.parametrize("V", [10, 600, 5000])
@pytest.mark.parametrize("outside", [-1, -101, "V", 2**40, -2**40])
def test_a_target_out_of_range_gives_nan_in_its_row_and_touches_nothing_else(V, outside):
    """The kernel itself: on the CPU the public function refuses such a target before."""
    room = torch.full((5, V + 32), 7.0, device=DEVICE)  # logits inside a margin that nobody may write to
    logits, targets = room[1:4, 16:V + 16], torch.tensor([1, V if outside == "V" else outside, 3], device=DEVICE)
    values, _ = draw(3, V, torch.float32)
    logits.copy_(values)
    losses, statistics = torch.empty(3, device=DEVICE), torch.empty(3, 2, device=DEVICE)
    fused_cross_entropy.run_rows(logits, targets, -100, losses, statistics, logits)
    wanted = [expected(values[row:row + 1], targets[row:row + 1]) for row in (0, 2)]
    assert losses.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(losses[::2].double(), torch.stack([loss for loss, _ in wanted]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits[::2].double(), torch.cat([gradient for _, gradient in wanted]), rtol=1e-5, atol=1e-6)
    assert logits[1].isnan().all()
    room[1:4, 16:V + 16] = 7.0
    assert (room == 7.0).all()


def linear_case(N, C, V, dtype):
    x, weight = torch.randn(N, C).to(DEVICE, dtype), (0.5 * torch.randn(V, C)).to(DEVICE, dtype)
    targets = torch.randint(0, V, (N,)).to(DEVICE)
    targets[::5] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets


def linear_expected(x, weight, targets, incoming=1.0):
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = reference.cross_entropy(x @ weight.t(), targets)
    return loss.detach(), *torch.autograd.grad(incoming * loss, (x, weight))


@each_dtype
@pytest.mark.parametrize("V, chunk", [(12, 8), (16, None), (50, 1), (50, 8), (50, 23), (50, None), (4500, 8), (4500, None)])
def test_linear_cross_entropy_equals_float64_in_any_chunks(V, chunk, dtype, monkeypatch):
    x, weight, targets = linear_case(23, 16, V, dtype)  # chunks of 8 leave 7
    if chunk:
        monkeypatch.setattr(fused_cross_entropy, "chunk_rows", lambda *_: chunk)
    loss = fused_cross_entropy.linear_cross_entropy(x, weight, targets)
    got = torch.autograd.grad(loss, (x, weight), torch.tensor(256.0, device=DEVICE))
    wanted = linear_expected(x, weight, targets, 256.0)
    assert loss.dtype == torch.float32 and loss.shape == ()
    rounding = EPSILON[dtype]
    torch.testing.assert_close(loss.double(), wanted[0], rtol=4 * rounding, atol=rounding)
    for gradient, value in zip(got, wanted[1:]):
        assert gradient.dtype == dtype
        # logits and their gradients are rounded to dtype before the next product: a few roundings of the largest value
        torch.testing.assert_close(gradient.double(), value, rtol=0, atol=4 * rounding * value.abs().max().item())


def test_small_probabilities_survive_float16_with_many_targets():
    """(softmax / count) would be below float16's smallest number here; the loss scale arrives only in backward."""
    N, V = 256, 512
    x, weight = torch.zeros(N, 4, device=DEVICE, dtype=torch.float16), torch.zeros(V, 4, device=DEVICE, dtype=torch.float16)
    x[:, 0] = 1
    weight[1:, 0] = -6  # each of the 511 others has 6e-6, after 1 / 256 2e-8
    weight[0, 0] = 6
    weight.requires_grad_()
    loss = fused_cross_entropy.linear_cross_entropy(x, weight, torch.zeros(N, dtype=torch.int64, device=DEVICE))
    gradient, = torch.autograd.grad(loss, weight, torch.tensor(2.0**14, device=DEVICE))
    wanted = 2.0**14 * torch.tensor([0.0] + [-12.0] * (V - 1), dtype=torch.float64).softmax(0)
    torch.testing.assert_close(gradient[1:, 0].double().cpu(), wanted[1:], rtol=0.02, atol=0)


@pytest.mark.parametrize("V, passes", [(10, []), (20, ["aten::mul"])], ids=["late", "early"])
def test_backward_passes_over_dx_again_only_where_the_vocabulary_is_large(V, passes):
    N, C = 40, 16
    x, weight, targets = linear_case(N, C, V, torch.float32)
    loss = fused_cross_entropy.linear_cross_entropy(x, weight, targets)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        torch.autograd.grad(loss, (x, weight))
    seen = [event.name for event in profile.events() if [N, C] in event.input_shapes or [N, V] in event.input_shapes]
    assert "aten::mm" in seen or V > C  # operations inside our operators are seen
    # zeros would be those that autograd makes up for outputs that nobody differentiates
    assert [name for name in seen if name in ("aten::mul", "aten::mul_", "aten::copy_", "aten::zero_", "aten::fill_")] == passes


@pytest.mark.parametrize("V", [12, 20], ids=["late", "early"])
@each_dtype
def test_backward_may_come_again_with_another_factor(dtype, V):
    x, weight, targets = linear_case(9, 16, V, dtype)
    loss = fused_cross_entropy.linear_cross_entropy(x, weight, targets)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    (3 * loss).backward(retain_graph=True)
    assert all(map(torch.equal, first, kept))
    for tensor, value in zip((x, weight), linear_expected(x, weight, targets, 3.0)[1:]):
        torch.testing.assert_close(tensor.grad.double(), value, rtol=0, atol=4 * EPSILON[dtype] * value.abs().max().item())
    assert all(map(torch.equal, torch.autograd.grad(loss, (x, weight)), kept))


@pytest.mark.parametrize("V", [6, 30], ids=["late", "early"])
@pytest.mark.parametrize("chosen", ["x", "weight"])
def test_only_the_gradients_asked_for_are_computed(chosen, V, monkeypatch):
    x, weight, targets = linear_case(9, 8, V, torch.float32)
    wanted = linear_expected(x, weight, targets)
    (weight if chosen == "x" else x).requires_grad_(False)
    monkeypatch.setattr(fused_cross_entropy, "chunk_rows", lambda *_: 4)
    with FlopCounterMode(display=False) as counter:
        fused_cross_entropy.linear_cross_entropy(x, weight, targets).backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * 8 * V
    got, other, value = (x.grad, weight.grad, wanted[1]) if chosen == "x" else (weight.grad, x.grad, wanted[2])
    assert other is None
    torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-6)


def test_without_gradients_no_gradient_is_computed(monkeypatch):
    x, weight, targets = linear_case(9, 8, 30, torch.float32)
    wanted = linear_expected(x, weight, targets)[0].float()
    run_rows, written = fused_cross_entropy.run_rows, []

    def watched(logits, targets, ignore_index, losses, statistics, gradient=None, factor=None):
        written.append(gradient is not None)
        run_rows(logits, targets, ignore_index, losses, statistics, gradient, factor)

    monkeypatch.setattr(fused_cross_entropy, "run_rows", watched)
    with torch.no_grad():
        torch.testing.assert_close(fused_cross_entropy.linear_cross_entropy(x, weight, targets), wanted)
        torch.testing.assert_close(fused_cross_entropy.cross_entropy(x @ weight.t(), targets), wanted)
    torch.testing.assert_close(fused_cross_entropy.linear_cross_entropy(x.detach(), weight.detach(), targets), wanted)
    assert written == [False] * 3
    assert fused_cross_entropy.linear_cross_entropy(x, weight, targets).requires_grad and written == [False] * 3 + [True]


def test_chunks_have_4096_rows_or_256_megabytes_and_are_even():
    assert fused_cross_entropy.chunk_rows(16384, 152000, 2) == 4096
    assert fused_cross_entropy.chunk_rows(4097, 152000, 2) == 2049  # not 4096 and 1
    assert fused_cross_entropy.chunk_rows(65536, 512, 2) == 65536
    assert fused_cross_entropy.chunk_rows(1, 512, 2) == 1 and fused_cross_entropy.chunk_rows(0, 512, 2) == 0


@pytest.mark.slow
def test_the_operators_pass_opcheck(monkeypatch):
    logits, targets = draw(6, 20, torch.float32)
    strided = torch.randn(6, 40, device=DEVICE)[:, :20]
    for values in (logits.clone().requires_grad_(), logits, strided.requires_grad_()):
        torch.library.opcheck(fused_cross_entropy.cross_entropy_forward, (values, targets, -100))
    torch.library.opcheck(fused_cross_entropy.cross_entropy_backward,
                          (torch.tensor(1.0, device=DEVICE), logits, targets, torch.ones(6, 2, device=DEVICE), -100))
    x, weight, targets = linear_case(6, 8, 20, torch.float32)
    for late in (False, True):
        torch.library.opcheck(fused_cross_entropy.linear_forward, (x, weight.detach(), targets, -100, True, False, late))
    torch.library.opcheck(fused_cross_entropy.linear_forward, (x.detach(), weight.detach(), targets, -100, False, False, False))
    for wanted in itertools.product((False, True), repeat=2):
        torch.library.opcheck(fused_cross_entropy.linear_backward, (torch.ones((), device=DEVICE), logits, x.detach(),
                                                                    weight.detach(), *wanted))
    monkeypatch.setattr(fused_cross_entropy, "chunk_rows", lambda *_: 4)
    torch.library.opcheck(fused_cross_entropy.linear_forward, (x, weight, targets, -100, True, True, False))
    torch.library.opcheck(fused_cross_entropy.linear_forward, (x, weight, targets, -100, True, True, True))


# which of both, and V beside C = 8: the head multiplies late where V is not larger
each_loss = pytest.mark.parametrize("fused, V", [(False, 20), (True, 20), (True, 8)], ids=["logits", "early", "late"])


@pytest.mark.slow
@each_loss
def test_a_model_around_it_compiles_without_a_break_and_may_be_recomputed(fused, V):
    x, weight, targets = linear_case(7, 8, V, torch.float32)

    def model(x, weight, targets):
        hidden = x.tanh()
        if fused:
            return 2 * fused_cross_entropy.linear_cross_entropy(hidden, weight, targets)
        return 2 * fused_cross_entropy.cross_entropy(hidden @ weight.t(), targets)

    wanted = torch.autograd.grad(model(x, weight, targets), (x, weight))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, weight, targets), (x, weight)), wanted)
    recomputed = checkpoint(model, x, weight, targets, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed, (x, weight)), wanted)


@each_loss
@pytest.mark.parametrize("frozen", [None, "x", "weight"])
def test_differentiating_twice_is_refused(fused, V, frozen):
    x, weight, targets = linear_case(5, 8, V, torch.float32)
    {"x": x, "weight": weight}.get(frozen, x).requires_grad_(frozen is None)
    loss = (fused_cross_entropy.linear_cross_entropy(x, weight, targets) if fused
            else fused_cross_entropy.cross_entropy(x @ weight.t(), targets))
    with pytest.raises(RuntimeError):
        first, = torch.autograd.grad(loss, x if frozen == "weight" else weight, create_graph=True)
        first.sum().backward()


def test_its_three_products_are_counted():
    x, weight, targets = linear_case(5, 8, 20, torch.float32)
    with FlopCounterMode(display=False) as counter:
        fused_cross_entropy.linear_cross_entropy(x, weight, targets)
    assert counter.get_total_flops() == 3 * 2 * 5 * 8 * 20


@pytest.fixture
def forced(monkeypatch):
    """The kernels, by way of the public functions, which check for them."""
    monkeypatch.setenv("TWIST_KERNELS", "triton")


@pytest.mark.parametrize("change, words", [
    (dict(logits=torch.zeros(2, 3, 20, device=DEVICE)), "flatten"),
    (dict(targets=torch.zeros(3, dtype=torch.int64, device=DEVICE)), "flatten"),
    (dict(logits=torch.zeros(4, 20, dtype=torch.float64, device=DEVICE)), "float64"),
    (dict(targets=torch.zeros(4, dtype=torch.int32, device=DEVICE)), "int32"),
    (dict(targets=torch.zeros(4, dtype=torch.int64, device="meta")), "meta"),
])
def test_logits_and_targets_that_do_not_fit_are_refused_in_a_sentence(change, words, forced):
    arguments = dict(logits=torch.zeros(4, 20, device=DEVICE), targets=torch.zeros(4, dtype=torch.int64, device=DEVICE)) | change
    logits, targets = arguments["logits"], arguments["targets"]
    with pytest.raises(ValueError, match=words):
        kernels.cross_entropy(logits, targets)
    with pytest.raises(ValueError, match=words):
        kernels.linear_cross_entropy(logits, torch.zeros(5, 20, dtype=logits.dtype, device=DEVICE), targets)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("weight, words", [(torch.zeros(8, 20), r"\(V, C\)"), (torch.zeros(8), r"\(V, C\)"),
                                           (torch.zeros(20, 8, dtype=torch.float16), "float16")])
def test_a_head_that_does_not_fit_is_refused_in_a_sentence(weight, words, backend, monkeypatch):
    monkeypatch.setenv("TWIST_KERNELS", backend)
    with pytest.raises(ValueError, match=words):
        kernels.linear_cross_entropy(torch.zeros(4, 8), weight, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("target", [20, -1])
def test_a_target_out_of_range_is_named_where_reading_it_costs_nothing(target, forced):
    targets = torch.tensor([0, 1, target, 3])
    with pytest.raises(ValueError, match=rf"targets\[2\] is {target}: expected a class in \[0, 20\)"):
        kernels.cross_entropy(torch.zeros(4, 20), targets)
    with pytest.raises(ValueError, match=r"targets\[2\]"):
        kernels.linear_cross_entropy(torch.zeros(4, 8), torch.zeros(20, 8), targets)


def test_variants_name_every_argument_of_the_kernel_once():
    found = list(row_variants())
    assert len({row["name"] for row in found}) == len(found)
    for row in found:
        names = list(row["signature"])
        assert {names[i] for i, in row["attrs"]} >= {name for name, kind in row["signature"].items() if kind[0] == "*"}
        assert {name for name, kind in row["signature"].items() if kind == "constexpr"} == set(row["constexprs"])
    assert {(row["constexprs"]["BLOCK_V"], row["launch"]["num_warps"]) for row in found} == set(fused_cross_entropy.TILES)
