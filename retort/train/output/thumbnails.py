"""Small copies of the images of recorded rollouts, for the report: one file for each image, named by its digest."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort.core.images import PromptImage
from retort.core.rollouts import Prompt
from retort.errors import RunError
from retort.files import reason, write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FOLDER", "MOST_BYTES", "keep", "small"]

#: Folder of them in the folder of a run.
FOLDER = "thumbnails"
#: Most bytes of one.
MOST_BYTES = 20_000
#: Longest side, pixels, and the one up to which an image is enlarged, so that its pixels stay sharp.
_LONGEST, _TINY = 256, 64
#: Qualities of JPEG that are tried, one after another, where PNG is too large.
_QUALITIES = (85, 70, 50, 30)


def keep(folder: Path, rows: Iterable[Mapping[str, Any]], prompts: Iterable[Prompt]) -> None:
    """Writes those that recorded rollouts name and that are not there yet. Nothing is overwritten.

    Args:
        folder: The folder of the run.
        rows: Lines of `rollouts.jsonl` or `answers.jsonl`.
        prompts: The prompts whose images they name.

    Raises:
        RunError: One cannot be written.
        UserError: An image cannot be read any more.
    """
    named = {digest for row in rows for name in ("images", "teacher_images") for digest in row.get(name, ())}
    if not named:
        return
    images = {image.digest: image for own in prompts for image in (*own.images, *own.teacher_images)}
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write {folder / FOLDER}: {reason(error)}") from None
    for digest in sorted(named & images.keys()):
        if not any((folder / FOLDER / f"{digest}.{kind}").exists() for kind in ("png", "jpg")):
            kind, content = small(images[digest])
            write_bytes(folder / FOLDER / f"{digest}.{kind}", content)


def small(image: PromptImage) -> tuple[str, bytes]:
    """A small copy of an image: the ending of its file, `png` or `jpg`, and its bytes, at most `MOST_BYTES`."""
    from PIL.Image import Resampling

    found = image.decoded()
    if max(found.size) <= _TINY:
        times = _LONGEST // (2 * max(found.size))
        found = found.resize((found.width * times, found.height * times), Resampling.NEAREST)
    else:
        found.thumbnail((_LONGEST, _LONGEST))
    while True:
        content = _encoded(found, "PNG", optimize=True)
        if len(content) <= MOST_BYTES:
            return "png", content
        for quality in _QUALITIES:
            content = _encoded(found, "JPEG", quality=quality)
            if len(content) <= MOST_BYTES:
                return "jpg", content
        found = found.resize((max(1, found.width // 2), max(1, found.height // 2)))


def _encoded(image: Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.info.clear()  # no profiles and no remarks: they are no pixels
    image.save(file, format=kind, **options)
    return file.getvalue()
