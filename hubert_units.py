"""Speech -> discrete units: HuBERT features, their nearest k-means centre, repeats removed.

    wav (S,) --HuBERT layer k (hubert.py)--> (F, C) --argmin distance to K centres--> frame units (F,)
             --deduplicate--> units (T,), runs (T,)

One frame is 320 samples (50 Hz) in the original HuBERT and 640 samples (25 Hz) in the mHuBERT that TWIST uses. A recording
has the same units alone and in a batch, on one process or on many; a command that was interrupted goes on when it is repeated.

    python hubert_units.py recordings/ more.flac --out=units/mine         # any tree of audio -> unit shards
    torchrun --nproc-per-node=8 hubert_units.py recordings/ --out=units/mine         # files divided over the processes
    python hubert_units.py --inspect=units/mine                           # what is in a folder of shards
    python hubert_units.py recordings/ --fit=500 --layer=9 --out=kmeans.safetensors  # k-means of one layer's features

Sources: HuBERT, Hsu et al. 2021 (arXiv 2106.07447) section III; deduplication, TWIST (arXiv 2305.13009) section 3. Shapes: B
batch, S samples, F frames, C width, K centres, T units.
"""
import collections
import glob
import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import audio
import checkpoint
import config
import data
import distributed
import download
from audio import SAMPLE_RATE
from hubert import Moments, frames_of, load_hubert
from kmeans import fit_kmeans, reservoir

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64"}
CHUNKINGS = {"overlap": (60, 5), "textless": (100, 0)}  # seconds of a piece of a long recording, of context on each side
BUDGET_SECONDS = {"cpu": 60, "cuda": 960}  # audio in one forward, padding included
LEAST_FILL = 0.9  # recordings share a forward if the shortest is at least this share of the longest
ROUNDING = 5e-6  # of features in a batch against alone, relative to their norm; bench.py units met 1e-6 at most
WINDOW = 2000  # files whose lengths are looked at together, to find recordings of like length
AHEAD = 4  # groups of recordings that are decoded while one is encoded
HELD_SECONDS = 600  # longer recordings are not held in memory, but read twice, block by block, while they are encoded


# ---------------------------------------------------------------------------------------------- the encoder

