"""Pictures of one character in a colour at a position, drawn from a bitmap font that is written down here.

No file and no drawing library is needed to know what a picture looks like: the same picture has the same pixels on
every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 24
"""Width and height of a picture, pixels."""
MARK = 10
"""Width and height of a character, pixels: 5 by 5 cells of 2 by 2."""

FONT: Mapping[str, tuple[str, ...]] = {
    "A": (".###.", "#...#", "#####", "#...#", "#...#"),
    "C": (".####", "#....", "#....", "#....", ".####"),
    "E": ("#####", "#....", "####.", "#....", "#####"),
    "H": ("#...#", "#...#", "#####", "#...#", "#...#"),
    "L": ("#....", "#....", "#....", "#....", "#####"),
    "O": (".###.", "#...#", "#...#", "#...#", ".###."),
    "T": ("#####", "..#..", "..#..", "..#..", "..#.."),
    "X": ("#...#", ".#.#.", "..#..", ".#.#.", "#...#"),
    "4": ("#...#", "#...#", "#####", "....#", "....#"),
    "7": ("#####", "....#", "...#.", "..#..", "..#.."),
}
COLORS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.90, 0.20, 0.20),
    "green": (0.20, 0.80, 0.30),
    "blue": (0.25, 0.40, 1.00),
    "yellow": (0.95, 0.85, 0.20),
    "purple": (0.75, 0.30, 0.90),
    "cyan": (0.25, 0.85, 0.90),
}
#: Row and column of the quarter.
POSITIONS: Mapping[str, tuple[int, int]] = {
    "top left": (0, 0),
    "top right": (0, 1),
    "bottom left": (1, 0),
    "bottom right": (1, 1),
}

# Axes: N pictures, G characters of the font, H and W pixels.


@dataclass(frozen=True)
class Marks:
    """What N pictures show.

    Attributes:
        glyph_N: Index of the character in `FONT`, int64.
        color_N: Index of its colour in `COLORS`.
        position_N: Index of its quarter in `POSITIONS`.
        ground_N: Grey of the background, 0 to 1.
    """

    glyph_N: Tensor
    color_N: Tensor
    position_N: Tensor
    ground_N: Tensor


def templates() -> Tensor:
    """The characters, [G, 10, 10]: 1 where one is."""
    cells = torch.tensor([[[cell == "#" for cell in row] for row in rows] for rows in FONT.values()])
    return cells.float().repeat_interleave(2, 1).repeat_interleave(2, 2)


def pictures(marks: Marks) -> Tensor:
    """Draws them, [N, 3, 24, 24], values from 0 to 1."""
    quarters = torch.tensor(list(POSITIONS.values())) * (SIDE // 2)
    start_N2 = quarters[marks.position_N] + 1  # in the middle of its quarter
    mask_NHW = torch.zeros(len(marks.glyph_N), SIDE, SIDE)
    own = torch.arange(MARK)
    rows, columns = start_N2[:, :1] + own, start_N2[:, 1:] + own
    here = torch.arange(len(mask_NHW))[:, None, None]
    mask_NHW[here, rows[:, :, None], columns[:, None, :]] = templates()[marks.glyph_N]
    ink = torch.tensor(list(COLORS.values()))[marks.color_N][:, :, None, None]
    ground, mask = marks.ground_N[:, None, None, None], mask_NHW[:, None]
    return mask * ink + (1 - mask) * ground


def picture(glyph: str, color: str, position: str, ground: float = 0.1) -> Tensor:
    """Draws one, [3, 24, 24].

    Args:
        glyph: A key of `FONT`.
        color: A key of `COLORS`.
        position: A key of `POSITIONS`.
        ground: Grey of the background, 0 to 1.

    Example:
        >>> from retort.tasks.glyphs.pictures import picture
        >>> picture("A", "red", "top left").shape
        torch.Size([3, 24, 24])
    """
    glyph_N, color_N, position_N = (
        torch.tensor([list(names).index(name)])
        for names, name in ((FONT, glyph), (COLORS, color), (POSITIONS, position))
    )
    return pictures(Marks(glyph_N, color_N, position_N, torch.tensor([ground])))[0]


def random_marks(glyph_N: Tensor, color_N: Tensor, position_N: Tensor, generator: torch.Generator) -> Marks:
    """Marks whose background is drawn at random."""
    return Marks(glyph_N, color_N, position_N, 0.05 + 0.15 * torch.rand(len(glyph_N), generator=generator))
