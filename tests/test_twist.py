"""twist.py: the body is kept to the bit, the vocabulary is drawn anew, and transformers opens what is saved."""
import dataclasses
import functools
import json
import shutil

import pytest
import torch

import hubert_units
import twist
from checkpoints import files, pretrained
from corpus.shards import check_recipe
from model import Transformer, TransformerConfig
from twist import UnitVocab, cold_start, load_speech_lm, save_speech_lm, warm_start

LLAMA = TransformerConfig(vocab_size=700, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, n_inner=40,
                          norm="rmsnorm", norm_eps=1e-6, position="rope", rope_theta=500.0, mlp="swiglu", attention_bias=False,
                          mlp_bias=False, tie_embeddings=False, init_std=0.03, family="llama")
OPT = TransformerConfig(vocab_size=700, block_size=64, n_layer=2, n_head=4, n_kv_head=4, n_embd=32, head_dim=8, n_inner=40,
                        init_std=0.03)
NEOX = dataclasses.replace(OPT, position="rope", rope_fraction=0.25, parallel_residual=True, mlp="gelu", tie_embeddings=False,
                           family="gpt_neox")
BLOOM = dataclasses.replace(OPT, n_head=2, n_kv_head=2, head_dim=16, n_inner=128, position="alibi", embed_norm=True,
                            mlp="gelu_tanh", family="bloom")
