"""Charts as SVG text: no script, colours that follow the page's light or dark scheme, sizes that fit a phone.

Each chart is a picture with a title and a description for screen readers. Names that come from data are escaped here;
what is returned is safe to put into a page. Lengths are in the SVG's own units.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from markupsafe import Markup, escape

from maskft.measures import colour

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 10, 38
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, told apart with any colour vision; dashes tell further lines apart."""
DASHES = ("", "6 3", "2 3", "8 3 2 3")
Points = Sequence[tuple[float, float]]
Scale = Callable[[float], float]


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    x: str,
    y: str,
    zero: bool = False,
    share: bool = False,
    spans: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> Markup:
    """Lines through points (x, y), with a legend where there are several. Where points of one line share an x, it goes
    through their mean.

    Args:
        title: says what is shown.
        series: points by name.
        x, y: names of the axes.
        zero: let the y axis start at 0.
        share: write y as per cent.
        spans: intervals (x, low, high) by name, drawn as thin upright lines, side by side where they share an x.
    """
    spans = spans or {}
    points = [point for line in series.values() for point in line]
    if not points:
        return Markup()
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    across = _axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    ys += [end for some in spans.values() for span in some for end in span[1:]]
    up = _axis(0.0 if zero else min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = [*_frame(across[1], up[1], across[0], up[0], x, y, share)]
    for number, (name, line) in enumerate(series.items()):
        style = line_style(number)
        for a, low, high in spans.get(name, ()):
            place = across[0](a) + 2 * (number - (len(series) - 1) / 2)
            ends = f'x1="{place:.1f}" y1="{up[0](low):.1f}" x2="{place:.1f}" y2="{up[0](high):.1f}"'
            parts.append(f'<line {ends} stroke-width="1" {style}/>')
        heights = defaultdict[str, list[float]](list)
        for a, b in line:
            heights[f"{across[0](a):.1f}"].append(up[0](b))
        path = " ".join(f"{place},{mean(those):.1f}" for place, those in heights.items())
        parts.append(f'<polyline points="{path}" fill="none" stroke-width="2" {style}/>')
        if len(line) <= 20:
            dots = (f'<circle cx="{across[0](a):.1f}" cy="{up[0](b):.1f}" r="2.5"/>' for a, b in line)
            parts.append(f'<g fill="{LINES[number % len(LINES)]}">{"".join(dots)}</g>')
    last = "; ".join(
        f"{name}: {_number(line[0][1], share)} to {_number(line[-1][1], share)}" for name, line in series.items()
    )
    return _picture(title, f"{y} by {x}. {last}", parts)


def line_style(number: int) -> Markup:
    """Colour and dashes of the line of that number, as SVG attributes."""
    dash = DASHES[number // len(LINES) % len(DASHES)]
    return Markup(f'stroke="{LINES[number % len(LINES)]}"' + (f' stroke-dasharray="{dash}"' if dash else ""))


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]], *, x: str) -> Markup:
    """Shares with their intervals, a row each: (name, value, low, high)."""
    if not rows:
        return Markup()
    letters = min(32, max(26, *(len(row[0]) for row in rows)))
    left, step = 175 + 6.5 * (letters - 26), 24
    height = TOP + step * len(rows) + BOTTOM
    across = _axis(min(0.0, *(r[2] for r in rows)), max(1.0, *(r[3] for r in rows)), left, WIDTH - RIGHT)
    parts = [_x_axis(across[1], across[0], height - BOTTOM, x, share=True, middle=(left + WIDTH - RIGHT) / 2)]
    for number, (name, value, low, high) in enumerate(rows):
        y = TOP + step * (number + 0.5)
        parts.append(
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(shortened(name, letters))}</text>'
        )
        parts.append(
            f'<g stroke="{LINES[0]}" fill="{LINES[0]}"><title>{escape(name)}: {_number(value, True)}, '
            f'{_number(low, True)} to {_number(high, True)}</title><line x1="{across[0](low):.1f}" y1="{y}" '
            f'x2="{across[0](high):.1f}" y2="{y}" stroke-width="2"/>'
            f'<circle cx="{across[0](value):.1f}" cy="{y}" r="4"/></g>'
        )
    told = "; ".join(f"{n}: {_number(v, True)} ({_number(a, True)} to {_number(b, True)})" for n, v, a, b in rows)
    return _picture(title, told, parts, height=height)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], float],
    *,
    top: float,
    x: str,
) -> Markup:
    """Values by row and column as colours from 0 (dark) to `top` (light), with a scale beneath."""
    if not cells:
        return Markup()
    left, step = 122, 18
    wide = min((WIDTH - RIGHT - left) / len(columns), 40.0)
    bottom = TOP + step * len(rows)
    parts = []
    for number, name in enumerate(rows):
        y = TOP + step * (number + 0.5) + 4
        parts.append(f'<text x="{left - 6}" y="{y:.1f}" text-anchor="end">{escape(shortened(name, 20))}</text>')
    every = max(1, math.ceil(24 / wide))
    for number, name in enumerate(columns[::every]):
        at = left + wide * (number * every + 0.5)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{escape(name)}</text>')
    for (row, column), value in cells.items():
        parts.append(
            f'<rect x="{left + wide * column:.2f}" y="{TOP + step * row}" width="{wide + 0.2:.2f}" height="{step - 1}" '
            f'fill="{_hex(value / top if top else 0)}"><title>{escape(rows[row])}, {escape(columns[column])}: '
            f"{value:.4g}</title></rect>"
        )
    middle = left + wide * len(columns) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 30}" text-anchor="middle">{escape(x)}</text>')
    parts.append(_scale(left, bottom + 40, top))
    most = max(cells, key=lambda cell: cells[cell])
    told = f"largest {cells[most]:.4g}, {rows[most[0]]} of {columns[most[1]]}; smallest {min(cells.values()):.4g}"
    return _picture(title, told, parts, height=bottom + 72)


