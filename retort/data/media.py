"""Refuses images, sounds and videos in columns of their own: this version reads text only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retort.errors import UserError, quoted

__all__ = ["check_media"]

#: Columns, and keys of a turn, in which data sets keep media; case does not matter.
_ENDS = ("", "s", "_path", "_paths", "_file", "_files", "_url", "_urls")
_COLUMNS = {f"{kind}{end}" for kind in ("image", "video", "audio") for end in _ENDS}
_COLUMNS |= {"pixel_values", "multi_modal_data", "multimodal_data"}
#: Types of media that `datasets` decodes, or leaves as stored.
_LIBRARIES = ("PIL", "torchcodec", "torchvision", "soundfile")
_STORED = ({"bytes", "path"}, {"array", "path", "sampling_rate"})


def check_media(where: str, row: Mapping[Any, Any], read: set[str] | frozenset[str] = frozenset()) -> None:
    """Refuses a row or a turn that holds an image, a sound or a video beside its text.

    Args:
        where: Name of the row or the turn, for messages.
        row: Its cells by their names.
        read: Names of cells that are read as text, whatever they are called.

    Raises:
        UserError: It holds one. A cell that is null, empty or a number holds none.
    """
    for name, value in row.items():
        if name in read:
            continue
        named = isinstance(name, str) and name.lower() in _COLUMNS
        if _is_media(value) or (named and _is_something(value)):
            raise UserError(
                f"{where}: {quoted(name)} holds what is no text (an image, a sound or a film), and this version reads "
                "text only; leave such rows out, or drop the column if the prompts make sense without it"
            )


def _is_something(value: Any) -> bool:
    if value is None or isinstance(value, bool | int | float):
        return False
    if isinstance(value, Mapping):
        return any(map(_is_something, value.values()))
    if isinstance(value, str | bytes):
        return bool(value.strip())
    if isinstance(value, Sequence):
        return any(map(_is_something, value))
    return str(value) not in ("<NA>", "NaT")  # pandas' marks of a missing cell


def _is_media(value: Any) -> bool:
    """Whether a cell is an image or a sound, whatever its column is called."""
    if isinstance(value, Mapping):
        return set(value) in _STORED and any(own is not None for own in value.values())
    if isinstance(value, list | tuple):
        return bool(value) and _is_media(value[0])
    return type(value).__module__.partition(".")[0] in _LIBRARIES
