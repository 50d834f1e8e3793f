"""Curves and bars as SVG that is drawn here, once: it needs no script, and takes its colours from style.css, light or dark.

    [(label, x (N,), y (N,)), ...] --thinned--> at most two points a column --curves--> <svg>: axes, legend, one <path> each
    [(label, value, ...), ...]     --bars--> <svg>: a group of bars a row

A path keeps the numbers that it was drawn from in data-values, "x y x y ...", one pair for each point of its d, in that order:
runs.js reads them out. What is not finite breaks a line; what a logarithmic axis cannot show is left out.
"""
import math
from dataclasses import dataclass

import numpy as np

from pages.html import escape

WIDTH, HEIGHT = 480, 300  # units of the picture, which is as wide as its place; HEIGHT without the legend
LEFT, RIGHT, TOP, BOTTOM = 64, 456, 28, 250  # of the plot; ticks and labels stand outside
LEGEND = 20  # a row
DASHES = ("", "7 4", "2 3", "10 3 2 3")  # curves differ in them and in colour: .c0 to .c3
MOST_TICKS, MOST_DOTS, MOST_LABEL = 6, 60, 52
LARGE = 1e300  # beyond it numbers count as not finite, so that differences of two do not overflow


@dataclass(frozen=True)
class Axis:
    """From numbers between low and high to places between begin and end, on a linear or logarithmic scale."""

    low: float
    high: float
    log: bool
    begin: float
    end: float

    def place(self, values):
        low, high, values = (np.log10(part) if self.log else part for part in (self.low, self.high, np.asarray(values, float)))
        return self.begin + (values - low) / (high - low) * (self.end - self.begin)


def axis_of(values, log, begin, end, margin=0.0):
    """The axis that shows all values (N,) that it can; margin: share of its length that is left free at both ends."""
    shown = values[visible(values, log)]
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (1.0, 10.0)
    if log:
        low, high = math.log10(low), math.log10(high)
    free = (high - low) * margin if high - low > 1e-9 * abs(high) else max(0.1 * abs(high), 1e-9 if high else 1.0)
    low, high = low - free, high + free
    return Axis(10 ** low, 10 ** high, log, begin, end) if log else Axis(low, high, log, begin, end)


def visible(values, log):
    return (np.abs(values) < LARGE) & (values > 1 / LARGE if log else True)


def ticks(low, high, log):
    """Where an axis is labelled: multiples of 1, 2 or 5 x 10^n; on logarithmic axes decades, with 2 and 5 where they are few."""
    if log:
        decades = [10.0 ** n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        found = [digit * decade for decade in decades for digit in (1, 2, 5) if low <= digit * decade <= high]
        if len(found) > MOST_TICKS:
            found = [decade for decade in decades if low <= decade <= high]
        if len(found) > 2:
            return found[::math.ceil(len(found) / MOST_TICKS)]
    rough = (high - low) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value, digits=6):
    """As short as it goes: 0.002, 5e-5, 12.5k, 3M."""
    for least, letter in ((1e6, "M"), (1e4, "k")):
        if least <= abs(value) < 1e10:
            return f"{value / (1e6 if letter == 'M' else 1e3):.{digits}g}{letter}"
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def thinned(columns, y):
    """Indices, ascending, of the lowest and the highest y of every column; without one that is finite, of one that breaks the line.

    Args: columns (N,) int, ascending: where each point falls; y (N,), NaN where there is nothing to draw.
    """
    order = np.lexsort((y, columns))  # NaN last
    first = np.flatnonzero(np.diff(columns[order], prepend=-1 if len(order) else ()))
    counts = np.add.reduceat(np.isfinite(y[order]).astype(int), first) if len(first) else first
    return np.unique(np.concatenate([order[first], order[first + np.maximum(counts - 1, 0)]]).astype(int))


def path_of(x, y, places, colour):
    """One curve. x, y (N,): numbers, y NaN where the line breaks; places ((N,), (N,)): where they are drawn."""
    drawn = np.isfinite(y)
    after_gap = ~np.concatenate([[False], drawn[:-1]])
    lone = after_gap & ~np.concatenate([drawn[1:], [False]])
    points = [(i, f"{places[0][i]:.1f} {places[1][i]:.1f}") for i in np.flatnonzero(drawn)]
    line = "".join(f"{'M' if after_gap[i] else 'L'}{point}" for i, point in points)
    dots = "".join(f"M{point}h0" for i, point in points if len(points) <= MOST_DOTS or lone[i])
    values = " ".join(f"{x[i]:.10g} {y[i]:.6g}" for i, _ in points)
    return (f'<path class="curve c{colour % 4}" stroke-dasharray="{DASHES[colour // 4 % 4 ^ colour % 4]}" data-values="{values}" '
            f'd="{line}"/>' + f'<path class="curve dot c{colour % 4}" d="{dots}"/>' * bool(dots))


def frame(x, y, x_label, y_label):
    """Grid, ticks and labels of two axes; x None: without ticks."""
    parts = [f'<text x="0" y="16">{escape(y_label)}</text>',
             f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>']
    for value in ticks(y.low, y.high, y.log):
        at, kind = y.place(value), "zero" if abs(value) < 1e-12 * (y.high - y.low) else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text class="y" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(x.low, x.high, x.log) if x else ():
        at = x.place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{BOTTOM}"/>'
                     f'<text class="x" x="{at:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{number(value)}</text>')
    return "".join(parts)


