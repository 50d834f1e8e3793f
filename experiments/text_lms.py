"""Text LMs that differ in one thing from the pocket's: in their family, size or text, or in what was done to them afterwards.

    text "stories":   the factory's, as the pocket's text LM read them (pocket/stories.py)
    text "elsewhere": stories that stories260K tells, a LLaMA which others trained on TinyStories (experiments/real.py)
    text "german":    pocket/german.py; "both": rows of stories and of German ones, half each
                      --bytes--> folder/texts/TEXT/{train,val} --permuted within documents--> folder/texts/TEXT-random/
    shape(family, size) = config.json --train.py --init=cold on one of these--> folder/text_lms/FAMILY-SIZE-TEXT-STEPS/model
    any text LM --layers_permuted--> the same layers in another order, as a folder for --lm

    python -m experiments families

Everything is made once; what was interrupted goes on. Shapes follow each family's published models: OPT (learned positions,
ReLU), BLOOM (ALiBi, a norm after the table), GPT-NeoX (rotary in a quarter of each head, parallel branches, an untied head),
LLaMA (rotary, RMS norms, SwiGLU). Bodies, all but tables and head, are of one size to 5 %. Rates fall with the width, untuned.
"""
from pathlib import Path

import numpy as np
import torch

import config
import twist
from checkpoints import files, pretrained
from corpus.shards import UnitShards, read_meta, write_shards
from experiments.real import released
from model import generate
from pocket import text as pocket_text
from pocket.build import TEXT, TEXT_VAL, run

FAMILIES = ("opt", "bloom", "gpt_neox", "llama")
ORDERS = {"as it is": "", "random": "-random"}  # -> in names of folders
SIZES = {  # -> width, layers, heads, LLaMA's inner width (8/3 of the width; others have 4), init_std, peak learning rate
    "0.8M": (128, 4, 2, 344, 0.06, 3e-3), "3M": (192, 6, 3, 512, 0.05, 2e-3), "10M": (320, 8, 5, 856, 0.04, 1e-3)}
POSITIONS = 256
BUNDLED = 4000  # updates of the pocket's text LM
STORIES = {"train": (TEXT, 60_000), "val": (TEXT_VAL, 400)}  # first seed, stories: those of the pocket's text LM
LANGUAGES = {"stories": "en", "german": "de"}
TEXTS = {"both": ("stories", "german")}  # of several; the last is validated on
ROWS = 256  # stories that are told at once
TOLD = {"train": (0, 32), "val": (1_000_000, 2)}  # first seed, pieces of ROWS stories: some 6 MB
SEED = 0  # of the random order


def shape(family, size):
    """config.json of a byte-level text LM of a family, with the keys that the family's published models have."""
    width, layers, heads, inner, std, _ = SIZES[size]
    common = {"model_type": family, "vocab_size": 258, "hidden_size": width}
    usual = {"num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": POSITIONS}
    return common | {
        "opt": usual | {"ffn_dim": 4 * width, "word_embed_proj_dim": width, "activation_function": "relu",
                        "do_layer_norm_before": True, "tie_word_embeddings": True, "init_std": std},
        "bloom": {"n_layer": layers, "n_head": heads, "seq_length": POSITIONS, "tie_word_embeddings": True,
                  "initializer_range": std},
        "gpt_neox": usual | {"intermediate_size": 4 * width, "rotary_pct": 0.25, "use_parallel_residual": True,
                             "hidden_act": "gelu", "tie_word_embeddings": False, "initializer_range": std},
        "llama": usual | {"intermediate_size": inner, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
                          "initializer_range": std}}[family]


# ------------------------------------------------------------------------------------------------ texts

def read_words(path):
    """The 512 words of stories260K's tokenizer as bytes: its file ends with each of them and a zero byte."""
    content = path.read_bytes()
    words = content[content.find(b"<unk>"):].split(b"\0")[:512]
    if len(words) < 512:
        raise ValueError(f"{path} holds {len(words)} words, expected 512; copy the file again")
    return [bytes([int(word[3:5], 16)]) if word.startswith(b"<0x") else word for word in words]


def tell(lm, words, seed):
    """ROWS stories by stories260K, as bytes, the same for a seed; one that the window cuts ends with its last whole sentence."""
    generator = torch.Generator().manual_seed(seed)
    ids = generate(lm, torch.ones(ROWS, 1, dtype=torch.int64), lm.config.block_size - 1, generator=generator, eos=1)
    for row in ids[:, 1:].tolist():
        ended = next((place for place, i in enumerate(row) if i <= 2), None)  # a special word
        story = b"".join(words[i] for i in row[:ended]).strip()
        yield story if ended is not None else story[:story.rfind(b".") + 1]


