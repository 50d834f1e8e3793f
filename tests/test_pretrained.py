"""pretrained.py: what transformers saves, in any of the spellings found on the hub, gives the same logits here.

The oracle is transformers itself, on tiny models with every parameter drawn at random (norms and biases too).
"""
import contextlib
import copy
import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import files, pretrained
from kernels import decode_step, packed
from model import KVCache, alibi_slopes, rotary_table
from twist import load_lm_config, load_text_lm

transformers = pytest.importorskip("transformers")

V, T = 61, 23  # rows of the table; tokens of a test sequence
SMALL = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
SHAPES = {"llama": dict(SMALL, intermediate_size=40), "gpt_neox": dict(SMALL, intermediate_size=40),
          "opt": dict(SMALL, ffn_dim=40),
          "bloom": dict(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, seq_length=64),
          "gpt2": dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)}
SHAPES |= dict.fromkeys(("mistral", "qwen2", "qwen3"), dict(SHAPES["llama"], num_key_value_heads=2))


def rope(theta, **more):
    return {"rope_type": "default", "rope_theta": theta, **more}


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # short, so that all three of its bands are met within T tokens
CASES = {
    "llama": ("llama", dict(rms_norm_eps=1e-5)),
    "llama-gqa": ("llama", dict(num_key_value_heads=2, rms_norm_eps=1e-3)),
    "llama-one-key-head": ("llama", dict(num_key_value_heads=1)),
    "llama-head-dim": ("llama", dict(num_key_value_heads=2, head_dim=12)),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=2)),
    "llama-theta": ("llama", dict(rope_parameters=rope(100.0))),
    "llama-3": ("llama", dict(num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral-window": ("mistral", dict(sliding_window=32)),
    "mistral-head-dim": ("mistral", dict(head_dim=12, sliding_window=None)),
    "qwen2": ("qwen2", dict(rope_parameters=rope(1e6), rms_norm_eps=1e-6)),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True, num_attention_heads=14, num_key_value_heads=2, hidden_size=56)),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=32, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3-tied": ("qwen3", dict(head_dim=12, tie_word_embeddings=True)),
    "opt": ("opt", {}),
    "opt-untied": ("opt", dict(tie_word_embeddings=False)),
    "opt-gelu": ("opt", dict(activation_function="gelu")),
    "opt-350m": ("opt", dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
    "opt-pre-norm-projected": ("opt", dict(word_embed_proj_dim=16)),
    "opt-post-norm-plain": ("opt", dict(do_layer_norm_before=False)),
    "neox": ("gpt_neox", {}),
    "neox-sequential": ("gpt_neox", dict(use_parallel_residual=False)),
    "neox-rotary": ("gpt_neox", dict(rope_parameters=rope(100.0, partial_rotary_factor=0.5))),
    "neox-all-rotary": ("gpt_neox", dict(rope_parameters=rope(1e4, partial_rotary_factor=1.0), hidden_act="gelu_new")),
    "neox-no-bias": ("gpt_neox", dict(attention_bias=False)),
    "neox-tied": ("gpt_neox", dict(tie_word_embeddings=True)),
    "bloom": ("bloom", {}),
    "bloom-6-heads": ("bloom", dict(n_head=6, hidden_size=48)),
    "bloom-11-heads": ("bloom", dict(n_head=11, hidden_size=44)),
    "gpt2": ("gpt2", {}),
    "gpt2-inner": ("gpt2", dict(n_inner=40, activation_function="gelu")),
}
BOTH = ["llama-gqa", "opt-350m", "opt"]


@functools.cache
def oracle(case):
    """(their model, ids (2, T), its logits (2, T, V)), with no parameter left at its initial value."""
    family, extra = CASES[case]
    config = transformers.AutoConfig.for_model(family, **{**SHAPES[family], **extra})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            center = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0  # a norm's weight
            parameter.copy_(center + 0.25 * torch.randn(parameter.shape, generator=generator))
        model.eval()
        ids = torch.randint(0, V, (2, T), generator=generator)
        return model, ids, model(ids).logits


