"""Curves and bars as SVG that is drawn here, once: it needs no script, and takes its colours from style.css, light or dark.

    [(label, x (N,), y (N,)), ...] --thinned--> at most two points a column --curves--> <svg>: axes, legend, one <path> each
    [(label, value, ...), ...]     --bars--> <svg>: a group of bars a row

A path keeps the numbers that it was drawn from in data-values, "x y x y ...", one pair for each point of its d, in that order:
runs.js reads them out. What is not finite breaks a line; what a logarithmic axis cannot show is left out.
"""
import math

import numpy as np

from pages.html import escape

WIDTH, HEIGHT = 480, 300  # units of the picture, which is as wide as its place; HEIGHT without the legend
LEFT, RIGHT, TOP, BOTTOM = 64, 456, 28, 250  # of the plot; ticks and labels stand outside
LEGEND = 20  # a row
DASHES = ("", "7 4", "2 3", "10 3 2 3")  # curves differ in them and in colour: .c0 to .c3
MOST_TICKS, MOST_DOTS, MOST_LABEL = 6, 25, 52
LARGE = 1e300  # beyond it numbers count as not finite, so that differences of two do not overflow


def axis(values, log, begin, end, margin=0.0):
    """An axis from begin to end that shows all values (N,) that it can; margin: share of its length that is left free.

    Returns: (function: numbers -> where they are drawn, the numbers that are labelled).
    """
    scale, shown = (np.log10 if log else np.asarray), values[visible(values, log)]
    low, high = map(float, scale([shown.min(), shown.max()]) if len(shown) else (0, 1))
    free = (high - low) * margin if high - low > 1e-9 * abs(high) else 0.1 * abs(high) or 0.5
    low, high = low - free, high + free
    return lambda numbers: begin + (scale(numbers) - low) / (high - low) * (end - begin), ticks(low, high, log)


def visible(values, log):
    return (np.abs(values) < LARGE) & (values > (1 / LARGE if log else -LARGE))


def ticks(low, high, log):
    """Multiples of 1, 2 or 5 x 10^n; on logarithmic axes (low, high: log10) decades, with 2 and 5 where they are few."""
    if log:
        decades = range(math.floor(low), math.ceil(high) + 1)
        for digits in ((1, 2, 5), (1,)):
            found = [digit * 10.0 ** n for n in decades for digit in digits if low <= math.log10(digit) + n <= high]
            if 2 < len(found) <= MOST_TICKS:
                return found
        if len(found) > 2:
            return found[::math.ceil(len(found) / MOST_TICKS)]
        low, high = 10 ** low, 10 ** high
    rough = (high - low) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value, digits=6):
    """As short as it goes: 0.002, 5e-5, 12.5k, 3M."""
    least, letter = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e4 else (1, "")
    text = f"{value / least:.{digits}g}{letter}" if abs(value) < 1e10 else f"{value:.{digits}g}"
    return text.replace("e-0", "e-").replace("e+", "e")


def thinned(columns, y):
    """Indices, ascending, of the lowest and the highest y of every column; of one NaN, which breaks the line, where it has no y.

    Args: columns (N,) int, ascending: where each point falls; y (N,), NaN where there is nothing to draw.
    """
    order = np.lexsort((y, columns))  # by column, then by y, NaN last
    first = np.flatnonzero(np.diff(columns[order], prepend=columns[:1] - 1))
    finite = np.add.reduceat(np.isfinite(y[order]), first, dtype=int) if len(first) else first
    return np.unique(np.concatenate([order[first], order[first + np.maximum(finite - 1, 0)]]))


def style(row):
    """The class and the dashes of a curve: 16 combinations, of which neighbours differ in both."""
    return f'class="curve c{row % 4}" stroke-dasharray="{DASHES[row // 4 % 4 ^ row % 4]}"'


def path(row, label, x, y, across, up):
    """One curve. x, y (N,): numbers, y NaN where the line breaks; across, up: functions that place them."""
    drawn = np.isfinite(y)
    starts, ends = drawn & ~np.append(False, drawn[:-1]), drawn & ~np.append(drawn[1:], False)
    places = {i: f"{at:.1f} {height:.1f}" for i, at, height in zip(np.flatnonzero(drawn), across(x[drawn]), up(y[drawn]))}
    line = "".join(f"{'M' if starts[i] else 'L'}{place}" for i, place in places.items())
    dots = "".join(f"M{place}h0" for i, place in places.items() if len(places) <= MOST_DOTS or starts[i] and ends[i])
    values = " ".join(f"{x[i]:.10g} {y[i]:.6g}" for i in places)
    return (f'<path {style(row)} data-label="{escape(label)}" data-values="{values}" d="{line}"/>'
            f'<path class="curve dot c{row % 4}" d="{dots}"/>')