def legend(labels, sample):
    """Rows under the plot. sample: function (row, y) -> what the row stands for, as SVG that is 30 wide."""
    short = [label if len(label) <= MOST_LABEL else "…" + label[1 - MOST_LABEL:] for label in map(str, labels)]
    return "".join(sample(row, at - 4) + f'<text x="{LEFT + 38}" y="{at}">{escape(label)}</text>'
                   for row, label in enumerate(short) for at in [HEIGHT + 14 + row * LEGEND])


def picture(said, parts, rows):
    """The <svg>. said: what a screen reader says of it; rows: of its legend."""
    return (f'<svg class="chart" role="img" tabindex="0" viewBox="0 0 {WIDTH} {HEIGHT + rows * LEGEND}" aria-label="{escape(said)}">'
            f'{"".join(parts)}</svg>')


def curves(series, x_label, y_label, log_x=False, log_y=False):
    """Lines over one pair of axes, as SVG. series: [(label, x (N,), y (N,))], x ascending."""
    series = [(label, np.asarray(x, float), np.asarray(y, float)) for label, x, y in series]
    series = [(label, x[at], np.where(visible(y, log_y), y, np.nan)[at]) for label, x, y in series for at in [visible(x, log_x)]]
    everything = [np.concatenate([one[part] for one in series] or [np.zeros(0)]) for part in (1, 2)]
    axes = axis_of(everything[0], log_x, LEFT, RIGHT), axis_of(everything[1], log_y, BOTTOM, TOP, margin=0.04)
    parts, said = [frame(*axes, x_label, y_label)], [f"{y_label} by {x_label}"]
    for row, (label, x, y) in enumerate(series):
        kept = thinned(axes[0].place(x).astype(int), y)
        x, y = x[kept], y[kept]
        parts.append(path_of(x, y, (axes[0].place(x), axes[1].place(y)), row))
        ends = np.flatnonzero(np.isfinite(y))[[0, -1]] if np.isfinite(y).any() else ()
        said.append(f"{label}: " + (" to ".join(f"{number(y[i], 4)} at {number(x[i])}" for i in ends) or "nothing to draw"))
    rows = len(series) * (len(series) > 1)
    parts.append(legend([label for label, _, _ in series[:rows]], lambda row, at: (
        f'<path class="curve c{row % 4}" stroke-dasharray="{DASHES[row // 4 % 4 ^ row % 4]}" d="M{LEFT} {at}h30"/>')))
    return picture("; ".join(said), [*parts, f'<line class="cursor" x1="-9" x2="-9" y1="{TOP}" y2="{BOTTOM}"/>'], rows)


def bars(rows, x_label, y_label, names=(), fill=None):
    """Upright bars from 0, as SVG. rows: [(label, value, ...)], values >= 0; as many as fit have their label written.

    Args: names: what the values of a row are, if they are several; fill: function (row number) -> a colour of its own.
    """
    many, highest = max(map(len, rows), default=2) - 1, max((value for row in rows for value in row[1:]), default=1)
    y, wide = Axis(0.0, float(highest) or 1.0, False, BOTTOM, TOP), (RIGHT - LEFT) / max(1, len(rows))
    every = next(n for power in range(9) for n in (10 ** power, 2 * 10 ** power, 5 * 10 ** power)
                 if n * wide >= 8 * max((len(str(row[0])) for row in rows), default=1) + 6)
    bar, parts = wide * (0.8 if wide > 4 else 1) / many, [frame(None, y, x_label, y_label)]
    for at, (label, *values) in enumerate(rows):
        left = LEFT + at * wide
        for part, value in enumerate(values):
            own = f' style="fill:{fill(at)}"' if fill and not part else ""
            top = float(y.place(value))
            parts.append(f'<rect class="bar c{part % 4}"{own} x="{left + part * bar:.2f}" y="{top:.1f}" width="{bar:.2f}" '
                         f'height="{BOTTOM - top:.1f}"><title>{escape(f"{label}: {number(value)}")}'
                         f'{escape(f", {names[part]}") if names else ""}</title></rect>')
        if at % every == 0:
            parts.append(f'<text class="x" x="{left + wide * 0.4:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{escape(label)}</text>')
    parts.append(legend(names, lambda row, at: f'<rect class="bar c{row % 4}" x="{LEFT}" y="{at - 6}" width="30" height="10"/>'))
    top = max(rows, key=lambda row: max(row[1:]), default=None)
    said = f"{y_label} by {x_label}: {len(rows)} bars" + (f", the highest {number(max(top[1:]))} at {top[0]}" if top else "")
    return picture(said, parts, len(names))


def figure(title, svg, note=""):
    """A chart with its heading and the place where runs.js says the values."""
    return (f'<figure class="drawn"><figcaption>{escape(title)} <small>{escape(note)}</small></figcaption>{svg}'
            '<output class="unit" aria-live="polite"></output></figure>')
