"""Unit shards -> batches: the batch of step s is a pure function of (seed, s), on any number of processes.

    stream    <S> u u u u u <S> u u u <S> u u u u u u u u u <S> u u ...       every document behind the token that begins it
    windows   [0 . . . . . . .][1 . . . . . . .][2 . . . . . . .][3 . .       T inputs each, targets one to the right
    order     epoch 0: 2 0 1   epoch 1: 1 2 0   ...                           a permutation of all windows per epoch
    step s    takes the windows at positions s B .. (s + 1) B of the order; each process takes its own rows of them

No process keeps a place in the data, so a run resumes exactly, on any number of processes, by asking for the next step. The
stream is never built. Only the documents' bounds are held, 8 bytes of each (16 of a fraction's); units stay in the memory-mapped
shards until a batch gathers them:

    document j of the stream occupies positions bounds[j] .. bounds[j + 1]; its unit at position p is raw unit p + shifts[j]

so a batch is a few hundred pieces (document, window), found by searchsorted, and a handful of passes over B (T + 1) numbers.

    loader = UnitLoader(UnitShards("units/train"), vocab, block_size=1024, batch=64, seed=0, packing="documents")
    ids, targets, document_starts = loader.rows(step, rank * 8, 8)         # 8 of the 64 rows of this step
    python -m bench loader                                                  # units per second, beside a reader of JSON lines

Shapes: B rows of a step, T positions of a window. Source: TWIST (arXiv 2305.13009), figure 2 (data fractions).
"""
from typing import NamedTuple

import numpy as np
import torch

from corpus.shards import check_recipe

PACKINGS = ("stream", "documents")
SUBSET_SEED = 2305  # of the order in which fractions take documents: the same subset for every run
WHOLE_UNITS = 2**29  # a corpus of fewer is soon in memory whole, a gigabyte, if the system reads ahead
ROUND = 1000  # rows of a mixture in which every corpus has exactly its share


class Batch(NamedTuple):
    """What one forward takes: rows of a step."""

    ids: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64: the id after each, -100 where there is none
    document_starts: torch.Tensor | None  # (B, T) int32: where in the row the position's document begins; None: one document

    @property
    def count(self):
        """Targets that count; of a batch on the CPU."""
        return np.count_nonzero(self.targets.numpy() != -100)

    def pinned(self):
        """The same in memory from which a GPU copies by itself."""
        return Batch(*(part if part is None else part.pin_memory() for part in self))

    def to(self, device):
        """The same on a device, to which a GPU copies pinned rows while the host goes on. They may be dropped at once: PyTorch
        gives pinned memory away again only after an event that it records behind the copy."""
        return Batch(*(part if part is None else part.to(device, non_blocking=device.type == "cuda") for part in self))

    def split(self, rows):
        """The same in batches of at most this many rows."""
        starts = [None] * len(self.ids) if self.document_starts is None else self.document_starts.split(rows)
        return [Batch(*pieces) for pieces in zip(self.ids.split(rows), self.targets.split(rows), starts)]


def subset(lengths, fraction):
    """Documents that hold this fraction of the units: (documents,) int64, ascending. A smaller fraction's lie among them.

    Args: lengths (documents,) int64, units of each; fraction in (0, 1]. Taken: the shortest prefix of one random order.
    """
    if fraction == 1:
        return np.arange(len(lengths))
    order = np.random.default_rng(SUBSET_SEED).permutation(len(lengths))
    units = np.cumsum(lengths[order])
    return np.sort(order[:np.searchsorted(units, fraction * units[-1]) + 1])


def numbered(numbers, windows):
    """(B,) int64 of window numbers, if there are such windows."""
    numbers = np.asarray(numbers, np.int64)
    if numbers.min() < 0 or numbers.max() >= windows:
        raise ValueError(f"windows {numbers.min()} .. {numbers.max()} were asked for, there are 0 .. {windows - 1}")
    return numbers


