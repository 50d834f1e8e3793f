"""Products by oneDNN against float64, forward and backward; where they must not be used; kept memory."""
import dataclasses
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn

import cpu
from evaluation import likelihood
from model import Transformer, TransformerConfig
from training.distributed import Dist

ONEDNN = pytest.mark.skipif(not cpu.AVAILABLE, reason="this PyTorch has no oneDNN operators")
CONFIG = TransformerConfig(vocab_size=34, block_size=64, n_layer=2, n_head=3, n_kv_head=3, n_embd=48, embed_dim=48, n_inner=80,
                           mlp="swiglu", norm="rmsnorm", position="rope")


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape)).float()


def layer(bias=True, C=48, N=80):
    made = cpu.Linear(C, N, bias=bias)
    with torch.no_grad():
        made.weight.copy_(draw(N, C) / C**0.5)
        if bias:
            made.bias.copy_(draw(N, seed=1))
    return made


def exact(made, x, activation=None):
    """The layer in float64, by PyTorch's own operators."""
    weight, bias = made.weight.double(), None if made.bias is None else made.bias.double()
    return cpu.ACTIVATIONS[activation](nn.functional.linear(x.double(), weight, bias))


def operators(function):
    """Names of the operators that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


@pytest.fixture
def model():
    return Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", list(cpu.ACTIVATIONS))
def test_forward_and_gradients_are_those_of_float64(activation, bias):
    made, x, dy = layer(bias), draw(3, 100, 48).requires_grad_(), draw(3, 100, 80)
    y = made(x, activation)
    assert not cpu.AVAILABLE or cpu.Product.__name__ in str(y.grad_fn) or activation in ("silu", "gelu", "gelu_tanh")
    inputs = [x, *made.parameters()]
    found = torch.autograd.grad(y, inputs, dy)
    expected = torch.autograd.grad(exact(made, x, activation), inputs, dy.double())
    torch.testing.assert_close(y.double(), exact(made, x, activation), atol=1e-5, rtol=1e-5)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-5)


@ONEDNN
@pytest.mark.parametrize("activation", list(cpu.ACTIVATIONS))
@pytest.mark.parametrize("shape", [(1, 48), (3, 1, 48), (2, 100, 48)])
def test_packed_weights_give_the_same_for_any_number_of_rows(activation, shape):
    made, x, z = layer(), draw(*shape), draw(*shape[:-1], 80, seed=2)
    with cpu.packed(made), torch.inference_mode():
        torch.testing.assert_close(made(x, activation).double(), exact(made, x, activation), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(made(x, times=z).double(), exact(made, x) * z, atol=1e-5, rtol=1e-5)
        assert "mkldnn::_linear_pointwise" in operators(lambda: made(x))
    assert made.packed is None and made(x).requires_grad


@ONEDNN
def test_packed_weights_are_given_up_when_scoring_fails_and_do_not_serve_training(model):
    with pytest.raises(RuntimeError, match="stop"), cpu.packed(model):
        assert model.h[0].mlp.up.packed is not None
        x = draw(2, 100, 48).requires_grad_()
        model.h[0].mlp.up(x).sum().backward()  # with gradients: by the weight itself
        assert x.grad is not None and model.h[0].mlp.up.weight.grad is not None
        raise RuntimeError("stop")
    assert all(part.packed is None for part in model.modules() if isinstance(part, cpu.Linear))


@ONEDNN
def test_only_enough_rows_of_float32_without_autocast_go_to_onednn():
    made, many, few = layer(), draw(cpu.FEWEST, 48), draw(cpu.FEWEST - 1, 48)
    assert "mkldnn::_linear_pointwise" in operators(lambda: made(many))
    assert "mkldnn::_linear_pointwise" not in operators(lambda: made(few))
    with torch.autocast("cpu", torch.bfloat16):
        assert made(many).dtype == torch.bfloat16
    assert "mkldnn::_linear_pointwise" not in operators(lambda: layer().double()(many.double()))
    with torch.no_grad():
        assert "mkldnn::_linear_pointwise" not in operators(lambda: made(many))  # not packed: as nn.Linear


def test_without_onednn_everything_is_nn_linear(monkeypatch, model):
    monkeypatch.setattr(cpu, "AVAILABLE", False)
    ids = torch.randint(34, (4, 50), generator=torch.Generator().manual_seed(1))
    assert "mkldnn::_linear_pointwise" not in operators(lambda: model(ids, ids).backward())
    with cpu.packed(model):
        assert model.h[0].mlp.up.packed is None


def test_frozen_parameters_get_no_gradient():
    made, x = layer().requires_grad_(False), draw(200, 48).requires_grad_()
    made(x, "relu").sum().backward()
    assert x.grad is not None and made.weight.grad is None and made.bias.grad is None


@pytest.mark.parametrize("mlp", ["swiglu", "relu", "gelu", "gelu_tanh"])
def test_a_model_has_the_gradients_of_float64(mlp):
    config = dataclasses.replace(CONFIG, mlp=mlp)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    twin = Transformer(config).double()
    twin.load_state_dict(model.state_dict())
    ids = torch.randint(34, (4, 60), generator=torch.Generator().manual_seed(1))
    model(ids, ids).backward()
    logits = twin(ids)
    nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    for (name, ours), exactly in zip(model.named_parameters(), twin.parameters()):
        error = (ours.grad - exactly.grad).norm() / exactly.grad.norm()
        assert error < 1e-5, f"{name}: {error}"


def test_scoring_on_packed_weights_gives_what_the_model_gives(model):
    rows = [torch.randint(34, (length,), generator=torch.Generator().manual_seed(length)) for length in (2, 9, 30, 64)]
    for row, found in zip(rows, likelihood.log_probabilities(model, rows, Dist(0, 1, torch.device("cpu")))):
        with torch.no_grad():
            expected = model(row[None, :-1])[0].log_softmax(-1).gather(1, row[1:, None])[:, 0]
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


KEEP = """
import resource, torch, cpu
if {keep}:
    cpu.keep_freed_memory()
def work():
    for _ in range(8):
        x = torch.ones(20_000_000)
        del x
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_kept_memory_is_not_cleared_again_by_the_system():
    kept, not_kept = (int(subprocess.run([sys.executable, "-c", KEEP.format(keep=keep)], capture_output=True, text=True,
                                         check=True, timeout=120).stdout) for keep in (True, False))
    pages = 20_000_000 * 4 / resource.getpagesize()
    assert kept < 2 * pages < not_kept  # the heap may grow once more
