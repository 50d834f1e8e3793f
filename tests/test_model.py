"""model.py: the cache changes nothing, the future changes nothing, sampling keeps to its rules."""
import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode

import twist
from kernels import decode_step, draw
from kernels.draw import Draw, filter_logits
from model import KVCache, TransformerConfig, alibi_slopes, generate, rotary_frequencies

LLAMA = TransformerConfig(vocab_size=40, block_size=64, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, n_inner=48,
                          norm="rmsnorm", position="rope", mlp="swiglu", attention_bias=False, mlp_bias=False,
                          tie_embeddings=False, init_std=0.2, family="llama")
OPT = TransformerConfig(vocab_size=40, block_size=64, n_layer=3, n_head=4, n_kv_head=4, n_embd=32, head_dim=8, n_inner=48,
                        init_std=0.2)
SHAPES = {
    "llama": LLAMA, "opt": OPT, "opt-350m": dataclasses.replace(OPT, norm_order="post", embed_dim=16),
    "neox": dataclasses.replace(OPT, position="rope", rope_fraction=0.5, parallel_residual=True, mlp="gelu",
                                tie_embeddings=False),
    "bloom": dataclasses.replace(OPT, n_head=6, n_kv_head=6, position="alibi", embed_norm=True, mlp="gelu_tanh"),
    "qwen": dataclasses.replace(LLAMA, attention_bias=True, out_bias=False, qk_norm=True, rope_scaling=(8.0, 1.0, 4.0, 16))}


@pytest.fixture(params=SHAPES)
def model(request):
    return twist.build(SHAPES[request.param], twist.cold_tensors(SHAPES[request.param]))


def test_a_later_token_never_changes_an_earlier_output(model):
    ids = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 40
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before[:, 12], after[:, 12])


def test_pieces_through_the_cache_give_the_full_forward(model):
    ids = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config, 20)
    pieces = [model(piece, cache=cache) for piece in ids.split([7, 1, 5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-5, atol=1e-5)


def test_greedy_generation_equals_argmax_of_full_forwards(model):
    ids = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(1))
    expected = ids
    for _ in range(20):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, ids, 20, temperature=0), expected)


def test_the_loss_is_the_mean_over_targets_that_count(model):
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -100
    logits = model(ids)[:, :-1].double()
    expected = -logits.log_softmax(-1).gather(2, targets[:, :-1, None]).mean()
    assert abs(model(ids, targets).item() - expected.item()) < 1e-5


