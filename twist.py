"""THE METHOD: a text language model becomes a speech language model.

    text LM:    text table (V_text, C)  ->  body: L blocks, positions, norms  ->  text head
    speech LM:  unit table (V_unit, C)  ->  the same body, weight for weight  ->  unit head (tied or not, as before)

TWIST (arXiv 2305.13009, section 3): keep the body of a trained text LM, throw its vocabulary away, draw a new table for
the speech units, train on with next-unit prediction on speech alone. A cold start has the same architecture and random
weights. The third start, `shuffled`, keeps every tensor's values but permutes them inside the tensor: what it gains
over cold is the scale of the initialisation, what TWIST gains over it is knowledge.

    python twist.py --lm=facebook/opt-125m --units=500                # prints what is kept, dropped and drawn anew
    python twist.py --lm=pocket --units=100 --out=warm               # and writes the warm-started model
"""
import dataclasses
from dataclasses import dataclass

import torch

import config
from checkpoints import files, pretrained
from checkpoints.fill import fill
from checkpoints.recognise import check_values
from model import Transformer, TransformerConfig

LARGEST_UNIT_VOCAB = 2**15  # rows; a larger table is one of text
EMBEDDINGS = ("fresh", "matched", "truncate")  # how the new table of a warm start is drawn, see warm_tensors
SLAMKIT_PAD = 40  # zeros around each recording that slamkit's models were trained on, samples; their files do not say it
TABLES = ("wte.weight", "lm_head.weight")  # the tensors that have a row for every word, and the head only where it is not tied


@dataclass(frozen=True)
class UnitVocab:
    """Ids of the speech LM: special tokens, and unit u as offset + u. A published checkpoint's file says its own."""

    num_units: int  # K of the tokenizer
    offset: int = 2  # id of unit 0
    bos: int | None = 1  # begins a recording; None: the model knows no such token
    eos: int | None = 1  # ends a recording (the same token: the stream is <S> units <S> units ...)
    pad: int | None = 0
    recipe: dict | None = None  # which tokenizer the units come from, as in the shards' meta.json; slamkit's models: pad alone

    @property
    def size(self):
        """Rows of the embedding table."""
        return max([self.offset + self.num_units] + [token + 1 for token in (self.bos, self.eos, self.pad) if token is not None])

    def encode(self, units, bos=False, eos=False):
        """Units (T,) -> ids (T [+ 1 [+ 1]],) int64."""
        units = torch.as_tensor(units, dtype=torch.int64)
        if units.numel() and not 0 <= int(units.min()) <= int(units.max()) < self.num_units:
            raise ValueError(f"units lie in {int(units.min())} .. {int(units.max())}, this model knows 0 .. "
                             f"{self.num_units - 1}; they come from another tokenizer")
        if (bos and self.bos is None) or (eos and self.eos is None):
            raise ValueError("this model has no bos or no eos token; encode the units without it")
        ids = [units + self.offset]
        if bos:
            ids.insert(0, torch.tensor([self.bos]))
        if eos:
            ids.append(torch.tensor([self.eos]))
        return torch.cat(ids)

    def decode(self, ids):
        """Ids (T,) -> units; special tokens are dropped."""
        units = torch.as_tensor(ids) - self.offset
        return units[(units >= 0) & (units < self.num_units)]

    @property
    def banned(self):
        """Ids that no recording contains: never sampled."""
        used = {self.bos, self.eos, *range(self.offset, self.offset + self.num_units)}
        return tuple(i for i in range(self.size) if i not in used)

    @property
    def dedup(self):
        """Whether the units that the model knows are collapsed runs."""
        return (self.recipe or {}).get("dedup", True)

    @property
    def knows_recipe(self):
        return "kind" in (self.recipe or {})

    def expected(self, recipe):
        """The recipe that units must have which this model is given; a checkpoint without one says only how many there are."""
        pad = (self.recipe or {}).get("pad", recipe.get("pad", 0))
        if not self.knows_recipe and pad != recipe.get("pad", 0):
            files.note(f"these units have {recipe.get('pad', 0)} zeros around each recording, slamkit's models were trained with "
                       f"{pad} (--pad={pad}): many units differ")
        return {**(self.recipe if self.knows_recipe else recipe), "num_units": self.num_units}


# ---------------------------------------------------------------------------------------------- starts