def frame(across, up, x_label, y_label):
    """Grid, ticks and labels. across, up: of the two axes, [(number, where it is drawn)]."""
    parts = [f'<text x="0" y="16">{escape(y_label)}</text>', f'<text class="across" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}" '
             f'text-anchor="middle">{escape(x_label)}</text>']
    for value, at in up:
        parts.append(f'<line class="{"grid" if value else "zero"}" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text class="y" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value, at in across:
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{BOTTOM}"/>'
                     f'<text class="x" x="{at:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{number(value)}</text>')
    return parts


def picture(said, parts, labels, sample):
    """The <svg> with its legend. said: to a screen reader; sample: function (row, y) -> what a label stands for, 30 wide."""
    for row, label in enumerate(map(str, labels)):
        at = HEIGHT + 14 + row * LEGEND
        short = label if len(label) <= MOST_LABEL else "…" + label[1 - MOST_LABEL:]
        parts.append(f'{sample(row, at - 4)}<text x="{LEFT + 38}" y="{at}">{escape(short)}</text>')
    return (f'<svg class="chart" role="img" tabindex="0" viewBox="0 0 {WIDTH} {HEIGHT + len(labels) * LEGEND}" '
            f'aria-label="{escape(said)}">{"".join(parts)}</svg>')


def curves(series, x_label, y_label, log_x=False, log_y=False):
    """Lines over one pair of axes, as SVG. series: [(label, x (N,), y (N,))], x ascending."""
    shown, said = [], [f"{y_label} by {x_label}"]
    for label, x, y in series:
        x, y = np.asarray(x, float), np.asarray(y, float)
        shown.append((label, x[visible(x, log_x)], np.where(visible(y, log_y), y, np.nan)[visible(x, log_x)]))
    across, x_ticks = axis(np.concatenate([np.zeros(0), *(x for _, x, _ in shown)]), log_x, LEFT, RIGHT)
    up, y_ticks = axis(np.concatenate([np.zeros(0), *(y for *_, y in shown)]), log_y, BOTTOM, TOP, margin=0.04)
    parts = frame(zip(x_ticks, across(x_ticks)), zip(y_ticks, up(y_ticks)), x_label, y_label)
    for row, (label, x, y) in enumerate(shown):
        kept = thinned(across(x).astype(int), y)
        parts.append(path(row, label, x[kept], y[kept], across, up))
        ends = np.flatnonzero(np.isfinite(y))[[0, -1]] if np.isfinite(y).any() else ()
        said.append(f"{label}: " + (" to ".join(f"{number(y[i], 4)} at {number(x[i])}" for i in ends) or "nothing to draw"))
    parts.append(f'<line class="cursor" x1="-9" x2="-9" y1="{TOP}" y2="{BOTTOM}"/>')
    return picture("; ".join(said), parts, [label for label, *_ in shown] if len(shown) > 1 else (),
                   lambda row, at: f'<path {style(row)} d="M{LEFT} {at}h30"/>')


def bars(rows, x_label, y_label, names=(), fill=None):
    """Upright bars from 0, as SVG. rows: [(label, value, ...)], values >= 0; as many as fit have their label written.

    Args: names: what the values of a row are, if they are several; fill: function (row number) -> a colour of its own.
    """
    top = max(rows, key=lambda row: max(row[1:]), default=("", 1))
    up, y_ticks = axis(np.array([0.0, max(top[1:]) or 1.0]), False, BOTTOM, TOP)
    wide, longest = (RIGHT - LEFT) / max(1, len(rows)), max((len(str(row[0])) for row in rows), default=1)
    every = next(step for n in range(9) for step in (10 ** n, 2 * 10 ** n, 5 * 10 ** n) if step * wide >= 8 * longest + 6)
    bar, parts = wide * (0.8 if wide > 4 else 1) / (len(top) - 1), frame((), zip(y_ticks, up(y_ticks)), x_label, y_label)
    for at, (label, *values) in enumerate(rows):
        left = LEFT + at * wide
        for part, (value, height) in enumerate(zip(values, up(values))):
            own = f'style="fill:{fill(at)}" ' if fill and not part else ""
            told = escape(f"{label}: {number(value)}" + (f", {names[part]}" if names else ""))
            parts.append(f'<rect class="bar c{part % 4}" {own}x="{left + part * bar:.2f}" y="{height:.1f}" width="{bar:.2f}" '
                         f'height="{BOTTOM - height:.1f}"><title>{told}</title></rect>')
        if at % every == 0:
            parts.append(f'<text class="x" x="{left + wide * 0.4:.1f}" y="{BOTTOM + 18}" text-anchor="middle">'
                         f'{escape(label)}</text>')
    said = f"{y_label} by {x_label}: {len(rows)} bars" + (f", the highest {number(max(top[1:]))} at {top[0]}" if rows else "")
    return picture(said, parts, names, lambda row, at: (
        f'<rect class="bar c{row % 4}" x="{LEFT}" y="{at - 6}" width="30" height="10"/>'))


def figure(title, svg, note=""):
    """A chart with its heading and the place where runs.js says the values."""
    return (f'<figure class="drawn"><figcaption>{escape(title)} <small>{escape(note)}</small></figcaption>{svg}'
            '<output class="unit" aria-live="polite"></output></figure>')
