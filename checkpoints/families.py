"""The families of text LMs, and HuBERT, as tables: what their files call what model.py and speech/hubert.py compute.

    Family = keys of config.json, theirs -> ours + one Row (theirs, ours) a tensor

A row holds templates; {} is the layer number. Its layout says how their tensors form ours: q, k and v stored apart are
stacked, because we multiply them at once; q, k and v interleaved head by head are sorted; the matrices of GPT-2 are
transposed. The same key and the same row write it back. A new family is a new table; pretrained.py holds the machinery that
reads them. `architecture` is everywhere a dictionary of keyword arguments: of TransformerConfig, or of HubertConfig.

Sources: the config.json and tensor names of the Hugging Face releases of OPT, GPT-2, GPT-NeoX (Pythia), BLOOM, LLaMA, Mistral,
Qwen and HuBERT; fairseq's HuBERT checkpoints.
"""
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from checkpoints.recognise import check_values


@dataclass(frozen=True)
class Layout:
    read: Callable  # ([their tensor, ...], architecture) -> our tensor
    write: Callable  # (our tensor, architecture) -> [their tensor, ...]


def sort_heads(parts, architecture):
    """Rows in the order head, (q, k, v), dimension -> rows of all q heads, then all k, then all v."""
    x = parts[0]
    return x.view(architecture["n_head"], 3, architecture["head_dim"], *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def interleave_heads(x, architecture):
    return [x.view(3, architecture["n_head"], architecture["head_dim"], *x.shape[1:]).transpose(0, 1).reshape(x.shape)]


def split_qkv(x, architecture):
    return x.split([architecture["head_dim"] * architecture[n] for n in ("n_head", "n_kv_head", "n_kv_head")])


PLAIN = Layout(lambda parts, _: parts[0], lambda x, _: [x])
STACKED = Layout(lambda parts, _: torch.cat(parts), split_qkv)
PER_HEAD = Layout(sort_heads, interleave_heads)
TRANSPOSED = Layout(lambda parts, _: parts[0].t(), lambda x, _: [x.t().contiguous()])  # a bias stays as it is
# OPT's positions begin at row 2; transformers wants the two rows before to exist, and never reads them.
FROM_ROW_2 = Layout(lambda parts, _: parts[0][2:], lambda x, _: [torch.cat([x.new_zeros(2, x.shape[1]), x])])


def always(architecture):
    return True


@dataclass(frozen=True)
class Row:
    theirs: tuple[str, ...]
    ours: str
    layout: Layout = PLAIN
    when: Callable = always  # does a model of this architecture have this tensor?


def having(name):
    """The condition that a field of the architecture is set."""
    return lambda architecture: architecture[name]


def linear(theirs, ours, bias=always, when=always, layout=PLAIN):
    """The weight row and the bias row of a linear or norm layer."""
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return (Row(tuple(f"{name}.weight" for name in theirs), f"{ours}.weight", layout, when),
            Row(tuple(f"{name}.bias" for name in theirs), f"{ours}.bias", layout,
                lambda architecture: when(architecture) and bias(architecture)))


def head(theirs="lm_head.weight"):
    return Row((theirs,), "lm_head.weight", when=lambda architecture: not architecture["tie_embeddings"])


@dataclass(frozen=True)
class Family:
    class_name: str  # the transformers class that opens our exports
    keys: dict  # key of config.json -> field of TransformerConfig, in the order in which an export has them
    fixed: dict  # fields that are the same in all models of the family, whatever a key says
    rows: tuple[Row, ...]
    prefix: str  # what a full name starts with; older files leave it out
    defaults: dict = field(default_factory=dict)  # of keys that may be absent or null; all others must be there
    demanded: dict = field(default_factory=dict)  # keys that would change the network: the one value that we compute
    aliases: dict = field(default_factory=dict)  # other spelling of a key -> the key
    derive: Callable = lambda c: {}  # their config -> fields that no single key gives
    extra: dict = field(default_factory=dict)  # what an export says besides
    head: str = "lm_head.weight"  # the one name outside the prefix
    dropped: str = r"(?!)"  # regular expression of the tensors that carry no information: causal masks, rotary tables


# fields of TransformerConfig -> the kind of value that a key of theirs must have; of all others: true or false
KINDS = {**dict.fromkeys(("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "embed_dim", "head_dim",
                          "n_inner"), int),
         **dict.fromkeys(("norm_eps", "rope_theta", "rope_fraction", "init_std"), float), "mlp": str, "rope_scaling": dict}
OTHER_KINDS = {"sliding_window": int, "use_sliding_window": bool, "rope_parameters": dict, "rope_type": str, "type": str,
               "original_max_position_embeddings": int, **dict.fromkeys(
                   ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"), float)}
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # the order of our tuple
# theirs -> ours; the tanh approximation has three spellings
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh")}


def read_activation(key, name):
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: {key} {name!r} is not supported, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


# fields whose value is another here: how it is read from a key, and written
READ = {"mlp": read_activation, "norm_order": lambda key, before: "pre" if before else "post"}
WRITE = {"mlp": lambda mlp: {"gelu_tanh": "gelu_new", "swiglu": "silu"}.get(mlp, mlp), "norm_order": lambda order: order == "pre",
         "rope_scaling": lambda scaling: scaling and {"rope_type": "llama3", **dict(zip(ROPE_SCALING, scaling))}}


def read_rope(c):
    """Rotary fields, in the spelling of transformers 5 (rope_parameters) or of older files."""
    new = c.get("rope_parameters") or {}
    scaling = new or c.get("rope_scaling") or {}
    check_values(scaling, OTHER_KINDS, "config.json, rotary settings")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: rope scaling of type {kind!r} as rope_type is not supported, expected default or llama3")
    theta = new.get("rope_theta") or c.get("rope_theta") or c.get("rotary_emb_base") or 10000.0
    return {"rope_theta": float(theta),
            "rope_scaling": tuple(scaling[key] for key in ROPE_SCALING) if kind == "llama3" else None}


def derive_llama(c):
    """Up to the length of a sliding window, attention is plain: the model is opened for that length."""
    windowed = c.get("use_sliding_window", c["model_type"] == "mistral")  # Qwen's key; LLaMA has no window
    positions = c.get("max_position_embeddings") or 2048
    window = c.get("sliding_window", 4096) if windowed else None
    return {**read_rope(c), "block_size": min(positions, window or positions)}


LLAMA_ROWS = (
    Row(("model.embed_tokens.weight",), "wte.weight"),
    Row(("model.layers.{}.input_layernorm.weight",), "h.{}.ln_1.weight"),
    *linear(tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"), "h.{}.attn.qkv", having("attention_bias"),
            layout=STACKED),
    Row(("model.layers.{}.self_attn.q_norm.weight",), "h.{}.attn.q_norm.weight", when=having("qk_norm")),
    Row(("model.layers.{}.self_attn.k_norm.weight",), "h.{}.attn.k_norm.weight", when=having("qk_norm")),
    *linear("model.layers.{}.self_attn.o_proj", "h.{}.attn.out", having("out_bias")),
    Row(("model.layers.{}.post_attention_layernorm.weight",), "h.{}.ln_2.weight"),
    *(row for name in ("gate", "up", "down")
      for row in linear(f"model.layers.{{}}.mlp.{name}_proj", f"h.{{}}.mlp.{name}", having("mlp_bias"))),
    Row(("model.norm.weight",), "ln_f.weight"),
    head())
LLAMA = Family(
    "LlamaForCausalLM", prefix="model.", rows=LLAMA_ROWS, derive=derive_llama,
    dropped=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    keys={"vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
          "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head", "hidden_size": "n_embd", "head_dim": "head_dim",
          "intermediate_size": "n_inner", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta", "rope_scaling": "rope_scaling",
          "hidden_act": "mlp", "attention_bias": "attention_bias", "mlp_bias": "mlp_bias",
          "tie_word_embeddings": "tie_embeddings", "initializer_range": "init_std"},
    fixed=dict(norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=False), demanded=dict(hidden_act="silu"),
    defaults=dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, attention_bias=False, mlp_bias=False,
                  tie_word_embeddings=False, initializer_range=0.02))
MISTRAL = replace(LLAMA, class_name="MistralForCausalLM", extra={"sliding_window": None},
                  demanded=LLAMA.demanded | dict(attention_bias=False, mlp_bias=False))
QWEN2 = replace(LLAMA, class_name="Qwen2ForCausalLM", extra={"use_sliding_window": False},
                fixed=LLAMA.fixed | dict(attention_bias=True, out_bias=False))
QWEN3 = replace(LLAMA, class_name="Qwen3ForCausalLM", extra={"use_sliding_window": False},
                fixed=LLAMA.fixed | dict(qk_norm=True), defaults=LLAMA.defaults | dict(head_dim=128))


def projected(architecture):
    return architecture["embed_dim"] != architecture["n_embd"]


OPT = Family(
    "OPTForCausalLM", prefix="model.",
    keys={"vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
          "num_attention_heads": "n_head", "hidden_size": "n_embd", "ffn_dim": "n_inner", "word_embed_proj_dim": "embed_dim",
          "do_layer_norm_before": "norm_order", "activation_function": "mlp", "tie_word_embeddings": "tie_embeddings",
          "init_std": "init_std"},
    fixed=dict(norm="layernorm", norm_eps=1e-5, position="learned", attention_bias=True, mlp_bias=True),
    demanded=dict(enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False),
    defaults=dict(word_embed_proj_dim=None, do_layer_norm_before=True, activation_function="relu", tie_word_embeddings=True,
                  init_std=0.02),
    extra={"dropout": 0.0}, rows=(
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
    *linear("model.decoder.final_layer_norm", "ln_f", when=lambda architecture: architecture["norm_order"] == "pre"),
    Row(("model.decoder.project_out.weight",), "project_out.weight", when=projected),
    head()))

GPT2 = Family(
    "GPT2LMHeadModel", prefix="transformer.", dropped=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
    keys={"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
          "n_inner": "n_inner", "layer_norm_epsilon": "norm_eps", "activation_function": "mlp",
          "tie_word_embeddings": "tie_embeddings", "initializer_range": "init_std"},
    fixed=dict(norm="layernorm", position="learned", attention_bias=True, mlp_bias=True),
    demanded=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
    defaults=dict(n_inner=None, layer_norm_epsilon=1e-5, activation_function="gelu_new", tie_word_embeddings=True,
                  initializer_range=0.02),
    extra={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, rows=(
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


def derive_neox(c):
    rope, fraction = read_rope(c), (c.get("rope_parameters") or {}).get("partial_rotary_factor", c.get("rotary_pct"))
    return {**rope, "rope_fraction": 0.25 if fraction is None else fraction}


NEOX = Family(
    "GPTNeoXForCausalLM", prefix="gpt_neox.", head="embed_out.weight", derive=derive_neox,
    dropped=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    keys={"vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
          "num_attention_heads": "n_head", "hidden_size": "n_embd", "intermediate_size": "n_inner", "layer_norm_eps": "norm_eps",
          "use_parallel_residual": "parallel_residual", "rope_theta": "rope_theta", "rope_scaling": "rope_scaling",
          "rotary_pct": "rope_fraction", "rotary_emb_base": "rope_theta", "hidden_act": "mlp", "attention_bias": "attention_bias",
          "tie_word_embeddings": "tie_embeddings", "initializer_range": "init_std"},
    fixed=dict(norm="layernorm", position="rope", mlp_bias=True),
    defaults=dict(layer_norm_eps=1e-5, use_parallel_residual=True, hidden_act="gelu", attention_bias=True,
                  tie_word_embeddings=False, initializer_range=0.02), rows=(
    Row(("gpt_neox.embed_in.weight",), "wte.weight"),
    *linear("gpt_neox.layers.{}.input_layernorm", "h.{}.ln_1"),
    *linear("gpt_neox.layers.{}.attention.query_key_value", "h.{}.attn.qkv", having("attention_bias"), layout=PER_HEAD),
    *linear("gpt_neox.layers.{}.attention.dense", "h.{}.attn.out", having("attention_bias")),
    *linear("gpt_neox.layers.{}.post_attention_layernorm", "h.{}.ln_2"),
    *linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "h.{}.mlp.up"),
    *linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "h.{}.mlp.down"),
    *linear("gpt_neox.final_layer_norm", "ln_f"),
    head("embed_out.weight")))

BLOOM = Family(
    "BloomForCausalLM", prefix="transformer.",
    keys={"vocab_size": "vocab_size", "seq_length": "block_size", "n_layer": "n_layer", "n_head": "n_head",
          "hidden_size": "n_embd", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_embeddings",
          "initializer_range": "init_std"},
    aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    fixed=dict(norm="layernorm", position="alibi", mlp="gelu_tanh", attention_bias=True, mlp_bias=True, embed_norm=True),
    demanded=dict(apply_residual_connection_post_layernorm=False),
    # ALiBi has no longest sequence; seq_length is the one that the model was trained on
    defaults=dict(seq_length=2048, layer_norm_epsilon=1e-5, tie_word_embeddings=True, initializer_range=0.02),
    extra={"hidden_dropout": 0.0, "attention_dropout": 0.0}, rows=(
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
FAMILIES = {"opt": OPT, "gpt2": GPT2, "gpt_neox": NEOX, "bloom": BLOOM, "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2,
            "qwen3": QWEN3}

HUBERT_CONFIG = {  # theirs -> ours, where the value is the same
    "conv_dim": "conv_dim", "conv_kernel": "conv_kernel", "conv_stride": "conv_stride", "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "intermediate_size": "n_inner",
    "num_conv_pos_embeddings": "pos_kernel", "num_conv_pos_embedding_groups": "pos_groups",
    "conv_pos_batch_norm": "pos_batch_norm", "layer_norm_eps": "norm_eps"}
HUBERT_KINDS = {key: list if ours.startswith("conv_") else {"pos_batch_norm": bool, "norm_eps": float}.get(ours, int)
                for key, ours in HUBERT_CONFIG.items()}
HUBERT_FIXED = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False,
                "feat_proj_layer_norm": True, "feat_extract_activation": "gelu", "hidden_act": "gelu"}
FAIRSEQ_FIXED = {"extractor_mode": "default", "layer_norm_first": False, "conv_bias": False, "sample_rate": 16_000}
POS_CONV = "encoder.pos_conv_embed.conv"
# A convolution's weight (out, channels, taps) <-> (out, taps, channels), which is the matrix that multiplies patches.
TAPS_FIRST = Layout(lambda parts, _: parts[0].transpose(1, 2), lambda x, _: [x.transpose(1, 2).contiguous()])
THIRDS = Layout(lambda parts, _: torch.cat(parts), lambda x, _: x.chunk(3))  # q, k and v are multiplied at once
HUBERT_ROWS = (
    Row(("masked_spec_embed",), "mask_embedding"),
    Row(("feature_extractor.conv_layers.{}.conv.weight",), "convs.{}.weight", layout=TAPS_FIRST),
    *linear("feature_extractor.conv_layers.0.layer_norm", "group_norm"),
    *linear("feature_projection.layer_norm", "feature_norm"),
    *linear("feature_projection.projection", "projection"),
    *linear("encoder.pos_conv_embed.batch_norm", "pos_norm", when=having("pos_batch_norm")),
    *(Row((f"encoder.pos_conv_embed.batch_norm.{name}",), f"pos_norm.{name}", when=having("pos_batch_norm"))
      for name in ("running_mean", "running_var", "num_batches_tracked")),
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
# heads: of pretraining, of recognition (CTC), of classification
HUBERT_DROPPED = r"(final_proj|target_glu|lm_head|projector|classifier)\..*|label_embs_concat|layer_weights"
HEADS_OF_WIDTH = {768: 12, 1024: 16}  # HuBERT base and large, for files that do not say it
