"""kernels/packed.py: packed weights against float64; where they must not be used; that nothing of them stays."""
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn

import twist
from conftest import TINY
from evaluation import likelihood
from kernels import packed as module
from kernels.packed import packed
from training.distributed import Dist

ONEDNN = pytest.mark.skipif(not module.AVAILABLE, reason="this PyTorch has no oneDNN operators")
OPERATOR = "mkldnn::_linear_pointwise"


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape)).float()


def layer(bias=True, C=48, N=80):
    made = nn.Linear(C, N, bias=bias)
    with torch.no_grad():
        made.weight.copy_(draw(N, C) / C**0.5)
        if bias:
            made.bias.copy_(draw(N, seed=1))
    return made


def exact(made, x):
    """The layer in float64, by PyTorch's own operators."""
    return nn.functional.linear(x.double(), made.weight.double(), None if made.bias is None else made.bias.double())


def operators(function):
    """Names of the operators that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


@pytest.fixture
def model():
    return twist.build(TINY, twist.cold_tensors(TINY))


@ONEDNN
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (3, 1, 48), (2, 100, 48)])
def test_packed_weights_give_the_same_for_any_number_of_rows(shape, bias, monkeypatch):
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    made, x = layer(bias), draw(*shape)
    with packed(made), torch.inference_mode():
        torch.testing.assert_close(made(x).double(), exact(made, x), atol=1e-5, rtol=1e-5)
        assert OPERATOR in operators(lambda: made(x))
    assert OPERATOR not in operators(lambda: made(x)) and made(x).requires_grad and "forward" not in vars(made)


@ONEDNN
def test_a_layer_with_a_product_is_packed_as_its_flat_weight(monkeypatch):
    from speech.hubert import StridedConv
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    conv, x = StridedConv(6, 10, 3, 2), draw(2, 31, 6)
    expected = nn.functional.conv1d(x.transpose(1, 2), conv.weight.transpose(1, 2), stride=2).transpose(1, 2)
    with packed(conv), torch.inference_mode():
        torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)
        assert OPERATOR in operators(lambda: conv(x))
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)


@ONEDNN
def test_packing_twice_packs_once(model):
    up = model.h[0].mlp.up
    with packed(model):
        first = vars(up)["forward"]
        with packed(model):
            assert vars(up)["forward"] is first
        assert vars(up)["forward"] is first
    assert "forward" not in vars(up)


@ONEDNN
def test_packed_weights_are_given_up_when_scoring_fails_and_do_not_serve_training(model, monkeypatch):
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    up = model.h[0].mlp.up
    with pytest.raises(RuntimeError, match="stop"), packed(model):
        assert "forward" in vars(up)
        x = draw(2, 100, TINY.n_embd).requires_grad_()
        up(x).sum().backward()  # with gradients: by the weight itself
        assert x.grad is not None and up.weight.grad is not None
        raise RuntimeError("stop")
    assert not any("forward" in vars(part) or "product" in vars(part) for part in model.modules())


@ONEDNN
def test_little_work_other_dtypes_and_autocast_stay_with_pytorch(monkeypatch):
    made, many, few = layer(), draw(module.LEAST_WORK // (48 * 80) + 1, 48), draw(8, 48)
    with packed(made), torch.inference_mode():
        assert OPERATOR in operators(lambda: made(many)) and OPERATOR not in operators(lambda: made(few))
        with torch.autocast("cpu", torch.bfloat16):
            assert made(many).dtype == torch.bfloat16
    for other in (layer().double(), layer().half(), layer().to("meta")):
        with packed(other):
            assert "forward" not in vars(other)
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    with packed(made):
        assert "forward" not in vars(made)


def test_without_onednn_nothing_changes(monkeypatch, model):
    monkeypatch.setattr(module, "AVAILABLE", False)
    with packed(model):
        assert "forward" not in vars(model.h[0].mlp.up)


def test_scoring_on_packed_weights_gives_what_the_model_gives(model, monkeypatch):
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    rows = [torch.randint(60, (length,), generator=torch.Generator().manual_seed(length)) for length in (2, 9, 30, 64)]
    for row, found in zip(rows, likelihood.log_probabilities(model, rows, Dist(0, 1, torch.device("cpu")))):
        with torch.no_grad():
            expected = model(row[None, :-1])[0].log_softmax(-1).gather(1, row[1:, None])[:, 0]
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


KEEP = """
import resource, torch
from kernels.packed import keep_freed_memory
if {keep}:
    keep_freed_memory()
def work():
    for _ in range(8):
        x = torch.ones(20_000_000)
        del x
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_kept_memory_is_not_cleared_again_by_the_system():
    kept, not_kept = (int(subprocess.run([sys.executable, "-c", KEEP.format(keep=keep)], capture_output=True, text=True,
                                         check=True, timeout=120).stdout) for keep in (True, False))
    pages = 20_000_000 * 4 / resource.getpagesize()
    assert kept < 2 * pages < not_kept  # the heap may grow once more
