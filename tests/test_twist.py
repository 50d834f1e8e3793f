"""twist.py: the body is kept to the bit, the vocabulary is drawn anew, and transformers opens what is saved."""
import dataclasses
import json

import pytest
import torch

import checkpoint
import pretrained
import twist
from model import Transformer, TransformerConfig
from twist import UnitVocab, cold_start, load_speech_lm, save_speech_lm, shuffled_start, warm_start

LLAMA = TransformerConfig(vocab_size=700, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, n_inner=40,
                          norm="rmsnorm", norm_eps=1e-6, position="rope", rope_theta=500.0, mlp="swiglu", attention_bias=False,
                          mlp_bias=False, tie_embeddings=False, init_std=0.03, family="llama")
OPT = TransformerConfig(vocab_size=700, block_size=64, n_layer=2, n_head=4, n_kv_head=4, n_embd=32, head_dim=8, n_inner=40,
                        init_std=0.03)
SHAPES = {"llama": LLAMA, "llama-tied": dataclasses.replace(LLAMA, tie_embeddings=True, head_dim=12), "opt": OPT,
          "opt-350m": dataclasses.replace(OPT, norm_order="post", embed_dim=16)}
TABLES = ("wte.weight", "lm_head.weight")
META = UnitVocab(30, offset=4, bos=None, eos=None, pad=None)  # the kind of Meta's TWIST checkpoints: no <S>


