"""Changed images, for views of a teacher and for evaluation: pixelated, blurred, blank, or with a border cut off.

Each function takes an image of Pillow or a `PromptImage` and returns a new one of the same kind, of the same size and
mode, so that a processor makes as many image tokens of it. `Changed` applies one to the images of prompts.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, overload

from retort.core.images import PromptImage
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CACHED_BYTES", "Changed", "blank", "blur", "crop", "pixelate"]

#: Encoded bytes of changed images that one `Changed` keeps.
CACHED_BYTES = 64 * 2**20


@overload
def pixelate(image: Image, ratio: float = 0.1) -> Image: ...
@overload
def pixelate(image: PromptImage, ratio: float = 0.1) -> PromptImage: ...
def pixelate(image: Image | PromptImage, ratio: float = 0.1) -> Image | PromptImage:
    """The image in blocks of one colour each: scaled down (bilinear), and up again (nearest neighbour).

    The scaled-down sides have max(1, int(side * ratio)) pixels. It is the view of VA-OPD (arXiv 2605.21924). Palettes
    and images of one bit are interpolated in RGB and in grey, and then brought back to their mode, as in the released
    code.

    Args:
        image: The image, which is not changed.
        ratio: Pixels of a side that are left, as a share, above 0 and at most 1.

    Raises:
        UserError: The ratio is none of these; or, of a `PromptImage`, what `PromptImage.decoded` raises.

    Example:
        >>> from PIL import Image
        >>> from retort.views import pixelate
        >>> picture = Image.new("L", (20, 10))
        >>> picture.paste(255, (10, 0, 20, 10))
        >>> small = pixelate(picture)
        >>> small.size, small.mode, small.getpixel((0, 0)), small.getpixel((19, 9))
        ((20, 10), 'L', 36, 219)
    """
    check_ratio(ratio)
    if isinstance(image, PromptImage):
        return PromptImage.of(pixelate(image.decoded(), ratio))
    from PIL.Image import Resampling

    smooth = _smooth(image)
    sides = (max(1, int(image.width * ratio)), max(1, int(image.height * ratio)))
    return _in_mode(smooth.resize(sides, Resampling.BILINEAR).resize(image.size, Resampling.NEAREST), image)


@overload
def blur(image: Image, radius: float = 0.05) -> Image: ...
@overload
def blur(image: PromptImage, radius: float = 0.05) -> PromptImage: ...
def blur(image: Image | PromptImage, radius: float = 0.05) -> Image | PromptImage:
    """The image under a Gaussian blur.

    Args:
        image: The image, which is not changed.
        radius: Standard deviation of the Gaussian, as a share of the shorter side; positive.

    Raises:
        UserError: The radius is not positive; or, of a `PromptImage`, what `PromptImage.decoded` raises.

    Example:
        >>> from PIL import Image
        >>> from retort.views import blur
        >>> picture = Image.new("L", (40, 40))
        >>> picture.paste(255, (20, 0, 40, 40))
        >>> 0 < blur(picture).getpixel((19, 20)) < 128
        True
    """
    if not (math.isfinite(radius) and radius > 0.0):
        raise UserError(f"blur: radius must be positive, not {radius}")
    if isinstance(image, PromptImage):
        return PromptImage.of(blur(image.decoded(), radius))
    from PIL.ImageFilter import GaussianBlur

    return _in_mode(_smooth(image).filter(GaussianBlur(radius * min(image.size))), image)


@overload
def blank(image: Image, colour: tuple[int, int, int] | None = None) -> Image: ...
@overload
def blank(image: PromptImage, colour: tuple[int, int, int] | None = None) -> PromptImage: ...
def blank(image: Image | PromptImage, colour: tuple[int, int, int] | None = None) -> Image | PromptImage:
    """An image of one colour, of the same size and mode.

    Args:
        image: The image, which is not changed.
        colour: Red, green and blue, 0 to 255 each; None for the mean colour of the image.

    Raises:
        UserError: Of a `PromptImage`, what `PromptImage.decoded` raises.

    Example:
        >>> from PIL import Image
        >>> from retort.views import blank
        >>> picture = Image.new("L", (20, 10))
        >>> picture.paste(200, (10, 0, 20, 10))
        >>> blank(picture).getcolors(), blank(picture, (128, 128, 128)).getcolors()
        ([(200, 100)], [(200, 128)])
    """
    if isinstance(image, PromptImage):
        return PromptImage.of(blank(image.decoded(), colour))
    from PIL import Image as images
    from PIL.ImageStat import Stat

    if colour is not None:
        return _in_mode(images.new("RGB", image.size, colour), image)
    smooth = _smooth(image)
    mean = [round(value) for value in Stat(smooth).mean]
    return _in_mode(images.new(smooth.mode, image.size, tuple(mean) if len(mean) > 1 else mean[0]), image)


@overload
def crop(image: Image, box: tuple[float, float, float, float]) -> Image: ...
@overload
def crop(image: PromptImage, box: tuple[float, float, float, float]) -> PromptImage: ...
def crop(image: Image | PromptImage, box: tuple[float, float, float, float]) -> Image | PromptImage:
    """A part of the image in its place, and the mean colour of the image around it: the size stays.

    Args:
        image: The image, which is not changed.
        box: Left, top, right and bottom of the part, as shares of the sides: 0 <= left < right <= 1, and likewise top
            and bottom. At least one pixel is left.

    Raises:
        UserError: The box is none of these; or, of a `PromptImage`, what `PromptImage.decoded` raises.

    Example:
        >>> from PIL import Image
        >>> from retort.views import crop
        >>> picture = Image.new("L", (20, 10))
        >>> picture.paste(200, (10, 0, 20, 10))
        >>> right = crop(picture, (0.5, 0, 1, 1))
        >>> right.size, right.getpixel((0, 0)), right.getpixel((15, 5))
        ((20, 10), 100, 200)
    """
    left, top, right, bottom = box
    if not (0.0 <= left < right <= 1.0 and 0.0 <= top < bottom <= 1.0):
        raise UserError(f"crop: a box has 0 <= left < right <= 1, and likewise top and bottom, not {box}")
    if isinstance(image, PromptImage):
        return PromptImage.of(crop(image.decoded(), box))
    smooth = _smooth(image)
    across, down = _pixels(left, right, image.width), _pixels(top, bottom, image.height)
    part = (across[0], down[0], across[1], down[1])
    found = blank(smooth)
    found.paste(smooth.crop(part), part)
    return _in_mode(found, image)


@dataclass(frozen=True, eq=False)
class Changed:
    """Prompts with each of their images changed; the images that it made last are kept, as siblings share them.

    Attributes:
        change: Returns a changed image; the number of image tokens stays if its size does.
        keep: Encoded bytes of changed images that are kept.

    Example:
        >>> from PIL import Image
        >>> from retort.core.images import PLACEHOLDER, PromptImage
        >>> from retort.types import Message, Prompt
        >>> from retort.views import Changed, pixelate
        >>> picture = Image.linear_gradient("L")
        >>> turn = Message("user", f"{PLACEHOLDER} What is it?", images=(PromptImage.of(picture),))
        >>> seen = Changed(pixelate)(Prompt("1", (turn,)))
        >>> seen.images[0].size, len(seen.images[0].decoded().getcolors())
        ((256, 256), 25)
    """

    change: Callable[[PromptImage], PromptImage]
    keep: int = CACHED_BYTES
    _made: OrderedDict[str, PromptImage] = field(default_factory=OrderedDict[str, PromptImage], init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def __call__(self, prompt: Prompt) -> Prompt:
        """The prompt with its images changed; a prompt without images is returned as it is.

        Raises:
            UserError: As `PromptImage.decoded`.
        """
        return replace(prompt, messages=tuple(self._turn(message) for message in prompt.messages))

    def _turn(self, message: Message) -> Message:
        return replace(message, images=tuple(self.image(image) for image in message.images))

    def image(self, image: PromptImage) -> PromptImage:
        """One image, changed."""
        with self._lock:
            if image.digest in self._made:
                self._made.move_to_end(image.digest)
                return self._made[image.digest]
        found = self.change(image)
        with self._lock:
            self._made[image.digest] = found
            while len(self._made) > 1 and sum(map(_size, self._made.values())) > self.keep:
                self._made.popitem(last=False)
        return found


def check_ratio(ratio: float) -> None:
    """Raises `UserError` for a ratio that `pixelate` does not take."""
    if not (math.isfinite(ratio) and 0.0 < ratio <= 1.0):
        raise UserError(f"pixelate: ratio must lie above 0 and at most at 1, not {ratio}")


def _size(image: PromptImage) -> int:
    """Bytes in memory."""
    return len(image.source) if isinstance(image.source, bytes) else 0


def _smooth(image: Image) -> Image:
    """The image in a mode that can be interpolated."""
    return image.convert({"P": "RGB", "1": "L"}[image.mode]) if image.mode in ("P", "1") else image


def _in_mode(found: Image, like: Image) -> Image:
    return found if found.mode == like.mode else found.convert(like.mode)


def _pixels(low: float, high: float, side: int) -> tuple[int, int]:
    """First pixel and the one after the last, of a part of a side."""
    first = min(int(low * side), side - 1)
    return first, max(first + 1, round(high * side))
