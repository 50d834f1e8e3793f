"""Speech -> frame units, exactly: one recording, a ragged batch, or hours that are never held whole.

    wavs (S_i,) --like lengths together--> Hubert --> features (F_i, C) --nearest centre--> frame units (F_i,)
    frame units (F,) --deduplicate--> units (T,), runs (T,)

A recording has the same units alone and in a batch: the group norm takes its statistics over each recording's own samples
(hubert.py), and a frame that rounding could push to another centre is decided alone. A long recording goes in pieces. Precisions
below float32 do not promise that: nearly every recording has a frame that their rounding could push.

A GPU is not waited for while it could work: batches come in on a stream of their own, units go back in one copy a batch.

Source: HuBERT, Hsu et al. 2021 (arXiv 2106.07447) section III. Shapes: B batch, S samples, F frames, C width, K centres, T units.
"""
import functools
import itertools

import torch
import torch.nn as nn
from torch.nn import functional
from tqdm import tqdm

from speech.audio import SAMPLE_RATE
from speech.hubert import Moments, frames_of
from speech.kmeans import fingerprint
from speech.precision import PRECISIONS, check_precision, exactly, full_precision

CHUNKINGS = {"overlap": (60, 5), "textless": (100, 0)}  # seconds of a piece of a long recording, of context on each side
BUDGET_SECONDS = {"cpu": 60, "cuda": 960}  # audio in one forward, padding included
LEAST_FILL = 0.9  # recordings share a forward if the shortest is at least this share of the longest
ROUNDING = 5e-6  # of features in a batch against alone, relative to their norm; python -m bench units met 1e-6 at most


def deduplicate(frame_units):
    """Collapse runs: (F,) -> units (T,), runs (T,), both int64. [5 5 5 2 2 5] -> [5 2 5], [3 2 1]."""
    return torch.unique_consecutive(torch.as_tensor(frame_units, dtype=torch.int64), return_counts=True)


