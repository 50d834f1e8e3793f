"""kernels/: the dispatch gives what reference.py computes in float64."""
import pytest
import torch

import kernels
from kernels import reference


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("alibi, documents, cached", [(False, False, 0), (True, False, 0), (False, True, 0), (True, True, 0),
                                                      (False, False, 9), (True, False, 9)])
def test_attention_equals_the_reference(heads, kv_heads, alibi, documents, cached):
    torch.manual_seed(0)
    B, T, D = 2, 13, 16
    q = torch.randn(B, T, heads, D, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(B, T + cached, kv_heads, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    slopes = torch.rand(heads) if alibi else None
    starts = torch.tensor([[0] * 5 + [5] * 8, [0] * 13], dtype=torch.int32) if documents else None
    results = []
    for attention in (kernels.attention, reference.attention):
        y = attention(q, k, v, alibi_slopes=slopes, document_starts=starts)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_one_query_sees_all_cached_keys():
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    torch.testing.assert_close(kernels.attention(q, k, v), reference.attention(q, k, v))


def test_cross_entropy_equals_the_reference_and_ignores_what_it_should():
    torch.manual_seed(0)
    logits = 30 * torch.randn(50, 17, dtype=torch.float64)
    targets = torch.randint(0, 17, (50,))
    targets[::7] = -100
    expected = reference.cross_entropy(logits, targets)
    torch.testing.assert_close(kernels.cross_entropy(logits, targets).double(), expected, rtol=1e-5, atol=1e-5)


def test_forcing_what_does_not_exist_is_an_error(monkeypatch):
    monkeypatch.setenv("TWIST_KERNELS", "abacus")
    with pytest.raises(ValueError, match="abacus"):
        kernels.explain()


def test_explain_names_both_operations():
    assert kernels.explain("cpu").count("torch") == 2


def test_heads_that_cannot_share_keys_are_refused():
    with pytest.raises(ValueError, match="evenly"):
        kernels.attention(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8))
