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


def test_the_fused_head_is_the_head_and_the_loss():
    x, weight = torch.randn(9, 5, requires_grad=True), torch.randn(17, 5, requires_grad=True)
    targets = torch.randint(0, 17, (9,))
    targets[2] = -100
    fused = kernels.linear_cross_entropy(x, weight, targets)
    apart = kernels.cross_entropy(x @ weight.t(), targets)
    torch.testing.assert_close(fused, apart)
    torch.testing.assert_close(torch.autograd.grad(fused, (x, weight)), torch.autograd.grad(apart, (x, weight)))


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_the_choice_is_a_function_of_what_is_asked_for(operation, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    backend, reason = kernels.choose(operation, "cuda", torch.bfloat16, 64)
    assert backend == ("torch" if operation == "decode_attention" else "triton") and reason
    assert kernels.choose(operation, "cuda", torch.bfloat16, 64, forced="triton")[0] == "triton"
    assert kernels.choose(operation, "cuda", torch.bfloat16, 64, forced="torch")[0] == "torch"
    for obstacle in (dict(device="cpu"), dict(dtype=torch.float64), dict(capability=(7, 5)), dict(interpret="1"),
                     dict(triton=None), *([dict(head_dim=72)] if "attention" in operation else [])):
        with monkeypatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", obstacle.get("interpret", "0"))
            patch.setattr(kernels, "triton", obstacle.get("triton", kernels.triton))
            capability = obstacle.get("capability", (9, 0))
            patch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
            usual = dict(device="cuda", dtype=torch.bfloat16, head_dim=64)
            asked = (operation, *(obstacle.get(key, value) for key, value in usual.items()))
            backend, reason = kernels.choose(*asked)
            assert backend == "torch"
            with pytest.raises(ValueError, match=f"TWIST_KERNELS=triton cannot run {operation}: ") as refusal:
                kernels.choose(*asked, forced="triton")
            assert str(refusal.value).endswith(reason)


def test_bfloat16_is_not_run_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TWIST_KERNELS", "triton")
    q = torch.zeros(1, 4, 2, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        kernels.attention(q, q, q)


def test_forcing_what_does_not_exist_is_an_error(monkeypatch):
    monkeypatch.setenv("TWIST_KERNELS", "abacus")
    with pytest.raises(ValueError, match="abacus"):
        kernels.explain()


def test_explain_names_every_operation_and_its_backend():
    lines = kernels.explain("cpu", torch.float32, 64).splitlines()
    assert [line.partition(":")[0] for line in lines] == list(kernels.OPERATIONS)
    assert all(": torch (" in line for line in lines)
    answer = lines[0].partition(": ")[2]
    assert kernels.explain("cpu", torch.float32, 64, brief=True) == f"{', '.join(kernels.OPERATIONS)}: {answer}"


Q, KV = torch.zeros(1, 4, 6, 32), torch.zeros(1, 4, 2, 32)
STARTS = torch.zeros(1, 4, dtype=torch.int32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("arguments, options, words", [
    ((Q, KV[:, :, :, :16], KV), {}, r"\(B, T, H, D\)"), ((Q[0], KV, KV), {}, r"\(B, T, H, D\)"),
    ((Q, KV, KV[:, :3]), {}, r"\(B, S, K, D\)"), ((Q[:, :, :5], KV, KV), {}, "evenly"),
    ((Q, KV[:, :3], KV[:, :3]), {}, "4 queries over 3 keys"), ((Q, KV.half(), KV.half()), {}, "dtype"),
    ((Q, KV, KV), dict(scale=0.0), "positive"), ((Q, KV, KV), dict(alibi_slopes=torch.zeros(2)), r"\(6,\)"),
    ((Q, KV, KV), dict(alibi_slopes=torch.zeros(6).double()), "float32"),
    ((Q, KV, KV), dict(document_starts=STARTS.long()), "int32"), ((Q, KV, KV), dict(document_starts=STARTS[:, :3]), r"\(1, 4\)"),
    ((Q[:, :3], KV, KV), dict(document_starts=STARTS[:, :3]), "as many keys"),
    ((Q, KV, KV), dict(document_starts=torch.tensor([[0, 1, 0, 0]]).int()), "ascend"),
    ((Q, KV, KV), dict(document_starts=torch.tensor([[-1, 0, 0, 0]]).int()), "ascend"),
    ((Q, KV, KV), dict(document_starts=torch.tensor([[0, 2, 2, 2]]).int()), "ascend"),
])
def test_what_attention_cannot_mean_is_refused_in_a_sentence(arguments, options, words, backend, monkeypatch):
    monkeypatch.setenv("TWIST_KERNELS", backend if not torch.cuda.is_available() else "torch")
    with pytest.raises(ValueError, match=words):
        kernels.attention(*arguments, **options)


@pytest.mark.parametrize("targets, words", [(torch.tensor([0, 7]), r"targets\[1\] is 7"), (torch.tensor([-1, 0]), "is -1"),
                                            (torch.tensor([0]), "flatten"), (torch.tensor([0, 1]).int(), "int64")])
def test_what_cross_entropy_cannot_mean_is_refused_in_a_sentence(targets, words):
    with pytest.raises(ValueError, match=words):
        kernels.cross_entropy(torch.zeros(2, 7), targets)
    with pytest.raises(ValueError, match=words):
        kernels.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(7, 3), targets)


def test_under_autocast_everything_takes_its_dtype():
    """Norms of q and k (Qwen3) leave them in float32 while v is bfloat16."""
    q, v = torch.randn(1, 5, 2, 32), torch.randn(1, 5, 2, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.attention(q, q, v).dtype == torch.bfloat16