class UnitEncoder(nn.Module):
    """HuBERT up to one layer, and k-means: samples -> frame units.

    A long recording is encoded in pieces of 60 s that see 5 s more on both sides, which are then discarded. The statistics of
    the group norm are those of the whole recording, so pieces differ from the whole only in how far attention sees.
    chunking="textless" does as the published pipeline: independent pieces of 100 s, the waveform normalised as a whole if at all.

    Args:
        hubert: Hubert. centers: (K, C). layer: 1 is the first. name: of the model, for the recipe.
        frame_rate: Hz; the network's own (default), half of it (neighbouring features averaged) or twice it (interpolated).
        pad: zeros put before and after each recording, samples; slamkit's models were trained with 40.
        precision: of products (precision.py); the first convolution, norms, soft-max and distances are in float32 always.
    Attributes: num_units (K), frame_rate (Hz), recipe (what identifies the units; stored beside every shard), budget (seconds
        of audio in one forward).
    """

    def __init__(self, hubert, centers, layer, name="hubert", frame_rate=None, pad=0, chunking="overlap",
                 precision="float32"):
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
        if chunking not in CHUNKINGS or pad < 0 or precision not in PRECISIONS:
            raise ValueError(f"chunking {chunking!r}, pad {pad}, precision {precision!r}: expected {' or '.join(CHUNKINGS)}, "
                             f"at least 0 samples, and one of {', '.join(PRECISIONS)}")
        self.precision, self.copying = precision, None  # the stream on which batches come to a GPU
        self.hubert, self.layer, self.pad, self.chunking, self.native_rate = hubert, layer, pad, chunking, native
        self.register_buffer("centers", centers.float())
        self.num_units, self.budget = len(centers), BUDGET_SECONDS["cpu"]
        self.least_certainty = 0.0  # of speech, where the file of the centres says it
        self.seconds = [0.0, 0.0]  # of audio encoded so far: without and with the padding of batches
        self.recipe = {"kind": "hubert", "model": name, "layer": layer, "num_units": self.num_units,
                       "frame_rate": self.frame_rate, "centers": fingerprint(centers.float()),
                       "pad": pad, "chunking": chunking, "precision": precision}

    # ---- what callers use

    def encode(self, wav):
        """(S,) float32 at 16 kHz -> (F,) int64 frame units (repeats not yet removed). Raises ValueError below one frame."""
        return self.encode_batch([wav])[0]

    def encode_batch(self, wavs):
        """List of (S_i,) -> list of (F_i,) int64 frame units on the CPU, each what its recording gives alone.

        Recordings of like length share a forward. That changes features by float32 rounding; a recording with a frame so close
        to the middle between two centres that rounding could decide is encoded again, alone. In other precisions it is not.
        """
        return self.begin(wavs)()

    @torch.inference_mode()
    def begin(self, wavs):
        """encode_batch in two parts: a GPU has the work after this one, and what it returns waits for the units."""
        wavs = [self.checked(wav) for wav in wavs]
        begun = [(batch, self.units_begun([wavs[i] for i in batch])) for batch in self.batches([len(wav) for wav in wavs])]

        @torch.inference_mode()
        def finish():
            found = {i: units for batch, waits in begun for i, units in zip(batch, [unit for wait in waits for unit in wait()])}
            return [found[i] for i in range(len(wavs))]
        return finish

    @torch.inference_mode()
    def encode_stream(self, blocks):
        """A recording of any length that is never held whole -> (F,) int64. blocks() gives its samples, block after block.

        They are asked for twice: the statistics of the group norm are those of the whole recording.
        """
        return self.in_pieces(blocks, self.units_of)

    @torch.inference_mode()
    def features(self, wav):
        """(S,) float32 at 16 kHz -> (F, C) float32. Raises ValueError below one receptive field."""
        return self.features_of([self.checked(wav)])[0]

    def certainty(self, features):
        """(F, C) -> in [0, 1], how likely the likeliest unit of each frame is, their mean. Of centres that were learnt with the
        network: negative squared distances, halved, are then logits (pocket/train_hubert.py)."""
        return (torch.cdist(features, self.centers).square() / -2).softmax(1).amax(1).mean().item()

    def in_pieces(self, blocks, compute):
        """compute (features_of or units_of) of a recording that does not fit into one forward; blocks() gives its samples."""
        silence = [torch.zeros(self.pad)]
        return torch.cat(list(self.pieces(lambda: (
            block.to(self.centers.device) for block in itertools.chain(silence, blocks(), silence)), compute)))

    # ---- recordings that fit into one forward

    @property
    def longest(self):
        """Samples up to which a recording is encoded whole."""
        piece, context = CHUNKINGS[self.chunking]
        return int((piece + 2 * context) * SAMPLE_RATE) - 2 * self.pad

    @property
    def shortest(self):
        """Samples of one frame; at half the network's rate a frame is the mean of two."""
        return self.hubert.receptive_field + (self.hubert.hop if self.frame_rate < self.native_rate else 0)

    def checked(self, wav):
        """The samples as a float32 tensor, where they are."""
        wav = torch.as_tensor(wav, dtype=torch.float32, device=self.centers.device if getattr(wav, "is_cuda", False) else None)
        if wav.ndim != 1:
            raise ValueError(f"expected one mono recording of shape (S,), got {tuple(wav.shape)}")
        if len(wav) + 2 * self.pad < self.shortest:
            raise ValueError(f"{len(wav)} samples are shorter than one frame ({self.shortest - 2 * self.pad} samples, "
                             f"{1000 * (self.shortest - 2 * self.pad) / SAMPLE_RATE:.0f} ms at 16 kHz); give a longer recording")
        return wav

    def batches(self, lengths):
        """Lists of indices that share a forward: of like length, and together within the budget; each long one is alone."""
        groups, group, most = [], [], 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if len(group) == most or lengths[i] < LEAST_FILL * lengths[group[0]]:
                most = max(1, int(self.budget * SAMPLE_RATE) // lengths[i]) if lengths[i] <= self.longest else 1
                group = []
                groups.append(group)
            group.append(i)
        return groups

    def features_of(self, wavs, moments=None, kept=slice(None)):
        """Features at the frame rate of recordings of any length: list of (F_i, C), cut to `kept`."""
        if moments is None and len(wavs[0]) > self.longest:
            return [self.in_pieces(lambda: wavs, self.features_of)]
        return self.within_memory(lambda wavs: [row[:count] for row, count in zip(*self.one_forward(wavs, moments, kept))], wavs)

    def units_of(self, wavs, moments=None, kept=slice(None)):
        """As features_of: list of (F_i,) units on the CPU, each what its recording gives in a forward of its own."""
        return [units for wait in self.units_begun(wavs, moments, kept) for units in wait()]

    def units_begun(self, wavs, moments=None, kept=slice(None)):
        """units_of in two parts: a GPU has the work, and what is returned, one function a forward, waits for the units."""
        if moments is None and len(wavs[0]) > self.longest:
            return [lambda: [self.in_pieces(lambda: wavs, self.units_of)]]

        def compute(wavs):
            x, frames = self.one_forward(wavs, moments, kept)
            units = self.nearest(x.flatten(0, 1), len(wavs) > 1).view(x.shape[:2]).to("cpu", non_blocking=True)
            arrived = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None
            return [functools.partial(wait, wavs, units, frames, arrived)]

        def wait(wavs, units, frames, arrived):
            if arrived:
                arrived.synchronize()
            found = [torch.from_numpy(row[:count].astype("int64")) for row, count in zip(units.numpy(), frames)]
            if len(wavs) == 1 and (found[0] < 0).any():
                raise ValueError(f"its features are too large for --precision={self.precision}; choose --precision=float32")
            return [self.units_of([wav], moments, kept)[0] if (units < 0).any() else units for wav, units in zip(wavs, found)]
        return self.within_memory(compute, wavs)

    def within_memory(self, compute, wavs):
        """compute(wavs), a list; where memory runs out, of one half and of the other, and the budget is smaller from then on."""
        try:
            return compute(wavs)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
        # go on outside of the handler, where the failed forward's tensors are gone
        longest, half = max(map(len, wavs)) / SAMPLE_RATE, len(wavs) // 2
        if not half:
            raise ValueError(f"not enough memory for {longest:.0f} s of audio in one forward; "
                             "use a machine with more, or close other programs")
        self.budget = half * longest
        tqdm.write(f"out of memory: at most {self.budget:.0f} s of audio in one forward from here on")
        return self.within_memory(compute, wavs[:half]) + self.within_memory(compute, wavs[half:])

    def one_forward(self, wavs, moments, kept):
        """Recordings, or pieces of one (with moments), at once: (B, F, C) at the frame rate; how many frames of each count."""
        device, pad = self.centers.device, self.pad if moments is None else 0  # pieces have their zeros
        check_precision(self.precision, device)
        lengths = [len(wav) + 2 * pad for wav in wavs]
        batch = torch.empty(len(wavs), max(lengths), device=wavs[0].device, pin_memory=wavs[0].device.type != device.type)
        for row, wav in zip(batch, wavs):
            row[:pad], row[pad:pad + len(wav)], row[pad + len(wav):] = 0, wav, 0
        self.seconds[0] += sum(lengths) / SAMPLE_RATE
        self.seconds[1] += batch.numel() / SAMPLE_RATE
        batch, ragged = self.moved(batch), None if len(set(lengths)) == 1 else self.moved(torch.tensor(lengths))
        with full_precision(device.type, self.precision):
            x = self.hubert(batch, self.layer, ragged, moments=moments)
        x, frames = self.at_rate(x, [self.hubert.num_frames(length) for length in lengths])
        return x[:, kept], [len(range(count)[kept]) for count in frames]

    def moved(self, x):
        """A tensor on the encoder's device; to a GPU on a stream of its own, while the work that it has before goes on."""
        if x.device.type == self.centers.device.type:
            return x
        now = torch.cuda.current_stream(self.centers.device)
        self.copying = self.copying or torch.cuda.Stream(self.centers.device)
        with torch.cuda.stream(self.copying):
            x = x.pin_memory().to(self.centers.device, non_blocking=True)
        now.wait_stream(self.copying)
        x.record_stream(now)  # until it is done with this, no other copy gets the memory
        return x

    def at_rate(self, x, frames):
        """(B, F, C) at the network's rate, of which `frames` of each row count -> both at the encoder's rate: the mean of
        neighbours, or linear interpolation between them."""
        if self.frame_rate < self.native_rate:
            return x[:, :x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2), [count // 2 for count in frames]
        if self.frame_rate > self.native_rate:
            rows = [functional.interpolate(row[:count].T[None], scale_factor=2, mode="linear", align_corners=False)[0].T
                    for row, count in zip(x, frames)]  # each to its own end
            return nn.utils.rnn.pad_sequence(rows, batch_first=True), [2 * count for count in frames]
        return x, frames

    @exactly
    def scores(self, features):
        """(N, C) -> (N, K): the squared distance to each centre, less the feature's own square. float32 throughout."""
        return self.centers.square().sum(1) - 2 * features.float() @ self.centers.T

    def quantize(self, features):
        """(N, C) -> (N,) int64, the nearest centre; ties go to the lowest index."""
        return self.scores(features).argmin(1)

    def nearest(self, features, together):
        """(N, C) -> (N,) int32, the nearest centre u; ~u, below 0, if that is open: the feature is no finite number, or it is of
        a batch (together) and so nearly half-way between two centres that rounding could decide, in float32."""
        scores = self.scores(features)
        least, units = scores.min(1)
        sure = least.isfinite()
        if together and self.precision == "float32":
            second, other = scores.scatter_(1, units[:, None], torch.inf).min(1)
            apart = (self.centers[units] - self.centers[other]).norm(dim=1)
            sure = second - least > 2 * ROUNDING * features.norm(dim=1) * apart
        return torch.where(sure, units, ~units).int()

    # ---- long recordings

    def pieces(self, blocks, compute):
        """compute (features_of or units_of) of a long recording, piece after piece; blocks() gives its padded samples."""
        piece, context = (int(seconds * self.native_rate) for seconds in CHUNKINGS[self.chunking])  # frames
        moments, mean, spread, overlap = False, 0.0, 1.0, 0
        if self.chunking == "overlap":
            piece, context = piece // 2 * 2, context // 2 * 2  # neighbours that are averaged lie in one piece
            moments, mean, spread = self.statistics(blocks)
            overlap = self.hubert.receptive_field - self.hubert.hop
        elif self.hubert.config.normalize:
            _, mean, spread = self.statistics(blocks)
        pieces = self.cut(blocks(), piece, context, overlap)
        for (length, kept), alike in itertools.groupby(pieces, key=lambda found: (len(found[0]), found[1])):
            while group := list(itertools.islice(alike, max(1, int(self.budget * SAMPLE_RATE) // length))):
                yield from compute([(wav - mean) / spread for wav, _ in group], moments, kept)

    def cut(self, blocks, piece, context, overlap):
        """(samples, slice of their features to keep) of each piece, from blocks that are read once; memory holds one piece.

        piece, context: frames of the network; the slice is in frames at the encoder's rate. overlap: samples that the last
        frame sees of the next, or 0 if pieces are independent and lose that frame. The last pieces may be short.
        """
        hop, factor = self.hubert.hop, self.frame_rate / self.native_rate
        blocks, held, start = iter(blocks), torch.zeros(0, device=self.centers.device), 0  # start: position of held[0]
        for begin in itertools.count(0, piece):
            first, end = max(0, begin - context), begin + piece
            seen = (end + context) * hop + overlap
            while start + len(held) < seen and (block := next(blocks, None)) is not None:
                held = torch.cat([held, block])
            if start + len(held) - begin * hop < self.shortest:
                return
            held, start = held[first * hop - start:], first * hop
            yield held[:seen - start], slice(int((begin - first) * factor), int((end - first) * factor))

    def statistics(self, blocks):
        """One pass over a recording: Moments for the group norm, mean and deviation of the waveform."""
        kernel, stride = self.hubert.config.conv_kernel[0], self.hubert.config.conv_stride[0]
        rest, moments, samples, total, squares = torch.zeros(0, device=self.centers.device), (0, 0, 0), 0, 0.0, 0.0
        for block in blocks():
            samples, total, squares = samples + len(block), total + block.double().sum(), squares + block.double().square().sum()
            rest = torch.cat([rest, block])  # windows that begin in one block may end in the next
            if windows := frames_of(len(rest), kernel, stride):
                # added up at once: small tensors that are kept from every block would hold freed memory apart
                moments = Moments(*(a + b for a, b in zip(moments, self.hubert.moments(rest[None]))))
                rest = rest[windows * stride:]
        if samples < self.shortest:
            raise ValueError(f"{samples} samples are shorter than one frame ({self.shortest} samples); give a longer recording")
        if not self.hubert.config.normalize:
            return moments, 0.0, 1.0
        count, first, second = moments
        mean = total / samples
        spread = torch.sqrt(squares / samples - mean.square() + 1e-5)
        # windows of (wav - mean) / spread, from those of wav
        second = second - mean * (first[:, :, None] + first[:, None, :]) + count[:, None, None] * mean.square()
        moments = Moments(count, (first - count[:, None] * mean) / spread, second / spread.square())
        return moments, mean.float(), spread.float()
