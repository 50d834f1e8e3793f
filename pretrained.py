"""Foreign names <-> ours, as tables, in both directions. A family is data, not code.

    folder --checkpoint.read_tensors--> {their name: tensor} --rows of the family's table--> {our name: tensor}

A row (theirs, ours) holds templates; {} is the layer number. Several foreign tensors may form one of ours (q, k and v
are stored apart but multiplied at once): they are stacked along the first axis, and split again on the way out.
Every foreign tensor is consumed by a row or listed as dropped on purpose; anything else is an error that names it.

Sources: the config.json and tensor names that the Hugging Face releases of OPT, LLaMA and HuBERT use.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint


@dataclass(frozen=True)
class Row:
    theirs: tuple[str, ...]  # templates; more than one are stacked along axis 0
    ours: str
    skip: int = 0  # first rows of their tensor that are not ours (OPT's positions begin at row 2)
    when: Callable = lambda options: True  # does a model with these options have this tensor?


def linear(theirs, ours, bias=lambda options: True, when=lambda options: True):
    """The weight row and the bias row of a linear or norm layer."""
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return (Row(tuple(f"{name}.weight" for name in theirs), f"{ours}.weight", when=when),
            Row(tuple(f"{name}.bias" for name in theirs), f"{ours}.bias",
                when=lambda options: when(options) and bias(options)))


@dataclass(frozen=True)
class Family:
    architecture: str  # the transformers class that opens our exports
    read_config: Callable  # their config -> keyword arguments of TransformerConfig
    write_config: Callable  # TransformerConfig fields -> their config
    rows: tuple[Row, ...]
    prefix: str  # what a full name starts with; older files leave it out
    dropped: tuple[str, ...] = ()  # regular expressions of tensors that carry no information


# ---------------------------------------------------------------------------------------------- LLaMA

def read_llama_config(c):
    rope = c.get("rope_parameters") or {}
    scaling = c.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: rope scaling of type {kind!r} is not supported; only the default rotary embedding is")
    if c.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {c['hidden_act']!r} is not supported for LLaMA, expected 'silu'")
    return dict(
        vocab_size=c["vocab_size"], block_size=c.get("max_position_embeddings", 2048), n_layer=c["num_hidden_layers"],
        n_head=c["num_attention_heads"], n_kv_head=c.get("num_key_value_heads") or c["num_attention_heads"],
        n_embd=c["hidden_size"], head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        n_inner=c["intermediate_size"], norm="rmsnorm", norm_eps=c.get("rms_norm_eps", 1e-6), position="rope",
        rope_theta=float(rope.get("rope_theta", c.get("rope_theta", 10000.0))), mlp="swiglu",
        attention_bias=c.get("attention_bias", False), mlp_bias=c.get("mlp_bias", False),
        tie_embeddings=c.get("tie_word_embeddings", False), init_std=c.get("initializer_range", 0.02))


def write_llama_config(o):
    return {"vocab_size": o["vocab_size"], "max_position_embeddings": o["block_size"], "num_hidden_layers": o["n_layer"],
            "num_attention_heads": o["n_head"], "num_key_value_heads": o["n_kv_head"], "hidden_size": o["n_embd"],
            "head_dim": o["head_dim"], "intermediate_size": o["n_inner"], "rms_norm_eps": o["norm_eps"],
            "rope_theta": o["rope_theta"], "hidden_act": "silu", "attention_bias": o["attention_bias"],
            "mlp_bias": o["mlp_bias"], "tie_word_embeddings": o["tie_embeddings"], "initializer_range": o["init_std"]}


def attention_bias(options):
    return options["attention_bias"]


def mlp_bias(options):
    return options["mlp_bias"]


def no_bias(options):
    return False


LLAMA = Family(
    architecture="LlamaForCausalLM", read_config=read_llama_config, write_config=write_llama_config, prefix="model.",
    rows=(
        Row(("model.embed_tokens.weight",), "wte.weight"),
        *linear("model.layers.{}.input_layernorm", "h.{}.ln_1", bias=no_bias),
        *linear(tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"), "h.{}.attn.qkv", bias=attention_bias),
        *linear("model.layers.{}.self_attn.o_proj", "h.{}.attn.out", bias=attention_bias),
        *linear("model.layers.{}.post_attention_layernorm", "h.{}.ln_2", bias=no_bias),
        *linear("model.layers.{}.mlp.gate_proj", "h.{}.mlp.gate", bias=mlp_bias),
        *linear("model.layers.{}.mlp.up_proj", "h.{}.mlp.up", bias=mlp_bias),
        *linear("model.layers.{}.mlp.down_proj", "h.{}.mlp.down", bias=mlp_bias),
        *linear("model.norm", "ln_f", bias=no_bias),
        Row(("lm_head.weight",), "lm_head.weight", when=lambda o: not o["tie_embeddings"])),
    dropped=(r".*\.rotary_emb\.inv_freq",))


# ---------------------------------------------------------------------------------------------- OPT

def read_opt_config(c):
    if not (c.get("enable_bias", True) and c.get("layer_norm_elementwise_affine", True)) \
            or c.get("_remove_final_layer_norm", False):
        raise ValueError("config.json: this OPT variant (no bias, or no affine or final layer norm) is not supported")
    return dict(
        vocab_size=c["vocab_size"], block_size=c["max_position_embeddings"], n_layer=c["num_hidden_layers"],
        n_head=c["num_attention_heads"], n_kv_head=c["num_attention_heads"], n_embd=c["hidden_size"],
        head_dim=c["hidden_size"] // c["num_attention_heads"], n_inner=c["ffn_dim"], norm="layernorm", norm_eps=1e-5,
        norm_order="pre" if c.get("do_layer_norm_before", True) else "post", position="learned",
        mlp=c.get("activation_function", "relu"), attention_bias=True, mlp_bias=True,
        tie_embeddings=c.get("tie_word_embeddings", True), embed_dim=c.get("word_embed_proj_dim") or c["hidden_size"],
        init_std=c.get("init_std", 0.02))


def write_opt_config(o):
    return {"vocab_size": o["vocab_size"], "max_position_embeddings": o["block_size"], "num_hidden_layers": o["n_layer"],
            "num_attention_heads": o["n_head"], "hidden_size": o["n_embd"], "ffn_dim": o["n_inner"],
            "word_embed_proj_dim": o["embed_dim"], "do_layer_norm_before": o["norm_order"] == "pre",
            "activation_function": o["mlp"], "tie_word_embeddings": o["tie_embeddings"], "init_std": o["init_std"],
            "dropout": 0.0}


def projected(options):
    return options["embed_dim"] != options["n_embd"]


OPT = Family(
    architecture="OPTForCausalLM", read_config=read_opt_config, write_config=write_opt_config, prefix="model.",
    rows=(
        Row(("model.decoder.embed_tokens.weight",), "wte.weight"),
        Row(("model.decoder.embed_positions.weight",), "wpe.weight", skip=2),
        Row(("model.decoder.project_in.weight",), "project_in.weight", when=projected),
        Row(("model.decoder.project_out.weight",), "project_out.weight", when=projected),
        *linear("model.decoder.layers.{}.self_attn_layer_norm", "h.{}.ln_1"),
        *linear(tuple(f"model.decoder.layers.{{}}.self_attn.{x}_proj" for x in "qkv"), "h.{}.attn.qkv"),
        *linear("model.decoder.layers.{}.self_attn.out_proj", "h.{}.attn.out"),
        *linear("model.decoder.layers.{}.final_layer_norm", "h.{}.ln_2"),
        *linear("model.decoder.layers.{}.fc1", "h.{}.mlp.up"),
        *linear("model.decoder.layers.{}.fc2", "h.{}.mlp.down"),
        # the post-norm 350M has no norm after the last layer
        *linear("model.decoder.final_layer_norm", "ln_f", when=lambda o: o["norm_order"] == "pre"),
        Row(("lm_head.weight",), "lm_head.weight", when=lambda o: not o["tie_embeddings"])))

FAMILIES = {"llama": LLAMA, "opt": OPT}  # model_type in config.json -> family


# ---------------------------------------------------------------------------------------------- text LMs, both directions

def read_lm(folder):
    """Returns (family name, keyword arguments of TransformerConfig, {our name: tensor}, their config.json)."""
    settings = checkpoint.read_json(Path(folder) / "config.json")
    family, options = lm_options(settings, folder)
    tensors = ours(checkpoint.read_tensors(folder), FAMILIES[family], options, options["n_layer"], folder)
    return family, options, tensors, settings


def lm_options(settings, where="config.json"):
    """config.json of a text LM -> (family name, keyword arguments of TransformerConfig)."""
    family = settings.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{where}: model_type {family!r} is not supported; known are {', '.join(FAMILIES)}")
    try:
        return family, FAMILIES[family].read_config(settings)
    except KeyError as error:
        raise ValueError(f"{where}: config.json lacks {error} which a {family} model needs") from None


def write_lm(family, options, tensors):
    """The reverse of read_lm: (their config.json, {their name: tensor})."""
    settings = {"architectures": [FAMILIES[family].architecture], "model_type": family,
                **FAMILIES[family].write_config(options)}
    return settings, theirs(tensors, FAMILIES[family].rows, options, options["n_layer"], sizes_of_qkv(options))


def sizes_of_qkv(options):
    """Rows of q, k and v in the stacked weight."""
    return [options["head_dim"] * n for n in (options["n_head"], options["n_kv_head"], options["n_kv_head"])]


def ours(tensors, family, options, n_layer, where):
    """{their name: tensor} -> {our name: tensor}; every tensor is consumed or dropped on purpose."""
    left = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(?:lm\.)", "", name)
        if not name.startswith((family.prefix, "lm_head.")):
            name = family.prefix + name  # files of the older kind leave the prefix out
        left[name] = tensor
    result, missing = {}, []
    for row, layer in expand(family.rows, options, n_layer):
        parts = [left.pop(template.format(layer), None) for template in row.theirs]
        if any(part is None for part in parts):
            missing += [template.format(layer) for template, part in zip(row.theirs, parts) if part is None]
            continue
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        result[row.ours.format(layer)] = value[row.skip:] if row.skip else value
    if options.get("tie_embeddings"):
        left.pop("lm_head.weight", None)  # a second copy of the embedding table; config.json says they are one
    left = [name for name in left if not any(re.fullmatch(pattern, name) for pattern in family.dropped)]
    if missing or left:
        raise ValueError(f"{where}: the weights do not fit config.json; missing {missing[:3] or 'none'}"
                         f"{' ...' if len(missing) > 3 else ''}, unexpected {left[:3] or 'none'}"
                         f"{' ...' if len(left) > 3 else ''}")
    return result


def check_shapes(expected, tensors, where):
    """Raises ValueError where a weight differs in shape from `expected`, the state_dict of the network of config.json."""
    for name, tensor in expected.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            raise ValueError(f"{where}: config.json promises {name} of shape {tuple(tensor.shape)}, but the weights hold "
                             f"{tuple(tensors[name].shape)}; they belong to different models")


def theirs(tensors, rows, options, n_layer, sizes):
    """{our name: tensor} -> {their name: tensor}."""
    left, result = dict(tensors), {}
    for row, layer in expand(rows, options, n_layer):
        value = left.pop(row.ours.format(layer))
        if row.skip:  # rows that transformers wants to exist but never reads
            value = torch.cat([value.new_zeros(row.skip, *value.shape[1:]), value])
        parts = [value] if len(row.theirs) == 1 else value.split(sizes)
        result.update({template.format(layer): part for template, part in zip(row.theirs, parts)})
    assert not left, f"tensors without a row in the family's table: {sorted(left)[:3]}"
    return result


def expand(rows, options, n_layer):
    """Every (row, layer) of a model with these options; layer is None for rows outside the stack."""
    for row in rows:
        if row.when(options):
            for layer in range(n_layer) if "{}" in row.ours else (None,):
                yield row, layer


# ---------------------------------------------------------------------------------------------- HuBERT

HUBERT_CONFIG = {  # theirs -> ours, where the value is the same
    "conv_dim": "conv_dim", "conv_kernel": "conv_kernel", "conv_stride": "conv_stride", "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "intermediate_size": "n_inner",
    "num_conv_pos_embeddings": "pos_kernel", "num_conv_pos_embedding_groups": "pos_groups",
    "conv_pos_batch_norm": "pos_batch_norm", "layer_norm_eps": "norm_eps"}
HUBERT_FIXED = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False,
                "feat_proj_layer_norm": True, "feat_extract_activation": "gelu", "hidden_act": "gelu"}


def batch_norm(options):
    return options["pos_batch_norm"]


HUBERT = Family(
    architecture="HubertModel", read_config=None, write_config=None, prefix="",
    rows=(
        Row(("masked_spec_embed",), "mask_embedding"),
        Row(("feature_extractor.conv_layers.{}.conv.weight",), "convs.{}.weight"),
        *linear("feature_extractor.conv_layers.0.layer_norm", "group_norm"),
        *linear("feature_projection.layer_norm", "feature_norm"),
        *linear("feature_projection.projection", "projection"),
        *linear("encoder.pos_conv_embed.batch_norm", "pos_norm", when=batch_norm),
        Row(("encoder.pos_conv_embed.batch_norm.running_mean",), "pos_norm.running_mean", when=batch_norm),
        Row(("encoder.pos_conv_embed.batch_norm.running_var",), "pos_norm.running_var", when=batch_norm),
        Row(("encoder.pos_conv_embed.batch_norm.num_batches_tracked",), "pos_norm.num_batches_tracked", when=batch_norm),
        *linear("encoder.pos_conv_embed.conv", "pos_conv"),
        *linear("encoder.layer_norm", "ln_in"),
        *(row for part, name in (("attention.q_proj", "q"), ("attention.k_proj", "k"), ("attention.v_proj", "v"),
                                 ("attention.out_proj", "out"), ("layer_norm", "ln_1"),
                                 ("feed_forward.intermediate_dense", "up"), ("feed_forward.output_dense", "down"),
                                 ("final_layer_norm", "ln_2"))
          for row in linear(f"encoder.layers.{{}}.{part}", f"layers.{{}}.{name}"))))


def expand_hubert(options):
    """As expand(), with as many convolutions as the front end has."""
    for row in HUBERT.rows:
        if row.when(options):
            count = len(options["conv_dim"]) if row.ours.startswith("convs.") else options["n_layer"]
            for layer in range(count) if "{}" in row.ours else (None,):
                yield row, layer


def read_hubert(folder):
    """A Hugging Face HuBERT folder -> (keyword arguments of HubertConfig, {our name: tensor})."""
    settings = checkpoint.read_json(Path(folder) / "config.json")
    if settings.get("model_type") != "hubert":
        raise ValueError(f"{folder}: model_type is {settings.get('model_type')!r}, expected 'hubert'")
    for key, value in HUBERT_FIXED.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{folder}: {key} = {settings[key]!r} is not supported, expected {value!r} (HuBERT base)")
    settings.setdefault("conv_pos_batch_norm", False)  # a key newer than the first releases
    lacking = [key for key in HUBERT_CONFIG if key not in settings]
    if lacking:
        raise ValueError(f"{folder}: config.json lacks {', '.join(lacking)} which a HuBERT needs")
    options = {ours: settings[key] for key, ours in HUBERT_CONFIG.items()}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    left = {name.removeprefix("hubert."): tensor for name, tensor in checkpoint.read_tensors(folder).items()}
    fold_weight_norm(left, "encoder.pos_conv_embed.conv")
    result, missing = {}, []
    for row, layer in expand_hubert(options):
        name = row.theirs[0].format(layer)
        if name in left:
            result[row.ours.format(layer)] = left.pop(name)
        elif row.ours == "mask_embedding":  # encoding never masks, and stripped files lack it
            result[row.ours] = torch.zeros(options["n_embd"])
        elif row.ours == "pos_norm.num_batches_tracked":
            result[row.ours] = torch.tensor(0)
        else:
            missing.append(name)
    if missing or left:
        raise ValueError(f"{folder}: the weights do not fit config.json; missing {missing[:3] or 'none'}, "
                         f"unexpected {sorted(left)[:3] or 'none'}")
    return options, result


def fold_weight_norm(tensors, name):
    """Replace g and v of a weight-normed positional convolution by w = g v / |v|, norm per tap over both channel axes."""
    for g, v in (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")):
        if f"{name}.{g}" in tensors and f"{name}.{v}" in tensors:  # one alone is reported as unexpected
            g, v = tensors.pop(f"{name}.{g}").float(), tensors.pop(f"{name}.{v}").float()  # (1, 1, taps), (C, C / groups, taps)
            tensors[f"{name}.weight"] = g * v / v.norm(dim=(0, 1), keepdim=True)


def write_hubert(options, tensors):
    """The reverse of read_hubert: (their config.json, {their name: tensor})."""
    settings = {"architectures": ["HubertModel"], "model_type": "hubert", **HUBERT_FIXED,
                **{key: options[ours] for key, ours in HUBERT_CONFIG.items()},
                "num_feat_extract_layers": len(options["conv_dim"]), "vocab_size": 32}
    return settings, {row.theirs[0].format(layer): tensors[row.ours.format(layer)]
                      for row, layer in expand_hubert(options)}
