"""Units -> speech: the unit HiFi-GAN with a duration predictor.

    units (T,) --embedding--> (C, T) --duration predictor--> runs (T,) --repeat--> (C, F) --convolution--> (width, F)
      --[transposed convolution, x rate; mean of residual blocks] per upsample rate--> (width / 2^n, S) --tanh--> (S,)

A language model of deduplicated units has no clock, so the vocoder gives each unit its length again: the predictor says log(1 +
frames), and each embedding is repeated that often before the generator runs. S = sum(runs) * hop; hop, the samples per frame, is
the product of the upsample rates: 640 at 25 Hz, 320 at 50 Hz.

    python vocoder.py units.jsonl --out=speech                     # one wav a line, named after its file_name
    python vocoder.py units/mine --out=speech --use-durations      # a shard folder; the recorded timing
    python vocoder.py units.jsonl --vocoder=hubert-base-ls960 --speaker=3   # one of several voices, by number or name
    python vocoder.py units.jsonl --page                        # also speech/index.html, to hear and to see in a browser

A vocoder of many voices has a table of speakers, and perhaps one of styles; their rows are appended to every frame's
embedding. Modules carry the published parameter names, so a released checkpoint and its config.json load as they are.
Sources: generator, Kong et al. 2020 (HiFi-GAN, arXiv 2010.05646) section 2.2; unit input, Polyak et al. 2021
(arXiv 2104.00355) section 2.2; duration predictor, Ren et al. 2021 (FastSpeech 2, arXiv 2006.04558) section 2.3,
used on units by Lee et al. 2022 (arXiv 2107.05604). Shapes: B batch, T units, F frames, S samples, C width.
"""
import difflib
import itertools
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional

import config
from checkpoints import files, recognise
from checkpoints.fill import fill
from checkpoints.pretrained import fold_weight_norm
from corpus.shards import read_units
from speech.audio import SAMPLE_RATE
from speech.channels_last import Conv1d, ConvTranspose1d, lay_out
from speech.precision import exactly
from speech.spoken import record_of, write_spoken

SLOPE = 0.1  # leaky ReLU inside the generator
LAST_SLOPE = 0.01  # leaky ReLU before the last convolution: the published models use the library's default there
EDGE_KERNEL = 7  # taps of the first and the last convolution
# Keys of published configs that would change the network; any value but these is refused rather than ignored.
UNSUPPORTED = ("f0", "embedder_params", "f0_quant_num_bin", "code_vq_params")
REMEDY = "give the config.json of a unit HiFi-GAN without f0"
SIZES = (("num_embeddings", 1, 10**6), ("embedding_dim", 1, 10**4), ("upsample_initial_channel", 1, 10**4),
         ("num_speakers", 0, 10**5), ("num_styles", 0, 10**5))
SPEAKERS, STYLES = 200, 100  # rows of the tables of voices where the config does not say it, as in the published code


@dataclass(frozen=True)
class DurationConfig:
    encoder_embed_dim: int = 128  # width of the unit embedding that comes in
    var_pred_hidden_dim: int = 128  # width of both convolutions
    var_pred_kernel_size: int = 3  # taps; the second convolution of the published models is padded for 3 only
    var_pred_dropout: float = 0.5  # after each layer norm, in training


