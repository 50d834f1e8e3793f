"""The inspector's page: what a folder of units looks like, what each unit sounds like, and where two folders differ.

    python hubert_units.py --inspect=units/x --page                             # units/x/index.html, beside the shards
    python hubert_units.py --inspect=units/x --beside=units/y --page=x_y.html   # of the same recordings: where do units differ?

    UnitShards --measure--> numbers, charts
      some documents --recordings, where they are at hand--> spectrograms over strips of units
                     --frames of each unit--> its mean spectrum;  --longest runs of it--> places to hear it
      two folders    --compare (differences.py)--> how well they agree; strips of both, marked where they differ

Sounds stay where they are: players lead to the recordings themselves, from the page by relative paths. Nothing is synthesised.
Shapes: S samples, T units, C columns of a spectrogram.
"""
import os
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import config
from corpus.extract import tried
from corpus.inspector import measure, summary
from corpus.shards import UnitShards
from pages import charts, html
from pages.clips import BANDS, HOP, PICTURE, PIXELS, RANGE, STRIP, Clip, boxes, colour, mel, ramp, spectrogram
from pages.differences import at_equal_times, compare, matched, paths_of
from pages.listening import KEYS
from speech.audio import SAMPLE_RATE, read_blocks

READ, SECONDS, SHOWN = 40, 20.0, 4  # documents that are looked into, at most; how much of each; those that are drawn
COMPARED = 2000  # documents of two folders, at most
CARDS, PLAYERS, PLACES = 2000, 600, 3  # units that are shown; places to hear on a page (one of each unit at least); of one unit
AROUND, AVERAGED, SHADES = 5, 2, 16  # of a mean spectrum: columns on both sides (100 ms), mel bands that are one row, colours
BEFORE = 0.15  # seconds that are heard on both sides of a place
PLAYABLE = {".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3"}  # by browsers


class Document(NamedTuple):
    """A document of a folder, with the first SECONDS of its recording, if that is at hand."""

    name: str
    path: str
    units: np.ndarray  # (T,)
    runs: np.ndarray  # (T,) frames
    wav: torch.Tensor | None  # (S,)

    def address(self, folder):
        """Of its recording as seen from a page in `folder`; None where a browser has nothing to play."""
        plays = self.wav is not None and os.path.isfile(self.path) and Path(self.path).suffix.lower() in PLAYABLE
        return html.address(self.path, folder) if plays else None


def measured(folder):
    """(UnitShards, what measure() says of them). Raises: ValueError where units have no place in time."""
    shards = UnitShards(folder)
    m, recipe = measure(shards), shards.recipe
    lacks = ("a frame rate" if not recipe.get("frame_rate") else
             "run lengths (all are 1)" if recipe.get("dedup", True) and m["run_max"] == 1 else None)
    if lacks:
        raise ValueError(f"{folder} holds units ({recipe.get('kind')}) without {lacks}, so nothing in it has a time to be drawn "
                         "or heard at; --inspect without --page prints its numbers")
    return shards, m


