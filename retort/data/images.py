"""Images of rows: files, bytes, data URLs and images of Pillow. Each is decoded once, so that a broken one is found."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort.core.images import FORMATS, PromptImage, digest_of, opened, upright
from retort.data.values import short
from retort.errors import UserError, a_kind, quoted, shortened
from retort.files import unnameable

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_IMAGE_PIXELS", "ImageFolder", "ImageReader", "shown_size", "spelt"]

#: Most pixels of an image; more are refused before they are decoded (four bytes each in memory, and copies).
MAX_IMAGE_PIXELS = 50_000_000
#: How many times as long as the other a side may be: some processors scale the shorter one to hundreds of pixels.
_MOST_LONGER = 200
#: Most bytes of an encoded image.
_MOST_BYTES = 2**28
#: Keys of a mapping that holds an image, in the order in which they are tried: of `datasets`, OpenAI, and transformers.
_KEYS = ("bytes", "image", "image_url", "source", "url", "base64", "data", "path")
#: Those whose text is base64, and no path.
_BASE64 = ("bytes", "base64", "data")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URL = re.compile(r"data:(?P<about>[^,]*),", re.IGNORECASE)
#: Beginnings of other files, and what to do about them.
_OTHERS = (
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg|<svg)", re.DOTALL), "it is SVG"),
    (re.compile(rb"%PDF"), "it is PDF"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "it is PostScript"),
    (re.compile(rb"....ftyp(heic|heix|hevc|mif1|msf1)", re.DOTALL), "it is HEIC"),
    (re.compile(rb"\s*<(!DOCTYPE )?html", re.IGNORECASE), "it is a page of HTML"),
    (re.compile(rb"version https://git-lfs"), "it stands for a file of Git LFS that was not fetched (git lfs pull)"),
)


@dataclass(frozen=True)
class ImageFolder:
    """The folder of the files that rows name as images.

    Attributes:
        path: Where relative paths begin; None where there is none.
        within: Folders that hold every file that may be named; None where any file may be, as in the user's own data.
    """

    path: Path | None
    within: tuple[Path, ...] | None = None


class ImageReader:
    """Reads the images of one source. The same file, and the same bytes, are decoded and kept only once."""

    def __init__(self) -> None:
        """Begins without images."""
        self._files: dict[Path, PromptImage] = {}
        self._digests: dict[str, PromptImage] = {}

    def __call__(self, at: str, value: Any, folder: ImageFolder) -> PromptImage:
        """Reads one image.

        Args:
            at: Name of the image, for messages.
            value: A path, bytes, a data URL, an image of Pillow, or a mapping that holds one of these.
            folder: The folder of paths.

        Raises:
            UserError: It is something else, or an address; or the file is missing, broken, empty, animated, of an
                unknown format, or too large.
        """
        if isinstance(value, Mapping):
            return self._mapping(at, value, folder)
        if isinstance(value, bytes | bytearray | memoryview):
            return self._bytes(at, bytes(value))
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str):
            return self._text(at, value, folder)
        if _is_pillow(value):
            return self._bytes(at, _as_png(at, value))
        raise UserError(f"{at}: is {a_kind(value)}; expected a path, bytes, a data URL or an image of Pillow")

    def _mapping(self, at: str, value: Mapping[Any, Any], folder: ImageFolder) -> PromptImage:
        key = next((key for key in _KEYS if value.get(key) is not None), None)
        if key is None:
            keys = ", ".join(map(str, value)) or "none"
            raise UserError(f"{at}: holds no image (its keys: {keys}); expected one of {', '.join(_KEYS)}")
        own = value[key]
        if key in _BASE64 and isinstance(own, str):
            return self._bytes(at, _from_base64(at, own[found.end() :] if (found := _DATA_URL.match(own)) else own))
        return self(at, own, folder)

    def _text(self, at: str, value: str, folder: ImageFolder) -> PromptImage:
        found = _DATA_URL.match(value)
        if found is not None:
            if not found["about"].lower().endswith(";base64"):
                raise UserError(f"{at}: is a data URL without base64; write data:image/png;base64,...")
            return self._bytes(at, _from_base64(at, value[found.end() :]))
        if _ADDRESS.match(value):
            raise UserError(
                f"{at}: {shortened(value, 120)} is an address, and Retort fetches no images; save the image to a file "
                "and name its path"
            )
        return self._file(at, _path(at, value, folder))

    def _file(self, at: str, path: Path) -> PromptImage:
        if path not in self._files:
            try:
                about = path.stat()
                if not stat.S_ISREG(about.st_mode):  # reading a pipe would wait for ever
                    raise UserError(f"{at}: {path} is no file")
                if about.st_size > _MOST_BYTES:
                    raise UserError(f"{at}: {path} has {about.st_size:,} bytes; an image has at most {_MOST_BYTES:,}")
                encoded = path.read_bytes()
            except FileNotFoundError:
                missing = "" if path.parent.is_dir() else f" (there is no folder {path.parent} either)"
                raise UserError(f"{at}: there is no file {path}{missing}") from None
            except OSError as error:
                raise UserError(f"{at}: cannot read {path}: {error.strerror or error}") from None
            self._files[path] = self._known(f"{at}: {path}", encoded, path)
        return self._files[path]

    def _bytes(self, at: str, encoded: bytes) -> PromptImage:
        if len(encoded) > _MOST_BYTES:
            raise UserError(f"{at}: has {len(encoded):,} bytes; an image has at most {_MOST_BYTES:,}")
        return self._known(at, encoded, encoded)

    def _known(self, at: str, encoded: bytes, source: bytes | Path) -> PromptImage:
        digest = digest_of(encoded)
        if digest not in self._digests:
            self._digests[digest] = PromptImage(digest, source, shown_size(at, encoded))
        return self._digests[digest]


def spelt(value: Any) -> str | None:
    """An image that JSON cannot spell, bytes or an image of Pillow, as a data URL; None for anything else.

    What is read from it is the same image, with the same digest.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        encoded = bytes(value)
    elif _is_pillow(value):
        encoded = _as_png("an image", value)
    else:
        return None
    return f"data:image;base64,{base64.b64encode(encoded).decode()}"