def tell_stories(place, part):
    """Pieces of ROWS stories each -> shards in `place`, after those that it holds."""
    words, lm = read_words(released("text_lm", "tok512.bin")), twist.load_text_lm(released("text_lm", "stories260K_hf"))
    first, pieces = TOLD[part]
    done = (read_meta(place) or {"files": 0})["files"] // ROWS
    for piece in config.progress(range(done, pieces), initial=done, total=pieces, desc="telling", unit="piece"):
        told = (np.frombuffer(story, np.uint8).astype(np.int64) for story in tell(lm, words, first + piece))
        write_shards(place, pocket_text.RECIPE, [(f"piece {first + piece}, story {i}", story, np.ones_like(story), 0.0)
                                                 for i, story in enumerate(told)])


def text_shards(folder, text, order, part):
    """Bytes of a text (stories | german | elsewhere) as unit shards below `folder`; returns their place. part: train | val."""
    place = Path(folder, "texts", text + ORDERS[order], part).absolute()
    first, count = STORIES[part] if text in LANGUAGES else (None, TOLD[part][1] * ROWS)
    if (read_meta(place) or {"files": 0})["files"] >= count:
        return place
    if order == "random":
        documents, rng = UnitShards(text_shards(folder, text, "as it is", part)), np.random.default_rng(SEED)
        permuted = ((name, rng.permutation(units), runs, 0.0) for name, units, runs in documents)
        write_shards(place, pocket_text.RECIPE, permuted, overwrite=True)
    elif text in LANGUAGES:
        pocket_text.main([f"--out={place}", f"--count={count}", f"--first-story={first}", f"--language={LANGUAGES[text]}"])
    else:
        tell_stories(place, part)
    return place


# ------------------------------------------------------------------------------------------------ text LMs

def text_lm(folder, family="llama", size="0.8M", text="stories", steps=BUNDLED, order="as it is"):
    """A text LM after `steps` updates of 4,096 bytes, made once below `folder`; for --lm. LLaMA of 3M is the pocket's again.

    Args: family: of FAMILIES; size: of SIZES; text: stories | german | both | elsewhere; order: of ORDERS.
    """
    out = Path(folder, "text_lms", f"{family}-{size}-{text}{ORDERS[order]}-{steps}").absolute()
    if not (out / "model/config.json").exists():  # train.py writes it last
        files.write_json(out / "shape/config.json", shape(family, size))
        texts = TEXTS.get(text, (text,))
        data, val_data = ([text_shards(folder, each, order, part) for each in texts] for part in ("train", "val"))
        run("train.py", "--init=cold", f"--lm={out / 'shape'}", f"--data={','.join(map(str, data))}",
            *[f"--data-weights={','.join('1' * len(data))}"] * (len(data) > 1), f"--val-data={val_data[-1]}", f"--out={out}",
            "--auto-resume", f"--steps={steps}", "--tokens-per-step=4096", f"--block-size={POSITIONS}",
            f"--peak-lr={SIZES[size][-1]}", f"--warmup={min(100, steps // 10)}", "--eval-interval=250", "--save-interval=250",
            "--keep=1", "--log-interval=10", "--no-report")
    return out / "model"


def layers_permuted(lm, out, seed):
    """A text LM, folder or name, with its layers in another order, none in its own place, written to `out`, which is returned."""
    out = Path(out)
    if (out / "config.json").exists():  # written whole, or not at all
        return out
    family, architecture, tensors = pretrained.open_lm(files.find_model(str(lm), "lm"))
    layers, rng = np.arange(architecture["n_layer"]), np.random.default_rng(seed)
    if len(layers) < 2:
        raise ValueError(f"{lm} has one layer, which cannot change places; give a text LM of at least two")
    order = layers
    while (order == layers).any():
        order = rng.permutation(layers)
    source = {f"h.{to}.": f"h.{of}." for to, of in enumerate(order.tolist())}
    moved = {name: tensors[name.replace(prefix, source[prefix], 1)] if (prefix := ".".join(name.split(".")[:2]) + ".") in source
             else tensors[name] for name in tensors}
    settings, stored = pretrained.write_lm(family, architecture, moved)
    dtype = str(next(iter(stored.values())).dtype).removeprefix("torch.")
    files.write_model(out, settings | {"torch_dtype": dtype}, stored)
    return out