def warm_tensors(lm_config, text, vocab, seed=0, embedding="fresh", shuffled=False):
    """The weights of a warm start, one tensor at a time: yields (name, tensor) in the order of the model's parameters.

    Args:
        text: {name: tensor} of the text LM, best one that reads a tensor when it is asked for (open_text_lm).
        embedding: fresh: the new table ~ N(0, init_std), 0.02 in the published families (the paper re-draws it);
            matched: ~ N(0, std of the text table), which trains on worse in the pocket world (results/README.md);
            truncate: the first rows of the text table, whatever their words (what slamkit's resize does).
        shuffled: permute the values of every body tensor inside it: same scale, no knowledge.
    """
    drawing, shuffling = (torch.Generator().manual_seed(seed + i) for i in range(2))
    for name in empty(lm_config).state_dict():
        tensor = text[name]
        if name in TABLES:
            tensor = new_table(tensor, vocab.size, lm_config, embedding, drawing)
        elif shuffled:
            tensor = tensor.flatten()[torch.randperm(tensor.numel(), generator=shuffling)].view_as(tensor)
        yield name, tensor


def new_table(text_table, rows, lm_config, embedding, generator):
    if embedding == "truncate":
        if rows > len(text_table):
            raise ValueError(f"--embedding=truncate: {rows} rows wanted, the text table has {len(text_table)}; "
                             "use fresh or matched")
        return text_table[:rows].clone()
    if embedding not in EMBEDDINGS:
        raise ValueError(f"--embedding={embedding}: expected one of {', '.join(EMBEDDINGS)}")
    std = lm_config.init_std if embedding == "fresh" else text_table.float().std().item()
    return torch.empty(rows, text_table.shape[1]).normal_(0.0, std, generator=generator)


