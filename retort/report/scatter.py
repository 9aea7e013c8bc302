"""Scatter plots of points as plain SVG, several side by side on the same axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from retort.report.axes import minus, nice_step, tick_label
from retort.report.words import escape, listed

__all__ = ["Cloud", "scatter_figures"]

SIDE, LEFT, BOTTOM, EDGE = 260, 30, 18, 4
#: The share of points beyond either end of an axis at most: a few that are far away would make the rest a dot.
_BEYOND = 0.005

Point = tuple[float, float]


@dataclass(frozen=True)
class Cloud:
    """The points of one model.

    Attributes:
        name: Its name.
        points: Points with the index of their colour.
        beneath: Points drawn in grey beneath them.
        means: Mean of each reward, for the legend.
    """

    name: str
    points: Sequence[tuple[Point, int]]
    beneath: Sequence[Point] = ()
    means: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Frame:
    """A square of the plane: its lower left corner and its side, in the data's units."""

    x: float
    y: float
    side: float

    def holds(self, point: Point) -> bool:
        return self.x <= point[0] <= self.x + self.side and self.y <= point[1] <= self.y + self.side

    def across(self, x: float) -> float:
        return LEFT + (x - self.x) / self.side * (SIDE - LEFT - EDGE)

    def down(self, y: float) -> float:
        return SIDE - BOTTOM - (y - self.y) / self.side * (SIDE - BOTTOM - EDGE)


def scatter_figures(clouds: Sequence[Cloud], kinds: Sequence[str]) -> str:
    """One figure for each model, on the same axes.

    Args:
        clouds: Models with at least one point each.
        kinds: What the colours tell apart, by their index; none: all points are alike.
    """
    frame = _frame([point for cloud in clouds for point in (*(own for own, _ in cloud.points), *cloud.beneath)])
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 18 6" aria-hidden="true"><circle class="dot c{index}" cx="9" cy="3" r="3"/>'
        f"</svg>{escape(kind)}</li>"
        for index, kind in enumerate(kinds)
        if len(kinds) > 1 and kind
    )
    if any(cloud.beneath for cloud in clouds):
        grey = (
            '<svg class="key" viewBox="0 0 18 6" aria-hidden="true"><circle class="dot c6" cx="9" cy="3" r="3"/></svg>'
        )
        legend += f"<li>{grey}teacher, beneath</li>"
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    return f'{legend}<div class="clouds">{"".join(_figure(cloud, kinds, frame) for cloud in clouds)}</div>'


def _figure(cloud: Cloud, kinds: Sequence[str], frame: _Frame) -> str:
    outside = sum(not frame.holds(point) for point, _ in cloud.points)
    beneath = _dots(cloud.beneath, 6, frame, "beneath")
    colors = sorted({color for _, color in cloud.points})
    drawn = "".join(_dots([point for point, own in cloud.points if own == color], color, frame) for color in colors)
    about = [f"{name} {value:.2f}" for name, value in cloud.means.items()]
    about += [f"{outside} of {len(cloud.points)} points outside"] if outside else []
    of = f", by {listed([kind for kind in kinds if kind])}" if len(kinds) > 1 else ""
    spoken = escape(f"{len(cloud.points)} points of {cloud.name}{of}")
    return (
        f'<figure class="cloud"><figcaption><h3>{escape(cloud.name)}</h3> '
        f'<small class="muted">{escape(minus(" · ".join(about)))}</small></figcaption>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{spoken}">{_grid(frame)}{beneath}{drawn}'
        "</svg></figure>"
    )


def _dots(points: Sequence[Point], color: int, frame: _Frame, css: str = "") -> str:
    """Points as one path of strokes without length, whose round ends are the dots."""
    inside = [point for point in points if frame.holds(point)]
    path = "".join(f"M{frame.across(x):.1f} {frame.down(y):.1f}h0" for x, y in inside)
    css = " ".join(["cloud-dots", f"c{color}", *(["few"] if len(inside) <= 150 else []), *([css] if css else [])])
    return f'<path class="{css}" d="{path}"/>' if path else ""


def _grid(frame: _Frame) -> str:
    parts: list[str] = []
    step = nice_step(frame.side / 4)
    for start, is_x in ((frame.x, True), (frame.y, False)):
        first, last = math.ceil(start / step - 1e-9), math.floor((start + frame.side) / step + 1e-9)
        ticks = [index * step for index in range(first, last + 1)]
        for tick in ticks:
            css, text = "zero" if tick == 0 else "grid", tick_label(tick, ticks, "number")
            if is_x:
                x = frame.across(tick)
                parts.append(f'<line class="{css}" x1="{x:.1f}" x2="{x:.1f}" y1="{EDGE}" y2="{SIDE - BOTTOM}"/>')
                parts.append(f'<text x="{x:.1f}" y="{SIDE - BOTTOM + 13}" text-anchor="middle">{text}</text>')
            else:
                y = frame.down(tick)
                parts.append(f'<line class="{css}" x1="{LEFT}" x2="{SIDE - EDGE}" y1="{y:.1f}" y2="{y:.1f}"/>')
                parts.append(f'<text class="y" x="{LEFT - 5}" y="{y + 3.5:.1f}">{text}</text>')
    return "".join(parts)


def _frame(points: Sequence[Point]) -> _Frame:
    """The square that holds nearly all points, with a margin."""
    lows, highs = list[float](), list[float]()
    for axis in (0, 1):
        values = sorted(point[axis] for point in points)
        beyond = int(_BEYOND * len(values))
        lows.append(values[beyond])
        highs.append(values[len(values) - 1 - beyond])
    size = max(high - low for low, high in zip(lows, highs, strict=True))
    # Points that are all the same, or so far out that a float tells them apart no more, get a square around them.
    least = 1e-9 * max(1.0, *map(abs, lows), *map(abs, highs))
    side = 1.16 * size if size > least else max(1.0, 2 * least)
    x, y = ((low + high - side) / 2 for low, high in zip(lows, highs, strict=True))
    return _Frame(x, y, side)