def test_the_same_seed_gives_the_same_continuation(model):
    ids = torch.zeros(3, 4, dtype=torch.int64)
    runs = [generate(model, ids, 12, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_finished_row_is_filled_with_eos_and_banned_ids_never_appear(model):
    ids = torch.zeros(4, 4, dtype=torch.int64)
    rows = generate(model, ids, 50, temperature=3.0, eos=1, banned=(0, 2), generator=torch.Generator().manual_seed(0))[:, 4:]
    assert not ((rows == 0) | (rows == 2)).any()
    for row in rows.tolist():
        if 1 in row:
            assert set(row[row.index(1):]) == {1}


class HostReads(TorchFunctionMode):
    """Counts the numbers that the host asks a device for."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("new", [10, 40])
def test_a_token_costs_no_look_at_the_device(model, new, monkeypatch):
    """But one at the prompt's logits, and of rows that may end one every `look` tokens and one at the end."""
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with HostReads() as reads:
        generate(model, ids, new, top_k=5, top_p=0.9, banned=(0, 2))
    assert reads.count == 1
    monkeypatch.setitem(draw.LOOK, "cpu", 16)
    with HostReads() as reads:
        generate(model, ids, new, eos=1, banned=(1,))
    assert reads.count == 2 + (new - 1) // 16


def test_tokens_drawn_are_those_of_multinomial():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    drawn = Draw(logits, 0.8, None, None, torch.Generator().manual_seed(1), None, (3,))
    ours, other = [drawn(logits) for _ in range(20)], torch.Generator().manual_seed(1)
    logits[:, 3] = float("-inf")
    expected = [torch.multinomial((logits / 0.8).softmax(-1), 1, generator=other) for _ in ours]
    assert torch.equal(torch.cat(ours), torch.cat(expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_tokens_of_a_graph_are_those_of_single_launches(model, backend, temperature, monkeypatch):
    monkeypatch.setenv("TWIST_KERNELS", backend)
    config = dataclasses.replace(model.config, head_dim=32)  # the least that our kernels take
    model = twist.build(config, twist.cold_tensors(config), device="cuda")
    ids, rows = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(1)).cuda(), []
    for recorded in (True, False):
        monkeypatch.setattr(decode_step, "usable", lambda model, recorded=recorded: recorded)
        rows.append(generate(model, ids, 40, temperature, eos=1, generator=torch.Generator("cuda").manual_seed(0)))
    assert torch.equal(*rows) and rows[0].shape[1] > 10


@pytest.mark.parametrize("look", [1, 4, 16])
def test_nothing_is_drawn_after_all_rows_have_ended(model, look, monkeypatch):
    """However late it is noticed: rows are the same as if every token had been looked at."""
    monkeypatch.setitem(draw.LOOK, "cpu", look)
    rows = generate(model, torch.zeros(3, 4, dtype=torch.int64), 60, temperature=3.0, eos=1, banned=range(2, 38),
                    generator=torch.Generator().manual_seed(0))[:, 4:]
    assert 1 < rows.shape[1] < 60 and (rows[:, -1] == 1).all() and not (rows[:, -2] == 1).all()


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    assert torch.isfinite(filter_logits(logits, top_k=2))[0].tolist() == [False, True, False, True]
    assert torch.isfinite(filter_logits(logits, top_p=0.65))[0].tolist() == [False, True, False, True]
    assert torch.isfinite(filter_logits(logits, top_p=0.1))[0].tolist() == [False, True, False, False]


@pytest.mark.parametrize("heads, expected", [
    (16, [2 ** (-i / 2) for i in range(1, 17)]), (32, [2 ** (-i / 4) for i in range(1, 33)]), (1, [2**-8]),
    (12, [2**-i for i in range(1, 9)] + [2 ** (-i / 2) for i in (1, 3, 5, 7)])])
def test_alibi_slopes_are_the_published_ones(heads, expected):
    torch.testing.assert_close(alibi_slopes(heads, "cpu"), torch.tensor(expected))


def test_llama_3_stretches_long_waves_and_keeps_short_ones():
    config = dataclasses.replace(LLAMA, head_dim=64, rope_theta=500000.0)
    plain = rotary_frequencies(config, "cpu")
    scaled = rotary_frequencies(dataclasses.replace(config, rope_scaling=(8.0, 1.0, 4.0, 8192)), "cpu")
    length = 2 * torch.pi / plain
    short, long = length < 8192 / 4, length > 8192
    between = ~short & ~long
    assert short.sum() > 5 and long.sum() > 5 and between.sum() > 1
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_too_long_a_sequence_says_so(model):
    with pytest.raises(ValueError, match="at most 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="fewer"):
        generate(model, torch.zeros(1, 60, dtype=torch.int64), 10)


def test_a_packed_row_gives_the_logits_of_its_documents_alone(model):
    ids = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(1))
    lengths = (7, 1, 12)
    starts = torch.tensor([0, 7, 8]).repeat_interleave(torch.tensor(lengths)).int().expand(2, 20)
    packed = model(ids, document_starts=starts)
    torch.testing.assert_close(packed, torch.cat([model(piece) for piece in ids.split(lengths, dim=1)], dim=1))
    assert not torch.allclose(packed, model(ids))


def test_documents_and_a_cache_do_not_go_together(model):
    ids, cache = torch.zeros(1, 4, dtype=torch.int64), KVCache(model.config, 8)
    with pytest.raises(ValueError, match="cache"):
        model(ids, cache=cache, document_starts=torch.zeros(1, 4, dtype=torch.int32))