def perturbed(model, scale=0.2):
    """Every parameter away from its initial value, in eval mode."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.ndim == 1) + scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def lm(request):
    return perturbed(Transformer(SHAPES[request.param]))


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_bit_equal(first, second, names=None):
    assert first.keys() == second.keys()
    for name in names or first:
        assert torch.equal(first[name], second[name]), name


# ---------------------------------------------------------------------------------------------- unit ids

def test_default_ids_are_pad_0_bos_and_eos_1_and_units_from_2():
    vocab = UnitVocab(500)
    assert vocab.size == 502 and vocab.banned == (0,)
    assert vocab.encode([0, 7, 499]).tolist() == [2, 9, 501]
    assert vocab.encode([0, 7, 499], bos=True, eos=True).tolist() == [1, 2, 9, 501, 1]
    assert vocab.encode([3], bos=True).tolist() == [1, 5] and vocab.encode([3], eos=True).tolist() == [5, 1]
    assert vocab.decode(torch.tensor([1, 2, 0, 9, 501, 1])).tolist() == [0, 7, 499]


def test_a_vocabulary_without_specials_bans_what_lies_below_its_units():
    assert META.size == 34 and META.banned == (0, 1, 2, 3)
    assert META.encode([0, 29]).tolist() == [4, 33]
    assert META.decode([0, 3, 4, 33, 34]).tolist() == [0, 29]
    for special in ({"bos": True}, {"eos": True}):
        with pytest.raises(ValueError, match="no bos or no eos"):
            META.encode([0], **special)


def test_specials_may_lie_above_the_units_and_differ():
    vocab = UnitVocab(10, offset=0, bos=10, eos=11, pad=12)
    assert vocab.size == 13 and vocab.banned == (12,)
    assert vocab.encode([0, 9], bos=True, eos=True).tolist() == [10, 0, 9, 11]
    assert vocab.decode([10, 0, 9, 11, 12]).tolist() == [0, 9]


@pytest.mark.parametrize("vocab", [UnitVocab(30), META])
@pytest.mark.parametrize("kind", [list, torch.tensor, lambda units: torch.tensor(units, dtype=torch.uint8).numpy()])
def test_every_unit_comes_back_from_any_kind_of_sequence(vocab, kind):
    units = list(range(30)) + [5, 5, 0]
    ids = vocab.encode(kind(units))
    assert ids.dtype == torch.int64 and vocab.decode(ids).tolist() == units
    assert not set(ids.tolist()) & set(vocab.banned)
    empty = vocab.encode([])
    assert empty.dtype == torch.int64 and empty.tolist() == [] and vocab.decode(empty).tolist() == []


@pytest.mark.parametrize("units", [[500], [-1], [0, 3, 1000], [499, -7]])
def test_units_out_of_range_are_refused(units):
    with pytest.raises(ValueError, match="0 .. 499"):
        UnitVocab(500).encode(units)


# ---------------------------------------------------------------------------------------------- starts

def test_a_warm_start_keeps_the_body_to_the_bit_and_the_text_lm_as_it_was(lm):
    before = values(lm)
    slm = warm_start(lm, UnitVocab(98))
    body = [name for name in before if name not in TABLES]
    assert len(body) >= 15 and slm.config == dataclasses.replace(lm.config, vocab_size=100)
    assert_bit_equal(values(slm), before, body)
    assert slm(torch.tensor([[1, 99]])).shape == (1, 2, 100)
    with torch.no_grad():  # the two share no memory
        for parameter in slm.parameters():
            parameter.zero_()
    assert_bit_equal(values(lm), before)
    assert all(parameter.requires_grad for parameter in slm.parameters()) and not slm.training


@pytest.mark.parametrize("start", [warm_start, shuffled_start])
@pytest.mark.parametrize("embedding, expected", [("fresh", 0.03), ("matched", 0.2)])
def test_the_new_table_has_the_shape_and_scale_that_were_asked_for(lm, start, embedding, expected):
    slm = start(lm, UnitVocab(498), embedding=embedding)
    found = {name: tensor for name, tensor in values(slm).items() if name in TABLES}
    assert found.keys() == {name for name in values(lm) if name in TABLES}
    for table in found.values():
        assert table.shape == (500, lm.config.embed_dim)
        assert table.std().item() == pytest.approx(expected, rel=0.04)  # 8000 draws or more: 5 standard errors
        assert abs(table.mean().item()) < 0.06 * expected
    if len(found) == 2:
        assert not torch.equal(*found.values())  # table and head are drawn one after the other


def test_truncate_keeps_the_first_rows_of_the_text_table(lm):
    slm = warm_start(lm, UnitVocab(98), embedding="truncate")
    for name in TABLES:
        if name in values(lm):
            assert torch.equal(values(slm)[name], values(lm)[name][:100])
    with pytest.raises(ValueError, match="702 rows wanted, the text table has 700"):
        warm_start(lm, UnitVocab(700), embedding="truncate")
    with pytest.raises(ValueError, match="expected fresh, matched or truncate"):
        warm_start(lm, UnitVocab(98), embedding="frehs")


@pytest.mark.parametrize("start", [warm_start, shuffled_start, lambda lm, vocab, seed: cold_start(lm.config, vocab, seed)],
                         ids=["warm", "shuffled", "cold"])
def test_a_start_is_reproducible_by_its_seed(lm, start):
    torch.manual_seed(0)
    first = values(start(lm, UnitVocab(98), seed=3))
    torch.manual_seed(1)  # the global generator has no say
    assert_bit_equal(values(start(lm, UnitVocab(98), seed=3)), first)
    other = values(start(lm, UnitVocab(98), seed=4))
    assert not torch.equal(other["wte.weight"], first["wte.weight"])


def test_a_cold_start_shares_the_architecture_and_nothing_else(lm):
    slm = cold_start(lm.config, UnitVocab(498))
    found, text = values(slm), values(lm)
    assert slm.config == dataclasses.replace(lm.config, vocab_size=500) and found.keys() == text.keys()
    for name, tensor in found.items():
        if name not in TABLES:
            assert tensor.shape == text[name].shape and not torch.equal(tensor, text[name]), name
        if tensor.ndim == 2:
            assert tensor.std().item() == pytest.approx(0.03, rel=0.15), name
        else:  # biases 0, norms 1
            assert tensor.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name


def test_a_shuffled_start_keeps_the_values_of_every_tensor_in_another_order(lm):
    before = values(lm)
    found = values(shuffled_start(lm, UnitVocab(98)))
    for name, tensor in found.items():
        if name in TABLES:
            assert tensor.shape == (100, lm.config.embed_dim)
            continue
        assert torch.equal(tensor.flatten().sort().values, before[name].flatten().sort().values), name
        moved = (tensor != before[name]).float().mean()
        assert moved > 0.8, name  # a permutation of n values leaves one in place on average
    assert_bit_equal(values(lm), before)


def test_the_report_counts_what_is_kept_dropped_and_drawn(lm):
    slm = warm_start(lm, UnitVocab(98))
    rows = [line.split() for line in twist.report(lm, slm).splitlines()]
    counts = {kind: sum(int(row[1].replace(",", "")) for row in rows if row[0] == kind)
              for kind in ("kept", "dropped", "drawn", "total")}
    assert counts["total"] == sum(parameter.numel() for parameter in slm.parameters()) == counts["kept"] + counts["drawn"]
    assert counts["kept"] + counts["dropped"] == sum(parameter.numel() for parameter in lm.parameters())
    assert counts["drawn"] * 7 == counts["dropped"]  # 100 rows for 700


# ---------------------------------------------------------------------------------------------- published sizes

OPT_125M = {"model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "ffn_dim": 3072, "max_position_embeddings": 2048, "do_layer_norm_before": True, "word_embed_proj_dim": 768}
OPT_350M = {"model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
            "ffn_dim": 4096, "max_position_embeddings": 2048, "do_layer_norm_before": False, "word_embed_proj_dim": 512}


@pytest.mark.parametrize("settings, rows, published", [
    (OPT_125M, 502, 87_015_936), (OPT_350M, 502, 305_714_176), (OPT_350M, 50272, 331_196_416)])
def test_parameter_counts_equal_the_published_ones(settings, rows, published):
    family, options = pretrained.lm_options(settings)
    assert rows in (UnitVocab(500).size, options["vocab_size"])
    options["vocab_size"] = rows
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**options, family=family))
    _, exported = pretrained.write_lm(family, options, model.state_dict())
    assert sum(tensor.numel() for tensor in exported.values()) == published
    # two rows of their position table are never read; ours does not hold them
    assert sum(parameter.numel() for parameter in model.parameters()) == published - 2 * settings["hidden_size"]


# ---------------------------------------------------------------------------------------------- load and save

RECIPE = {"kind": "hubert", "num_units": 30, "layer": 2, "centers": "abc", "frame_rate": 25.0}
VOCABS = {"default": UnitVocab(30, recipe=RECIPE), "meta": META, "above": UnitVocab(30, offset=0, bos=30, eos=31, pad=33)}


@pytest.mark.parametrize("vocab", VOCABS.values(), ids=list(VOCABS))
def test_a_saved_speech_lm_is_loaded_to_the_bit(lm, vocab, tmp_path):
    slm = warm_start(lm, vocab)
    save_speech_lm(slm, vocab, tmp_path / "model")
    again, found = load_speech_lm(tmp_path / "model")
    assert found == vocab and again.config == slm.config and not again.training
    assert_bit_equal(values(again), values(slm))
    ids = vocab.encode(range(20))[None]
    assert torch.equal(again(ids), slm(ids))


def test_saving_in_half_precision_halves_the_file_and_rounds_once(lm, tmp_path):
    slm = warm_start(lm, UnitVocab(30))
    save_speech_lm(slm, UnitVocab(30), tmp_path / "full")
    save_speech_lm(slm, UnitVocab(30), tmp_path / "half", dtype=torch.bfloat16)
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.6 * full
    again, _ = load_speech_lm(tmp_path / "half")
    assert_bit_equal(values(again), {name: tensor.bfloat16().float() for name, tensor in values(slm).items()})


@pytest.mark.parametrize("vocab", VOCABS.values(), ids=list(VOCABS))
def test_transformers_opens_the_folder_and_gives_the_same_logits(lm, vocab, tmp_path):
    transformers = pytest.importorskip("transformers")
    slm = perturbed(warm_start(lm, vocab))
    save_speech_lm(slm, vocab, tmp_path / "model")
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.offset) == (vocab.bos, vocab.eos, vocab.offset)
    ids = torch.randint(0, vocab.size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        assert expected.shape == (2, 40, vocab.size) and expected.std() > 0.3
        torch.testing.assert_close(slm(ids), expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_says_only_its_offset_has_all_other_rows_as_units(tmp_path):
    save_speech_lm(cold_start(OPT, META), META, tmp_path / "model")
    settings = checkpoint.read_json(tmp_path / "model" / "config.json")
    for key in ("num_units", "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_recipe"):
        del settings[key]
    checkpoint.write_json(tmp_path / "model" / "config.json", settings)
    assert load_speech_lm(tmp_path / "model")[1] == META


def test_a_text_lm_is_no_speech_lm(tmp_path):
    slm = cold_start(OPT, UnitVocab(30))
    save_speech_lm(slm, UnitVocab(30), tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    del settings["offset"]
    checkpoint.write_json(tmp_path / "model" / "config.json", settings)
    with pytest.raises(ValueError, match="no speech LM.*--init=twist"):
        load_speech_lm(tmp_path / "model")
    assert_bit_equal(values(twist.load_text_lm(tmp_path / "model")), values(slm))  # as a text LM it opens


def test_the_architecture_alone_needs_no_weights(lm, tmp_path):
    save_speech_lm(warm_start(lm, UnitVocab(30)), UnitVocab(30), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert twist.load_lm_config(tmp_path / "model") == dataclasses.replace(lm.config, vocab_size=32)
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load_speech_lm(tmp_path / "model")


@pytest.mark.parametrize("embedding", ["fresh", "truncate"])
def test_the_command_writes_the_warm_started_model_and_prints_the_counts(embedding, tmp_path, capsys):
    lm = perturbed(Transformer(LLAMA))
    save_speech_lm(lm, UnitVocab(698), tmp_path / "lm")
    twist.main([f"--lm={tmp_path / 'lm'}", "--units=50", f"--embedding={embedding}", "--seed=5", f"--out={tmp_path / 'warm'}"])
    printed = capsys.readouterr().out
    assert "dropped" in printed and "(700, 32)" in printed and "(52, 32)" in printed
    slm, vocab = load_speech_lm(tmp_path / "warm")
    assert vocab == UnitVocab(50)
    assert_bit_equal(values(slm), values(warm_start(lm, vocab, seed=5, embedding=embedding)))
