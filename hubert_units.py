"""Speech -> discrete units: HuBERT features, their nearest k-means centre, repeats removed.

    wav (S,) --HuBERT up to layer k--> features (F, C) --nearest of K centres--> frame units (F,) --runs--> units (T,), runs (T,)

      samples     ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~    16,000 a second
      features    | x  | x  | x  | x  | x  | x  | x  | x  | x  |    one vector of C numbers every 40 ms (25 Hz) or 20 ms (50 Hz)
      frame units | 71 | 71 | 71 | 12 | 12 | 40 | 40 | 40 | 40 |    the number of its nearest centre
      units         71             12        40                     what the language model reads
      runs          3              2         4                      what the vocoder puts back

One frame is 320 samples (50 Hz) in the original HuBERT and 640 samples (25 Hz) in the mHuBERT that TWIST uses. A recording
has the same units alone and in a batch, on one process or on many; a command that was interrupted goes on when it is repeated. A
folder of shards keeps what it holds: recordings of other paths are added, and units of another recipe are refused.

    python hubert_units.py recordings/ more.flac --out=units/mine         # any tree of audio -> unit shards
    torchrun --nproc-per-node=8 hubert_units.py recordings/ --out=units/mine         # files divided over the processes
    python hubert_units.py LibriSpeech/ --out=units/libri --hold-out=0.01 --by=speaker   # units/libri/train and units/libri/val
    python hubert_units.py --inspect=units/mine --page                    # what is in a folder of shards, to see and hear, too
    python hubert_units.py recordings/ --fit=500 --layer=9 --out=kmeans.safetensors  # k-means of one layer's features

Sources: HuBERT, Hsu et al. 2021 (arXiv 2106.07447) section III; deduplication, TWIST (arXiv 2305.13009) section 3. Shapes: B
batch, S samples, F frames, C width, K centres, T units.
"""
import re
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch

import config
from checkpoints import download
from checkpoints.files import find, find_model, note, read_kmeans, refuse_existing, write_tensors
from corpus import inspector, selection
from corpus.extract import encode_files, find_audio, sample_features
from kernels.dtypes import hardware_bfloat16
from kernels.packed import packed
from speech.audio import SAMPLE_RATE, read_wav
from speech.encoder import BUDGET_SECONDS, CHUNKINGS, UnitEncoder, deduplicate
from speech.hubert import load_hubert
from speech.kmeans import fit_kmeans
from speech.precision import PRECISIONS, check_precision
from training import distributed

# ---------------------------------------------------------------------------------------------- the way of one recording

def speech_to_units(path, encoder, seconds=0.0, dedup=True):
    """A recording -> units (T,), runs (T,) int64, of its first `seconds`; 0: of all of it.

    dedup: whether runs are collapsed; else every frame is a unit that lasts 1. A folder goes the same way to the same units,
    many recordings at once, and into shards: corpus/extract.py.
    Raises: OSError or ValueError that names the file, if it cannot be read or is shorter than one frame.
    """
    wav = read_wav(path)  # (S,) float32 in [-1, 1], mono, 16 kHz
    if seconds:
        wav = wav[:round(seconds * SAMPLE_RATE)]
    try:
        features = encoder.features(wav)  # (F, C): HuBERT's hidden states after one of its layers
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    frame_units = encoder.quantize(features).cpu()  # (F,): the nearest of the K centres, by squared distance
    return deduplicate(frame_units) if dedup else (frame_units, torch.ones_like(frame_units))


# ---------------------------------------------------------------------------------------------- loading

@dataclass(frozen=True)
class TokenizerOptions:
    """What makes units of speech, for every command that does. Where k (of a known tokenizer), frame rate, pad, chunking and
    precision are left open, they are those of the speech LM, if there is one that says so."""

    tokenizer: str = "pocket"  # HuBERT: folder or .pt file, `pocket`, or a known name (mhubert-base-25hz)
    kmeans: str | None = None  # k-means file or known name; default the one that belongs to the tokenizer
    k: int | None = None  # centres, where a known tokenizer has k-means of several sizes
    layer: int | None = None  # transformer layer of the features; default the k-means file's (of --fit: the last)
    frame_rate: float | None = None  # Hz: the network's own, half or twice of it; default the speech LM's or the k-means file's
    pad: int | None = None  # zeros around each recording, samples; default the speech LM's (of slamkit's models: 40), or none
    chunking: str | None = None  # long ones: overlap (over 70 s: pieces of 60, 5 s context; default), textless (of 100 s, alone)
    precision: str | None = None  # of products: float32 (default), the exact one; faster bfloat16 and, on a GPU, tf32 and float16
    RANGES = {"k": (1, 2**16), "layer": (1, 1000), "frame_rate": (config.ABOVE_0, 1000), "pad": (0, SAMPLE_RATE)}
    CHOICES = {"chunking": tuple(CHUNKINGS), "precision": tuple(PRECISIONS)}