def save(case, folder):
    """The folder that transformers writes; returns ({their name: tensor}, their config.json)."""
    oracle(case)[0].save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def rewrite(folder, tensors=None, settings=None):
    """Replace the weights or the config of a folder."""
    if tensors is not None:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))


def assert_same_logits(case, folder, tolerance=1e-5):
    _, ids, expected = oracle(case)
    assert expected.std() > 0.3  # logits near zero would agree by accident
    with torch.no_grad():
        torch.testing.assert_close(load_text_lm(folder)(ids), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, tmp_path):
    save(case, tmp_path)
    assert_same_logits(case, tmp_path)


@torch.inference_mode()
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_one_token_gives_the_logits_of_the_whole_forward(case, tmp_path, monkeypatch):
    """With the model's own weights and with packed ones, whichever is faster on this machine, and as GPUs do it."""
    save(case, tmp_path)
    ours, ids = load_text_lm(tmp_path), oracle(case)[1]
    config, expected = ours.config, ours(ids)
    assert decode_step.usable(ours)
    monkeypatch.setattr(packed, "LEAST_WORK", 0)
    for is_packed, on_device in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(decode_step, "faster_packed", lambda *_, chosen=is_packed: chosen)
        with packed.packed(ours) if is_packed else contextlib.nullcontext():
            cache = KVCache(config, ids.shape[1])
            ours(ids[:, :3], cache=cache)
            step = decode_step.stepper(
                ours, cache, rotary_table(0, ids.shape[1], config, "cpu") if config.position == "rope" else None,
                alibi_slopes(config.n_head, "cpu") if config.position == "alibi" else None, on_device)
            found = torch.stack([step(ids[:, t:t + 1]) for t in range(3, ids.shape[1])], dim=1)
        torch.testing.assert_close(found, expected[:, 3:], rtol=3e-5, atol=3e-5)