def histogram(title: str, counts: Sequence[int], top: float, *, x: str, start: float | None = None) -> Markup:
    """Counts of values in equal bins from 0 to `top`, on a logarithmic axis; a dashed line marks `start`."""
    if not any(counts):
        return Markup()
    decades = max(1, math.ceil(math.log10(max(counts) + 1)))
    across = _axis(0.0, top, LEFT, WIDTH - RIGHT)
    ticks = [10.0**n for n in range(0, decades + 1, max(1, decades // 4))]

    def up(count: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * math.log10(count + 1) / math.log10(10.0**decades + 1)

    parts = _frame(across[1], ticks, across[0], up, x, "gates", False)
    wide = (across[0](top) - LEFT) / len(counts)
    for number, count in enumerate(counts):
        if count:
            y, low, high = up(count), top * number / len(counts), top * (number + 1) / len(counts)
            parts.append(
                f'<rect x="{LEFT + wide * number:.2f}" y="{y:.1f}" width="{wide * 0.9:.2f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}" fill="{LINES[0]}">'
                f"<title>{low:.3g} to {high:.3g}: {count:,}</title></rect>"
            )
    if start is not None:
        at = across[0](start)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{LINES[1]}" '
            f'stroke-width="2" stroke-dasharray="4 3"><title>start: {start:.3g}</title></line>'
        )
    peak = counts.index(max(counts))
    told = f"most gates lie from {top * peak / len(counts):.3g} to {top * (peak + 1) / len(counts):.3g}"
    return _picture(title, told + ("" if start is None else f"; they started at {start:.3g}"), parts)


def matrix(title: str, names: Sequence[str], values: Mapping[tuple[int, int], float]) -> Markup:
    """Shares for pairs, written into coloured squares; `values` holds those of row and column by index."""
    if not values:
        return Markup()
    left = 110
    side = min((WIDTH - RIGHT - left) / len(names), 46.0)
    small = side < 22
    parts = []
    for number, name in enumerate(names):
        y = TOP + side * (number + 0.5) + 4
        parts.append(f'<text x="{left - 6}" y="{y:.1f}" text-anchor="end">{escape(shortened(name, 16))}</text>')
        at = left + side * (number + 0.5)
        parts.append(
            f'<text x="{at:.1f}" y="{TOP + side * len(names) + 14:.1f}" text-anchor="middle">{number + 1}</text>'
        )
    for (row, column), value in values.items():
        x, y = left + side * column, TOP + side * row
        told = f"{names[row]} and {names[column]}: {_number(value, True)}"
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{side - 1:.1f}" height="{side - 1:.1f}" fill="{_hex(value)}">'
            f"<title>{escape(told)}</title></rect>"
        )
        if not small:
            ink = "#000" if value > 0.55 else "#fff"
            parts.append(
                f'<text x="{x + side / 2:.1f}" y="{y + side / 2 + 4:.1f}" text-anchor="middle" style="fill:{ink}">'
                f"{100 * value:.0f}</text>"
            )
    apart = [value for (row, column), value in values.items() if row != column]
    told = f"pairs share {_number(min(apart), True)} to {_number(max(apart), True)}" if apart else "one run"
    return _picture(title, told, parts, height=TOP + side * len(names) + 24)


def shortened(text: str, longest: int) -> str:
    """The text with its middle left out where it is too long."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that span low to high."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * n for n in range(first, last + 1)]


def _axis(low: float, high: float, start: float, end: float) -> tuple[Scale, list[float]]:
    """A scale from round numbers around low to high onto start to end, and those numbers."""
    marks = ticks(low, high)
    span = marks[-1] - marks[0]
    return (lambda value: start + (end - start) * (value - marks[0]) / span), marks


def _frame(
    x_marks: Sequence[float], y_marks: Sequence[float], across: Scale, up: Scale, x: str, y: str, share: bool
) -> list[str]:
    """Both axes with their names."""
    parts = [_x_axis(x_marks, across, HEIGHT - BOTTOM, x, share=False, middle=(LEFT + WIDTH - RIGHT) / 2)]
    for mark in y_marks:
        at = up(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(mark, share)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    return parts


def _x_axis(marks: Sequence[float], across: Scale, bottom: float, name: str, *, share: bool, middle: float) -> str:
    texts = (
        f'<text x="{across(mark):.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{_number(mark, share)}</text>'
        for mark in marks
    )
    lines = (
        f'<line class="grid" x1="{across(mark):.1f}" x2="{across(mark):.1f}" y1="{TOP}" y2="{bottom}"/>'
        for mark in marks
    )
    return (
        "".join(lines)
        + "".join(texts)
        + f'<text x="{middle:.1f}" y="{bottom + 32:.1f}" text-anchor="middle">{escape(name)}</text>'
    )


def _scale(left: float, y: float, top: float) -> str:
    steps, wide = 40, 5
    cells = (
        f'<rect x="{left + wide * n}" y="{y}" width="{wide + 0.3}" height="8" fill="{_hex((n + 0.5) / steps)}"/>'
        for n in range(steps)
    )
    right = left + wide * steps
    return "".join(cells) + (
        f'<text x="{left}" y="{y + 22}">0</text>'
        f'<text x="{right}" y="{y + 22}" text-anchor="end">{_number(top, False)}</text>'
    )


def _picture(title: str, description: str, parts: Sequence[str], height: float = HEIGHT) -> Markup:
    inside = "".join(parts)
    label = escape(f"{title}. {description}")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}" '
        f'xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    )


def _number(value: float, share: bool) -> str:
    if share:
        return f"{100 * value:.4g} %"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _hex(share: float) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour(share))