class UnitLoader:
    """Windows over the documents of one corpus, without replacement within an epoch.

    Args:
        shards: UnitShards. vocab: twist.UnitVocab; where its bos is None, documents follow each other directly.
        block_size: T. batch: rows B of the whole step, over all processes. seed: of the order.
        packing: stream: attention and targets go on into the next document. documents: the same windows with document_starts
            for kernels.attention; a document's last unit has the next <S> as its target, and none where there is no <S>.
        fraction: share of the units, of whole documents, in (0, 1].
    Attributes: windows: how many an epoch has. T: positions of each. targets: that count in every step; None: it depends.
    Raises: ValueError for options out of range, or fewer ids than one window needs.
    """

    def __init__(self, shards, vocab, block_size, batch, seed, *, packing="stream", fraction=1.0):
        if packing not in PACKINGS:
            raise ValueError(f"packing is {packing!r}, expected {' or '.join(PACKINGS)}")
        if not 0 < fraction <= 1:
            raise ValueError(f"the fraction of the data is {fraction}, expected more than 0 and at most 1")
        if block_size < 1 or batch < 1:
            raise ValueError(f"block size {block_size} and batch {batch}: expected at least 1 of each")
        self.shards, self.vocab, self.T, self.batch, self.seed, self.packing = shards, vocab, block_size, batch, seed, packing
        self.targets = batch * block_size if packing == "stream" or vocab.bos is not None else None
        self.units = [np.asarray(units) for units, *_ in shards.parts if len(units)]
        self.unit_bounds = np.cumsum([0] + [len(units) for units in self.units])  # raw units before each file
        if self.unit_bounds[-1] > WHOLE_UNITS:
            shards.read_at_random()
        between = int(vocab.bos is not None)
        if fraction == 1:
            self.bounds, self.shifts = shards.bounds(between), None
        else:
            lengths = shards.lengths
            kept = subset(lengths, fraction)
            self.bounds = np.append(0, np.cumsum(lengths[kept] + between))
            self.shifts = np.cumsum(lengths)[kept] - self.bounds[1:]
        # windows overlap by one id: the target of a window's last position is the first input of the next
        self.windows = (int(self.bounds[-1]) - 1) // block_size
        if self.windows < 1:
            raise ValueError(f"{shards.folder} holds {int(self.bounds[-1])} ids, fewer than one window of {block_size + 1}"
                             f"{f', at a fraction of {fraction}' if fraction < 1 else ''}; "
                             "give more audio or a smaller --block-size")
        self.epoch, self.order = None, None

    def rows(self, step, first, count):
        """Batch of rows first .. first + count of this step."""
        return self.window(*self.numbers(step * self.batch + first + np.arange(count)))

    def numbers(self, positions):
        """Window at each position of the endless order: (B,) int64 -> (B,) int64."""
        epochs, indices = np.divmod(positions, self.windows)
        found = np.empty_like(positions)
        for epoch in np.unique(epochs):
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.windows)
            found[epochs == epoch] = self.order[indices[epochs == epoch]]
        return found

    def window(self, *numbers):
        """Batch of the windows of these numbers, in 0 .. windows - 1; window(w) has one row."""
        begins = numbered(numbers, self.windows) * self.T  # stream positions
        documents, rows, sizes = self.pieces(begins)
        units = self.gather(documents, begins[rows] - rows * (self.T + 1), sizes).reshape(-1, self.T + 1)
        ids, targets = (np.add(part, self.vocab.offset, dtype=np.int64) for part in (units[:, :-1], units[:, 1:]))
        piece_begins = self.bounds[documents] - begins[rows]  # in its row; negative where the left edge cuts the document
        if self.vocab.bos is not None:
            for part, places in ((ids, piece_begins), (targets, piece_begins - 1)):
                inside = (0 <= places) & (places < self.T)
                part[rows[inside], places[inside]] = self.vocab.bos
        if self.packing == "stream":
            return Batch(torch.from_numpy(ids), torch.from_numpy(targets), None)
        if self.vocab.bos is None:
            targets[rows[piece_begins > 0], piece_begins[piece_begins > 0] - 1] = -100
        sizes[np.cumsum(np.bincount(rows)) - 1] -= 1  # the T + 1st id of a row is a target only
        starts = np.repeat(np.maximum(piece_begins, 0).astype(np.int32), sizes).reshape(-1, self.T)
        return Batch(*map(torch.from_numpy, (ids, targets, starts)))

    def pieces(self, begins):
        """Documents in the T + 1 ids of windows at stream positions (B,) -> document, row, ids in the row: (pieces,) each."""
        first, last = (np.searchsorted(self.bounds, at, side="right") - 1 for at in (begins, begins + self.T))
        counts = last - first + 1
        rows = np.repeat(np.arange(len(begins)), counts)
        documents = np.arange(len(rows)) + np.repeat(first - np.cumsum(counts) + counts, counts)
        ends = rows * (self.T + 1) + np.minimum(self.bounds[documents + 1] - begins[rows], self.T + 1)
        return documents, rows, np.diff(ends, prepend=0)

    def gather(self, documents, offsets, sizes):
        """Raw units of the pieces, one after the other: (sum of sizes,) uint16; anything where <S> belongs.

        Args: (pieces,) each: document; stream position less place in the result; how many.
        """
        # where no document is left out, each up to this one has put in one <S>, or none
        shifts = -(documents + 1) * (self.vocab.bos is not None) if self.shifts is None else self.shifts[documents]
        behind = shifts + self.bounds[documents + 1]  # raw unit behind the document: tells its file
        files = np.searchsorted(self.unit_bounds[1:], behind)
        raw = np.repeat(offsets + shifts - self.unit_bounds[files], sizes)
        raw += np.arange(len(raw))
        units, ends = np.empty(len(raw), np.uint16), np.cumsum(sizes)
        begin = 0
        for last in [*np.flatnonzero(np.diff(files)), len(files) - 1]:  # the last piece before another file
            part = slice(begin, ends[last])
            # clip, because <S> of a file's first document would lie before the file
            np.take(self.units[files[last]], raw[part], mode="clip", out=units[part])
            begin = ends[last]
        if units.max() >= self.vocab.num_units:
            self.vocab.encode(units)  # raises, in a sentence
        return units


