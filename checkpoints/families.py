"""The families of text LMs, and HuBERT, as tables: what their files call what model.py and speech/hubert.py compute.

    Family = how config.json spells the options + one Row (theirs, ours) a tensor

A row holds templates; {} is the layer number. Its layout says how their tensors form ours: q, k and v stored apart are
stacked, because we multiply them at once; q, k and v interleaved head by head are sorted; the matrices of GPT-2 are
transposed. The same row writes it back. A new family is a new table; pretrained.py holds the machinery that reads them.

Sources: the config.json and tensor names of the Hugging Face releases of OPT, GPT-2, GPT-NeoX, BLOOM, LLaMA, Mistral, Qwen
and HuBERT; fairseq's HuBERT checkpoints.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

# ---------------------------------------------------------------------------------------------- rows and layouts


@dataclass(frozen=True)
class Layout:
    read: Callable  # ([their tensor, ...], options of the model) -> our tensor
    write: Callable  # (our tensor, options) -> [their tensor, ...]


def sort_heads(parts, options):
    """Rows in the order head, (q, k, v), dimension -> rows of all q heads, then all k, then all v."""
    x = parts[0]
    return x.view(options["n_head"], 3, options["head_dim"], *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def interleave_heads(x, options):
    return [x.view(3, options["n_head"], options["head_dim"], *x.shape[1:]).transpose(0, 1).reshape(x.shape)]


def split_qkv(x, options):
    return x.split([options["head_dim"] * n for n in (options["n_head"], options["n_kv_head"], options["n_kv_head"])])


PLAIN = Layout(lambda parts, options: parts[0], lambda x, options: [x])
STACKED = Layout(lambda parts, options: torch.cat(parts), split_qkv)
PER_HEAD = Layout(sort_heads, interleave_heads)
TRANSPOSED = Layout(lambda parts, options: parts[0].t(), lambda x, options: [x.t().contiguous()])  # a bias stays as it is
# OPT's positions begin at row 2; transformers wants the two rows before to exist, and never reads them.
FROM_ROW_2 = Layout(lambda parts, options: parts[0][2:], lambda x, options: [torch.cat([x.new_zeros(2, x.shape[1]), x])])


def always(options):
    return True


@dataclass(frozen=True)
class Row:
    theirs: tuple[str, ...]
    ours: str
    layout: Layout = PLAIN
    when: Callable = always  # does a model with these options have this tensor?


def having(field):
    """The condition that an option is set."""
    return lambda options: options[field]


def linear(theirs, ours, bias=always, when=always, layout=PLAIN):
    """The weight row and the bias row of a linear or norm layer."""
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return (Row(tuple(f"{name}.weight" for name in theirs), f"{ours}.weight", layout, when),
            Row(tuple(f"{name}.bias" for name in theirs), f"{ours}.bias", layout,
                lambda options: when(options) and bias(options)))


def scale(theirs, ours, when=always):
    """The weight of a norm without bias."""
    return Row((f"{theirs}.weight",), f"{ours}.weight", when=when)


def head(theirs="lm_head.weight"):
    return Row((theirs,), "lm_head.weight", when=lambda options: not options["tie_embeddings"])


@dataclass(frozen=True)
class Family:
    architecture: str  # the transformers class that opens our exports
    read_config: Callable  # their config -> keyword arguments of TransformerConfig
    write_config: Callable  # TransformerConfig fields -> their config
    rows: tuple[Row, ...]
    prefix: str  # what a full name starts with; older files leave it out
    head: str = "lm_head.weight"  # the one name outside the prefix
    dropped: str = r"(?!)"  # regular expression of the tensors that carry no information: causal masks, rotary tables


# theirs -> ours; the tanh approximation has three spellings
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh")}


def activation(c, key, default):
    name = c.get(key) or default
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: {key} {name!r} is not supported, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def write_activation(mlp):
    return {"gelu_tanh": "gelu_new"}.get(mlp, mlp)


def demand(c, **values):
    """Raises ValueError where a key that would change the network has another value than the one we compute."""
    for key, value in values.items():
        if c.get(key, value) not in (value, None):
            raise ValueError(f"config.json: {key} = {c[key]!r} is not supported, expected {value!r}")


def square(width, heads):
    """n_embd, n_head, n_kv_head and head_dim of a family whose heads divide the width among them."""
    return dict(n_embd=width, n_head=heads, n_kv_head=heads, head_dim=width // heads)


# ---------------------------------------------------------------------------------------------- LLaMA and its kin

def read_rope(c):
    """Rotary options in the spelling of transformers 5 (rope_parameters) or of older files."""
    new = c.get("rope_parameters") or {}
    scaling = new or c.get("rope_scaling") or {}
    kind, stretch = scaling.get("rope_type", scaling.get("type", "default")), None
    if kind == "llama3":
        stretch = tuple(scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor",
                                                 "original_max_position_embeddings"))
    elif kind != "default":
        raise ValueError(f"config.json: rope scaling of type {kind!r} is not supported, expected 'default' or 'llama3'")
    theta = new.get("rope_theta") or c.get("rope_theta") or c.get("rotary_emb_base") or 10000.0
    return dict(position="rope", rope_theta=float(theta), rope_scaling=stretch)


def write_rope(o):
    if o["rope_scaling"] is None:
        return {"rope_theta": o["rope_theta"]}
    factor, low, high, original = o["rope_scaling"]
    return {"rope_theta": o["rope_theta"],
            "rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                             "original_max_position_embeddings": original}}


def read_llama_config(c, bias=None, out_bias=None, qk_norm=False, head_dim=None, window=None):
    """bias, out_bias: what the family fixes, None: config's attention_bias; head_dim: the family's default, None: C / H."""
    demand(c, hidden_act="silu")
    heads, bias = c["num_attention_heads"], c.get("attention_bias", False) if bias is None else bias
    positions = c.get("max_position_embeddings", 2048)
    return dict(
        # up to the length of a sliding window, attention is plain causal attention: the model is opened for that length
        vocab_size=c["vocab_size"], block_size=min(positions, window) if window else positions,
        n_layer=c["num_hidden_layers"], n_head=heads, n_kv_head=c.get("num_key_value_heads") or heads,
        n_embd=c["hidden_size"], head_dim=c.get("head_dim") or head_dim or c["hidden_size"] // heads,
        n_inner=c["intermediate_size"], norm="rmsnorm", norm_eps=c.get("rms_norm_eps", 1e-6), **read_rope(c), mlp="swiglu",
        attention_bias=bias, out_bias=bias if out_bias is None else out_bias, mlp_bias=c.get("mlp_bias", False), qk_norm=qk_norm,
        tie_embeddings=c.get("tie_word_embeddings", False), init_std=c.get("initializer_range", 0.02))


def write_llama_config(o):
    return {"vocab_size": o["vocab_size"], "max_position_embeddings": o["block_size"], "num_hidden_layers": o["n_layer"],
            "num_attention_heads": o["n_head"], "num_key_value_heads": o["n_kv_head"], "hidden_size": o["n_embd"],
            "head_dim": o["head_dim"], "intermediate_size": o["n_inner"], "rms_norm_eps": o["norm_eps"], **write_rope(o),
            "hidden_act": "silu", "attention_bias": o["attention_bias"], "mlp_bias": o["mlp_bias"],
            "tie_word_embeddings": o["tie_embeddings"], "initializer_range": o["init_std"]}


def read_mistral_config(c):
    demand(c, attention_bias=False, mlp_bias=False)
    return read_llama_config(c, window=c.get("sliding_window", 4096))


def qwen_window(c):
    return c.get("sliding_window", 4096) if c.get("use_sliding_window", False) else None


LLAMA_ROWS = (
    Row(("model.embed_tokens.weight",), "wte.weight"),
    scale("model.layers.{}.input_layernorm", "h.{}.ln_1"),
    *linear(tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"), "h.{}.attn.qkv", having("attention_bias"),
            layout=STACKED),
    scale("model.layers.{}.self_attn.q_norm", "h.{}.attn.q_norm", having("qk_norm")),
    scale("model.layers.{}.self_attn.k_norm", "h.{}.attn.k_norm", having("qk_norm")),
    *linear("model.layers.{}.self_attn.o_proj", "h.{}.attn.out", having("out_bias")),
    scale("model.layers.{}.post_attention_layernorm", "h.{}.ln_2"),
    *(row for name in ("gate", "up", "down")
      for row in linear(f"model.layers.{{}}.mlp.{name}_proj", f"h.{{}}.mlp.{name}", having("mlp_bias"))),
    scale("model.norm", "ln_f"),
    head())


def llama_like(architecture, read_config, extra=None):
    """A family of LLaMA's tensors; extra: what its config.json says besides."""
    return Family(architecture, read_config, lambda o: {**write_llama_config(o), **(extra or {})}, LLAMA_ROWS, "model.",
                  dropped=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


# ---------------------------------------------------------------------------------------------- OPT

def read_opt_config(c):
    demand(c, enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
    return dict(
        vocab_size=c["vocab_size"], block_size=c["max_position_embeddings"], n_layer=c["num_hidden_layers"],
        **square(c["hidden_size"], c["num_attention_heads"]), n_inner=c["ffn_dim"], norm="layernorm", norm_eps=1e-5,
        norm_order="pre" if c.get("do_layer_norm_before", True) else "post", position="learned",
        mlp=activation(c, "activation_function", "relu"), attention_bias=True, mlp_bias=True,
        tie_embeddings=c.get("tie_word_embeddings", True), embed_dim=c.get("word_embed_proj_dim") or c["hidden_size"],
        init_std=c.get("init_std", 0.02))


def write_opt_config(o):
    return {"vocab_size": o["vocab_size"], "max_position_embeddings": o["block_size"], "num_hidden_layers": o["n_layer"],
            "num_attention_heads": o["n_head"], "hidden_size": o["n_embd"], "ffn_dim": o["n_inner"],
            "word_embed_proj_dim": o["embed_dim"], "do_layer_norm_before": o["norm_order"] == "pre",
            "activation_function": write_activation(o["mlp"]), "tie_word_embeddings": o["tie_embeddings"],
            "init_std": o["init_std"], "dropout": 0.0}


def projected(options):
    return options["embed_dim"] != options["n_embd"]


OPT = Family("OPTForCausalLM", read_opt_config, write_opt_config, prefix="model.", rows=(
    Row(("model.decoder.embed_tokens.weight",), "wte.weight"),
    Row(("model.decoder.embed_positions.weight",), "wpe.weight", FROM_ROW_2),
    Row(("model.decoder.project_in.weight",), "project_in.weight", when=projected),
    *linear("model.decoder.layers.{}.self_attn_layer_norm", "h.{}.ln_1"),
    *linear(tuple(f"model.decoder.layers.{{}}.self_attn.{x}_proj" for x in "qkv"), "h.{}.attn.qkv", layout=STACKED),
    *linear("model.decoder.layers.{}.self_attn.out_proj", "h.{}.attn.out"),
    *linear("model.decoder.layers.{}.final_layer_norm", "h.{}.ln_2"),
    *linear("model.decoder.layers.{}.fc1", "h.{}.mlp.up"),
    *linear("model.decoder.layers.{}.fc2", "h.{}.mlp.down"),
    # the post-norm 350M has no norm after the last layer
    *linear("model.decoder.final_layer_norm", "ln_f", when=lambda options: options["norm_order"] == "pre"),
    Row(("model.decoder.project_out.weight",), "project_out.weight", when=projected),
    head()))

# ---------------------------------------------------------------------------------------------- GPT-2


def read_gpt2_config(c):
    demand(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return dict(
        vocab_size=c["vocab_size"], block_size=c["n_positions"], n_layer=c["n_layer"], **square(c["n_embd"], c["n_head"]),
        n_inner=c.get("n_inner") or 4 * c["n_embd"], norm="layernorm", norm_eps=c.get("layer_norm_epsilon", 1e-5),
        position="learned", mlp=activation(c, "activation_function", "gelu_new"), attention_bias=True, mlp_bias=True,
        tie_embeddings=c.get("tie_word_embeddings", True), init_std=c.get("initializer_range", 0.02))


def write_gpt2_config(o):
    return {"vocab_size": o["vocab_size"], "n_positions": o["block_size"], "n_layer": o["n_layer"], "n_head": o["n_head"],
            "n_embd": o["n_embd"], "n_inner": o["n_inner"], "layer_norm_epsilon": o["norm_eps"],
            "activation_function": write_activation(o["mlp"]), "tie_word_embeddings": o["tie_embeddings"],
            "initializer_range": o["init_std"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


GPT2 = Family("GPT2LMHeadModel", read_gpt2_config, write_gpt2_config, prefix="transformer.",
              dropped=r"transformer\.h\.\d+\.attn\.(masked_)?bias", rows=(
    Row(("transformer.wte.weight",), "wte.weight"),
    Row(("transformer.wpe.weight",), "wpe.weight"),
    *linear("transformer.h.{}.ln_1", "h.{}.ln_1"),
    *linear("transformer.h.{}.attn.c_attn", "h.{}.attn.qkv", layout=TRANSPOSED),
    *linear("transformer.h.{}.attn.c_proj", "h.{}.attn.out", layout=TRANSPOSED),
    *linear("transformer.h.{}.ln_2", "h.{}.ln_2"),
    *linear("transformer.h.{}.mlp.c_fc", "h.{}.mlp.up", layout=TRANSPOSED),
    *linear("transformer.h.{}.mlp.c_proj", "h.{}.mlp.down", layout=TRANSPOSED),
    *linear("transformer.ln_f", "ln_f"),
    head()))

# ---------------------------------------------------------------------------------------------- GPT-NeoX and Pythia


def read_neox_config(c):
    rope = read_rope(c)
    fraction = (c.get("rope_parameters") or {}).get("partial_rotary_factor", c.get("rotary_pct", 0.25))
    return dict(
        vocab_size=c["vocab_size"], block_size=c["max_position_embeddings"], n_layer=c["num_hidden_layers"],
        **square(c["hidden_size"], c["num_attention_heads"]), n_inner=c["intermediate_size"], norm="layernorm",
        norm_eps=c.get("layer_norm_eps", 1e-5), parallel_residual=c.get("use_parallel_residual", True), **rope,
        rope_fraction=fraction, mlp=activation(c, "hidden_act", "gelu"), attention_bias=c.get("attention_bias", True),
        mlp_bias=True, tie_embeddings=c.get("tie_word_embeddings", False), init_std=c.get("initializer_range", 0.02))


def write_neox_config(o):
    return {"vocab_size": o["vocab_size"], "max_position_embeddings": o["block_size"], "num_hidden_layers": o["n_layer"],
            "num_attention_heads": o["n_head"], "hidden_size": o["n_embd"], "intermediate_size": o["n_inner"],
            "layer_norm_eps": o["norm_eps"], "use_parallel_residual": o["parallel_residual"], **write_rope(o),
            "rotary_pct": o["rope_fraction"], "rotary_emb_base": o["rope_theta"], "hidden_act": write_activation(o["mlp"]),
            "attention_bias": o["attention_bias"], "tie_word_embeddings": o["tie_embeddings"],
            "initializer_range": o["init_std"]}


NEOX = Family("GPTNeoXForCausalLM", read_neox_config, write_neox_config, prefix="gpt_neox.", head="embed_out.weight",
              dropped=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", rows=(
    Row(("gpt_neox.embed_in.weight",), "wte.weight"),
    *linear("gpt_neox.layers.{}.input_layernorm", "h.{}.ln_1"),
    *linear("gpt_neox.layers.{}.attention.query_key_value", "h.{}.attn.qkv", having("attention_bias"), layout=PER_HEAD),
    *linear("gpt_neox.layers.{}.attention.dense", "h.{}.attn.out", having("attention_bias")),
    *linear("gpt_neox.layers.{}.post_attention_layernorm", "h.{}.ln_2"),
    *linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "h.{}.mlp.up"),
    *linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "h.{}.mlp.down"),
    *linear("gpt_neox.final_layer_norm", "ln_f"),
    head("embed_out.weight")))

# ---------------------------------------------------------------------------------------------- BLOOM


def either(c, *keys):
    """The value of the key that this file uses; the official files and later re-saves spell some differently."""
    for key in keys:
        if key in c:
            return c[key]
    raise KeyError(keys[0])


def read_bloom_config(c):
    demand(c, apply_residual_connection_post_layernorm=False)
    width = either(c, "hidden_size", "n_embed")
    return dict(
        # ALiBi has no longest sequence; seq_length is the one that the model was trained on
        vocab_size=c["vocab_size"], block_size=c.get("seq_length") or 2048, n_layer=either(c, "n_layer", "num_hidden_layers"),
        **square(width, either(c, "n_head", "num_attention_heads")), n_inner=4 * width, norm="layernorm",
        norm_eps=c.get("layer_norm_epsilon", 1e-5), position="alibi", mlp="gelu_tanh", attention_bias=True, mlp_bias=True,
        embed_norm=True, tie_embeddings=c.get("tie_word_embeddings", True), init_std=c.get("initializer_range", 0.02))


def write_bloom_config(o):
    return {"vocab_size": o["vocab_size"], "seq_length": o["block_size"], "n_layer": o["n_layer"], "n_head": o["n_head"],
            "hidden_size": o["n_embd"], "layer_norm_epsilon": o["norm_eps"], "tie_word_embeddings": o["tie_embeddings"],
            "initializer_range": o["init_std"], "hidden_dropout": 0.0, "attention_dropout": 0.0}


BLOOM = Family("BloomForCausalLM", read_bloom_config, write_bloom_config, prefix="transformer.", rows=(
    Row(("transformer.word_embeddings.weight",), "wte.weight"),
    *linear("transformer.word_embeddings_layernorm", "ln_embed"),
    *linear("transformer.h.{}.input_layernorm", "h.{}.ln_1"),
    *linear("transformer.h.{}.self_attention.query_key_value", "h.{}.attn.qkv", layout=PER_HEAD),
    *linear("transformer.h.{}.self_attention.dense", "h.{}.attn.out"),
    *linear("transformer.h.{}.post_attention_layernorm", "h.{}.ln_2"),
    *linear("transformer.h.{}.mlp.dense_h_to_4h", "h.{}.mlp.up"),
    *linear("transformer.h.{}.mlp.dense_4h_to_h", "h.{}.mlp.down"),
    *linear("transformer.ln_f", "ln_f"),
    head()))

# model_type in config.json -> family
FAMILIES = {
    "opt": OPT, "gpt2": GPT2, "gpt_neox": NEOX, "bloom": BLOOM,
    "llama": llama_like("LlamaForCausalLM", read_llama_config),
    "mistral": llama_like("MistralForCausalLM", read_mistral_config, {"sliding_window": None}),
    "qwen2": llama_like("Qwen2ForCausalLM", lambda c: read_llama_config(c, bias=True, out_bias=False, window=qwen_window(c)),
                        {"use_sliding_window": False}),
    "qwen3": llama_like("Qwen3ForCausalLM", lambda c: read_llama_config(c, qk_norm=True, head_dim=128, window=qwen_window(c)),
                        {"use_sliding_window": False}),
}

# ---------------------------------------------------------------------------------------------- HuBERT

HUBERT_CONFIG = {  # theirs -> ours, where the value is the same
    "conv_dim": "conv_dim", "conv_kernel": "conv_kernel", "conv_stride": "conv_stride", "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "intermediate_size": "n_inner",
    "num_conv_pos_embeddings": "pos_kernel", "num_conv_pos_embedding_groups": "pos_groups",
    "conv_pos_batch_norm": "pos_batch_norm", "layer_norm_eps": "norm_eps"}
HUBERT_FIXED = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False,
                "feat_proj_layer_norm": True, "feat_extract_activation": "gelu", "hidden_act": "gelu"}
POS_CONV = "encoder.pos_conv_embed.conv"
# A convolution's weight (out, channels, taps) <-> (out, taps, channels), which is the matrix that multiplies patches.
TAPS_FIRST = Layout(lambda parts, options: parts[0].transpose(1, 2), lambda x, options: [x.transpose(1, 2).contiguous()])
THIRDS = Layout(lambda parts, options: torch.cat(parts), lambda x, options: x.chunk(3))  # q, k and v are multiplied at once
batch_norm = having("pos_batch_norm")

HUBERT_ROWS = (
    Row(("masked_spec_embed",), "mask_embedding"),
    Row(("feature_extractor.conv_layers.{}.conv.weight",), "convs.{}.weight", layout=TAPS_FIRST),
    *linear("feature_extractor.conv_layers.0.layer_norm", "group_norm"),
    *linear("feature_projection.layer_norm", "feature_norm"),
    *linear("feature_projection.projection", "projection"),
    *linear("encoder.pos_conv_embed.batch_norm", "pos_norm", when=batch_norm),
    Row(("encoder.pos_conv_embed.batch_norm.running_mean",), "pos_norm.running_mean", when=batch_norm),
    Row(("encoder.pos_conv_embed.batch_norm.running_var",), "pos_norm.running_var", when=batch_norm),
    Row(("encoder.pos_conv_embed.batch_norm.num_batches_tracked",), "pos_norm.num_batches_tracked", when=batch_norm),
    *linear(POS_CONV, "pos_conv"),
    *linear("encoder.layer_norm", "ln_in"),
    *linear(tuple(f"encoder.layers.{{}}.attention.{x}_proj" for x in "qkv"), "layers.{}.qkv", layout=THIRDS),
    *(row for part, name in (("attention.out_proj", "out"), ("layer_norm", "ln_1"), ("feed_forward.intermediate_dense", "up"),
                             ("feed_forward.output_dense", "down"), ("final_layer_norm", "ln_2"))
      for row in linear(f"encoder.layers.{{}}.{part}", f"layers.{{}}.{name}")))

FAIRSEQ_NAMES = (  # beginning of a fairseq name, as a regular expression -> of the Hugging Face name
    (r"mask_emb$", "masked_spec_embed"),
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"feature_extractor\.conv_layers\.0\.2\.", "feature_extractor.conv_layers.0.layer_norm."),
    (r"layer_norm\.", "feature_projection.layer_norm."),
    (r"post_extract_proj\.", "feature_projection.projection."),
    (r"encoder\.pos_conv\.0\.", f"{POS_CONV}."),
    (r"encoder\.layers\.(\d+)\.self_attn\.", r"encoder.layers.\1.attention."),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"encoder.layers.\1.layer_norm."),
    (r"encoder\.layers\.(\d+)\.fc1\.", r"encoder.layers.\1.feed_forward.intermediate_dense."),
    (r"encoder\.layers\.(\d+)\.fc2\.", r"encoder.layers.\1.feed_forward.output_dense."))
FAIRSEQ_BATCH_NORM = (  # with a BatchNorm in front, the positional convolution is the second module
    (r"encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.batch_norm."), (r"encoder\.pos_conv\.1\.", f"{POS_CONV}."))
FAIRSEQ_DROPPED = r"(final_proj|target_glu)\..*|label_embs_concat"  # the prediction head of pretraining
