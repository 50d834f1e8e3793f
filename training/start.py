"""Where a run begins: --init's weights, the model laid out over the processes and filled with them, its optimizer.

    text LM's folder --open_start--> (TransformerConfig, UnitVocab, tensors, one at a time)
    TransformerConfig --lay_out--> a model without memory, dealt out over the processes --build, tensors--> (model, optimizer)

Nothing is held twice: a tensor is read or drawn when its turn comes, and each process keeps its own part of it.
"""
import dataclasses

import twist
from corpus.shards import check_recipe
from training import distributed
from training import optimizer as optimizers
from training.step import compute_dtype


def open_start(options, recipe):
    """The start that --init names: (TransformerConfig, UnitVocab, (name, tensor) pairs that are read or drawn one at a time)."""
    vocab = twist.UnitVocab(recipe["num_units"], recipe=recipe)
    if options.init == "cold":
        model_config = dataclasses.replace(twist.load_lm_config(options.lm), vocab_size=vocab.size)
        return model_config, vocab, twist.cold_tensors(model_config, options.seed)
    if options.init in ("twist", "shuffled"):
        lm_config, text = twist.open_text_lm(options.lm)
        start = twist.warm_tensors if options.init == "twist" else twist.shuffled_tensors
        return (dataclasses.replace(lm_config, vocab_size=vocab.size), vocab,
                start(lm_config, text, vocab, options.seed, options.embedding))
    model_config, tensors, vocab = twist.open_speech_lm(options.init)
    if vocab.recipe is not None:
        check_recipe(recipe, vocab.recipe, f"--data={options.data[0]}")
    return model_config, vocab, tensors.items()


def rounded(model, tensors, low):
    """(name, bfloat16 tensor) of float32 ones; this process's part of the bits that are lost goes to low[name]."""
    for name, tensor in tensors:
        high, bits = optimizers.low_bits(tensor.float())
        low[name] = distributed.mine_of(bits, model.get_parameter(name))
        yield name, high


def lay_out(model_config, options, parallel, dist):
    """The model, laid out over the processes, without memory."""
    model = twist.empty(model_config).train()
    for block in model.h:
        block.recompute = options.recompute
    compiled = options.compile == "blocks" or (options.compile == "auto" and dist.device.type == "cuda")
    return distributed.lay_out(model.bfloat16() if options.optimizer == "split" else model, dist, parallel,
                               compute_dtype(options, dist), options.shard_size, options.reshard, compiled)


def build(model, tensors, options, parallel, dist):
    """(model, optimizer), filled with (name, tensor) pairs; tensors None: a state will fill them."""
    model, low = model.to_empty(device=dist.device), {}
    if tensors is not None:
        distributed.fill(model, rounded(model, tensors, low) if options.optimizer == "split" else tensors)
    model = distributed.wrap(model, dist, parallel)
    return model, optimizers.build(model, options, low)
