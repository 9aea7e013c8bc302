"""The samples that `eval.json` names: points, and images of the run's folder `samples`, made small for the page.

All of it may be damaged or somebody else's. The name of a file is made of a digest and never of a path, and a picture
is looked at by its first bytes before anything unpacks it.
"""

from __future__ import annotations

import base64
import io
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retort.report.flow_words import of_model
from retort.report.groups import Group, all_runs
from retort.report.read import RunFiles, as_list, as_object, number

__all__ = ["FOLDER", "Album", "Picture", "Sample", "picture_name", "samples_of", "with_samples"]

#: Folder of the images in the folder of a run.
FOLDER = "samples"
#: Most bytes of a file, and longest side of its image, pixels.
MOST_BYTES, MOST_PIXELS = 16_000_000, 4096
#: Longest side of an embedded image, pixels; bytes that one should have; and bytes of all of a page, as text.
LONGEST, FEW_BYTES, BUDGET = 128, 8_000, 3_500_000
#: Most samples read of one model, most rewards of one, and most characters of a text.
MOST_SAMPLES, MOST_REWARDS, MOST_TEXT = 4000, 6, 400
_NAME = re.compile(rf"{FOLDER}/([0-9a-f]{{8,64}})\.png")
_PNG, _HEADER = b"\x89PNG\r\n\x1a\n", 24
_QUALITIES = (88, 75, 60)
#: Longest side up to which the pixels of an image stay sharp where it is shown larger, pixels.
_FEW_PIXELS = 64


@dataclass(frozen=True)
class Sample:
    """A sample of a model.

    Attributes:
        prompt: Id of its prompt.
        text: The prompt.
        domain: The prompt's domain; empty where it has none.
        member: Its number among the samples of its prompt; samples of one number begin with the same noise.
        rewards: By name.
        image: Name of its file in the folder `samples`; None where it has none, and empty where that is no name.
        point: x and y, of a flow of points.
    """

    prompt: str
    text: str
    domain: str
    member: int
    rewards: Mapping[str, float]
    image: str | None = None
    point: tuple[float, float] | None = None


def samples_of(run: RunFiles, who: str) -> list[Sample]:
    """The samples of one model, in order; what is none is left out.

    Args:
        run: The files of a run.
        who: The name of the model's row in the table.
    """
    named = as_list(of_model(run, who, "samples"))[:MOST_SAMPLES]
    return [_sample(one) for one in named if isinstance(one, Mapping)]


def _sample(row: Mapping[str, Any]) -> Sample:
    member = number(row.get("member"))
    ends = [number(one) for one in as_list(row.get("point"))]
    point = (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None
    rewards = {str(name): number(value) for name, value in as_object(row.get("rewards")).items()}
    known = {name: value for name, value in rewards.items() if value is not None}
    return Sample(
        prompt=_text(row.get("prompt")),
        text=_text(row.get("text")),
        domain=_text(row.get("domain")),
        member=0 if member is None else int(member),
        rewards=dict(list(known.items())[:MOST_REWARDS]),
        image=None if row.get("image") is None else picture_name(row["image"]) or "",
        point=point,
    )


def _text(value: object) -> str:
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"


def picture_name(value: object) -> str | None:
    """The name of an image as a run writes it, `samples/<digest>.png`; None for anything else."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None


def with_samples(groups: Sequence[Group]) -> bool:
    """Whether a run has images of samples."""
    return any((run.folder / FOLDER).is_dir() for run in all_runs(groups))


@dataclass(frozen=True)
class Picture:
    """An image of a page.

    Attributes:
        url: Its data URL; empty where there is none.
        sharp: Whether it has so few pixels that they are to stay sharp.
        why: In words why there is none.
    """

    url: str = ""
    sharp: bool = False
    why: str = ""


@dataclass
class Album:
    """The images of a page, embedded as long as there is room.

    Attributes:
        left_out: Reason in words -> number of images.
    """

    left_out: dict[str, int] = field(default_factory=dict)
    _known: dict[tuple[str, str], Picture] = field(default_factory=dict)
    _size: int = 0

    def picture(self, run: RunFiles, name: str) -> Picture:
        """An image, made small.

        Args:
            run: The run that it is of.
            name: Its name, see `picture_name`.
        """
        key = (str(run.folder), name)
        if key not in self._known:
            try:
                self._known[key] = _embedded(run, name)
            except _LeftOut as error:
                self._known[key] = Picture(why=str(error))
        found = self._known[key]
        if found.url and self._size + len(found.url) > BUDGET:
            found = Picture(why="no room on this page")
        self._size += len(found.url)
        if not found.url:
            self.left_out[found.why] = self.left_out.get(found.why, 0) + 1
        return found


class _LeftOut(Exception):
    """Why an image is not on the page."""


def _embedded(run: RunFiles, name: str) -> Picture:
    if picture_name(name) is None:
        raise _LeftOut("missing")
    content = _content(run, name)
    if not content.startswith(_PNG) or len(content) < _HEADER or content[12:16] != b"IHDR":
        raise _LeftOut("broken")
    size = struct.unpack(">II", content[16:_HEADER])
    _refuse_large(size)
    kind, small = _small(content)
    return Picture(f"data:image/{kind};base64,{base64.b64encode(small).decode()}", max(size) <= _FEW_PIXELS)


def _refuse_large(size: tuple[int, ...]) -> None:
    if not all(0 < side <= MOST_PIXELS for side in size):
        raise _LeftOut("too large")


def _content(run: RunFiles, name: str) -> bytes:
    folder, path = run.folder / FOLDER, run.folder / name
    try:
        if folder.is_symlink() or path.is_symlink() or not path.is_file():
            raise _LeftOut("missing")
        if path.stat().st_size > MOST_BYTES:
            raise _LeftOut("too large")
        return path.read_bytes()
    except (OSError, ValueError):
        raise _LeftOut("missing") from None


def _small(content: bytes) -> tuple[str, bytes]:
    """An image of few pixels: its type and bytes. As PNG where that is short, else as JPEG."""
    try:
        from PIL import Image
    except ImportError:
        raise _LeftOut("Pillow is missing: pip install 'retort-distill[vision]'") from None
    from retort.core.images import upright

    try:
        # Only PNG: other formats that Pillow would recognise may start programs.
        opened = Image.open(io.BytesIO(content), formats=["PNG"])
        _refuse_large(opened.size)  # a file may say it twice
        found = upright(opened)
        found.thumbnail((LONGEST, LONGEST))
    except _LeftOut:
        raise
    except Exception:  # what a damaged file makes of its reader is anything: OSError, SyntaxError, struct.error, ...
        raise _LeftOut("broken") from None
    found.info.clear()  # no profiles and no remarks: they are no pixels
    encoded = _encoded(found, "PNG", optimize=True)
    if len(encoded) <= FEW_BYTES:
        return "png", encoded
    for quality in _QUALITIES:
        encoded = _encoded(found, "JPEG", quality=quality)
        if len(encoded) <= FEW_BYTES:
            break
    return "jpeg", encoded


def _encoded(image: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()