class Mixture:
    """Several corpora by weight, with the interface of UnitLoader: which corpus a row comes from depends on (seed, position).

    Rounds of ROUND rows have exact quotas in an order of their own; each corpus goes through its own epochs, in its own order.

    Args:
        loaders: UnitLoaders with one T, vocab and packing, whose shards share a recipe; batch and seed are the first one's.
        weights: shares of the rows, above 0; they are divided by their sum.
    Raises: ValueError for weights out of range, or corpora that do not fit together.
    """

    def __init__(self, loaders, weights):
        if not loaders or len(weights) != len(loaders) or not all(0 < weight < np.inf for weight in weights):
            raise ValueError(f"--data-weights={','.join(f'{weight:g}' for weight in weights)} for {len(loaders)} corpora: "
                             "expected one finite number above 0 for each folder of --data")
        first = loaders[0]
        for other in loaders[1:]:
            check_recipe(other.shards.recipe, first.shards.recipe, other.shards.folder)
            if (other.T, other.vocab, other.packing) != (first.T, first.vocab, first.packing):
                raise ValueError(f"{other.shards.folder}: not the block size, vocabulary and packing of {first.shards.folder}")
        self.loaders, self.batch, self.seed, self.T, self.targets = loaders, first.batch, first.seed, first.T, first.targets
        self.bounds = np.cumsum([0] + [loader.windows for loader in loaders])  # windows are numbered corpus after corpus
        self.windows = int(self.bounds[-1])
        shares = np.asarray(weights, np.float64) / np.sum(weights) * ROUND
        self.quotas = np.floor(shares).astype(np.int64)
        self.quotas[np.argsort(self.quotas - shares, kind="stable")[:ROUND - self.quotas.sum()]] += 1  # largest remainders
        if self.quotas.min() < 1:
            raise ValueError(f"weights {list(weights)}: the smallest is under one row in {ROUND}; leave that corpus out")

    rows = UnitLoader.rows  # by numbers() and window() of its own

    def numbers(self, positions):
        rounds, indices = np.divmod(positions, ROUND)
        found = np.empty_like(positions)
        for number in np.unique(rounds):
            order = np.random.default_rng([self.seed, number, ROUND]).permutation(np.repeat(range(len(self.quotas)), self.quotas))
            for corpus, loader in enumerate(self.loaders):
                before = np.cumsum(order == corpus) - 1  # rows of that corpus that came before, where the row is of it
                here = (rounds == number) & (order[indices] == corpus)
                turns = number * self.quotas[corpus] + before[indices[here]]
                found[here] = self.bounds[corpus] + loader.numbers(turns)
        return found

    def window(self, *numbers):
        numbers = numbered(numbers, self.windows)
        corpora = np.searchsorted(self.bounds, numbers, side="right") - 1
        here = [np.flatnonzero(corpora == corpus) for corpus in range(len(self.loaders))]
        parts = [loader.window(*(numbers[rows] - begin))
                 for loader, rows, begin in zip(self.loaders, here, self.bounds) if len(rows)]
        back = torch.from_numpy(np.argsort(np.concatenate(here)))
        return Batch(*(None if tensors[0] is None else torch.cat(tensors)[back] for tensors in zip(*parts)))


def mixed(loaders, weights):
    """One loader, or the Mixture of several. weights: a number for each, as text; none: by their sizes."""
    try:
        numbers = [float(weight) for weight in weights] or [loader.windows for loader in loaders]
    except ValueError:
        raise ValueError(f"--data-weights={','.join(weights)}: expected numbers") from None
    mixture = Mixture(loaders, numbers)  # refuses what does not fit
    return mixture if len(loaders) > 1 else loaders[0]
