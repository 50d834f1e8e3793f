"""Peak memory of opening a sharded checkpoint, ours and others.

    python -m bench opening                # a model of 2 GiB in float32
    python -m bench opening --gib=0.5      # a smaller one; needs as much free disk in the folder for temporary files

A LLaMA-shaped model of random weights is written in several shards; each way of opening it runs in a fresh process, and its
figure is the highest resident memory during the opening, less what the process held before, over the size of the model in
float32. Pages of mapped files count: they are memory while they are mapped.
"""
import functools
import importlib.util
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

import config
import twist
from bench.memory import in_own_process, resident
from checkpoints import files, pretrained
from model import Transformer, TransformerConfig


def open_all_at_once(folder):
    """The plain way, as a yardstick: every tensor read and converted, then copied into a model that was built before."""
    family, options = pretrained.lm_architecture(pretrained.read_settings(folder))
    model = Transformer(TransformerConfig(**options, family=family))
    held = {name: tensor.float() for name, tensor in files.read_tensors(folder).items()}
    model.load_state_dict(dict(pretrained.translate(held, pretrained.FAMILIES[family], options, folder)))
    return model


def open_with_transformers(folder):
    import transformers  # a peer, installed with the test packages; imported here because the rest runs without it
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


OPENERS = {"ours": twist.load_text_lm, "ours, in bfloat16": functools.partial(twist.load_text_lm, dtype=torch.bfloat16),
           "all at once": open_all_at_once, "transformers": open_with_transformers}


def measure_opening(how, folder):
    """In a process of its own: (peak bytes above what was held before, parameters)."""
    if how == "transformers":
        import transformers  # noqa: F401  its own imports are not part of the opening
    before = resident("VmRSS")
    model = OPENERS[how](folder)
    return resident("VmHWM") - before, sum(parameter.numel() for parameter in model.parameters())


def write_large_model(folder, options, dtype, kind):
    """A LLaMA-shaped checkpoint of about options.gib in float32, in shards; returns its number of parameters."""
    shape = dict(vocab_size=32_000, n_head=12, n_kv_head=12, n_embd=1536, head_dim=128, n_inner=4096, norm="rmsnorm",
                 position="rope", mlp="swiglu", attention_bias=False, mlp_bias=False, tie_embeddings=False, family="llama")
    layer = 4 * 1536**2 + 3 * 1536 * 4096
    layers = max(1, round((options.gib * 2**30 / 4 - 2 * 32_000 * 1536) / layer))
    model = Transformer(TransformerConfig(**shape, n_layer=layers)).to(dtype)
    fields = asdict(model.config)
    settings, tensors = pretrained.write_lm(fields.pop("family"), fields, model.state_dict())
    total = sum(tensor.nbytes for tensor in tensors.values())
    files.write_model(folder, settings, tensors, shard_bytes=total // options.shards + 1)
    if kind == "bin":
        index, renamed = folder / "model.safetensors.index.json", {}
        for name, shard in files.read_json(index)["weight_map"].items():
            renamed[name] = f"pytorch_{Path(shard).stem}.bin"
            if (folder / shard).exists():
                torch.save(files.read_tensors(folder / shard), folder / renamed[name])
                (folder / shard).unlink()
        index.unlink()
        files.write_json(folder / "pytorch_model.bin.index.json",
                         {"metadata": {"total_size": total}, "weight_map": renamed})
    return sum(parameter.numel() for parameter in model.parameters())


def bench_opening(options):
    """Rows of (stored as, opened by, GiB of the model, peak / size)."""
    rows = []
    openers = [how for how in OPENERS if how != "transformers" or importlib.util.find_spec("transformers")]
    stored = (("float32 safetensors", torch.float32, "safetensors"), ("float16 safetensors", torch.float16, "safetensors"),
              ("float16 bin", torch.float16, "bin"), ("float32 bin", torch.float32, "bin"))
    for name, dtype, kind in config.progress(stored, desc="opening"):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder) / "model"
            parameters = write_large_model(folder, options, dtype, kind)
            for how in openers:
                peak, found = in_own_process(measure_opening, how, folder)
                assert found == parameters, f"{how} opened {found} parameters of {parameters}"
                rows.append({"stored": name, "opened_by": how, "gib": round(4 * parameters / 2**30, 3),
                             "peak_over_size": round(peak / (4 * parameters), 3)})
    return rows
