"""Refuses sounds and videos, and images where none are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retort.errors import UserError, quoted

__all__ = ["check_media", "holds_a_number", "holds_something"]

#: Columns, and keys of a turn, in which data sets keep media; case does not matter.
_ENDS = ("", "s", "_path", "_paths", "_file", "_files", "_url", "_urls")
_COLUMNS = {f"{kind}{end}" for kind in ("image", "video", "audio") for end in _ENDS}
_COLUMNS |= {"pixel_values", "multi_modal_data", "multimodal_data"}
#: Types of media that `datasets` decodes, or leaves as stored.
_LIBRARIES = ("PIL", "torchcodec", "torchvision", "soundfile")
_STORED = ({"bytes", "path"}, {"array", "path", "sampling_rate"})


def check_media(where: str, row: Mapping[Any, Any], read: set[str] | frozenset[str] = frozenset()) -> None:
    """Refuses a row or a turn that holds a sound, a video, or an image in a place from which none is read.

    Args:
        where: Name of the row or the turn, for messages.
        row: Its cells by their names.
        read: Names of cells that are read, whatever they are called.

    Raises:
        UserError: It holds one. A cell that is null, empty or a number holds none.
    """
    for name, value in row.items():
        if name in read:
            continue
        named = isinstance(name, str) and name.lower() in _COLUMNS
        if _is_media(value) or (named and holds_something(value)):
            raise UserError(
                f"{where}: {quoted(name)} holds an image, a sound or a film that is not read; map the column of images "
                "(columns.images=...), or put them into parts of the messages; leave other such rows out, or drop the "
                "column if the prompts make sense without it"
            )


def holds_something(value: Any) -> bool:
    """Whether a cell holds something that may be an image; null, blank and empty ones and numbers do not."""
    if value is None or isinstance(value, bool | int | float):
        return False
    if isinstance(value, Mapping):
        return any(map(holds_something, value.values()))
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, bytes | bytearray | memoryview):
        return True  # no bytes are a file that was left empty
    if isinstance(value, Sequence):
        return any(map(holds_something, value))
    return str(value) not in ("<NA>", "NaT")  # pandas' marks of a missing cell


def holds_a_number(value: Any) -> bool:
    """Whether a cell is a number other than 0, or a list with one: an id, or pixels."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return any(map(holds_a_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and value != 0


def _is_media(value: Any) -> bool:
    """Whether a cell is an image or a sound, whatever its column is called."""
    if isinstance(value, Mapping):
        return set(value) in _STORED and any(own is not None for own in value.values())
    if isinstance(value, list | tuple):
        return bool(value) and _is_media(value[0])
    return type(value).__module__.partition(".")[0] in _LIBRARIES
