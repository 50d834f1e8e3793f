"""model.py: the cache changes nothing, the future changes nothing, sampling keeps to its rules."""
import dataclasses

import pytest
import torch

import twist
from model import KVCache, TransformerConfig, alibi_slopes, filter_logits, generate, rotary_frequencies

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