@dataclass(frozen=True)
class VocoderConfig:
    """The keys of a published config.json that shape the network; the rest of that file is about training."""
    upsample_rates: tuple[int, ...]  # samples out per sample in, stage by stage
    upsample_kernel_sizes: tuple[int, ...]  # taps of each transposed convolution; rate + an even number
    upsample_initial_channel: int = 512  # width before the first stage; each stage halves it
    resblock: str = "1"  # kind of residual block; only "1" (pairs of convolutions) exists here
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)  # one residual block each, averaged
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3  # dilations of each block's pairs
    num_embeddings: int = 500  # K, number of units
    embedding_dim: int = 128  # width of a unit's embedding
    model_in_dim: int = 128  # width that the generator takes: embedding_dim, once more for speakers, once more for styles
    num_speakers: int = 0  # rows of the table of speakers; 0: one voice, no table
    num_styles: int = 0  # rows of the table of speaking styles
    code_hop_size: int = 320  # samples per frame
    sampling_rate: int = SAMPLE_RATE  # Hz
    dur_predictor_params: DurationConfig | None = None  # None: no predictor, one frame per unit unless runs are given

    def __post_init__(self):
        rates, taps, duration = self.upsample_rates, self.upsample_kernel_sizes, self.dur_predictor_params
        demands = (
            (self.resblock == "1", f'resblock "{self.resblock}": only "1" is supported'),
            (self.sampling_rate == SAMPLE_RATE, f"sampling_rate {self.sampling_rate}: expected {SAMPLE_RATE} Hz"),
            (math.prod(rates) == self.code_hop_size,
             f"upsample_rates {list(rates)} multiply to {math.prod(rates)}, not code_hop_size {self.code_hop_size}"),
            (len(rates) == len(taps) and all(k >= u and (k - u) % 2 == 0 for u, k in zip(rates, taps)),
             f"upsample_kernel_sizes {list(taps)}: expected one for each of upsample_rates {list(rates)}, that rate "
             "plus an even number, or the length would not come out as an exact multiple"),
            (self.upsample_initial_channel % 2 ** len(rates) == 0,
             f"upsample_initial_channel {self.upsample_initial_channel} cannot be halved {len(rates)} times"),
            (len(kernels := self.resblock_kernel_sizes) == len(self.resblock_dilation_sizes) > 0 and all(k % 2 for k in kernels),
             "resblock_kernel_sizes: expected odd numbers, each with its list in resblock_dilation_sizes"),
            *((least <= getattr(self, name) <= most, f"{name} is {getattr(self, name)}, expected {least} to {most}")
              for name, least, most in SIZES),
            (self.model_in_dim == self.embedding_dim * (1 + bool(self.num_speakers) + bool(self.num_styles)),
             f"model_in_dim {self.model_in_dim} is not embedding_dim {self.embedding_dim}, once for the units and once more for "
             f"each of speakers ({self.num_speakers}) and styles ({self.num_styles}): it expects other inputs"),
            (not duration or (duration.var_pred_kernel_size, duration.encoder_embed_dim) == (3, self.embedding_dim),
             f"dur_predictor_params: expected kernel size 3 and encoder_embed_dim {self.embedding_dim}"),
        )
        for holds, sentence in demands:
            if not holds:
                raise ValueError(f"vocoder config: {sentence}; {REMEDY}")