class UnitEncoder(nn.Module):
    """HuBERT up to one layer, and k-means: samples -> frame units.

    A long recording is encoded in pieces of 60 s that see 5 s more on both sides, which are then discarded. The statistics of
    the group norm are those of the whole recording, so pieces differ from the whole only in how far attention sees.
    chunking="textless" does as the published pipeline: independent pieces of 100 s, each normalised by itself.

    Args:
        hubert: Hubert. centers: (K, C). layer: 1 is the first. name: of the model, for the recipe.
        frame_rate: Hz; the network's own (default), half of it (neighbouring features averaged) or twice it (interpolated).
        pad: zeros put before and after each recording, samples; slamkit's models were trained with 40.
    Attributes: num_units (K), frame_rate (Hz), recipe (what identifies the units; stored beside every shard), budget (seconds
        of audio in one forward).
    """

    def __init__(self, hubert, centers, layer, name="hubert", frame_rate=None, pad=0, chunking="overlap"):
        super().__init__()
        if not 1 <= layer <= hubert.config.n_layer:
            raise ValueError(f"layer {layer}: this HuBERT has layers 1 to {hubert.config.n_layer}")
        if centers.ndim != 2 or centers.shape[1] != hubert.config.n_embd:
            raise ValueError(f"k-means centres of shape {tuple(centers.shape)} do not fit features of width "
                             f"{hubert.config.n_embd}; k-means and HuBERT belong to different models")
        native = SAMPLE_RATE / hubert.hop
        self.frame_rate = float(frame_rate or native)
        if self.frame_rate not in (native / 2, native, native * 2):
            raise ValueError(f"frame rate {frame_rate} Hz: this HuBERT gives {native:g} Hz, from which {native / 2:g} and "
                             f"{native * 2:g} can be made; take a HuBERT of another rate for others")
        if chunking not in CHUNKINGS or pad < 0:
            raise ValueError(f"chunking {chunking!r}, pad {pad}: expected {' or '.join(CHUNKINGS)}, and at least 0 samples")
        self.hubert, self.layer, self.pad, self.chunking, self.native_rate = hubert, layer, pad, chunking, native
        self.register_buffer("centers", centers.float())
        self.num_units, self.budget = len(centers), BUDGET_SECONDS["cpu"]
        self.seconds = [0.0, 0.0]  # of audio encoded so far: without and with the padding of batches
        self.recipe = {"kind": "hubert", "model": name, "layer": layer, "num_units": self.num_units,
                       "frame_rate": self.frame_rate, "centers": data.fingerprint(centers.float()),
                       "pad": pad, "chunking": chunking}

    # ---- what callers use

    def encode(self, wav):
        """(S,) float32 at 16 kHz -> (F,) int64 frame units (repeats not yet removed). Raises ValueError below one frame."""
        return self.encode_batch([wav])[0]

    @torch.inference_mode()
    def encode_batch(self, wavs):
        """List of (S_i,) -> list of (F_i,) frame units, each what its recording gives alone.

        Recordings of like length share a forward. That changes features by float32 rounding; a recording with a frame so close
        to the middle between two centres that rounding could decide is encoded again, alone.
        """
        wavs, results = [self.checked(wav) for wav in wavs], [None] * len(wavs)
        short = [i for i, wav in enumerate(wavs) if len(wav) <= self.longest]
        for batch in self.batches([len(wavs[i]) for i in short]):
            batch = [short[i] for i in batch]
            for i, units in zip(batch, self.units_of([wavs[i] for i in batch])):
                results[i] = units
        for i, wav in enumerate(wavs):
            if results[i] is None:
                results[i] = torch.cat(list(self.pieces(lambda wav=wav: [wav], self.units_of)))
        return results

    @torch.inference_mode()
    def encode_stream(self, blocks):
        """A recording of any length that is never held whole -> (F,) int64. blocks() gives its samples, block after block.

        They are asked for twice: the statistics of the group norm are those of the whole recording.
        """
        return torch.cat(list(self.pieces(self.padded(blocks), self.units_of)))

    @torch.inference_mode()
    def features(self, wav):
        """(S,) float32 at 16 kHz -> (F, C) float32. Raises ValueError below one receptive field."""
        wav = self.checked(wav)
        if len(wav) <= self.longest:
            return self.features_of([wav])[0]
        return torch.cat(list(self.pieces(lambda: [wav], self.features_of)))

    # ---- recordings that fit into one forward

    @property
    def longest(self):
        """Samples up to which a recording is encoded whole."""
        piece, context = CHUNKINGS[self.chunking]
        return int((piece + 2 * context) * SAMPLE_RATE)

    @property
    def shortest(self):
        """Samples of one frame; at half the network's rate a frame is the mean of two."""
        return self.hubert.receptive_field + (self.hubert.hop if self.frame_rate < self.native_rate else 0)

    def checked(self, wav):
        """The samples as a float32 tensor on the encoder's device, with zeros around them if the recipe says so."""
        wav = torch.as_tensor(wav, dtype=torch.float32, device=self.centers.device)
        if wav.ndim != 1:
            raise ValueError(f"expected one mono recording of shape (S,), got {tuple(wav.shape)}")
        if len(wav) + 2 * self.pad < self.shortest:
            raise ValueError(f"{len(wav)} samples are shorter than one frame ({self.shortest - 2 * self.pad} samples, "
                             f"{1000 * (self.shortest - 2 * self.pad) / SAMPLE_RATE:.0f} ms at 16 kHz); give a longer recording")
        return F.pad(wav, (self.pad, self.pad)) if self.pad else wav

    def batches(self, lengths):
        """Lists of indices that share a forward: of like length, and together within the budget."""
        groups = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[groups[-1][0]] if groups else 0
            fits = (len(groups[-1]) + 1) * longest <= self.budget * SAMPLE_RATE if groups else False
            if fits and lengths[i] >= LEAST_FILL * longest:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def features_of(self, wavs, moments=None, kept=slice(None)):
        """Features at the frame rate of recordings of any length: list of (F_i, C), cut to `kept`."""
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        self.seconds[0] += int(lengths.sum()) / SAMPLE_RATE
        self.seconds[1] += len(wavs) * int(lengths.max()) / SAMPLE_RATE
        ragged = bool((lengths != lengths[0]).any())
        try:
            x = self.hubert(nn.utils.rnn.pad_sequence(wavs, batch_first=True), self.layer, lengths if ragged else None,
                            moments=moments and Moments(*(part.expand(len(wavs), *part.shape[1:]) for part in moments)))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            x = None  # go on outside of the handler, where the failed forward's tensors are gone
        if x is not None:
            return [self.at_rate(row[:self.hubert.num_frames(len(wav))])[kept] for row, wav in zip(x, wavs)]
        if len(wavs) == 1:
            raise ValueError(f"not enough memory for {len(wavs[0]) / SAMPLE_RATE:.0f} s of audio in one forward; "
                             "use a machine with more, or close other programs")
        self.budget = len(wavs) // 2 * int(lengths.max()) / SAMPLE_RATE
        tqdm.write(f"out of memory: at most {self.budget:.0f} s of audio in one forward from here on")
        half = len(wavs) // 2
        return self.features_of(wavs[:half], moments, kept) + self.features_of(wavs[half:], moments, kept)

    def at_rate(self, x):
        """(F, C) at the network's rate -> the encoder's: the mean of neighbours, or linear interpolation between them."""
        if self.frame_rate < self.native_rate:
            return x[:len(x) // 2 * 2].view(-1, 2, x.shape[1]).mean(1)
        if self.frame_rate > self.native_rate:
            return F.interpolate(x.T[None], scale_factor=2, mode="linear", align_corners=False)[0].T
        return x

    def units_of(self, wavs, moments=None, kept=slice(None)):
        """As features_of: list of (F_i,) units, each what its recording gives in a forward of its own."""
        results = []
        for wav, x in zip(wavs, self.features_of(wavs, moments, kept)):
            if len(wavs) > 1 and not self.sure(x):
                x = self.features_of([wav], moments, kept)[0]
            results.append(self.quantize(x))
        return results

    def scores(self, features):
        """(F, C) -> (F, K): the squared distance to each centre, less the feature's own square. float32 throughout."""
        return self.centers.square().sum(1) - 2 * features.float() @ self.centers.T

    def quantize(self, features):
        """(F, C) -> (F,) int64, the nearest centre; ties go to the lowest index."""
        return self.scores(features).argmin(1)

    def sure(self, features):
        """Whether no frame is so nearly half-way between two centres that rounding of its features could decide."""
        if self.num_units == 1:
            return True
        two = self.scores(features).topk(2, largest=False)
        apart = (self.centers[two.indices[:, 0]] - self.centers[two.indices[:, 1]]).norm(dim=1)
        return bool((two.values[:, 1] - two.values[:, 0] > 2 * ROUNDING * features.norm(dim=1) * apart).all())

    # ---- long recordings

    def padded(self, blocks):
        """blocks() on the encoder's device, with zeros around the recording if the recipe says so."""
        silence = [torch.zeros(self.pad)] if self.pad else []
        return lambda: (block.to(self.centers.device) for block in itertools.chain(silence, blocks(), silence))

    def pieces(self, blocks, compute):
        """compute (features_of or units_of) of a long recording, piece after piece; blocks() gives its padded samples."""
        piece, context = (int(seconds * self.native_rate) for seconds in CHUNKINGS[self.chunking])  # frames
        moments, mean, spread, total = None, 0.0, 1.0, None
        if self.chunking == "overlap":
            piece, context = piece // 2 * 2, context // 2 * 2  # neighbours that are averaged lie in one piece
            moments, mean, spread, samples = self.statistics(blocks)
            total = self.hubert.num_frames(samples)
        ranges = self.frame_ranges(piece, context, total)
        group, group_kept = [], None
        for wav, kept in self.cut(blocks(), ranges, overlap=total is not None):
            full = group and (len(group) + 1) * len(wav) > self.budget * SAMPLE_RATE
            if group and (full or len(wav) != len(group[0]) or kept != group_kept):
                yield from compute(group, moments, group_kept)
                group = []
            group, group_kept = [*group, (wav - mean) / spread if self.hubert.config.normalize and moments else wav], kept
        if group:
            yield from compute(group, moments, group_kept)

    def frame_ranges(self, piece, context, total):
        """(first, last, slice to keep) of each piece in frames of the network; the slice in frames at the encoder's rate."""
        factor = self.frame_rate / self.native_rate
        for begin in itertools.count(0, piece):
            if total is not None and begin >= total:
                return
            first, end = max(0, begin - context), begin + piece
            last = end + context if total is None else min(total, end + context)
            yield first, last, slice(int((begin - first) * factor), int((end - first) * factor))

    def cut(self, blocks, ranges, overlap):
        """(samples, slice) of each range, from blocks that are read once; the last may be short. Memory holds one piece."""
        hop, field = self.hubert.hop, self.hubert.receptive_field
        blocks, held, start = iter(blocks), torch.zeros(0, device=self.centers.device), 0  # start: position of held[0]
        for first, last, kept in ranges:
            begin, end = first * hop, (last - 1) * hop + field if overlap else last * hop
            while start + len(held) < end and (block := next(blocks, None)) is not None:
                held = torch.cat([held, block])
            held, start = held[begin - start:], begin
            wav = held[:end - begin]
            if len(wav) < self.shortest:
                return
            yield wav, kept

    def statistics(self, blocks):
        """One pass over a recording: Moments for the group norm, mean and deviation of the waveform, number of samples."""
        kernel, stride = self.hubert.config.conv_kernel[0], self.hubert.config.conv_stride[0]
        rest, moments, samples, total, squares = torch.zeros(0, device=self.centers.device), None, 0, 0.0, 0.0
        for block in blocks():
            samples, total, squares = samples + len(block), total + block.double().sum(), squares + block.double().square().sum()
            rest = torch.cat([rest, block])  # windows that begin in one block may end in the next
            if windows := frames_of(len(rest), kernel, stride):
                part = self.hubert.moments(rest[None])
                moments, rest = part if moments is None else moments.plus(part), rest[windows * stride:]
        if samples < self.shortest:
            raise ValueError(f"{samples} samples are shorter than one frame ({self.shortest} samples); give a longer recording")
        mean, spread = 0.0, 1.0
        if self.hubert.config.normalize:  # windows of (wav - mean) / spread, from those of wav
            mean = total / samples
            spread = torch.sqrt(squares / samples - mean.square() + 1e-5)
            first = moments.first - moments.count[:, None] * mean
            second = (moments.second - mean * (moments.first[:, :, None] + moments.first[:, None, :])
                      + moments.count[:, None, None] * mean.square())
            moments = Moments(moments.count, first / spread, second / spread.square())
            mean, spread = mean.float(), spread.float()
        return moments, mean, spread, samples


# ---------------------------------------------------------------------------------------------- units and their lengths

def deduplicate(frame_units):
    """Collapse runs: (F,) -> units (T,), runs (T,), both int64. [5 5 5 2 2 5] -> [5 2 5], [3 2 1]."""
    frame_units = torch.as_tensor(frame_units)
    if frame_units.numel() == 0:
        empty = torch.zeros(0, dtype=torch.int64)
        return empty, empty.clone()
    return torch.unique_consecutive(frame_units, return_counts=True)


# ---------------------------------------------------------------------------------------------- loading

def find_kmeans(path):
    """The k-means file that belongs to a tokenizer on disk: kmeans.* in its folder, or HUBERT_L11_km500.bin beside HUBERT.pt."""
    folder = path if path.is_dir() else path.parent
    beside = [] if path.is_dir() else sorted(folder.glob(f"{glob.escape(path.stem)}*_km*"))
    if len(beside) > 1:
        raise ValueError(f"{path} has {len(beside)} k-means beside it ({', '.join(file.name for file in beside)}); "
                         "name one with --kmeans")
    for file in (*(folder / f"kmeans.{ending}" for ending in ("safetensors", "bin", "pt")), *beside):
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
                      chunking="overlap"):
    """Load HuBERT and its k-means.

    Args:
        folder_or_file_or_name: Hugging Face folder, fairseq .pt file, `pocket`, or a known name (mhubert-base-25hz).
        kmeans: file or known name; a safetensors file with `centers` (K, C), or scikit-learn's estimator as joblib wrote it.
            Default: the one that belongs to the known name, with k centres, or stands beside the tokenizer's file.
        layer: transformer layer of the features, 1 is the first; default: what the k-means file or its name says.
        k: centres that are expected. frame_rate: Hz; default: what the k-means file says, or the network's own.
        pad, chunking: see UnitEncoder.
    """
    name = str(folder_or_file_or_name)
    path = checkpoint.find(name, "tokenizer")
    if kmeans is None and name in download.KNOWN["tokenizer"]:
        kmeans = known_kmeans(name, k)
    file = checkpoint.find(str(kmeans), "kmeans") if kmeans else find_kmeans(path)
    centers, said = checkpoint.read_kmeans(file)
    if k is not None and len(centers) != k:
        raise ValueError(f"{file} has {len(centers)} centres, not {k}; name another with --kmeans, or make one with --fit={k}")
    if layer is None:
        layer = said.get("layer")
    if layer is None and kmeans in download.KNOWN["kmeans"]:
        layer = download.KNOWN["kmeans"][kmeans].layer
    layer_in_name = re.search(r"_L(\d+)_km", file.name)  # as published: ..._L11_km500.bin
    if layer is None and layer_in_name:
        layer = layer_in_name.group(1)
    if layer is None:
        raise ValueError(f"{file} does not say which layer it belongs to; give --layer")
    return UnitEncoder(load_hubert(path), centers, int(layer), name_of(name, path), frame_rate or said.get("frame_rate"), pad,
                       chunking).eval()