def _is_pillow(value: Any) -> bool:
    # Who holds an image of Pillow has imported it.
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def _as_png(at: str, image: Image) -> bytes:
    """An image of Pillow, as `upright` makes it, encoded as PNG."""
    _refuse_large(at, image.size)
    _refuse_kind(at, image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = PromptImage.of(upright(image)).source
        except Exception as error:  # a file that was closed or cut
            raise UserError(f"{at}: the image of Pillow cannot be read: {short(error)}") from None
    assert isinstance(found, bytes)
    return found


def _path(at: str, value: str, folder: ImageFolder) -> Path:
    problem = unnameable(value)
    if problem is not None:
        raise UserError(f"{at}: {quoted(value, 60)}: {problem}")
    path = Path(value)
    if not path.is_absolute() and folder.path is None:
        raise UserError(
            f"{at}: {value} names a file, and a data set of the hub must hold its images itself; save both on disk and "
            "give the folder"
        )
    path = (folder.path or Path()).absolute() / path
    if folder.within is not None and not any(path.resolve().is_relative_to(own.resolve()) for own in folder.within):
        raise UserError(
            f"{at}: {value} lies outside of the data set; a data set of the hub may name only its own files"
        )
    return path


def _from_base64(at: str, text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{at}: is not base64 ({short(error)}): {quoted(text, 40)}") from None


def shown_size(at: str, encoded: bytes) -> tuple[int, int]:
    """Width and height of an encoded image, as it is shown, after its header was checked and its pixels decoded.

    Args:
        at: Where it is, for messages.
        encoded: Its bytes.

    Raises:
        UserError: It is of no format that is read, broken, too large or too narrow.
    """
    if not encoded:
        raise UserError(f"{at}: is empty (0 bytes)")
    with warnings.catch_warnings():  # Pillow's on size, and on metadata that are not needed
        warnings.simplefilter("ignore")
        try:
            image = opened(encoded)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{at}: {_unknown(encoded, error)}") from None
        try:
            _refuse_large(at, image.size)
            _refuse_kind(at, image)
            return upright(image).size
        except UserError:
            raise
        except Exception as error:  # the decoders raise a dozen kinds
            raise UserError(f"{at}: the image is broken or cut off ({short(error)})") from None


def _refuse_large(at: str, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_IMAGE_PIXELS:
        raise UserError(
            f"{at}: the image has {size[0]} x {size[1]} pixels; at most {MAX_IMAGE_PIXELS:,} are read: make it smaller"
        )
    if not size[0] * size[1]:
        raise UserError(f"{at}: the image has {size[0]} x {size[1]} pixels; there is nothing to see")
    if max(size) > _MOST_LONGER * min(size):
        raise UserError(
            f"{at}: the image has {size[0]} x {size[1]} pixels; processors of images would make it far larger, so one "
            f"side has at most {_MOST_LONGER} times the pixels of the other: crop it"
        )


def _refuse_kind(at: str, image: Image) -> None:
    # A JPEG of a phone may hold a second picture, such as a preview, which is no film.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        frames = getattr(image, "n_frames", "several")
        raise UserError(f"{at}: the image has {frames} frames (an animation, or pages); save the one that is meant")
    if image.mode in ("I", "F"):
        raise UserError(
            f"{at}: the image has pixels of 32 bits (mode {image.mode}), whose black and white are not known; save it "
            "with 8 bits"
        )


def _unknown(encoded: bytes, error: Exception) -> str:
    """The reason why bytes cannot be opened, as the end of a message."""
    if type(error).__name__ == "DecompressionBombError":
        return f"the image has far more than {MAX_IMAGE_PIXELS:,} pixels; make it smaller"
    start = encoded[:4096]
    other = next(
        (words for pattern, words in _OTHERS if pattern.match(start)), "its format is not known, or it is broken"
    )
    return f"{other}; save it in one of the formats {', '.join(FORMATS)}"