def cold_tensors(model_config, seed=0):
    """Random weights, one tensor at a time, as warm_tensors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in empty(model_config).named_parameters():
        yield name, model_config.initial(name, torch.empty(parameter.shape), generator)


def open_start(init, lm, recipe, seed=0, embedding="fresh", weights=True):
    """What train.py --init names -> (TransformerConfig, UnitVocab, (name, tensor) pairs, each read or drawn when its turn comes).

    Args:
        init: twist | cold | shuffled, from the text LM `lm` (cold: from its config.json alone); else the folder or name of a
            speech LM to go on with, which brings its own UnitVocab.
        recipe: of the units to train on.
        weights: False: the shape is enough, and a published text LM is not fetched for it.
    """
    if init not in ("twist", "cold", "shuffled"):
        try:
            model_config, tensors, vocab = open_speech_lm(init)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{str(error).replace('--model=', '--init=')}. The starts are twist, cold, shuffled, resume, "
                                    "and the folder or name of a speech LM") from None
        if not vocab.knows_recipe:  # from here on it is a model of these units
            vocab.expected(recipe)
            vocab = dataclasses.replace(vocab, recipe={**recipe, "num_units": vocab.num_units})
        return model_config, vocab, tensors.items()
    vocab = UnitVocab(recipe["num_units"], recipe=recipe)
    if init == "cold" or not weights and pretrained.shipped(lm):
        model_config = dataclasses.replace(load_lm_config(lm), vocab_size=vocab.size)
        return model_config, vocab, cold_tensors(model_config, seed)
    lm_config, text = open_text_lm(lm)
    tensors = warm_tensors(lm_config, text, vocab, seed, embedding, shuffled=init == "shuffled")
    return dataclasses.replace(lm_config, vocab_size=vocab.size), vocab, tensors


# ---------------------------------------------------------------------------------------------- weights -> a model

def empty(model_config):
    """A model of that architecture on the meta device: shapes without numbers, for counting at any size."""
    with torch.device("meta"):
        return Transformer(model_config)


def build(model_config, tensors, dtype=torch.float32, where="the weights", device="cpu"):
    """A model in eval mode, filled with (name, tensor) pairs, each of which is dropped before the next one is read."""
    return fill(empty(model_config).to(dtype).to_empty(device=device), tensors, where).eval()


def warm_start(lm, vocab, seed=0, embedding="fresh", shuffled=False):
    """A speech LM with the body of a text LM; `lm` is left as it was. Arguments as warm_tensors."""
    return build(dataclasses.replace(lm.config, vocab_size=vocab.size),
                 warm_tensors(lm.config, lm.state_dict(), vocab, seed, embedding, shuffled), lm.wte.weight.dtype)


def cold_start(lm_config, vocab, seed=0):
    """A speech LM of the same architecture with random weights."""
    model_config = dataclasses.replace(lm_config, vocab_size=vocab.size)
    return build(model_config, cold_tensors(model_config, seed))


def stored_parameters(model_config):
    """Parameters in the file that an export writes, which is the number that papers print."""
    architecture = dataclasses.asdict(model_config)
    family = architecture.pop("family")
    _, tensors = pretrained.write_lm(family, architecture, empty(model_config).state_dict())
    return sum(tensor.numel() for tensor in tensors.values())


def report(lm, slm, embedding="fresh"):
    """What the change of vocabulary kept, dropped and drew, as text. The models may be empty ones."""
    old, new = lm.state_dict(), slm.state_dict()
    tables = [name for name in old if name in TABLES]
    body = sum(tensor.numel() for name, tensor in new.items() if name not in tables)
    source = {"fresh": f"~ N(0, {lm.config.init_std})", "matched": "~ N(0, std of the text table)",
              "truncate": "= the first rows of the text table"}[embedding]
    lines = [f"kept     {body:>13,} parameters in {len(new) - len(tables)} tensors: the body"]
    for name in tables:
        lines.append(f"dropped  {old[name].numel():>13,} {name} {tuple(old[name].shape)}")
        lines.append(f"drawn    {new[name].numel():>13,} {name} {tuple(new[name].shape)} {source}")
    total = sum(tensor.numel() for tensor in new.values())
    unread = stored_parameters(slm.config) - total
    lines.append(f"total    {total:>13,} parameters" + (
        f"; {total + unread:,} in the file, whose position table has {unread:,} in rows that nothing reads" if unread else ""))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- load and save

def open_text_lm(folder_or_name="pocket"):
    """A text LM as any Hugging Face folder holds it -> (TransformerConfig, {name: tensor} that are read when asked for)."""
    family, architecture, tensors = pretrained.open_lm(files.find_model(folder_or_name, "lm"))
    return TransformerConfig(**architecture, family=family), tensors


def load_text_lm(folder_or_name="pocket", dtype=torch.float32):
    """The same as a Transformer in eval mode."""
    model_config, tensors = open_text_lm(folder_or_name)
    return build(model_config, tensors.items(), dtype, folder_or_name)


def load_lm_config(folder_or_name="pocket", kind="lm"):
    """The architecture alone: TransformerConfig from a folder's config.json (the weights need not be there). kind: lm | model."""
    family, architecture = pretrained.lm_architecture(*pretrained.find_settings(folder_or_name, kind))
    return TransformerConfig(**architecture, family=family)


def save_speech_lm(slm, vocab, folder, dtype=torch.float32):
    """Write a folder that load_speech_lm and transformers' AutoModelForCausalLM open."""
    save_tensors(slm.config, slm.state_dict(), vocab, folder, dtype)


def save_tensors(model_config, tensors, vocab, folder, dtype=torch.float32):
    """The same from {name: tensor}, for a model whose weights are spread over processes."""
    architecture = dataclasses.asdict(model_config)
    family = architecture.pop("family")
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    settings, tensors = pretrained.write_lm(family, architecture, tensors)
    settings |= {"torch_dtype": str(dtype).removeprefix("torch."), "offset": vocab.offset, "num_units": vocab.num_units,
                 "bos_token_id": vocab.bos, "eos_token_id": vocab.eos, "pad_token_id": vocab.pad,
                 "tokenizer_recipe": vocab.recipe}
    files.write_model(folder, settings, tensors)


