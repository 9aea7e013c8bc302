"""Line plots as plain SVG. Sizes are in the SVG's own units; the page scales it to its column."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from typing import Literal

WIDTH, HEIGHT = 380, 196
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 26

#: Most points drawn of a curve; longer ones are averaged over neighbours.
MOST_POINTS = 400
#: Shortest curve that gets a running mean over it.
SMOOTH_FROM = 40

#: A line's sample beside its name, by colour and dash.
KEY = '<svg class="key" viewBox="0 0 18 6" aria-hidden="true"><path class="line {} d{}" d="M0 3H18"/></svg>'

Kind = Literal["number", "share"]


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: Its name in the legend; empty where the title says it all. Neighbours that share it share a line there.
        points: (x, y), sorted by x, finite.
        color: Index into the page's palette.
        dash: Index into its dash patterns, 0 being solid.
        run: The run it is from, where the label does not say so.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    dash: int = 0
    run: str = ""


@dataclass(frozen=True)
class Axes:
    """Where data lie on the paper: x and y from data to SVG units, and the ticks."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]


def plot(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    kind: Kind = "number",
    x_label: str = "step",
    x_ticks: Sequence[float] | None = None,
    x_range: tuple[float, float] | None = None,
    smooth: bool = True,
) -> str:
    """A figure with caption, legend and curves; the legend gives the last values, or those under the pointer.

    Args:
        title: What is plotted.
        unit: Of y, in words.
        series: At least one, with at least one point each.
        kind: `share` for fractions shown in per cent.
        x_label: What x is.
        x_ticks: Values of x that exist, if few: they are spaced evenly. Default: a linear axis.
        x_range: Ends of the x axis; default: those of the curves.
        smooth: Draw long curves thin, with a running mean on top.
    """
    series = [_thinned(one) for one in series]
    axes = _axes(series, kind, x_ticks, x_range)
    smooth = smooth and max(len(one.points) for one in series) >= SMOOTH_FROM
    curves = "".join(_curve(one, axes, smooth) for one in series)
    data = {
        "x": [round(axes.x(x), 1) for x in _all_x(series)],
        "at": [_short(x) for x in _all_x(series)],
        "series": [{_short(x): _label(y, kind) for x, y in one.points} for one in series],
    }
    return (
        f'<figure class="plot"><figcaption><h3>{escape(title)}</h3> <span class="muted">{escape(unit)}</span>'
        f"</figcaption>{_legend(series, kind)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_spoken(title, unit, series, kind))}" '
        f'data-x="{escape(x_label)}" '
        f'data-plot="{escape(json.dumps(data, separators=(",", ":")))}">'
        f'{_frame(axes, kind, x_label)}{curves}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg></figure>'
    )


def _all_x(series: Sequence[Series]) -> list[float]:
    return sorted({x for one in series for x, _ in one.points})


def _thinned(one: Series) -> Series:
    """Averages neighbours until few enough points are left."""
    bin_size = math.ceil(len(one.points) / MOST_POINTS)
    if bin_size <= 1:
        return one
    bins = [one.points[start : start + bin_size] for start in range(0, len(one.points), bin_size)]
    points = [(cut[-1][0], sum(y for _, y in cut) / len(cut)) for cut in bins]
    return replace(one, points=points)


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Running mean, centred; at both ends over what there is."""
    reach = max(2, len(points) // 30)
    found: list[tuple[float, float]] = []
    for index, (x, _) in enumerate(points):
        window = points[max(0, index - reach) : index + reach + 1]
        found.append((x, sum(y for _, y in window) / len(window)))
    return found


# --- axes ---


def _axes(
    series: Sequence[Series], kind: Kind, x_ticks: Sequence[float] | None, x_range: tuple[float, float] | None
) -> Axes:
    ys = [y for one in series for _, y in one.points]
    low, high, y_ticks = _range(min(ys), max(ys), kind)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    inner = WIDTH - LEFT - RIGHT
    if x_ticks is not None:
        places = sorted(x_ticks)
        gap = inner / max(1, len(places) - 1)
        return Axes(lambda x: LEFT + places.index(x) * gap, y, places, y_ticks)
    first, last = x_range or (_all_x(series)[0], _all_x(series)[-1])
    last = last if last > first else first + 1
    stride = nice_step((last - first) / 5, whole=True)
    ticks = [index * stride for index in range(math.ceil(first / stride), math.floor(last / stride) + 1)]
    return Axes(lambda x: LEFT + (x - first) / (last - first) * inner, y, ticks, y_ticks)


def nice_step(rough: float, *, whole: bool = False) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `rough`."""
    if whole and rough <= 1:
        return 1
    power = 10 ** math.floor(math.log10(rough))
    steps = [factor * power for factor in (1, 2, 2.5, 5, 10)]
    return next(step for step in steps if step >= rough * (1 - 1e-9) and not (whole and step != int(step)))


