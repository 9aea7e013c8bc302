"""Images of prompts: their bytes, or where these lie, and a digest that stands for them."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from retort.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

#: The character of a message's text in whose place an image stands: Unicode's object replacement character.
PLACEHOLDER = "\ufffc"
#: The placeholder of an image in a text, as data sets write it.
WRITTEN = "<image>"
#: What people, graders and models that read text alone see in its place.
IN_WORDS = "[image]"
#: The formats that are read, by their names in Pillow. Others are refused, since some of them start programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True)
class PromptImage:
    """An image in a message.

    Attributes:
        digest: SHA-256 of its encoded bytes, hex: two with the same digest are the same image.
        source: The encoded bytes (PNG, JPEG, ...), or the file that holds them, which is read whenever it is decoded.
        size: Width and height, pixels, as it is shown.

    Example:
        >>> from PIL import Image
        >>> made = PromptImage.of(Image.new("L", (8, 4)))
        >>> made.size, made.decoded().mode
        ((8, 4), 'RGB')
    """

    digest: str
    source: bytes | Path = field(compare=False, repr=False)
    size: tuple[int, int]

    @staticmethod
    def of(image: Image) -> PromptImage:
        """An image that was made in this process, encoded as PNG."""
        encoded = io.BytesIO()
        image.save(encoded, format="PNG")
        return PromptImage(digest_of(encoded.getvalue()), encoded.getvalue(), image.size)

    def encoded(self) -> bytes:
        """Its encoded bytes.

        Raises:
            UserError: The file is gone, or holds another image than when the data were read.
        """
        if isinstance(self.source, bytes):
            return self.source
        try:
            found = self.source.read_bytes()
        except OSError as error:
            raise UserError(f"{self.source}: the image cannot be read any more: {error.strerror}") from None
        if digest_of(found) != self.digest:
            raise UserError(f"{self.source}: the image was changed since the data were read; start the run anew")
        return found

    def decoded(self) -> Image:
        """The image in RGB, turned as its EXIF data say; what is transparent lies on white.

        Raises:
            UserError: As `encoded`; or Pillow is missing.
        """
        return upright(opened(self.encoded()))


def parts_of(text: str) -> list[dict[str, str]]:
    """A text with placeholders as the parts that chat templates read: what stands between them, and images."""
    texts = text.split(PLACEHOLDER)
    found: list[dict[str, str]] = [{"type": "text", "text": texts[0]}] if texts[0] else []
    for after in texts[1:]:
        found += [{"type": "image"}, *([{"type": "text", "text": after}] if after else [])]
    return found


def digest_of(encoded: bytes) -> str:
    """The digest of encoded bytes."""
    return hashlib.sha256(encoded).hexdigest()


def opened(encoded: bytes) -> Image:
    """Opens encoded bytes of one of `FORMATS`, as Pillow does.

    Raises:
        UserError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise UserError("images need Pillow: pip install 'retort-distill[vision]'") from None
    Image.init()
    return Image.open(io.BytesIO(encoded), formats=[name for name in FORMATS if name in Image.OPEN])


def upright(image: Image) -> Image:
    """An image in RGB, turned as its EXIF data say; what is transparent lies on white.

    Greys of 16 bits keep the upper 8 of them. Pillow's own conversion would make nearly all of them white.
    """
    from PIL import Image, ImageOps

    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I;16"):
        return turned.point(lambda grey: grey / 256).convert("L").convert("RGB")
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        over = turned.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return turned.convert("RGB")


def in_words(text: str) -> str:
    """A text with words in place of each `PLACEHOLDER`."""
    return text.replace(PLACEHOLDER, IN_WORDS)
