"""THE METHOD: a text language model becomes a speech language model.

    text LM:    text table (V_text, C)  ->  body: L blocks, positions, norms  ->  text head
    speech LM:  unit table (V_unit, C)  ->  the same body, weight for weight  ->  unit head (tied or not, as before)

TWIST (arXiv 2305.13009, section 3): keep the body of a trained text LM, throw its vocabulary away, draw a new table for
the speech units, train on with next-unit prediction on speech alone. A cold start has the same architecture and random
weights. The third start, `shuffled`, keeps every tensor's values but permutes them inside the tensor: what it gains
over cold is the scale of the initialisation, what TWIST gains over it is knowledge.

    python twist.py --lm=pocket --units=100 --out=warm      # prints what is kept, dropped and drawn anew
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import config
import pretrained
from model import Transformer, TransformerConfig


@dataclass(frozen=True)
class UnitVocab:
    """Ids of the speech LM: special tokens, and unit u as offset + u. A published checkpoint's file says its own."""

    num_units: int  # K of the tokenizer
    offset: int = 2  # id of unit 0
    bos: int | None = 1  # begins a recording; None: the model knows no such token
    eos: int | None = 1  # ends a recording (the same token: the stream is <S> units <S> units ...)
    pad: int | None = 0
    recipe: dict | None = None  # which tokenizer the units come from, as in the shards' meta.json

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


# ---------------------------------------------------------------------------------------------- starts

def warm_start(lm, vocab, seed=0, embedding="fresh"):
    """A speech LM with the body of a text LM; `lm` is left as it was.

    Args:
        embedding: fresh: the new table ~ N(0, init_std), 0.02 in the published families (the paper re-draws it);
            matched: ~ N(0, std of the text table); truncate: the first rows of the text table (what slamkit's resize does).
    """
    tensors = {name: tensor.detach().clone() for name, tensor in lm.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for name in ("wte.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = new_table(tensors[name], vocab.size, lm.config, embedding, generator)
    return build(dataclasses.replace(lm.config, vocab_size=vocab.size), tensors)


def new_table(text_table, rows, lm_config, embedding, generator):
    if embedding == "truncate":
        if rows > len(text_table):
            raise ValueError(f"--embedding=truncate: {rows} rows wanted, the text table has {len(text_table)}; "
                             "use fresh or matched")
        return text_table[:rows].clone()
    if embedding not in ("fresh", "matched"):
        raise ValueError(f"--embedding={embedding}: expected fresh, matched or truncate")
    std = lm_config.init_std if embedding == "fresh" else text_table.float().std().item()
    return torch.empty(rows, text_table.shape[1]).normal_(0.0, std, generator=generator).to(text_table.dtype)


def cold_start(lm_config, vocab, seed=0):
    """A speech LM of the same architecture with random weights."""
    model = Transformer(dataclasses.replace(lm_config, vocab_size=vocab.size))
    return model.init_weights(torch.Generator().manual_seed(seed)).eval()


def shuffled_start(lm, vocab, seed=0, embedding="fresh"):
    """As warm_start, with the values of every body tensor permuted inside it: same scale, no knowledge."""
    model = warm_start(lm, vocab, seed, embedding)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("wte.weight", "lm_head.weight"):
                order = torch.randperm(parameter.numel(), generator=generator)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return model


def build(model_config, tensors, where="weights"):
    """A model of given tensors in eval mode; nothing is allocated twice."""
    with torch.device("meta"):
        model = Transformer(model_config)
    pretrained.check_shapes(model.state_dict(), tensors, where)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(True)


def report(lm, slm):
    """What the change of vocabulary kept, dropped and drew, as text."""
    old, new = lm.state_dict(), slm.state_dict()
    tables = [name for name in old if name in ("wte.weight", "lm_head.weight")]
    kept = sum(tensor.numel() for name, tensor in new.items() if name not in tables)
    lines = [f"kept     {kept:>13,} parameters in {len(new) - len(tables)} tensors: the body"]
    for name in tables:
        lines.append(f"dropped  {old[name].numel():>13,} {name} {tuple(old[name].shape)}")
        lines.append(f"drawn    {new[name].numel():>13,} {name} {tuple(new[name].shape)}")
    return "\n".join(lines + [f"total    {sum(tensor.numel() for tensor in new.values()):>13,} parameters"])


# ---------------------------------------------------------------------------------------------- load and save

def load_text_lm(folder_or_name="pocket", dtype=torch.float32):
    """A text LM as any Hugging Face folder holds it -> Transformer in eval mode."""
    folder = checkpoint.find(str(folder_or_name), "lm")
    family, options, tensors, _ = pretrained.read_lm(folder)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return build(TransformerConfig(**options, family=family), tensors, folder)


def load_lm_config(folder_or_name="pocket"):
    """The architecture alone: TransformerConfig from a folder's config.json (the weights need not be there)."""
    folder = checkpoint.find(str(folder_or_name), "lm")
    family, options = pretrained.lm_options(checkpoint.read_json(folder / "config.json"), folder)
    return TransformerConfig(**options, family=family)


def save_speech_lm(slm, vocab, folder, dtype=torch.float32):
    """Write a folder that load_speech_lm and transformers' AutoModelForCausalLM open."""
    options = dataclasses.asdict(slm.config)
    family = options.pop("family")
    tensors = {name: tensor.to(dtype) for name, tensor in slm.state_dict().items()}
    settings, tensors = pretrained.write_lm(family, options, tensors)
    settings |= {"torch_dtype": str(dtype).removeprefix("torch."), "offset": vocab.offset, "num_units": vocab.num_units,
                 "bos_token_id": vocab.bos, "eos_token_id": vocab.eos, "pad_token_id": vocab.pad,
                 "tokenizer_recipe": vocab.recipe}
    checkpoint.write_model(folder, settings, tensors)


def load_speech_lm(folder_or_name="pocket", dtype=torch.float32):
    """Returns (Transformer in eval mode, UnitVocab). Raises ValueError for a folder that is a text LM."""
    folder = checkpoint.find(str(folder_or_name), "model")
    settings = checkpoint.read_json(Path(folder) / "config.json")
    if "offset" not in settings:
        raise ValueError(f"{folder} is no speech LM: its config.json has no `offset`; "
                         f"make one with train.py --init=twist --lm={folder}")
    family, options, tensors, settings = pretrained.read_lm(folder)
    vocab = UnitVocab(settings.get("num_units", settings["vocab_size"] - settings["offset"]), settings["offset"],
                      settings.get("bos_token_id"), settings.get("eos_token_id"), settings.get("pad_token_id"),
                      settings.get("tokenizer_recipe"))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return build(TransformerConfig(**options, family=family), tensors, folder), vocab


# ---------------------------------------------------------------------------------------------- the command

@dataclass(frozen=True)
class TwistConfig:
    lm: str = "pocket"  # text LM: folder, or `pocket`
    units: int = 100  # K of the tokenizer
    embedding: str = "fresh"  # fresh | matched | truncate: how the unit table starts
    seed: int = 0  # of the new table
    out: str | None = None  # folder for the warm-started model; nothing is written without it


def main(argv=None):
    options = config.load(TwistConfig, argv)
    lm, vocab = load_text_lm(options.lm), UnitVocab(options.units)
    slm = warm_start(lm, vocab, options.seed, options.embedding)
    print(report(lm, slm))
    if options.out:
        save_speech_lm(slm, vocab, options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    config.command(main)