def _range(low: float, high: float, kind: Kind) -> tuple[float, float, list[float]]:
    """Ends of a linear axis and its ticks; zero belongs to it unless the curve lies far from zero."""
    if low >= 0 and low <= 0.6 * high:
        low = 0.0
    if high <= 0 and high >= 0.6 * low:
        high = 0.0
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        if kind == "share" and 0 <= low <= 1:
            return 0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread if low else 0.0, high + spread
    step = nice_step((high - low) / 4)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if kind == "share":
        low, high = max(0.0, low), min(1.0, high) if high <= 1.0 + step else high
    ticks = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return low, high, ticks


def _short(value: float) -> str:
    return f"{value:.6g}"


def _label(value: float, kind: Kind, step: float | None = None) -> str:
    """A number for people, with the digits that `step` needs if it labels one of several ticks."""
    if kind == "share":
        return percent(value, 1 if step is None else _digits(100 * step))
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e5 or (size < 1e-3 and (step is None or step < 1e-3)):
        mantissa, power = f"{value:.1e}".split("e")
        return minus(f"{mantissa.removesuffix('.0')}e{int(power)}")
    if step:
        return minus(f"{value:,.{_digits(step)}f}")
    return minus(f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3}f}")


def _digits(step: float) -> int:
    """Decimals that tell multiples of `step` apart: 1 for 0.5, 2 for 0.25."""
    return next((digits for digits in range(9) if abs(round(step, digits) - step) < 1e-9 * step + 1e-12), 9)


def percent(share: float, digits: int) -> str:
    """A share in per cent, with the narrow space that keeps number and sign together."""
    return minus(f"{100 * share:.{digits}f}\u202f%")


def minus(text: str) -> str:
    """A number with a proper minus sign, and none before a zero."""
    return text.replace("-", "−" if any(digit in text for digit in "123456789") else "")


# --- drawing ---


def _frame(axes: Axes, kind: Kind, x_label: str) -> str:
    step = axes.y_ticks[1] - axes.y_ticks[0] if len(axes.y_ticks) > 1 else None
    parts: list[str] = []
    for tick in axes.y_ticks:
        y = axes.y(tick)
        css = "zero" if tick == 0 else "grid"
        label = _label(tick, kind, step)
        parts.append(f'<line class="{css}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{label}</text>')
    x_step = axes.x_ticks[1] - axes.x_ticks[0] if len(axes.x_ticks) > 1 else 1
    for tick in axes.x_ticks:
        x = axes.x(tick)
        if x > WIDTH - RIGHT - 4:
            anchor, x = "end", float(WIDTH - RIGHT)
        else:
            anchor = "middle"
        label = _label(tick, "number", max(1, x_step))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="{anchor}">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _curve(one: Series, axes: Axes, smooth: bool) -> str:
    css = f"c{one.color} d{one.dash}"
    drawn = _path(one.points, axes)
    parts: list[str] = []
    if smooth and len(one.points) >= SMOOTH_FROM:
        parts.append(f'<path class="line thin {css}" d="{drawn}"/>')
        drawn = _path(_smoothed(one.points), axes)
    parts.append(f'<path class="line {css}" d="{drawn}"/>')
    if len(one.points) <= 12:
        parts += [
            f'<circle class="dot {css}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.4"/>' for x, y in one.points
        ]
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]], axes: Axes) -> str:
    return "M" + "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in points)


def _legend(series: Sequence[Series], kind: Kind) -> str:
    items: list[str] = []
    for label, group in groupby(series, key=lambda one: one.label):
        curves = list(group)
        shared = len(curves) > 1  # the same quantity of several runs: the values wear the runs' colours
        key = KEY.format("" if shared else f"c{curves[0].color}", curves[0].dash) if label else ""
        values = " ".join(
            f'<b class="{f"c{one.color}" if shared else ""}">{_label(one.points[-1][1], kind)}</b>' for one in curves
        )
        items.append(f"<li>{key}{escape(label)} {values}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _spoken(title: str, unit: str, series: Sequence[Series], kind: Kind) -> str:
    """The plot in a sentence, for those who do not see it."""
    ends = "; ".join(
        f"{' '.join(part for part in (one.run, one.label or title) if part)} "
        f"from {_label(one.points[0][1], kind)} to {_label(one.points[-1][1], kind)}"
        for one in series
    )
    return f"{title}, {unit}: {ends}" if unit else f"{title}: {ends}"