class DurationPredictor(nn.Module):
    """Embeddings (B, T, C) -> log(1 + frames) (B, T). It sees two units to each side."""

    def __init__(self, config):
        super().__init__()
        width, kernel = config.var_pred_hidden_dim, config.var_pred_kernel_size
        self.conv1 = nn.Sequential(nn.Conv1d(config.encoder_embed_dim, width, kernel, padding=kernel // 2), nn.ReLU())
        self.ln1 = nn.LayerNorm(width)
        self.conv2 = nn.Sequential(nn.Conv1d(width, width, kernel, padding=kernel // 2), nn.ReLU())
        self.ln2 = nn.LayerNorm(width)
        self.proj = nn.Linear(width, 1)
        self.dropout = nn.Dropout(config.var_pred_dropout)

    def forward(self, x):
        for conv, norm in ((self.conv1, self.ln1), (self.conv2, self.ln2)):
            x = self.dropout(norm(conv(x.transpose(1, 2)).transpose(1, 2)))
        return self.proj(x)[..., 0]  # (B, T)


class ResidualBlock(nn.Module):
    """Pairs of convolutions (dilated, then plain), each pair with a shortcut around it."""

    def __init__(self, width, kernel, dilations):
        super().__init__()
        self.convs1 = nn.ModuleList(Conv1d(width, width, kernel, dilation=d, padding=(kernel - 1) * d // 2) for d in dilations)
        self.convs2 = nn.ModuleList(Conv1d(width, width, kernel, padding=(kernel - 1) // 2) for _ in dilations)

    def forward(self, x):
        for dilated, plain in zip(self.convs1, self.convs2):
            x = x + plain(functional.leaky_relu(dilated(functional.leaky_relu(x, SLOPE)), SLOPE))
        return x


def integers(values, name):
    """Anything that holds whole numbers in one row -> (T,) int64."""
    try:
        values = torch.as_tensor(values)
    except (TypeError, RuntimeError, ValueError):
        raise ValueError(f"{name}: expected (T,) integers, got {values!r:.40}") from None
    if values.ndim != 1 or (len(values) and (values.is_floating_point() or values.is_complex())):
        raise ValueError(f"{name}: expected (T,) integers, got shape {tuple(values.shape)} of {values.dtype}")
    return values.long()


class Vocoder(nn.Module):
    """Unit HiFi-GAN. `voc(units)` speaks one sequence; `decode` is the batched inner part that training uses."""

    def __init__(self, config):
        super().__init__()
        self.config, self.recipe = config, None
        self.speakers, self.styles = [], []  # names of the voices, where the checkpoint brings them
        width, edge = config.upsample_initial_channel, dict(kernel_size=EDGE_KERNEL, padding=EDGE_KERNEL // 2)
        blocks = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes))
        sizes = config.num_embeddings, config.num_speakers, config.num_styles
        tables = (torch.empty(rows, config.embedding_dim) for rows in sizes)
        self.dict, self.spkr, self.style = (  # as model.py's table()
            nn.Embedding.from_pretrained(x if x.is_meta else x.normal_(), freeze=False) if len(x) else None for x in tables)
        self.conv_pre = Conv1d(config.model_in_dim, width, **edge)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes):
            # length out = (F - 1) rate - 2 padding + kernel, which this padding makes exactly F rate
            self.ups.append(ConvTranspose1d(width, width // 2, kernel, rate, padding=(kernel - rate) // 2))
            width //= 2
            self.resblocks.extend(ResidualBlock(width, k, dilations) for k, dilations in blocks)
        self.conv_post = Conv1d(width, 1, **edge)
        duration = config.dur_predictor_params
        self.dur_predictor = DurationPredictor(duration) if duration else None

    def decode(self, frames, speaker=0, style=0):
        """Frame units (B, F) int64, already at the frame rate -> (B, F * hop) float32 in [-1, 1].

        speaker, style: row of their tables, where the vocoder has them.
        """
        x = self.dict(frames)  # (B, F, C)
        for table, row in ((self.spkr, speaker), (self.style, style)):
            if table is not None:
                x = torch.cat([x, table.weight[row].expand(*frames.shape, -1)], dim=2)
        x = self.conv_pre(x.transpose(1, 2))  # (B, width, F)
        num_blocks = len(self.config.resblock_kernel_sizes)
        for i, up in enumerate(self.ups):
            x = up(functional.leaky_relu(x, SLOPE))  # (B, width / 2^(i+1), F * rates so far)
            x = sum(block(x) for block in self.resblocks[i * num_blocks:(i + 1) * num_blocks]) / num_blocks
        x = self.conv_post(functional.leaky_relu(x, LAST_SLOPE))
        return torch.tanh(x.float())[:, 0]  # (B, S); float() matters under bf16 autocast only

    @exactly
    @torch.no_grad()
    def durations(self, units):
        """Units (T,) int64 -> frames of each (T,) int64, at least 1. torch.round sends halves to the even number."""
        if self.dur_predictor is None:
            return torch.ones_like(units)
        log_frames = self.dur_predictor(self.dict(units.to(self.dict.weight.device))[None])[0]
        return torch.round(torch.exp(log_frames) - 1).clamp(min=1).long()

    def voice(self, speaker=None, style=None):
        """Rows of the tables of speakers and styles for numbers or names; None is the first. Raises ValueError, see forward."""
        rows = []
        for kind, wanted, count, names in (("speaker", speaker, self.config.num_speakers, self.speakers),
                                           ("style", style, self.config.num_styles, self.styles)):
            wanted = 0 if wanted is None else wanted
            row = names.index(wanted) if wanted in names else int(wanted) if str(wanted).isdecimal() else -1
            if not 0 <= row < max(count, 1):
                near = difflib.get_close_matches(str(wanted), names, n=1, cutoff=0.0)
                raise ValueError(f"{kind} {wanted!r}: this vocoder has " + (
                    f"{kind}s 0 to {count - 1}" + (f"; did you mean {near[0]!r}?" if near and row < 0 else "") if count
                    else f"no choice of {kind}; leave it out"))
            rows.append(row)
        return rows

    @exactly
    @torch.no_grad()
    def forward(self, units, runs=None, speaker=None, style=None):
        """Speak one sequence of units.

        Args:
            units: (T,) integers in [0, K), repeats removed where the model has a duration predictor.
            runs: (T,) integers >= 1, frames of each unit; default: predicted.
            speaker, style: number or name of the voice, where the vocoder has several; default: the first.
        Returns: (S,) float32 in [-1, 1] at 16 kHz, S = sum(runs) * hop; an empty sequence gives an empty tensor.
        Raises: ValueError for a unit or a voice that the model does not know, or runs that do not fit.
        """
        voice = self.voice(speaker, style)
        units, K = integers(units, "units").to(self.dict.weight.device), self.config.num_embeddings
        if len(units) == 0:
            return torch.zeros(0, device=units.device)
        if units.min() < 0 or units.max() >= K:
            raise ValueError(f"units between {units.min()} and {units.max()}, but this vocoder knows 0 to {K - 1}; "
                             "use the vocoder that belongs to the units' tokenizer, and remove any vocabulary offset")
        runs = self.durations(units) if runs is None else integers(runs, "runs").to(units.device)
        if len(runs) != len(units) or runs.min() < 1:
            raise ValueError(f"{len(runs)} runs, the shortest {min(runs.tolist(), default=0)}, for {len(units)} units; "
                             "expected one run of at least 1 frame for each")
        return self.decode(torch.repeat_interleave(units, runs)[None], *voice)[0]


# -------------------------------------------------------------------------------------------------- loading

KIND_OF = {int: int, tuple[int, ...]: list, tuple[tuple[int, ...], ...]: tuple}  # annotations -> what check_values calls them
KINDS = {"dur_predictor_params": dict, "tokenizer": dict,
         **{field.name: KIND_OF[field.type] for field in fields(VocoderConfig) if field.type in KIND_OF}}


def parse_config(table):
    """A published config.json, as a dictionary -> VocoderConfig. Keys about training are ignored on purpose."""
    if refused := [key for key in UNSUPPORTED if table.get(key)]:
        raise ValueError(f"vocoder config asks for {', '.join(refused)}, which is not supported; {REMEDY}")
    recognise.check_values(table, KINDS, "vocoder config")
    if missing := [key for key in ("upsample_rates", "upsample_kernel_sizes", "num_embeddings") if table.get(key) is None]:
        raise ValueError(f"vocoder config lacks {', '.join(missing)}; {REMEDY}{recognise.meant(table, 'vocoder')}")
    known = {field.name: freeze(table[field.name]) for field in fields(VocoderConfig) if table.get(field.name) is not None}
    known.setdefault("code_hop_size", math.prod(known["upsample_rates"]))
    known["resblock"] = str(known.get("resblock", "1"))  # some files hold the number 1
    for field, key, usual in (("num_speakers", "multispkr", SPEAKERS), ("num_styles", "multistyle", STYLES)):
        known[field] = (table.get(field) or usual) if table.get(key) else 0
    if duration := known.pop("dur_predictor_params", None):
        recognise.check_values(duration, kinds := {field.name: field.type for field in fields(DurationConfig)}, "vocoder config")
        if unknown := sorted(set(duration) - set(kinds)):
            raise ValueError(f"vocoder config: dur_predictor_params has {unknown[0]}, which is not supported; {REMEDY}")
        known["dur_predictor_params"] = DurationConfig(**{key: value for key, value in duration.items() if value is not None})
    return VocoderConfig(**known)


def freeze(value):
    return tuple(freeze(item) for item in value) if isinstance(value, list) else value


def beside(path, name):
    """The file `name` that belongs to a weight file, or to a folder: released files stand side by side as MODEL.pt,
    MODEL_config.json or MODEL_generator.pt, MODEL_config.json; trainers and this project write plain config.json."""
    if path.is_dir():
        return path / name
    stems = (path.stem, path.stem.removesuffix("_generator"))
    return next((file for file in (path.with_name(f"{stem}_{name}") for stem in stems) if file.is_file()), path.with_name(name))


def load_vocoder(folder_or_file_or_name="pocket"):
    """Load a unit HiFi-GAN: a folder (config.json + weights), a weight file beside its config, `pocket`, or a known name.

    Returns: Vocoder in eval mode, float32 (half-precision storage is widened), weight norm folded. Its `recipe` names
        the tokenizer whose units it speaks, or is None where the config does not say.
    Raises: ValueError naming tensors that are missing, unknown or of another shape; OSError if files are absent.
    """
    path = files.find_generator(files.find(str(folder_or_file_or_name), "vocoder"))
    table = files.read_json(beside(path, "config.json"))
    with torch.device("meta"):
        vocoder = Vocoder(parse_config(table))
    fill(vocoder.to_empty(device="cpu"), fold_weight_norm(files.read_generator(path)).items(), path)
    vocoder.recipe, (vocoder.speakers, vocoder.styles) = table.get("tokenizer"), (  # names of voices, one a line
        [line.strip() for line in file.read_text("utf-8", "surrogateescape").splitlines()] if file.is_file() else []
        for file in (beside(path, "speakers.txt"), beside(path, "styles.txt")))
    return lay_out(vocoder.eval().requires_grad_(False))


# -------------------------------------------------------------------------------------------------- the command

@dataclass(frozen=True)
class SpeakConfig:
    units: tuple[str, ...] = ()  # .jsonl files (keys units, duration, file_name) and shard folders
    vocoder: str = "pocket"  # vocoder folder or weight file, `pocket`, or a known name
    speaker: str | None = None  # number or name of the voice, where the vocoder has several
    style: str | None = None  # number or name of the speaking style, where the vocoder has several
    out: str = "speech"  # folder for the wav files; one that holds other speech stays, and the new one gets a number
    use_durations: bool = False  # speak with the recorded run lengths instead of predicted ones
    page: str | None = None  # also a page to listen to, index.html: beside (the wavs; --page alone) | inline (all in one file)
    device: str = "cpu"  # auto | cpu | cuda | cuda:N
    ALONE, CHOICES = {"page": "beside"}, {"page": ("beside", "inline")}


def main(argv=None):
    options = config.load(SpeakConfig, argv, positional="units")
    if not options.units:
        raise ValueError("no units given; name .jsonl files or shard folders, as in vocoder.py units.jsonl --out=DIR")
    vocoder, taken, failures = load_vocoder(options.vocoder).to(config.choose_device(options.device, False)), {}, []
    K, collapse, page = vocoder.config.num_embeddings, vocoder.dur_predictor is not None, None
    if options.page:
        from pages import listening  # nothing else needs it

        page = listening.Page(options.out, options.page)
    rows = (row for path in options.units for row in read_units(Path(path), K, vocoder.recipe, collapse))
    for name, units, runs in config.progress(rows, desc="speaking", unit="file"):
        if options.use_durations and runs is None:
            raise ValueError(f"{name} has no run lengths; leave out --use-durations")
        stems = (f"{Path(name).stem}_{copy}".removesuffix("_1") for copy in itertools.count(1))
        stem = next(stem for stem in stems if stem not in taken)  # two folders may hold recordings of one name
        wav = vocoder(units, runs if options.use_durations else None, options.speaker, options.style)
        record = record_of(name, options, ("vocoder", "speaker", "style"), (units, runs if options.use_durations else len(wav)))
        files = write_spoken(options.out, {stem: wav}, record, failures)
        taken[stem] = len(wav) / SAMPLE_RATE
        if page:
            units = integers(units, "units")
            frames = torch.as_tensor(runs) if options.use_durations else vocoder.durations(units)
            page.add(stem, [("speech", wav, files[0], units, frames * vocoder.config.code_hop_size / SAMPLE_RATE)])
    print(f"{len(taken) - len(failures)} files, {sum(taken.values()):.1f} s of speech in {options.out}")
    if page:
        told = [(name, getattr(options, name)) for name in ("vocoder", "speaker", "style", "use_durations")]
        print(page.write("Units, spoken", told, map(config.sentence, failures)))
    if failures:
        raise SystemExit(2)


if __name__ == "__main__":
    config.command(main)