def read_vocab(settings, where):
    """The unit ids that a checkpoint's config.json declares, in one of three conventions.

    ours         offset, num_units, bos, eos and pad are all written down
    Meta's TWIST `offset` alone; every row from there on is a unit. Trained without bos, whatever bos_token_id its text LM left
                 behind; an id below the offset may end a sequence.
    slamkit      the wrapper: pad 0, <S> 1 at both ends, unit u is u + 2; trained on recordings with 40 zeros on both sides.
                 The ids in its base_config are the text model's
    """
    check_values(settings, {"tokenizer_recipe": dict}, where)
    rows = settings["vocab_size"]

    def declared(key, limit):
        token = settings.get(key)
        return token if type(token) is int and 0 <= token < limit else None

    if "wrapper" in settings:
        if not 2 < rows <= LARGEST_UNIT_VOCAB:
            raise ValueError(f"{where} has {rows} rows: " + ("no unit is among them" if rows < 3 else "a vocabulary of text and "
                             "units together; only models of units alone open"))
        return UnitVocab(rows - 2, 2, bos=1, eos=1, pad=0, recipe={"pad": SLAMKIT_PAD})
    if "offset" not in settings:
        raise ValueError(f"{where} is no speech LM: its config.json has no `offset`; "
                         f"make one with train.py --init=twist --lm={where}")
    offset = settings["offset"]
    num_units = settings.get("num_units", rows - offset if type(offset) is int else None)
    if not (type(offset) is type(num_units) is int and offset >= 0 and num_units > 0 and offset + num_units <= rows):
        raise ValueError(f"{where}: config.json has offset {offset!r} and {num_units!r} units in a vocabulary of {rows} rows; "
                         "expected offset + units <= rows; copy the file again")
    if "num_units" in settings:
        return UnitVocab(num_units, offset, *(declared(f"{name}_token_id", rows) for name in ("bos", "eos", "pad")),
                         settings.get("tokenizer_recipe"))
    return UnitVocab(num_units, offset, None, declared("eos_token_id", offset), declared("pad_token_id", offset))


def open_speech_lm(folder_or_name="pocket"):
    """Ours, Meta's TWIST or slamkit's -> (TransformerConfig, tensors read when asked for, UnitVocab)."""
    folder = files.find_model(folder_or_name, "model")
    settings = pretrained.read_settings(folder)
    pretrained.lm_architecture(settings, folder)
    vocab = read_vocab(settings, folder)
    family, architecture, tensors = pretrained.open_lm(folder)
    return TransformerConfig(**architecture, family=family), tensors, vocab


def load_speech_lm(folder_or_name="pocket", dtype=torch.float32, device="cpu"):
    """The same as (Transformer in eval mode, UnitVocab). Raises ValueError for a text LM."""
    model_config, tensors, vocab = open_speech_lm(folder_or_name)
    return build(model_config, tensors.items(), dtype, folder_or_name, device), vocab


def count_parameters(*folders_or_names):  # of speech LMs, all together
    return sum(tensor.numel() for name in folders_or_names for tensor in empty(load_lm_config(name, "model")).parameters())


@dataclass(frozen=True)
class SpeechLMOptions:
    """Which speech LM, in which numbers and where, for every command that runs one."""

    model: str = "pocket"  # speech LM: folder, `pocket`, or a known name (TWIST-350M, slprl/slam)
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16: its weights; auto: bfloat16 on GPUs and where float32 has no room
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps: of the speech LM, and but for mps (never auto's choice) of all else
    CHOICES = {"dtype": ("auto", "float32", "bfloat16", "float16")}


# ---------------------------------------------------------------------------------------------- the command

@dataclass(frozen=True)
class TwistConfig:
    lm: str = "pocket"  # text LM: folder, `pocket`, or a name on the Hugging Face hub (facebook/opt-125m)
    units: int = 100  # K of the tokenizer
    embedding: str = "fresh"  # fresh | matched | truncate: how the unit table starts
    seed: int = 0  # of the new table
    out: str | None = None  # folder for the warm-started model; nothing is written without it
    overwrite: bool = False  # replace the model that --out holds
    RANGES, NEEDS = {"units": (1, 2**16)}, {"seed": "out", "overwrite": "out"}
    CHOICES = {"embedding": EMBEDDINGS}


def main(argv=None):
    options = config.load(TwistConfig, argv)
    if options.out:
        files.refuse_existing(options.out, options.overwrite)
    lm_config, text = open_text_lm(options.lm) if options.out else (load_lm_config(options.lm), {})  # counting needs no weights
    vocab, lm = UnitVocab(options.units), empty(lm_config)
    slm = empty(dataclasses.replace(lm_config, vocab_size=vocab.size))
    print(report(lm, slm, options.embedding))
    if options.out:
        tensors = dict(warm_tensors(lm_config, text, vocab, options.seed, options.embedding))
        save_tensors(slm.config, tensors, vocab, options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    config.command(main)