def load_tokenizer(options, recipe=None, device="cpu"):
    """The UnitEncoder that TokenizerOptions name, on a device; recipe: that of the speech LM which its units are for."""
    said = recipe or {}
    k = said.get("num_units") if options.k is None and options.tokenizer in download.KNOWN["tokenizer"] else options.k
    pad = said.get("pad", 0) if options.pad is None else options.pad
    if options.pad is None and pad and "kind" not in said:
        note(f"--pad={pad}: slamkit's models were trained on recordings with {pad} zeros on both sides")
    precision = options.precision or said.get("precision", "float32")
    check_precision(precision, device)
    if precision == "bfloat16" and not hardware_bfloat16(device):
        note("--precision=bfloat16: no hardware for it is known here, float32 would be faster")
    return load_unit_encoder(options.tokenizer, options.kmeans, options.layer, k, options.frame_rate or said.get("frame_rate"),
                             pad, options.chunking or said.get("chunking", "overlap"), precision).to(device)


def find_kmeans(path):
    """The k-means file that belongs to a tokenizer on disk: kmeans.* in its folder, or HUBERT_L11_km500.bin beside HUBERT.pt."""
    folder = path if path.is_dir() else path.parent
    name = re.compile(re.escape(path.stem) + r"(_L\d+)?_km\d+(\.\w+)?")
    beside = [] if path.is_dir() else sorted(file for file in folder.iterdir() if name.fullmatch(file.name))
    if len(beside) > 1:
        raise ValueError(f"{path} has {len(beside)} k-means beside it ({', '.join(file.name for file in beside)}); "
                         "name one with --kmeans")
    for file in (*(folder / f"kmeans.{ending}" for ending in ("safetensors", "bin", "pt", "npy")), folder / "km.bin", *beside):
        if file.is_file():
            return file
    raise FileNotFoundError(f"no k-means centres at {folder / 'kmeans.safetensors'}; name a file with --kmeans, or one of "
                             + ", ".join(download.KNOWN["kmeans"]))


def known_kmeans(tokenizer, k):
    """The name of the k-means that belongs to a known tokenizer: its default, or the one with k centres."""
    default = download.KNOWN["tokenizer"][tokenizer].kmeans
    if k is None or default.endswith(f"-{k}"):
        return default
    names = [name for name in download.KNOWN["kmeans"] if name.startswith(tokenizer) and name.endswith(f"-{k}")]
    if not names:
        raise ValueError(f"no k-means of {k} centres is published for {tokenizer}, only "
                         + ", ".join(name for name in download.KNOWN["kmeans"] if name.startswith(tokenizer))
                         + f"; make one with --fit={k}")
    return names[0]


def load_unit_encoder(folder_or_file_or_name="pocket", kmeans=None, layer=None, k=None, frame_rate=None, pad=0,
                      chunking="overlap", precision="float32"):
    """Load HuBERT and its k-means.

    Args:
        folder_or_file_or_name: Hugging Face folder, fairseq .pt file, `pocket`, or a known name (mhubert-base-25hz).
        kmeans: file or known name; safetensors with `centers` (K, C), .npy, or scikit-learn's estimator as joblib wrote it.
            Default: the one that belongs to the known name, with k centres, or stands beside the tokenizer's file.
        layer: transformer layer of the features, 1 is the first; default: what the k-means file or its name says.
        k: centres that are expected. frame_rate: Hz; default: what the k-means file says, or the network's own.
        pad, chunking, precision: see UnitEncoder.
    """
    name = str(folder_or_file_or_name)
    path = find_model(name, "tokenizer")
    hubert = load_hubert(path)
    if kmeans is None and name in download.KNOWN["tokenizer"]:
        kmeans = known_kmeans(name, k)
    file = find(str(kmeans), "kmeans") if kmeans else path
    file = file if kmeans and file.is_file() else find_kmeans(file)
    centers, said = read_kmeans(file)
    if k is not None and len(centers) != k:
        raise ValueError(f"{file} has {len(centers)} centres, not {k}; name another with --kmeans, or make one with --fit={k}")
    for key in ("layer", "frame_rate", "certainty"):
        if not re.fullmatch(r"-?\d+" + r"(\.\d+)?" * (key != "layer"), said.get(key, "1")):
            raise ValueError(f"{file}: the {key} in its header is {said[key]!r}, expected a number; write the file again")
    known, named = download.KNOWN["kmeans"].get(kmeans), re.search(r"_L(\d+)_km", file.name)  # ..._L11_km500.bin, as published
    if layer is None:
        layer = said.get("layer") or known and known.layer or named and named.group(1)
    if layer is None:
        raise ValueError(f"{file} does not say which layer it belongs to; give --layer")
    encoder = UnitEncoder(hubert, centers, int(layer), name_of(name, path), frame_rate or said.get("frame_rate"), pad, chunking,
                          precision)
    encoder.least_certainty = float(said.get("certainty", 0))
    return encoder.eval()


def name_of(name, path):
    """What the recipe calls a model: its known name, or the name of its file or folder."""
    own = name != "pocket" and Path(name).exists()
    return path.name.removesuffix(".pt") if own else name


# ---------------------------------------------------------------------------------------------- the command

