"""Axes of plots: ranges, ticks, and numbers for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH, HEIGHT = 380, 196
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 26

Kind = Literal["number", "share"]


@dataclass(frozen=True)
class Axes:
    """The mapping of data to the plot: x and y from data to SVG units, and the ticks."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]


def axes_for(
    xs: Sequence[float],
    ys: Sequence[float],
    kind: Kind,
    x_ticks: Sequence[float] | None,
    x_range: tuple[float, float] | None,
    log: bool,
) -> Axes:
    """Axes that hold the data; see `plots.plot`."""
    y, y_ticks = _log_y(min(ys), max(ys)) if log else _linear_y(min(ys), max(ys), kind)
    inner = WIDTH - LEFT - RIGHT
    if x_ticks is not None:
        slots = sorted(x_ticks)
        gap = inner / max(1, len(slots) - 1)
        every = math.ceil(len(slots) / 9)  # More labels would overlap.
        return Axes(lambda x: LEFT + slots.index(x) * gap, y, slots[::every], y_ticks)
    first, last = x_range or (xs[0], xs[-1])
    last = last if last > first else first + 1
    whole = all(x == int(x) for x in (first, last))
    stride = nice_step((last - first) / 5, whole=whole)
    ticks = [index * stride for index in range(math.ceil(first / stride), math.floor(last / stride + 1e-9) + 1)]
    return Axes(lambda x: LEFT + (min(x, last) - first) / (last - first) * inner, y, ticks, y_ticks)


def _height(fraction: float) -> float:
    """Maps 0 (bottom) to 1 (top) to SVG units."""
    return HEIGHT - BOTTOM - fraction * (HEIGHT - TOP - BOTTOM)


def _linear_y(low: float, high: float, kind: Kind) -> tuple[Callable[[float], float], list[float]]:
    low, high, ticks = _range(low, high, kind)
    return lambda value: _height((value - low) / (high - low)), ticks


def _log_y(low: float, high: float) -> tuple[Callable[[float], float], list[float]]:
    """Whole decades, at least one; a value below the lowest lies on it."""
    bottom, top = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    top = max(top, bottom + 1)
    ticks = [10.0**power for power in range(bottom, top + 1, math.ceil((top - bottom) / 5))]
    return lambda value: _height((math.log10(max(value, 10.0**bottom)) - bottom) / (top - bottom)), ticks


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


def tick_label(tick: float, ticks: Sequence[float], kind: Kind) -> str:
    """The label of one of several ticks."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else None
    if step is not None and kind == "share" and ticks[0] > 0 and ticks[-1] / ticks[0] >= 10 * (len(ticks) - 1):
        return percent(tick, max(0, -math.floor(math.log10(100 * tick) + 1e-9)))  # These are decades.
    return label(tick, kind, step)


def label(value: float, kind: Kind, step: float | None = None) -> str:
    """A number for people, with the digits that `step` needs if it labels one of several ticks."""
    if kind == "share":
        return percent(value, 1 if step is None else _digits(100 * step))
    size = abs(value)
    if value == 0:
        return "0"
    smallest = 1e-3 if step is None else 1e-2 if step < 1e-3 else 0.0
    if size >= 1e5 or size < smallest:
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
