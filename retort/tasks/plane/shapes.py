"""Shapes in the plane: where their points are drawn, and how far a point is from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: How thick a curve is drawn: standard deviation of its points around it.
SPREAD = 0.1
#: A point counts as on a shape up to this distance from it.
NEAR = 0.3
#: Distance of the eight Gaussians from the origin.
_RADIUS = 1.6


@dataclass(frozen=True)
class Shape:
    """A shape.

    Attributes:
        draw: Points on it without spread, [N, 2], given N and a generator.
        distance_N: Distance of points [N, 2] to it.
    """

    draw: Callable[[int, torch.Generator], Tensor]
    distance_N: Callable[[Tensor], Tensor]


def _arc(center: tuple[float, float], start: float, end: float) -> Shape:
    """A part of a circle of radius 1, from an angle to another one, counter-clockwise."""
    middle = torch.tensor(center)

    def point(angle_N: Tensor) -> Tensor:
        return middle.to(angle_N.dtype) + torch.stack([angle_N.cos(), angle_N.sin()], -1)

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return point(start + (end - start) * torch.rand(count, generator=generator))

    def distance_N(points: Tensor) -> Tensor:
        x, y = (points - middle.to(points.dtype)).unbind(-1)
        behind_N = (torch.atan2(y, x) - start) % (2 * math.pi)  # how far behind the start of the arc
        ends = point(torch.tensor([start, end], dtype=points.dtype))
        return torch.where(
            behind_N <= end - start, (x.hypot(y) - 1).abs(), (points[:, None] - ends).norm(dim=-1).amin(1)
        )

    return Shape(draw, distance_N)


def _dots(centers: list[tuple[float, float]]) -> Shape:
    """Separate points."""
    table = torch.tensor(centers)

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return table[torch.randint(len(table), (count,), generator=generator)]

    def distance_N(points: Tensor) -> Tensor:
        return (points[:, None] - table.to(points.dtype)).norm(dim=-1).amin(1)

    return Shape(draw, distance_N)


def _either(one: Shape, other: Shape) -> Shape:
    """Two shapes of the same size together."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        which_N1 = torch.rand(count, 1, generator=generator) < 0.5
        return torch.where(which_N1, one.draw(count, generator), other.draw(count, generator))

    return Shape(draw, lambda points: torch.minimum(one.distance_N(points), other.distance_N(points)))


def _around(first: int, count: int) -> Shape:
    """So many neighbours of eight points around the origin; the first one stands at `first` eighths of a turn."""
    angles = [math.pi / 4 * (first + index) + math.pi / 8 for index in range(count)]
    return _dots([(_RADIUS * math.cos(angle), _RADIUS * math.sin(angle)) for angle in angles])


_UPPER, _LOWER = _arc((-0.5, -0.25), 0.0, math.pi), _arc((0.5, 0.25), math.pi, 2 * math.pi)
#: The shapes by name; each name is a prompt.
SHAPES: Mapping[str, Shape] = {
    "upper moon": _UPPER,
    "lower moon": _LOWER,
    "both moons": _either(_UPPER, _LOWER),
    "upper gaussians": _around(0, 4),
    "lower gaussians": _around(4, 4),
    "both gaussians": _around(0, 8),
}


def points(name: str, count: int, generator: torch.Generator, spread: float = SPREAD) -> Tensor:
    """Random points of a shape, [N, 2].

    Args:
        name: A key of `SHAPES`.
        count: N.
        generator: The random numbers.
        spread: Standard deviation around it, in both directions.

    Example:
        >>> import torch
        >>> from retort.tasks.plane.shapes import points
        >>> points("upper moon", 100, torch.Generator().manual_seed(0)).shape
        torch.Size([100, 2])
    """
    own = SHAPES[name].draw(count, generator)
    return own + spread * torch.randn(count, 2, generator=generator)


def on_shape(name: str, samples: Tensor) -> Tensor:
    """Which points are on a shape, at most `NEAR` from it, [N] bool; points that are not finite are not.

    Args:
        name: A key of `SHAPES`.
        samples: [N, 2].
    """
    return SHAPES[name].distance_N(samples) <= NEAR
