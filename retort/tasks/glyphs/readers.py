"""What a picture shows, read without a model: which character, which colour, where, and how many marks.

What stands out from the median colour of a picture is its ink. Characters are found by template matching: the
correlation of the ink with each character of the font, at every position. Pictures of another size are scaled to 24
times 24 pixels first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retort.tasks.glyphs.pictures import COLORS, MARK, SIDE, templates

#: Least correlation with a character at which a picture shows it; all pictures of the task have at least 0.86.
SHOWN = 0.6
#: Least distance from the background, in RGB from 0 to 1, at which a pixel is ink.
INK = 0.3
#: Greatest distance of the ink's mean from a colour that it counts as.
LIKE = 0.35
#: Least pixels of a mark; what is smaller is a speck.
SPECK = 8

# Axes: N pictures, G characters, K colours, H and W pixels, X pixels of a window, P windows.


def ink(images: Tensor) -> Tensor:
    """Distance of each pixel from the background, [N, 24, 24].

    Args:
        images: [N, 3, H, W], from 0 to 1.
    """
    return (images - _ground(images)).norm(dim=1)


def glyphs_NG(images: Tensor) -> Tensor:
    """How well each character of the font matches where it matches best: correlations, [N, G].

    Args:
        images: [N, 3, H, W], from 0 to 1.

    Example:
        >>> from retort.tasks.glyphs.pictures import FONT, picture
        >>> from retort.tasks.glyphs.readers import glyphs_NG
        >>> list(FONT)[int(glyphs_NG(picture("T", "blue", "top right")[None]).argmax())]
        'T'
    """
    side = MARK + 2  # a margin without ink belongs to a character
    wanted_GX = F.pad(templates(), (1, 1, 1, 1)).flatten(1).to(images)
    wanted_GX = F.normalize(wanted_GX - wanted_GX.mean(1, keepdim=True), dim=1)
    seen_NXP = F.unfold(ink(_scaled(images))[:, None], side, padding=1)
    seen_NXP = seen_NXP - seen_NXP.mean(1, keepdim=True)
    # A window of faint ink has no shape: the constant keeps its correlation low.
    matches_NGP = torch.einsum("gx,nxp->ngp", wanted_GX, seen_NXP) / (seen_NXP.norm(dim=1)[:, None] + 0.5)
    return matches_NGP.amax(-1)


def glyph_N(images: Tensor) -> Tensor:
    """Index in `FONT` of the character that each picture shows, [N]; -1 where it shows none."""
    best = glyphs_NG(images).max(-1)
    return best.indices.masked_fill(best.values < SHOWN, -1)


def color_N(images: Tensor) -> Tensor:
    """Index in `COLORS` of the colour of the ink, [N]; -1 where there is no ink or it has none of them."""
    images = _scaled(images)
    inked = _inked(images)[:, None]
    mean_NC = (images * inked).sum((2, 3)) / inked.sum((2, 3)).clamp(min=1)
    nearest = torch.cdist(mean_NC, torch.tensor(list(COLORS.values())).to(images)).min(-1)
    return nearest.indices.masked_fill((nearest.values > LIKE) | ~inked.any((1, 2, 3)), -1)


def center_N2(images: Tensor) -> Tensor:
    """Where the middle of the ink is, from the top and from the left, 0 to 1, [N, 2]; NaN where there is none."""
    inked = _inked(_scaled(images)).to(images.dtype)
    along = (torch.arange(SIDE, device=images.device, dtype=images.dtype) + 0.5) / SIDE
    count_N = inked.sum((1, 2))
    return torch.stack([(inked.sum(2) * along).sum(1), (inked.sum(1) * along).sum(1)], -1) / count_N[:, None]


def marks_N(images: Tensor) -> Tensor:
    """Number of connected marks, [N], int64: pixels that touch, corners included; specks do not count."""
    inked = _inked(_scaled(images))
    own = torch.arange(1, SIDE * SIDE + 1, dtype=torch.float32, device=images.device).reshape(SIDE, SIDE)
    label = torch.where(inked, own, 0.0)
    while True:  # the greatest number of each mark spreads over it
        wider = torch.where(inked, F.max_pool2d(label[:, None], 3, 1, 1)[:, 0], 0.0)
        if torch.equal(wider, label):
            break
        label = wider
    sizes = torch.zeros(len(images), SIDE * SIDE + 1, device=images.device)
    sizes.scatter_add_(1, label.flatten(1).long(), torch.ones_like(label).flatten(1))
    return (sizes[:, 1:] >= SPECK).sum(1)


def _scaled(images: Tensor) -> Tensor:
    return images if images.shape[2:] == (SIDE, SIDE) else F.interpolate(images, (SIDE, SIDE), mode="area")


def _ground(images: Tensor) -> Tensor:
    """The median of each channel: most of a picture is background, [N, 3, 1, 1]."""
    return images.flatten(2).median(-1).values[:, :, None, None]


def _inked(images: Tensor) -> Tensor:
    return ink(images) > INK