def name_of(name, path):
    """What the recipe calls a model: its known name, or the name of its file or folder."""
    own = name != "pocket" and Path(name).exists()
    return path.name.removesuffix(".pt") if own else name


# ---------------------------------------------------------------------------------------------- the command

@dataclass(frozen=True)
class UnitsConfig:
    audio: tuple[str, ...] = ()  # files and folders (searched recursively)
    out: str = "units/mine"  # folder for the shards; with --fit the k-means file
    tokenizer: str = "pocket"  # HuBERT: folder or .pt file, `pocket`, or a known name (mhubert-base-25hz)
    kmeans: str | None = None  # k-means file or known name; default the one that belongs to the tokenizer
    k: int | None = None  # centres, where a known tokenizer has k-means of several sizes
    layer: int | None = None  # transformer layer of the features, default the k-means file's
    frame_rate: float | None = None  # Hz: the network's own, half or twice of it; default the k-means file's
    pad: int = 0  # zeros around each recording, samples (slamkit: 40)
    chunking: str = "overlap"  # recordings over 70 s: overlap (60 s pieces, 5 s context), textless (100 s, independent)
    dedup: bool = True  # collapse runs of equal units (--no-dedup keeps every frame)
    budget: float = 0.0  # seconds of audio in one forward; 0: 60 on a CPU, 960 on a GPU
    workers: int = 2  # threads that decode ahead of the encoder
    device: str = "auto"  # auto | cpu | cuda
    inspect: str | None = None  # print what is in this folder of shards, and do nothing else
    fit: int | None = None  # fit k-means with that many centres instead of encoding
    fit_frames: int = 200_000  # frames that k-means is fitted to, a random sample of all
    seed: int = 0  # of that sample and of the fit


