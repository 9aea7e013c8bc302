"""Line plots as plain SVG. Sizes are in the SVG's own units; the page scales it to its column."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from retort.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, Kind, axes_for, label, tick_label
from retort.report.words import escape

__all__ = ["KEY", "Kind", "Series", "plot"]

#: Most points drawn of a curve; longer ones are averaged over neighbours.
MOST_POINTS = 400
#: Shortest curve that gets a running mean over it.
SMOOTH_FROM = 40

#: A line's sample beside its name, by colour and dash.
KEY = '<svg class="key" viewBox="0 0 18 6" aria-hidden="true"><path class="line {} d{}" d="M0 3H18"/></svg>'


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: Its name in the legend; empty where the title says it all. Neighbours that share it share a line there.
        points: (x, y), sorted by x, finite.
        color: Index into the page's palette.
        dash: Index into its dash patterns, 0 being solid.
        run: The run it is from, where the label does not say so.
        band: (low, high) at each point, where there is an interval; as many as points.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    dash: int = 0
    run: str = ""
    band: Sequence[tuple[float, float]] = ()

    @property
    def name(self) -> str:
        """Run and label."""
        return " ".join(part for part in (self.run, self.label) if part)


def plot(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    kind: Kind = "number",
    x_label: str = "step",
    x_ticks: Sequence[float] | None = None,
    x_names: Sequence[str] = (),
    x_range: tuple[float, float] | None = None,
    smooth: bool = True,
    log: bool = False,
    stairs: float | None = None,
    values: bool = True,
) -> str:
    """A figure with caption, legend and curves; the legend gives the last values, or those under the pointer.

    Args:
        title: Title of the plot.
        unit: Unit of y, in words.
        series: At least one, with at least one point each.
        kind: `share` for fractions shown in per cent.
        x_label: Label of the x axis.
        x_ticks: Values of x that exist, if few: they are spaced evenly. Default: a linear axis.
        x_names: Labels of these ticks, instead of their numbers.
        x_range: Ends of the x axis; default: those of the curves.
        smooth: Draw long curves thin, with a running mean on top.
        log: A logarithmic y axis; values that are not positive are left out.
        stairs: A histogram with bins of this width: each value holds from its x on.
        values: Whether the legend gives the last values, or only those under the pointer.
    """
    series = [thinned(one) for one in series]
    if log:
        series = [replace(one, points=[point for point in one.points if point[1] > 0]) for one in series]
        series = [one for one in series if one.points]
    series = _trimmed(series)
    ys = [end for one in series for pair in one.band for end in pair] + [y for one in series for _, y in one.points]
    xs = sorted({x for one in series for x, _ in one.points})
    axes = axes_for(xs, ys, kind, x_ticks, x_range, log)
    smooth = smooth and max(len(one.points) for one in series) >= SMOOTH_FROM
    curves = "".join(_band(one, axes) for one in series) + "".join(_curve(one, axes, smooth, stairs) for one in series)
    names = [str(name) for name in x_names] or [f"{x:.6g}" for x in xs]
    if x_names and x_ticks is not None:
        names = [str(x_names[list(x_ticks).index(x)]) for x in xs]
    spoken = escape(_spoken(title, unit, series, kind, x_label))
    save = "".join(
        f'<button type="button" data-save="{form}" aria-label="Save {escape(title)} as {form.upper()}">'
        f"{form.upper()}</button>"
        for form in ("svg", "csv")
    )
    return (
        f'<figure class="plot"><figcaption><h3>{escape(title)}</h3> <span class="muted">{escape(unit)}</span>'
        f"</figcaption>{_legend(series, kind, values)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{spoken}" '
        f'data-title="{escape(title)}" data-unit="{escape(unit)}" data-x="{escape(x_label)}" '
        f'data-plot="{escape(_data(series, xs, names, axes, kind))}">'
        f"{_frame(axes, kind, x_label, dict(zip(x_ticks or (), x_names, strict=False)))}{curves}"
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg><div class="save">{save}</div></figure>'
    )


def _data(series: Sequence[Series], xs: Sequence[float], names: Sequence[str], axes: Axes, kind: Kind) -> str:
    """The data of a plot for the page's script, which also saves it as CSV."""
    return json.dumps(
        {
            "x": [round(axes.x(x), 1) for x in xs],
            "at": names,
            "kind": kind,
            "series": [
                {
                    "name": one.name,
                    "y": _at(dict(one.points), xs),
                    **({"low": _ends(one, xs, 0), "high": _ends(one, xs, 1)} if one.band else {}),
                }
                for one in series
            ],
        },
        separators=(",", ":"),
    )


def _at(values: dict[float, float], xs: Sequence[float]) -> list[float | None]:
    return [None if x not in values else float(f"{values[x]:.6g}") for x in xs]


def _ends(one: Series, xs: Sequence[float], end: int) -> list[float | None]:
    return _at({x: pair[end] for (x, _), pair in zip(one.points, one.band, strict=True)}, xs)