@dataclass(frozen=True)
class UnitsConfig(TokenizerOptions):
    audio: tuple[str, ...] = ()  # files and folders (searched recursively)
    out: str = "units/mine"  # folder for the shards, to which new recordings are added; with --fit the k-means file
    overwrite: bool = False  # replace the units, with --fit the k-means, that --out holds
    keep: str | None = None  # only the recordings that this file names, one a line: by paths or file names, also without endings
    hold_out: str | None = None  # a share (0.01), or a file of names, goes to OUT/val, all others to OUT/train: for validation
    by: str | None = None  # what is held out whole: speaker (by default, of a share), folder, or file (by default, of a list)
    dedup: bool = True  # collapse runs of equal units (--no-dedup keeps every frame)
    budget: float = 0.0  # seconds of audio in one forward; 0: 60 on a CPU, 960 on a GPU
    workers: int = 0  # threads that decode ahead of the encoder; 0: 2 on a CPU, beside a GPU up to 12, by the cores
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    inspect: str | None = None  # print what is in this folder of shards, and do nothing else
    page: str | None = None  # with --inspect: also write a page of it, index.html in that folder; or name the .html file
    beside: str | None = None  # with --page: another folder of the same recordings; where do their units differ?
    fit: int | None = None  # fit k-means with that many centres instead of encoding
    fit_frames: int = 200_000  # frames that k-means is fitted to, a random sample of all
    seed: int = 0  # of that sample and of the fit; of the share that is held out
    RANGES = {"workers": (0, 1000), "fit": (1, config.MOST), "fit_frames": (1, config.MOST)}
    CHOICES = {"by": selection.GROUPS}
    ALONE = {"page": "index.html"}
    FILES = {"out": "the k-means of --fit"}
    NEEDS = {"audio": "inspect=None", "out": "inspect=None", "fit_frames": "fit", "by": "hold_out", "page": "inspect",
             "beside": "inspect page", **dict.fromkeys(("dedup", "kmeans", "k", "budget", "keep", "hold_out"), "fit=None")}


def fit(files, options, dist):
    """The command with --fit: features of all files, a random sample of their frames, k-means of those."""
    if dist.world > 1:
        raise ValueError("--fit runs on one process; start it without torchrun")
    out = Path(options.out)
    out = out if out.suffix == ".safetensors" else out / "kmeans.safetensors"
    refuse_existing(out, options.overwrite)
    path = find_model(options.tokenizer, "tokenizer")
    hubert = load_hubert(path).to(dist.device)
    no_centers, layer = torch.zeros(1, hubert.config.n_embd, device=dist.device), options.layer or hubert.config.n_layer
    encoder = UnitEncoder(hubert, no_centers, layer, name_of(options.tokenizer, path), options.frame_rate, options.pad or 0,
                          options.chunking or "overlap", options.precision or "float32")
    generator = torch.Generator().manual_seed(options.seed)
    with packed(encoder):
        sample, seen = sample_features(files, encoder, options.fit_frames, generator)
    centers, inertia = fit_kmeans(sample, options.fit, generator, batch=max(4096, 10 * options.fit))
    write_tensors(out, {"centers": centers}, {
        "layer": str(encoder.layer), "frame_rate": str(encoder.frame_rate), "model": encoder.recipe["model"]})
    print(f"{options.fit} centres of {len(sample)} of {seen} frames, layer {layer}, {encoder.frame_rate:g} Hz: mean squared "
          f"distance {inertia:.4f} (of the frames to their mean {sample.var(0, correction=0).sum():.4f}); wrote {out}")


def main(argv=None):
    options = config.load(UnitsConfig, argv, positional="audio")
    if options.inspect:
        print(inspector.inspect(options.inspect))
        if options.page:
            from pages.inspector import write
            print(f"\nwrote {write(options.inspect, options.page, options.beside)}")
        return
    device = config.choose_device(options.device, language_model=False)
    dist = distributed.setup(device, timedelta(days=30))  # one process may be done days before the last
    if options.fit:
        return fit(find_audio(options.audio), options, dist)
    parts, names, done = selection.folders(options), {}, {}
    dist.from_main(lambda: names.update(selection.divide(options)))  # one process goes through the folders
    encoder = load_tokenizer(options, device=dist.device)
    encoder.budget = options.budget or BUDGET_SECONDS[dist.device.type]
    with packed(encoder):
        for part in parts:
            done[part] = encode_files(names.get(part, ()), encoder, replace(options, out=part), dist)
    for part, (meta, added) in done.items() if dist.is_main else ():
        waste = 1 - encoder.seconds[0] / encoder.seconds[1] if encoder.seconds[1] else 0.0
        print(f"{meta['files']} files, {meta['hours']:.3f} h, {meta['units']} units "
              f"({meta['units'] / max(meta['hours'] * 3600, 1e-9):.1f} per second) in {part}; "
              + (f"{added or 'none'} of the files are new; " if added < meta["files"] else "") + f"padding {waste:.1%}; "
              f"{meta['failures']} failures" + (f", listed in {part}/failures.csv" if meta["failures"] else ""))
        if meta["files"] == 0:
            raise ValueError(f"none of the {meta['failures']} files could be encoded; see {part}/failures.csv")
    distributed.leave()


if __name__ == "__main__":
    config.command(main)