def evenly(items, most):
    """At most so many of a sequence, from its first to its last."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int))]


def beginning(path):
    """The first SECONDS of a recording, (S,); of a short one the second block is the end."""
    return torch.cat([*islice(read_blocks(path, SECONDS), 2)])[:round(SECONDS * SAMPLE_RATE)]


def documents(shards, chosen):
    """[Document] of the chosen numbers, which ascend."""
    wanted = set(chosen)
    named = enumerate(zip(shards.each_file(), paths_of(shards)))
    rows = [(file["file_name"], path) for i, (file, path) in named if i in wanted]
    wavs = [tried(beginning, path) for _, path in config.progress(rows, desc="recordings", unit="file")]
    return [Document(*row, *shards.document(i), None if isinstance(wav, Exception) else wav)
            for i, row, wav in zip(chosen, rows, wavs)]


def within(units, runs, rate):
    """The units (T',) of the first SECONDS and how long each lasts, (T',) s; equal neighbours are one here."""
    last = np.flatnonzero(np.diff(units, append=-1))
    ends = np.cumsum(runs)[last] / rate
    ends = np.minimum(ends[:np.searchsorted(ends, SECONDS) + 1], SECONDS)
    return units[last][:len(ends)], np.diff(ends, prepend=0.0)


# ---------------------------------------------------------------------------------------------- one unit

def mean_spectra(found, units, rate):
    """Levels around the frames of each of some units (N,): (N, BANDS // AVERAGED, 2 * AROUND + 1), and how many frames, (N,).

    A level is log power between 0 and 1, which is the loudest place of a recording.
    """
    row = torch.full((2**16,), -1)
    row[torch.as_tensor(units)] = torch.arange(len(units))
    sums, counts = torch.zeros(len(units), BANDS // AVERAGED, 2 * AROUND + 1), torch.zeros(len(units), dtype=torch.int64)
    for document in (document for document in found if document.wav is not None):
        power = mel(document.wav)
        level = ((power - power.max()) / RANGE + 1).clamp(0, 1).unflatten(0, (-1, AVERAGED)).mean(1)  # (BANDS // AVERAGED, C)
        views = torch.nn.functional.pad(level[None], (AROUND, AROUND), "replicate")[0].unfold(1, 2 * AROUND + 1, 1)
        rows = row[torch.from_numpy(np.repeat(document.units, document.runs))]
        columns = ((torch.arange(len(rows)) + 0.5) / rate * SAMPLE_RATE / HOP).long()
        kept = (columns < level.shape[1]) & (rows >= 0)
        sums.index_add_(0, rows[kept], views[:, columns[kept]].transpose(0, 1))
        counts += rows[kept].bincount(minlength=len(units))
    return sums / counts[:, None, None].clamp(min=1), counts


def places_of(found, rate):
    """{unit: [(seconds, begin, number of its document), ...]}: its longest run in each document, the longest first."""
    places = {}
    for number, document in enumerate(found):
        units, seconds = within(document.units, document.runs, rate)
        for unit, length, begin in zip(units.tolist(), seconds.tolist(), (np.cumsum(seconds) - seconds).tolist()):
            best = places.setdefault(unit, {})
            best[number] = max(best.get(number, (0.0, 0.0, number)), (length, begin, number))
    return {unit: sorted(best.values(), reverse=True) for unit, best in places.items()}


def cards(m, found, rate, folder):
    """HTML: the units that occur, the most frequent first; and how many of them have a spectrum."""
    used = np.argsort(-m["counts"], kind="stable")[:min(CARDS, len(m["counts"]) - m["never"])]
    (spectra, frames), places, parts = mean_spectra(found, used, rate), places_of(found, rate), []
    pictures = (spectra / spectra.max().clamp(min=1e-6) * (SHADES - 1)).round().to(torch.uint8).flip(1)
    palette = ramp(SHADES)
    for unit, picture, count in zip(used.tolist(), pictures, frames.tolist()):
        share = 100 * m["counts"][unit] / m["units"]
        parts.append(f'<li><i style="background:{colour(unit)}"></i><b>{unit}</b> <small>{share:.2f} %</small>')
        if count:
            source = html.data_address("image/png", html.png(picture, palette))
            parts.append(f'<img src="{source}" alt="mean spectrum around {count} frames of unit {unit}">')
        for seconds, begin, number in places.get(unit, ())[:max(1, min(PLACES, PLAYERS // len(used)))]:
            source, said = found[number].address(folder), f"{begin:.2f} s in {Path(found[number].name).name}"
            part = f"#t={max(0.0, begin - BEFORE):.2f},{begin + seconds + BEFORE:.2f}"
            parts.append(html.player(source + part, f"unit {unit}, {said}", "none") if source else f"<p>{html.escape(said)}</p>")
    return f'<ul class="units">{"".join(parts)}</ul>', int((frames > 0).sum())


# ---------------------------------------------------------------------------------------------- the page

def pictures(folders, numbers, lengths):
    """HTML: charts of frequencies, run lengths and documents, of one folder or of both."""
    names, shares = folders if len(folders) > 1 else (), [100 * m["counts"] / m["units"] for m in numbers]
    ranks = [(folder, np.arange(1, 1 + len(share)), -np.sort(-share)) for folder, share in zip(folders, shares)]
    runs = [(label, *(100 * m["run_ranges"][label] / m["units"] for m in numbers)) for label in numbers[0]["run_ranges"]]
    edges = np.unique(np.linspace(0, max(some.max() for some in lengths) + 1, 21).astype(int))
    counts = [100 * np.histogram(some, edges)[0] / len(some) for some in lengths]
    drawn = {"Frequencies, sorted": charts.curves(ranks, "rank", "% of the units", log_x=True, log_y=True),
             "Frequencies by number": charts.bars([*enumerate(shares[0][:CARDS])], "unit", "% of the units", fill=colour),
             "Run lengths": charts.bars(runs, "frames", "% of the units", names),
             "Lengths of documents": charts.bars([*zip(edges, *counts)], "units, from", "% of the documents", names)}
    return f'<div class="charts">{"".join(charts.figure(title, svg) for title, svg in drawn.items())}</div>'


def drawing(document, strips, folder, differs):
    """A recording over its strips, [(units (T,), seconds (T,)), ...]; differs: what is marked, [(begin, end), ...] in seconds."""
    source, name, over, parts = document.address(folder), html.escape(document.name), 0, []
    length = max(float(seconds.sum()) for _, seconds in strips)
    if document.wav is not None:
        over = PICTURE + 4
        parts.append(f'<image href="{spectrogram(document.wav)}" width="{len(document.wav) / SAMPLE_RATE * PIXELS:.1f}" '
                     f'height="{PICTURE}" preserveAspectRatio="none"/>')
    parts += [boxes(Clip("", None, units=units, seconds=seconds), over + i * (STRIP + 8), STRIP)
              for i, (units, seconds) in enumerate(strips)]
    marks = "".join(f"M{begin * PIXELS:.1f} {over + STRIP + 4}H{end * PIXELS:.1f}" for begin, end in differs)
    height = over + len(strips) * (STRIP + 8)
    return (f'<figure class="{"clip" if source else "strip"}"><figcaption>{name} <small>{length:.1f} s</small></figcaption>'
            f'{html.player(source, document.name) if source else ""}<div class="along"><svg role="img" tabindex="0" '
            f'width="{length * PIXELS:.0f}" height="{height}" aria-label="units of {name}">{"".join(parts)}<path class="differs" '
            f'd="{marks}"/><line class="cursor" x1="-9" x2="-9" y1="0" y2="{height}"/></svg></div>'
            '<output class="unit" aria-live="polite"></output></figure>')


def write(folder, page="index.html", beside=None):
    """Write the page of a folder of shards, or of two; returns its path. Another page there is kept as index-1.html.

    Args: page: its file; a name alone lies in the folder. beside: another folder, of the same recordings.
    Raises: ValueError or OSError for what is no folder of shards, has no times, or shares no recording.
    """
    folders, path = [str(folder), *[str(beside)] * bool(beside)], Path(folder, page) if Path(page).name == page else Path(page)
    if path.suffix != ".html":
        raise ValueError(f"--page={page}: expected the name of a page, such as index.html")
    shards, numbers = zip(*map(measured, folders))
    pairs = evenly(matched(*shards), COMPARED) if beside else evenly([(i,) for i in range(len(shards[0]))], READ)
    differing, agree = compare(*shards, pairs) if beside else ("", None)
    pairs, rates = evenly(pairs, READ), [some.recipe["frame_rate"] for some in shards]
    found = documents(shards[0], [pair[0] for pair in pairs])
    there, figures = [one for one in zip(found, pairs) if one[0].wav is not None], []
    for document, pair in evenly(there or [*zip(found, pairs)], SHOWN):
        parts, edges = [some.document(i) for some, i in zip(shards, pair)], np.zeros(0)
        if beside:
            first, second = at_equal_times([np.repeat(*part) for part in parts], rates)
            seen = slice(round(SECONDS * max(rates)))
            edges = np.flatnonzero(np.diff(~agree(first[seen], second[seen]), prepend=False, append=False)) / max(rates)
        figures.append(drawing(document, [within(*part, rate) for part, rate in zip(parts, rates)], path.parent,
                               [*zip(edges[::2], edges[1::2])]))
    listed, count = cards(numbers[0], found, rates[0], path.parent)
    facts = "".join(f"<div><h2>{html.escape(some.folder)}</h2>{html.facts([*summary(some, m), ('recipe', recipe)])}</div>"
                    for some, m in zip(shards, numbers)
                    for recipe in [", ".join(f"{key} {value}" for key, value in some.recipe.items())])
    occur, said = len(numbers[0]["counts"]) - numbers[0]["never"], (
        f"{len(there)} of {len(found)} recordings, chosen evenly, are at hand; their first {SECONDS:g} s are used. {KEYS}"
        if there else f"None of {len(found)} recordings, chosen evenly, is at hand (the first: {html.escape(found[0].path)}), so "
        "there is nothing to hear and there are no spectra; nothing is synthesised in their place.") + (
        f" Above: {html.escape(folders[0])}; below: {html.escape(folders[1])}; marks: where they do not agree." if beside else "")
    html.write(path, html.document(f"Units in {' and '.join(folders)}", (
        f'<div class="charts">{facts}</div>{pictures(folders, numbers, [some.lengths for some in shards])}{differing}'
        f'<section><h2>Recordings</h2><p class="notes">{said}</p>{"".join(figures)}</section>'
        f'<section><h2>What a unit sounds like</h2><p class="notes">{min(occur, CARDS):,} of the {occur:,} units that occur in '
        f"{html.escape(folders[0])}, the most frequent first, with their share; {count:,} of them with the mean spectrum around "
        f"their frames (100 ms to both sides), and where they last longest in these recordings, heard with {BEFORE:g} s more on "
        f"both sides.</p>{listed}</section>"), "listening"))
    return path