def _trimmed(series: Sequence[Series]) -> list[Series]:
    """Bands that reach far beyond the curves (two seeds know little) end where they would flatten them."""
    ys = [y for one in series for _, y in one.points]
    low, high = min(ys), max(ys)
    reach = max(high - low, 0.25 * max(abs(low), abs(high)))
    floor, roof = max(low - reach, 0.0) if low >= 0 else low - reach, high + reach
    return [replace(one, band=[(max(lo, floor), min(hi, roof)) for lo, hi in one.band]) for one in series]


def thinned(one: Series) -> Series:
    """Averages neighbours until few enough points are left."""
    bin_size = math.ceil(len(one.points) / MOST_POINTS)
    if bin_size <= 1:
        return one
    starts = range(0, len(one.points), bin_size)
    bins = [one.points[start : start + bin_size] for start in starts]
    points = [(cut[-1][0], sum(y for _, y in cut) / len(cut)) for cut in bins]
    bands = [one.band[start : start + bin_size] for start in starts] if one.band else []
    band = [(sum(low for low, _ in cut) / len(cut), sum(high for _, high in cut) / len(cut)) for cut in bands]
    return replace(one, points=points, band=band)


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred running mean; at both ends over fewer points."""
    reach = max(2, len(points) // 30)
    found: list[tuple[float, float]] = []
    for index, (x, _) in enumerate(points):
        window = points[max(0, index - reach) : index + reach + 1]
        found.append((x, sum(y for _, y in window) / len(window)))
    return found


# --- drawing ---


def _frame(axes: Axes, kind: Kind, x_label: str, names: dict[float, str]) -> str:
    parts: list[str] = []
    for tick in axes.y_ticks:
        y = axes.y(tick)
        css = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{css}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{tick_label(tick, axes.y_ticks, kind)}</text>')
    for tick in axes.x_ticks:
        x = axes.x(tick)
        anchor, x = ("end", float(WIDTH - RIGHT)) if x > WIDTH - RIGHT - 4 else ("middle", x)
        text = names.get(tick) or tick_label(tick, axes.x_ticks, "number")
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="{anchor}">{escape(text)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _band(one: Series, axes: Axes) -> str:
    if not one.band or len(one.points) < 2:
        return ""
    xs = [x for x, _ in one.points]
    there = [(x, high) for x, (_, high) in zip(xs, one.band, strict=True)]
    back = [(x, low) for x, (low, _) in zip(xs, one.band, strict=True)][::-1]
    return f'<path class="band c{one.color}" d="{_path([*there, *back], axes)}Z"/>'


def _curve(one: Series, axes: Axes, smooth: bool, stairs: float | None) -> str:
    css = f"c{one.color} d{one.dash}"
    if stairs is not None:
        return f'<path class="line {css}" d="{_stairs(one.points, axes, stairs)}"/>'
    drawn = _path(one.points, axes)
    parts: list[str] = []
    if smooth and len(one.points) >= SMOOTH_FROM and not one.band:
        parts.append(f'<path class="line thin {css}" d="{drawn}"/>')
        drawn = _path(smoothed(one.points), axes)
    parts.append(f'<path class="line {css}" d="{drawn}"/>')
    if len(one.points) <= 12:
        parts += [
            f'<circle class="dot {css}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.4"/>' for x, y in one.points
        ]
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]], axes: Axes) -> str:
    return "M" + "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in points)


def _stairs(points: Sequence[tuple[float, float]], axes: Axes, width: float) -> str:
    """The path of a histogram; bins that are missing leave a gap."""
    parts: list[str] = []
    for index, (x, y) in enumerate(points):
        joined = index > 0 and points[index - 1][0] + 1.5 * width > x
        parts.append(f"{'L' if joined else 'M'}{axes.x(x):.1f} {axes.y(y):.1f}H{axes.x(x + width):.1f}")
    return "".join(parts)


def _legend(series: Sequence[Series], kind: Kind, values: bool) -> str:
    items: list[str] = []
    for text, group in groupby(series, key=lambda one: one.label):
        curves = list(group)
        shared = len(curves) > 1  # the same quantity of several runs: the values wear the runs' colours
        key = KEY.format("" if shared else f"c{curves[0].color}", curves[0].dash) if text else ""
        last = [label(one.points[-1][1], kind) if values else "" for one in curves]
        numbers = " ".join(
            f'<b class="{f"c{one.color}" if shared else ""}">{number}</b>'
            for one, number in zip(curves, last, strict=True)
        )
        items.append(f"<li>{key}{escape(text)} {numbers}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _spoken(title: str, unit: str, series: Sequence[Series], kind: Kind, x_label: str) -> str:
    """The plot in a sentence, for screen readers."""
    ends = "; ".join(
        f"{one.name or title} from {label(one.points[0][1], kind)} to {label(one.points[-1][1], kind)}"
        for one in series
    )
    return f"{title}{f', {unit}' if unit else ''}, over {x_label}: {ends}. Arrow keys read the values."