QWEN = dataclasses.replace(LLAMA, attention_bias=True, out_bias=False, tie_embeddings=True, family="qwen2")
SHAPES = {"neox": NEOX, "bloom": BLOOM, "qwen2": QWEN, "gpt2": dataclasses.replace(OPT, mlp="gelu_tanh", family="gpt2"),
          "llama": LLAMA, "llama-tied": dataclasses.replace(LLAMA, tie_embeddings=True, head_dim=12), "opt": OPT,
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


shuffled_start = functools.partial(warm_start, shuffled=True)


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
    with pytest.raises(ValueError, match="expected one of fresh, matched, truncate"):
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

def opt(hidden, layers, heads, embed=None):
    return {"model_type": "opt", "vocab_size": 50272, "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "ffn_dim": 4 * hidden, "max_position_embeddings": 2048,
            "do_layer_norm_before": embed is None, "word_embed_proj_dim": embed or hidden}


def pythia(hidden, layers, heads):
    return {"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "intermediate_size": 4 * hidden, "max_position_embeddings": 2048, "rotary_pct": 0.25}


def llama_like(kind, hidden, layers, heads, keys, inner, vocab, tied, **more):
    return {"model_type": kind, "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": keys, "intermediate_size": inner, "tie_word_embeddings": tied,
            **more}


OPT_350M = opt(1024, 24, 16, 512)
LLAMA_7B = llama_like("llama", 4096, 32, 32, 32, 11008, 32000, False)
QWEN_05B = llama_like("qwen2", 896, 24, 14, 2, 4864, 151936, True)
BLOOM_560M = {"model_type": "bloom", "vocab_size": 250880, "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16}
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}


@pytest.mark.parametrize("settings, rows, published, unread", [
    (opt(768, 12, 12), 502, 87_015_936, 2 * 768), (OPT_350M, 502, 305_714_176, 2 * 1024),
    (OPT_350M, 50272, 331_196_416, 2 * 1024), (opt(2048, 24, 32), 50272, 1_315_758_080, 2 * 2048),
    (QWEN_05B, 502, 358_347_904, 0), (QWEN_05B, 151936, 494_032_768, 0),
    (pythia(768, 12, 12), 502, 85_827_072, 0), (pythia(1024, 24, 16), 502, 303_339_520, 0),
    (pythia(768, 12, 12), 50304, 162_322_944, 0), (BLOOM_560M, 250880, 559_214_592, 0), (GPT2, 50257, 124_439_808, 0),
    (LLAMA_7B, 32000, 6_738_415_616, 0),
    (llama_like("llama", 2048, 22, 32, 4, 5632, 32000, False), 32000, 1_100_048_384, 0),
    (llama_like("llama", 576, 30, 9, 3, 1536, 49152, True), 49152, 134_515_008, 0),
    (llama_like("qwen3", 1024, 28, 16, 8, 3072, 151936, True, head_dim=128), 151936, 596_049_920, 0)],
    ids=["opt-125m", "opt-350m", "opt-350m-text", "opt-1.3b-text", "qwen2.5-0.5b", "qwen2.5-0.5b-text", "pythia-160m",
         "pythia-410m", "pythia-160m-text", "bloom-560m-text", "gpt2-text", "llama-7b-text", "tinyllama-text",
         "smollm2-135m-text", "qwen3-0.6b-text"])
def test_parameter_counts_equal_the_published_ones(settings, rows, published, unread):
    family, options = pretrained.lm_architecture(settings)
    lm_config = TransformerConfig(**options, family=family)
    slm_config = dataclasses.replace(lm_config, vocab_size=rows)
    assert rows in (UnitVocab(500).size, lm_config.vocab_size)
    assert twist.stored_parameters(slm_config) == published
    model = twist.empty(slm_config)
    assert all(parameter.is_meta for parameter in model.parameters())
    # rows of OPT's position table that are never read; ours does not hold them
    assert sum(parameter.numel() for parameter in model.parameters()) == published - unread
    total = twist.report(twist.empty(lm_config), model).splitlines()[-1]
    assert f"{published - unread:,} parameters" in total and (f"{published:,} in the file" in total) == bool(unread)


def test_the_command_counts_at_any_size_from_the_config_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    twist.main([f"--lm={tmp_path}", "--units=500", "--embedding=matched"])
    printed = capsys.readouterr().out
    assert "(32000, 4096)" in printed and "(502, 4096)" in printed and "6,480," in printed and "std of the text table" in printed


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
    settings = files.read_json(tmp_path / "model" / "config.json")
    for key in ("num_units", "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_recipe"):
        del settings[key]
    files.write_json(tmp_path / "model" / "config.json", settings)
    assert load_speech_lm(tmp_path / "model")[1] == META


def rewrite_config(folder, **change):
    settings = {**files.read_json(folder / "config.json"), **change}
    files.write_json(folder / "config.json", {key: value for key, value in settings.items() if value != "absent"})


@pytest.mark.parametrize("declared, expected", [
    ({}, (None, None, None)), ({"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}, (None, 2, 1)),
    ({"bos_token_id": 0, "eos_token_id": 7, "pad_token_id": None}, (None, None, None))])
def test_metas_twist_has_no_bos_whatever_its_text_lm_left_behind(declared, expected, tmp_path):
    save_speech_lm(cold_start(OPT, META), META, tmp_path / "model")
    absent = dict.fromkeys(("num_units", "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_recipe"), "absent")
    rewrite_config(tmp_path / "model", **{**absent, **declared})
    vocab = load_speech_lm(tmp_path / "model")[1]
    assert vocab == UnitVocab(30, 4, *expected)
    assert vocab.encode([0, 29]).tolist() == [4, 33] and 3 in vocab.banned


def test_metas_folder_may_have_one_folder_around_it(tmp_path):
    save_speech_lm(cold_start(OPT, META), META, tmp_path / "TWIST-350M" / "TWIST-350M")
    assert load_speech_lm(tmp_path / "TWIST-350M")[1] == META


def test_metas_zip_opens_as_it_was_published(tmp_path):
    save_speech_lm(cold_start(OPT, META), META, tmp_path / "in" / "TWIST-350M")
    archive = shutil.make_archive(tmp_path / "TWIST-350M", "zip", tmp_path / "in")
    slm, vocab = load_speech_lm(archive)
    assert vocab == META and slm.config == dataclasses.replace(OPT, vocab_size=META.size)


SLAMKITS = UnitVocab(30, offset=2, bos=1, eos=1, pad=0, recipe={"pad": 40})


def wrap_as_slamkit(folder, rows, **base):
    """Rewrite a saved model as slamkit's UnitLM: `lm.` before every name, the text LM's config one level down."""
    settings = {**files.read_json(folder / "config.json"), **base}
    for key in ("offset", "num_units", "tokenizer_recipe"):
        settings.pop(key, None)
    outer = {"model_type": "speech_language_model", "architectures": ["UnitLM"], "base_model_name": "Qwen/Qwen2.5-0.5B",
             "vocab_size": rows, "twist_init": True, "base_config": settings}
    files.write_json(folder / "config.json", outer)
    tensors = files.read_tensors(folder)
    files.write_tensors(folder / "model.safetensors", {f"lm.{name}": tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize("shape, inner_rows", [(QWEN, 151936), (QWEN, 32), (OPT, 50272)], ids=["qwen", "qwen-resized", "opt"])
def test_slamkits_wrapper_opens_with_its_own_ids_and_the_inner_rope_theta(shape, inner_rows, tmp_path):
    vocab = UnitVocab(30)
    slm = perturbed(cold_start(shape, vocab))
    save_speech_lm(slm, vocab, tmp_path / "model")
    wrap_as_slamkit(tmp_path / "model", 32, vocab_size=inner_rows, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    again, found = load_speech_lm(tmp_path / "model")
    assert found == SLAMKITS and again.config == slm.config
    assert_bit_equal(values(again), values(slm))
    if shape is QWEN:  # slam was trained with 10,000, not with the 1,000,000 of its text LM
        wrap = files.read_json(tmp_path / "model" / "config.json")
        assert wrap["base_config"]["rope_theta"] == again.config.rope_theta == 500.0
    assert twist.load_text_lm(tmp_path / "model").config == slm.config


@pytest.mark.parametrize("ids", [("absent",) * 3, (151643, 151645, 151643), (2, 2, 1), (0, 0, None)],
                         ids=["none", "qwen", "opt", "pythia"])
def test_a_wrapper_has_slamkits_ids_whatever_its_text_model_left_behind(ids, tmp_path):
    save_speech_lm(cold_start(QWEN, UnitVocab(30)), UnitVocab(30), tmp_path / "model")
    rewrite_config(tmp_path / "model", **dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids)))
    wrap_as_slamkit(tmp_path / "model", 32)
    assert load_speech_lm(tmp_path / "model")[1] == SLAMKITS


def test_units_for_slamkits_models_have_its_pad_unless_another_is_given(tmp_path, capsys):
    save_speech_lm(cold_start(QWEN, UnitVocab(200)), UnitVocab(200), tmp_path / "model")
    wrap_as_slamkit(tmp_path / "model", 202)
    _, vocab = load_speech_lm(tmp_path / "model")
    for given, pad, said in ((None, 40, "--pad=40: slamkit's"), (0, 0, "these units have 0 zeros"), (40, 40, "")):
        files.note.cache_clear()
        encoder = hubert_units.load_tokenizer(hubert_units.TokenizerOptions(pad=given), vocab.recipe)
        check_recipe(encoder.recipe, vocab.expected(encoder.recipe), "--tokenizer")
        assert encoder.pad == encoder.recipe["pad"] == pad
        heard = capsys.readouterr().err
        assert said in heard and bool(said) == bool(heard)
    assert hubert_units.load_tokenizer(hubert_units.TokenizerOptions(), {"kind": "hubert", "pad": 0}).pad == 0
    with pytest.raises(ValueError, match="num_units is 200, expected 199"):
        check_recipe(encoder.recipe, dataclasses.replace(vocab, num_units=199).expected(encoder.recipe), "--tokenizer")


def test_a_model_of_slamkit_that_is_saved_or_trained_on_here_keeps_its_pad(tmp_path, capsys):
    save_speech_lm(cold_start(QWEN, UnitVocab(30)), UnitVocab(30), tmp_path / "model")
    wrap_as_slamkit(tmp_path / "model", 32)
    save_speech_lm(*load_speech_lm(tmp_path / "model"), tmp_path / "again")
    assert load_speech_lm(tmp_path / "again")[1] == SLAMKITS
    recipe = {"kind": "hubert", "num_units": 30, "layer": 11, "frame_rate": 25.0, "centers": "c"}
    for folder in ("model", "again"):
        for pad, said in ((40, False), (0, True)):  # from there on it is a model of those units
            files.note.cache_clear()
            vocab = twist.open_start(str(tmp_path / folder), "pocket", {**recipe, "pad": pad})[1]
            assert vocab.recipe == {**recipe, "pad": pad} == vocab.expected({}) and vocab.offset == 2
            assert ("slamkit's models were trained with 40" in capsys.readouterr().err) == said
    vocab = twist.open_start(str(tmp_path / "model"), "pocket", {**recipe, "num_units": 31})[1]
    with pytest.raises(ValueError, match="num_units is 31, expected 30"):
        check_recipe({**recipe, "num_units": 31}, vocab.expected({}), "--data")


@pytest.mark.parametrize("change, words", [
    ({"offset": 5}, "offset 5 and 30 units in a vocabulary of 34 rows"), ({"num_units": 31}, "offset \\+ units <= rows"),
    ({"offset": -1}, "offset -1"), ({"offset": "4"}, "offset '4'"), ({"num_units": None}, "None units"),
    ({"offset": 40, "num_units": "absent"}, "-6 units"), ({"offset": None, "num_units": "absent"}, "offset None")])
def test_a_vocabulary_that_does_not_hold_offset_and_units_is_refused(change, words, tmp_path):
    save_speech_lm(cold_start(OPT, META), META, tmp_path / "model")
    rewrite_config(tmp_path / "model", **change)
    with pytest.raises(ValueError, match=words):
        load_speech_lm(tmp_path / "model")


def test_a_model_of_text_and_units_together_is_refused(tmp_path):
    save_speech_lm(cold_start(QWEN, UnitVocab(30)), UnitVocab(30), tmp_path / "model")
    wrap_as_slamkit(tmp_path / "model", 152_000)
    with pytest.raises(ValueError, match="text and units together"):
        load_speech_lm(tmp_path / "model")
    files.write_json(tmp_path / "model" / "config.json", {"model_type": "speech_language_model", "vocab_size": 32})
    with pytest.raises(ValueError, match="lacks base_config"):
        load_speech_lm(tmp_path / "model")


def test_a_text_lm_is_no_speech_lm(tmp_path):
    slm = cold_start(OPT, UnitVocab(30))
    save_speech_lm(slm, UnitVocab(30), tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    del settings["offset"]
    files.write_json(tmp_path / "model" / "config.json", settings)
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
