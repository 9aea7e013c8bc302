"""Pictures of coloured shapes on a grid, and of small bar charts, drawn pixel by pixel.

No file and no drawing library is needed to know what a picture looks like: every shape is a small bitmap below, so that
the same picture has the same pixels on every machine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

GRID, CELL = 4, 8
SIDE = GRID * CELL
"""Width and height of a picture, pixels."""

_DRAWN = {
    "circle": ("..###..", ".#####.", "#######", "#######", "#######", ".#####.", "..###.."),
    "square": ("#######", "#######", "#######", "#######", "#######", "#######", "#######"),
    "triangle": ("...#...", "...#...", "..###..", "..###..", ".#####.", ".#####.", "#######"),
    "cross": ("..###..", "..###..", "#######", "#######", "#######", "..###..", "..###.."),
    "ring": (".#####.", "##...##", "#.....#", "#.....#", "#.....#", "##...##", ".#####."),
}
SHAPES = tuple(_DRAWN)
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (35, 155, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 190, 20),
    "black": (35, 35, 40),
}
_SHADED = (255, 190, 240)
_HIGHEST = 8  # steps of a bar's height, of four pixels each

Cell = tuple[int, int]
"""Row and column, counted from 1."""


@dataclass(frozen=True)
class Item:
    """A shape in a cell, or a bar in a column.

    Attributes:
        cell: Its row and column, counted from 1; of a bar the height (1 to 8) and the column.
        shape: A name of `SHAPES`, or `bar`.
        colour: A name of `COLOURS`.
        shift: How far the shape stands from the upper left corner of its cell, pixels: down and right, 0 or 1 each.
    """

    cell: Cell
    shape: str
    colour: str
    shift: tuple[int, int] = (0, 0)


def draw(items: Collection[Item], ground: tuple[int, int, int], shaded: Collection[Cell] = ()) -> Image:
    """Draws a picture of `SIDE` times `SIDE` pixels, RGB.

    Args:
        items: What is on it.
        ground: Colour of the background.
        shaded: Cells whose background has another colour; of bars only the column counts.

    Raises:
        UserError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        from retort.errors import UserError

        raise UserError("the task shapes draws pictures with Pillow: pip install 'retort-distill[vision]'") from None
    return Image.frombytes("RGB", (SIDE, SIDE), pixels(items, ground, shaded))


def pixels(items: Collection[Item], ground: tuple[int, int, int], shaded: Collection[Cell] = ()) -> bytes:
    """The pixels of `draw`, three bytes each, row by row."""
    found = bytearray(bytes(ground) * (SIDE * SIDE))
    bars = any(item.shape == "bar" for item in items)
    for row, column in shaded:
        for down in range(SIDE) if bars else range((row - 1) * CELL, row * CELL):
            _line(found, down, (column - 1) * CELL, CELL, _SHADED)
    for item in items:
        colour, left = COLOURS[item.colour], (item.cell[1] - 1) * CELL
        if item.shape == "bar":
            for down in range(SIDE - item.cell[0] * SIDE // _HIGHEST, SIDE):
                _line(found, down, left + 1, CELL - 2, colour)
            continue
        top = (item.cell[0] - 1) * CELL + item.shift[0]
        for down, line in enumerate(_DRAWN[item.shape]):
            for right, mark in enumerate(line):
                if mark == "#":
                    _line(found, top + down, left + item.shift[1] + right, 1, colour)
    return bytes(found)


def _line(found: bytearray, down: int, right: int, length: int, colour: tuple[int, int, int]) -> None:
    start = 3 * (down * SIDE + right)
    found[start : start + 3 * length] = bytes(colour) * length