def find_audio(paths):
    """Files as given, folders searched recursively; sorted, so that every process sees the same order."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            files += [file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES]
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"no audio file or folder at {path}; check the path")
    if not files:
        raise ValueError(f"no audio found in {', '.join(map(str, paths)) or 'nothing'}; "
                         "give files or folders: python hubert_units.py recordings/ --out=units/mine")
    return sorted(set(files))


def tried(function, *arguments):
    """function(*arguments), or the error that says what is wrong with a file."""
    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        return error


def decoded(files, encoder, pool):
    """Groups of (file, samples or error), neighbours being of like length; decoding runs ahead of whoever takes them.

    Recordings that are too long to be held are not decoded: None in place of their samples.
    """
    queue, most = collections.deque(), encoder.budget
    for begin in range(0, len(files), WINDOW):
        window = files[begin:begin + WINDOW]
        lengths = {file: 0.0 if isinstance(seconds, Exception) else seconds  # what is wrong shows when it is read
                   for file, seconds in zip(window, pool.map(lambda file: tried(audio.duration, file), window))}
        group, total = [], 0.0
        for file in sorted(window, key=lambda file: (lengths[file], file)):
            if lengths[file] > HELD_SECONDS:
                queue.append([(file, None)])
                continue
            if group and total + lengths[file] > most:
                queue.append(group)
                group, total = [], 0.0
            group.append((file, pool.submit(tried, audio.read_wav, file)))
            total += lengths[file]
            while len(queue) > AHEAD:
                yield [(name, future and future.result()) for name, future in queue.popleft()]
        queue.append(group)
    while queue:
        yield [(name, future and future.result()) for name, future in queue.popleft()]


def encode_long(file, encoder):
    """Frame units and seconds of a recording that is read block by block."""
    samples = 0

    def blocks():
        nonlocal samples
        samples = 0
        for block in audio.read_blocks(file):
            samples += len(block)
            yield block

    return encoder.encode_stream(blocks), samples / SAMPLE_RATE


def encode_group(group, encoder):
    """[(file, samples, error or None)] -> [(file, frame units and seconds, or error)]."""
    results = [(file, wav if isinstance(wav, Exception) else
                tried(encode_long, file, encoder) if wav is None else tried(encoder.checked, wav)) for file, wav in group]
    good = [(i, wav) for i, ((_, result), (_, wav)) in enumerate(zip(results, group)) if isinstance(result, torch.Tensor)]
    for (i, wav), frames in zip(good, encoder.encode_batch([wav for _, wav in good])):
        results[i] = results[i][0], (frames, len(wav) / SAMPLE_RATE)
    return results


def encode_files(files, encoder, options, dist):
    """The command: every process journals what it finishes; when all have, one joins the journals to shards."""
    recipe, names = {**encoder.recipe, "dedup": options.dedup}, [str(file) for file in files]
    meta = data.complete(options.out, recipe, names)
    if meta:
        return meta
    journal = data.Journal(options.out, recipe, dist.rank)
    mine = [file for file in names[dist.rank::dist.world] if file not in journal.finished]
    hours, failures, began = 0.0, 0, time.perf_counter()
    bar = tqdm(total=len(names[dist.rank::dist.world]), initial=len(names[dist.rank::dist.world]) - len(mine), desc="encoding",
               unit="file", disable=None if dist.is_main else True)
    with ThreadPoolExecutor(options.workers) as pool:
        for group in decoded(mine, encoder, pool):
            for file, result in encode_group(group, encoder):
                if isinstance(result, Exception):
                    journal.fail(file, str(result))
                    failures += 1
                else:
                    frames, seconds = result[0].cpu(), result[1]
                    units, runs = deduplicate(frames) if options.dedup else (frames, torch.ones_like(frames))
                    journal.add(file, units.numpy(), runs.numpy(), seconds)
                    hours += seconds / 3600
            journal.flush()
            bar.update(len(group))
            speed = hours * 3600 / (time.perf_counter() - began)
            bar.set_postfix_str(f"{hours:.2f} h, {speed:.0f} x real time, {failures} failed")
    bar.close()
    journal.close()
    dist.barrier()
    return data.assemble(options.out, recipe, names) if dist.is_main else None


def fit(files, options, dist):
    """The command with --fit: features of all files, a random sample of their frames, k-means of those."""
    if dist.world > 1:
        raise ValueError("--fit runs on one process; start it without torchrun")
    path = checkpoint.find(options.tokenizer, "tokenizer")
    hubert = load_hubert(path).to(dist.device)
    if dist.device.type == "cpu":
        hubert.pack()
    no_centers, layer = torch.zeros(1, hubert.config.n_embd, device=dist.device), options.layer or hubert.config.n_layer
    encoder = UnitEncoder(hubert, no_centers, layer, name_of(options.tokenizer, path), options.frame_rate, options.pad,
                          options.chunking)
    generator, sample, seen = torch.Generator().manual_seed(options.seed), None, 0
    for file in tqdm(files, desc="features", unit="file", disable=None):
        wav = tried(audio.read_wav, file)
        features = wav if isinstance(wav, Exception) else tried(encoder.features, wav)
        if isinstance(features, Exception):
            tqdm.write(f"left out: {features}")
            continue
        sample = reservoir(sample, features.cpu(), seen, options.fit_frames, generator)
        seen += len(features)
    if sample is None:
        raise ValueError(f"none of the {len(files)} files gave features; see above")
    centers, inertia = fit_kmeans(sample, options.fit, generator, batch=max(4096, 10 * options.fit))
    out = Path(options.out)
    out = out if out.suffix == ".safetensors" else out / "kmeans.safetensors"
    checkpoint.write_tensors(out, {"centers": centers}, {
        "layer": str(encoder.layer), "frame_rate": str(encoder.frame_rate), "model": encoder.recipe["model"]})
    print(f"{options.fit} centres of {len(sample)} of {seen} frames, layer {layer}, {encoder.frame_rate:g} Hz: mean squared "
          f"distance {inertia:.4f} (of the frames to their mean {sample.var(0, correction=0).sum():.4f}); wrote {out}")


def main(argv=None):
    options = config.load(UnitsConfig, argv, positional="audio")
    if options.inspect:
        print(data.inspect(options.inspect))
        return
    if options.workers < 1 or options.budget < 0 or options.fit_frames < 1:
        raise ValueError("expected --workers and --fit-frames of at least 1 and no negative --budget")
    dist = distributed.setup(options.device, timedelta(days=30))  # one process may be done days before the last
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits in the positional convolution would flip units
    files = find_audio(options.audio)
    if options.fit:
        return fit(files, options, dist)
    encoder = load_unit_encoder(options.tokenizer, options.kmeans, options.layer, options.k, options.frame_rate, options.pad,
                                options.chunking).to(dist.device)
    if dist.device.type == "cpu":
        encoder.hubert.pack()
    encoder.budget = options.budget or BUDGET_SECONDS[dist.device.type]
    meta = encode_files(files, encoder, options, dist)
    if dist.is_main:
        waste = 1 - encoder.seconds[0] / encoder.seconds[1] if encoder.seconds[1] else 0.0
        print(f"{meta['files']} files, {meta['hours']:.3f} h, {meta['units']} units "
              f"({meta['units'] / max(meta['hours'] * 3600, 1e-9):.1f} per second) in {options.out}; padding {waste:.1%}; "
              f"{meta['failures']} failures" + (f", listed in {options.out}/failures.csv" if meta["failures"] else ""))
        if meta["files"] == 0:
            raise ValueError(f"none of the {meta['failures']} files could be encoded; see {options.out}/failures.csv")
    distributed.leave()


if __name__ == "__main__":
    config.command(main)