@torch.inference_mode()
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("case", ["llama-3", "qwen3", "opt", "opt-350m", "neox", "bloom-6-heads", "gpt2"])
def test_a_step_in_bfloat16_is_as_near_to_float32_as_the_whole_forward(case, on_device, tmp_path):
    save(case, tmp_path)
    _, ids, exact = oracle(case)
    ours = load_text_lm(tmp_path, torch.bfloat16)
    config, whole = ours.config, ours(ids)[:, 3:]
    cache = KVCache(config, 16 * -(-ids.shape[1] // 16))
    ours(ids[:, :3], cache=cache)
    step = decode_step.stepper(ours, cache, rotary_table(0, cache.room, config, "cpu") if config.position == "rope" else None,
                               alibi_slopes(config.n_head, "cpu") if config.position == "alibi" else None, on_device)
    found = torch.stack([step(ids[:, t:t + 1]) for t in range(3, ids.shape[1])], dim=1)
    assert found.dtype == torch.bfloat16
    assert (found - exact[:, 3:]).abs().mean() < 1.3 * (whole - exact[:, 3:]).abs().mean() + 1e-3


@pytest.mark.parametrize("case", ["llama-3", "qwen3", "opt", "opt-350m", "neox", "bloom-6-heads", "gpt2"])
def test_logits_in_bfloat16_are_as_near_to_float32_as_those_of_transformers(case, tmp_path):
    save(case, tmp_path)
    theirs, ids, exact = oracle(case)
    with torch.no_grad():
        ours = load_text_lm(tmp_path, torch.bfloat16)(ids)
        theirs = copy.deepcopy(theirs).bfloat16()(ids).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.3 * (theirs - exact).abs().mean() + 1e-3


def test_loading_widens_to_float32_and_leaves_the_model_in_eval_mode(tmp_path):
    tensors, _ = save("opt", tmp_path)
    rewrite(tmp_path, {name: tensor.half() for name, tensor in tensors.items()})
    model = load_text_lm(tmp_path)
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert load_text_lm(tmp_path, dtype=torch.bfloat16).wte.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- spellings of the weights

def without_prefix(tensors):
    assert any(name.startswith("model.") for name in tensors)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def wrapped(tensors):
    return {f"lm.{name}": tensor for name, tensor in tensors.items()}


def with_inv_freq(tensors):
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.full((4,), 99.0) for layer in range(2)}
    return {**tensors, **extra, "model.rotary_emb.inv_freq": torch.full((4,), 99.0)}


MASK = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()  # the buffers of causal masks that old files carry


def with_masks(tensors):
    gpt2 = any(".attn." in name for name in tensors)
    stem = "transformer.h.{}.attn" if gpt2 else "gpt_neox.layers.{}.attention"
    extra = {stem.format(layer) + name: value.clone() for layer in range(2)
             for name, value in ((".bias", MASK), (".masked_bias", torch.tensor(-1e4)))}
    if not gpt2:
        extra |= {f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq": torch.full((1,), 99.0) for layer in range(2)}
    return {**tensors, **extra}


def without_transformer(tensors):
    assert any(name.startswith("transformer.") for name in tensors)
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_new_head_name(tensors):
    return {name.replace("embed_out.", "lm_head."): tensor for name, tensor in tensors.items()}


def with_tied_copy(tensors):
    table = next(tensor for name, tensor in tensors.items()
                 if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight")))
    assert "lm_head.weight" not in tensors
    return {**tensors, "lm_head.weight": table.clone()}


def compiled(tensors):
    return {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


def compiled_by_block_and_distributed(tensors):
    return {f"module.{name.replace('.layers.1.', '.layers.1._orig_mod.')}": tensor for name, tensor in tensors.items()}


def in_a_trainer(tensors):
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def with_the_head_alone(tensors):
    """Of two names of one matrix, save_model of safetensors keeps one."""
    tensors = with_tied_copy(tensors)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(("embed_tokens.weight", "wte.weight"))}


@pytest.mark.parametrize("case, change", [
    ("llama-gqa", compiled), ("llama", in_a_trainer), ("gpt2", in_a_trainer), ("opt", in_a_trainer),
    ("neox", compiled_by_block_and_distributed), ("opt", compiled_by_block_and_distributed),
    ("llama-tied", with_the_head_alone), ("opt-350m", with_the_head_alone), ("gpt2", with_the_head_alone),
    ("opt-350m", without_prefix), ("opt", without_prefix), ("llama", without_prefix), ("llama-gqa", wrapped),
    ("opt-350m", wrapped), ("llama", with_inv_freq), ("llama-tied", with_inv_freq), ("llama-tied", with_tied_copy),
    ("opt", with_tied_copy), ("gpt2", with_masks), ("gpt2", lambda tensors: without_transformer(with_masks(tensors))),
    ("gpt2", with_tied_copy), ("neox", with_masks), ("neox-no-bias", with_masks), ("neox", with_new_head_name), ("neox", wrapped),
    ("bloom", without_transformer), ("bloom", with_tied_copy), ("bloom-6-heads", wrapped), ("qwen2", with_inv_freq),
    ("qwen3-tied", wrapped), ("opt-350m", lambda tensors: without_prefix(with_tied_copy(tensors)))],
    ids=lambda value: getattr(value, "__name__", value).strip("<>"))
def test_every_spelling_of_the_names_gives_the_same_logits(case, change, tmp_path):
    tensors, _ = save(case, tmp_path)
    rewrite(tmp_path, change(tensors))
    assert_same_logits(case, tmp_path)


@pytest.mark.parametrize("case", ["llama", "opt-untied", "neox", "gpt2", "bloom", "qwen2", "qwen3", "mistral"])
def test_a_head_that_is_said_to_be_tied_and_is_another_matrix_is_refused(case, tmp_path):
    """transformers 4 ties them, 5 does not: neither can be meant by all who wrote such a file."""
    tensors, settings = save(case, tmp_path)
    head, table = "embed_out.weight" if case == "neox" else "lm_head.weight", oracle(case)[0].get_input_embeddings().weight
    rewrite(tmp_path, {**tensors, head: 2 * table.detach()}, {**settings, "tie_word_embeddings": True})
    with pytest.raises(ValueError, match=f"tie_word_embeddings, but {head} is another matrix.* set tie_word_embeddings to false"):
        load_text_lm(tmp_path)
    rewrite(tmp_path, settings={**settings, "tie_word_embeddings": False})
    load_text_lm(tmp_path)


def test_names_of_wrappers_are_taken_off_shards_too(tmp_path, capsys):
    tensors, _ = save("llama-gqa", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shards = {}
    for i, (name, tensor) in enumerate(compiled(tensors).items()):
        shards.setdefault(f"part-{i % 2}.safetensors", {})[name] = tensor
    for file, part in shards.items():
        save_file(part, tmp_path / file)
    files.write_json(tmp_path / "model.safetensors.index.json",
                     {"weight_map": {name: file for file, part in shards.items() for name in part}})
    assert_same_logits("llama-gqa", tmp_path)
    assert "_orig_mod." in capsys.readouterr().err


@pytest.mark.parametrize("case", ["llama", "llama-3", "neox-rotary", "opt-350m", "bloom", "gpt2", "qwen3", "mistral-window"])
def test_a_value_of_any_kind_in_any_place_is_understood_or_named_by_its_key(case, tmp_path):
    _, settings = save(case, tmp_path)
    places = [(settings, key) for key in settings]
    places += [(settings["rope_parameters"], key) for key in settings.get("rope_parameters") or ()]
    refused = set()
    for table, key in places:
        kept = table[key]
        for value in ("1e-5", "text", [1], [], {"a": 1}, True, 10**400, float("nan"), 1.5, -3):
            table[key] = value
            rewrite(tmp_path, settings=settings)
            try:
                load_lm_config(tmp_path)
            except ValueError as error:
                ours = "rope_fraction" if key == "partial_rotary_factor" and value in (1.5, -3) else key  # model.py's range
                assert (key in str(error) or ours in str(error)) and "\n" not in str(error), (key, value, error)
                refused.add(key)
        table[key] = kept
    assert refused >= {"model_type", "vocab_size"} and len(refused) >= 8


def test_quantised_and_nested_models_are_named(tmp_path):
    _, settings = save("llama", tmp_path)
    for key in ("quantization_config", "quantization", "compression_config"):  # transformers', MLX's, compressed-tensors'
        rewrite(tmp_path, settings={**settings, key: {"quant_method": "gptq", "bits": 4}})
        with pytest.raises(ValueError, match="holds quantised weights, as its config.json says; give"):
            load_text_lm(tmp_path)
    rewrite(tmp_path, settings={"model_type": "llava", "text_config": settings})
    with pytest.raises(ValueError, match="'llava' is not supported.* give the text model alone"):
        load_text_lm(tmp_path)
    for value in ([], 3, {"a": 1}, True):
        rewrite(tmp_path, settings={**settings, "model_type": value})
        with pytest.raises(ValueError, match="model_type is .*, expected a text"):
            load_text_lm(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", BOTH)
def test_weights_stored_in_half_precision_give_the_logits_of_the_rounded_model(case, dtype, tmp_path):
    tensors, settings = save(case, tmp_path)
    rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    rewrite(tmp_path, rounded, {**settings, "dtype": dtype})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    _, ids, unrounded = oracle(case)
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(load_text_lm(tmp_path)(ids), expected, rtol=1e-5, atol=1e-5)
    assert (expected - unrounded).abs().max() > 1e-4  # the rounding is visible


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-torch-1.6"])
@pytest.mark.parametrize("case", BOTH)
def test_a_bin_file_loads_like_safetensors(case, legacy, tmp_path):
    tensors, _ = save(case, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert_same_logits(case, tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("case", BOTH)
def test_shards_with_an_index_load_like_one_file(case, kind, tmp_path):
    tensors, _ = save(case, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names, weight_map, stem = sorted(tensors), {}, {"safetensors": "model", "bin": "pytorch_model"}[kind]
    for i in range(3):
        shard = {name: tensors[name] for name in names[i::3]}  # a layer's tensors lie in several shards
        file = f"{stem}-{i + 1:05d}-of-00003.{kind}"
        (save_file if kind == "safetensors" else torch.save)(shard, tmp_path / file)
        weight_map.update(dict.fromkeys(shard, file))
    (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_logits(case, tmp_path)


def test_shards_written_by_transformers_load_too(tmp_path):
    oracle("llama-gqa")[0].save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits("llama-gqa", tmp_path)


# ---------------------------------------------------------------------------------------------- spellings of the config

def test_the_old_spelling_of_rope_theta_and_absent_defaults_are_understood(tmp_path):
    _, settings = save("llama-theta", tmp_path)
    assert settings.pop("rope_parameters")["rope_theta"] == 100.0
    for key in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        settings.pop(key, None)  # files of 2023 hold none of them
    rewrite(tmp_path, settings={**settings, "rope_theta": 100.0, "rope_scaling": None, "torch_dtype": "float16"})
    assert_same_logits("llama-theta", tmp_path)


def test_the_old_spelling_of_llama_3_rope_scaling_is_understood(tmp_path):
    _, settings = save("llama-3", tmp_path)
    scaling = settings.pop("rope_parameters")
    theta, kind = scaling.pop("rope_theta"), scaling.pop("rope_type")
    for spelling in ("rope_type", "type"):
        rewrite(tmp_path, settings={**settings, "rope_theta": theta, "rope_scaling": {**scaling, spelling: kind}})
        assert_same_logits("llama-3", tmp_path)


def test_the_old_spelling_of_neox_rotary_options_is_understood(tmp_path):
    _, settings = save("neox-rotary", tmp_path)
    del settings["rope_parameters"]
    for key in ("attention_bias", "tie_word_embeddings"):
        settings.pop(key, None)
    rewrite(tmp_path, settings={**settings, "rotary_pct": 0.5, "rotary_emb_base": 100})
    assert_same_logits("neox-rotary", tmp_path)
    _, settings = save("neox", tmp_path)  # and the defaults of a file that says neither
    del settings["rope_parameters"]
    rewrite(tmp_path, settings=settings)
    assert_same_logits("neox", tmp_path)


def test_the_spelling_of_the_official_bloom_configs_is_understood(tmp_path):
    _, settings = save("bloom-6-heads", tmp_path)
    settings |= {"n_embed": settings.pop("hidden_size"), "num_attention_heads": settings.pop("n_head"), "n_inner": None,
                 "num_hidden_layers": settings.pop("n_layer"), "offset_alibi": 100, "masked_softmax_fusion": True}
    settings.pop("seq_length", None)
    rewrite(tmp_path, settings=settings)
    assert_same_logits("bloom-6-heads", tmp_path)


def test_a_sliding_window_is_the_longest_sequence(tmp_path):
    for case in ("mistral-window", "qwen2-window"):
        save(case, tmp_path / case)
        assert load_lm_config(tmp_path / case).block_size == 32
    _, settings = save("qwen2", tmp_path / "qwen2")  # every published Qwen names a window and does not use it
    rewrite(tmp_path / "qwen2", settings={**settings, "use_sliding_window": False, "sliding_window": 8})
    assert load_lm_config(tmp_path / "qwen2").block_size == 64


def test_old_opt_configs_without_the_newer_keys_are_understood(tmp_path):
    _, settings = save("opt", tmp_path)
    for key in ("enable_bias", "layer_norm_elementwise_affine", "_remove_final_layer_norm", "tie_word_embeddings",
                "word_embed_proj_dim", "do_layer_norm_before", "activation_function"):
        settings.pop(key, None)
    rewrite(tmp_path, settings=settings)
    assert_same_logits("opt", tmp_path)


@pytest.mark.parametrize("case, change, words", [
    ("llama", {"model_type": "mamba"}, "'mamba' is not supported"),
    ("llama", {"model_type": None}, "model_type None"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear'"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn'"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, expected 'silu'"),
    ("qwen3", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("mistral", {"attention_bias": True}, "attention_bias = True"),
    ("llama", {"num_hidden_layers": "two"}, "num_hidden_layers is 'two', expected a whole number"),
    ("gpt2", {"n_layer": 0}, "n_layer is 0, expected a whole number from 1 to 1000"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("opt", {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
    ("neox", {"rope_parameters": rope(1e4, partial_rotary_factor=-1)}, "partial_rotary_factor is -1"),
    ("neox", {"rope_parameters": rope(1e4, partial_rotary_factor=2.0)}, "rope_fraction"),
    ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05, expected a number from 0 up"),
    ("llama", {"num_attention_heads": None, "head_dim": None}, "lacks 'num_attention_heads'"),
    ("llama", {"num_key_value_heads": 3}, "3 key heads"),
    ("opt", {"activation_function": "silu"}, "'silu' is not supported, expected one of relu, gelu"),
    ("opt", {"enable_bias": False}, "enable_bias = False"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm = True"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2", {"activation_function": "swish"}, "'swish'"), ("neox", {"hidden_act": "silu"}, "'silu'")])
def test_a_config_that_the_code_would_misread_is_refused(case, change, words, tmp_path):
    _, settings = save(case, tmp_path)
    rewrite(tmp_path, settings={**settings, **change})
    with pytest.raises(ValueError, match=words):
        load_lm_config(tmp_path)  # the architecture alone is refused as well
    with pytest.raises(ValueError, match=words):
        load_text_lm(tmp_path)


@pytest.mark.parametrize("case, key", [("llama", "hidden_size"), ("llama", "intermediate_size"), ("opt", "ffn_dim"),
                                       ("opt", "max_position_embeddings"), ("bloom", "n_head"), ("bloom", "hidden_size"),
                                       ("gpt2", "n_positions"), ("neox", "intermediate_size"), ("qwen3", "num_attention_heads")])
def test_a_config_without_a_needed_key_names_it(case, key, tmp_path):
    _, settings = save(case, tmp_path)
    del settings[key]
    rewrite(tmp_path, settings=settings)
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        load_text_lm(tmp_path)


# ---------------------------------------------------------------------------------------------- weights that do not fit

@pytest.mark.parametrize("case, name", [
    ("llama", "model.norm.weight"), ("llama", "lm_head.weight"), ("llama-gqa", "model.layers.1.self_attn.k_proj.weight"),
    ("llama-biases", "model.layers.0.self_attn.v_proj.bias"), ("opt", "model.decoder.layers.1.fc2.bias"),
    ("neox", "embed_out.weight"), ("neox", "gpt_neox.layers.1.attention.query_key_value.bias"),
    ("bloom", "transformer.word_embeddings_layernorm.bias"), ("gpt2", "transformer.h.0.attn.c_attn.bias"),
    ("qwen2", "model.layers.0.self_attn.q_proj.bias"), ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
    ("opt", "model.decoder.final_layer_norm.weight"), ("opt-350m", "model.decoder.project_out.weight")])
def test_a_missing_tensor_is_named(case, name, tmp_path):
    tensors, _ = save(case, tmp_path)
    del tensors[name]
    rewrite(tmp_path, tensors)
    with pytest.raises(ValueError, match="missing .*" + name.replace(".", r"\.")):
        load_text_lm(tmp_path)


@pytest.mark.parametrize("case, name", [
    ("llama", "model.layers.0.self_attn.q_norm.weight"), ("llama", "model.layers.2.mlp.up_proj.weight"),
    ("llama", "model.layers.0.self_attn.q_proj.bias"), ("opt", "model.decoder.project_in.weight"),
    ("opt-350m", "model.decoder.final_layer_norm.bias"), ("opt", "model.decoder.layers.0.self_attn.rotary_emb.inv_freq"),
    ("qwen2", "model.layers.0.self_attn.o_proj.bias"), ("bloom", "transformer.h.0.attn.bias"),
    ("neox", "gpt_neox.layers.0.attention.q_norm.bias"), ("gpt2", "transformer.h.2.attn.bias.weight")])
def test_an_unexpected_tensor_is_named(case, name, tmp_path):
    tensors, _ = save(case, tmp_path)
    rewrite(tmp_path, {**tensors, name: torch.zeros(3)})
    with pytest.raises(ValueError, match="unexpected .*" + name.replace(".", r"\.")):
        load_text_lm(tmp_path)


@pytest.mark.parametrize("case, key, value", [("llama", "vocab_size", 60), ("llama", "intermediate_size", 41),
                                              ("llama-gqa", "num_key_value_heads", 4), ("opt", "max_position_embeddings", 65),
                                              ("opt", "ffn_dim", 48), ("neox", "hidden_size", 64), ("bloom", "n_head", 5),
                                              ("bloom", "hidden_size", 64), ("gpt2", "n_inner", 40), ("qwen3", "head_dim", 8),
                                              ("llama-gqa", "num_attention_heads", 8), ("neox", "num_attention_heads", 3)])
def test_weights_of_another_shape_than_the_config_promises_are_refused(case, key, value, tmp_path):
    _, settings = save(case, tmp_path)
    rewrite(tmp_path, settings={**settings, key: value})
    with pytest.raises(ValueError, match="shape|size"):
        load_text_lm(tmp_path)


# ---------------------------------------------------------------------------------------------- and back

@pytest.mark.parametrize("case", CASES)
def test_reading_and_writing_gives_their_tensors_and_a_config_that_transformers_opens(case, tmp_path):
    tensors, _ = save(case, tmp_path / "theirs")
    family, options, ours = pretrained.open_lm(tmp_path / "theirs")
    settings, written = pretrained.write_lm(family, options, ours)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        unread = 2 if name.endswith("embed_positions.weight") else 0  # rows that no position uses
        assert written[name].shape == tensor.shape and torch.equal(written[name][unread:], tensor[unread:]), name
    files.write_model(tmp_path / "ours", settings, written)
    assert pretrained.lm_architecture(files.read_json(tmp_path / "ours" / "config.json")) == (family, options)
    model, ids, expected = oracle(case)
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True,
                                                                      attn_implementation="eager")
    assert type(again) is type(model) and not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- training arithmetic

@pytest.mark.parametrize("case", ["qwen3-tied", "bloom-6-heads", "neox", "opt-350m"])
def test_the_loss_and_every_gradient_equal_those_of_transformers(case, tmp_path):
    tensors, _ = save(case, tmp_path)
    theirs, ids, _ = oracle(case)
    model = load_text_lm(tmp_path).train()
    theirs.zero_grad()
    expected = theirs(ids, labels=ids).loss
    expected.backward()
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    family, options = pretrained.lm_architecture(files.read_json(tmp_path / "config.json"))
    _, found = pretrained.write_lm(family, options, gradients)
    names = dict(theirs.named_parameters())
    largest = max(parameter.grad.abs().max().item() for parameter in names.values())
    assert len(found) >= 20
    for name, gradient in found.items():
        wanted = names[{"embed_out.weight": "lm_head.weight"}.get(name, name)].grad
        skipped = 2 if name.endswith("embed_positions.weight") else 0
        # the gradient of a bias of the keys is zero but for rounding, since it adds the same to every score of a row
        scale = max(wanted.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(gradient[skipped:], wanted[skipped:], rtol=1e-4, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("case", ["llama-gqa", "opt", "neox", "gpt2", "qwen3", "qwen2", "bloom"])
def test_bfloat16_differs_from_float32_no_more_than_theirs_does(case, tmp_path):
    save(case, tmp_path)
    _, ids, exact = oracle(case)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    with torch.no_grad():
        ours = (load_text_lm(tmp_path, dtype=torch.bfloat16)(ids).float() - exact).square().mean().sqrt()
        peers = (theirs(ids).logits.float() - exact).square().mean().sqrt()
    assert 1e-4 < ours < 1.25 * peers, (ours, peers)


# ---------------------------------------------------------------------------------------------- memory

def test_tensors_are_read_when_asked_for_and_shards_one_at_a_time(tmp_path, monkeypatch):
    tensors, settings = save("opt", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"shard{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    read, original = [], files.open_safetensors
    monkeypatch.setattr(files, "open_safetensors", lambda path: read.append(path) or original(path))
    opened = files.open_tensors(tmp_path)
    assert len(read) == 2  # the names, of each shard once
    assert sorted(opened) == names and len(opened) == len(names)
    (tmp_path / "shard1.safetensors").unlink()
    assert names[1] in opened and "another" not in opened
    assert torch.equal(opened[names[0]], tensors[names[0]])  # in shard 0
    with pytest.raises(FileNotFoundError, match="shard1.safetensors"):
        opened[names[1]]
    with pytest.raises(FileNotFoundError, match="shard1.safetensors"):
        load_text_lm(tmp_path)


def test_a_loaded_model_owns_its_memory(tmp_path):
    save("llama-tied", tmp_path)
    model = load_text_lm(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "model.safetensors").write_bytes(b"overwritten in place")  # a mapped file would change, or crash, the model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
