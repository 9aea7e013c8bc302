"""Checks of one cell of a row: text as it is, numbers as text, JSON values for chat templates, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

from retort.errors import UserError, quoted

__all__ = [
    "decode",
    "json_value",
    "listed",
    "optional",
    "parsed",
    "plain",
    "short",
    "strict_json",
    "text",
    "without_nulls",
]


def text(where: str, name: str, given: str) -> str:
    """Checks a text, which every tokenizer must be able to take.

    Raises:
        UserError: It holds half of a surrogate pair, which JSON can spell.
    """
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: '{name}' holds half a character (\\ud... escape) at {error.start}") from None
    return given


def optional(where: str, name: str, value: Any) -> str | None:
    """Text as it is; a number as text; null or blank text as None.

    Raises:
        UserError: It is anything else (true, NaN, a list, an object); the message says what to write instead.
    """
    if isinstance(value, str):
        return text(where, name, value) if value.strip() else None
    if value is None:
        return None
    if isinstance(value, Decimal) and value.is_finite():
        return format(value, "f")  # 1E+3 is written 1000
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError:
            raise UserError(f"{where}: '{name}' is a number of thousands of digits; write it as text") from None
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    shown = value if isinstance(value, float | Decimal) else type(value).__name__
    raise UserError(f"{where}: '{name}' is {shown}; expected text or a number{_instead(name, value)}")


def _instead(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f": write the word that is meant ({'yes' if value else 'no'}, {str(value).lower()}, ...)"
    if isinstance(value, float | Decimal):
        return ": write null where there is none"
    if isinstance(value, Mapping):
        keys = [str(key) for key in value]
        return f": map one of its keys ({', '.join(keys[:6])}), as in columns.{name}=COLUMN.{keys[0]}" if keys else ""
    if isinstance(value, bytes | bytearray):
        return decode(value)
    return ": write one of them, or one text" if isinstance(value, Sequence) else ""


def decode(value: Any) -> str:
    """Advice about bytes, as the ending of a message; empty for other values."""
    return ": make text of it with .decode()" if isinstance(value, bytes | bytearray) else ""


def plain(value: Any) -> Any:
    """A cell as JSON's types, at any depth: arrays become lists, numpy's numbers Python's, and dates their ISO text."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, date) and value == value:  # also a date with a time, but not pandas' NaT
        return value.isoformat()
    listed = getattr(value, "tolist", None)
    if listed is not None:
        value = _as_written(listed(), value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _as_written(numbers: Any, given: Any) -> Any:
    """Numpy's numbers as numpy prints them: for a float32 that is 0.1, Python's would be 0.10000000149011612."""
    narrow = getattr(getattr(given, "dtype", None), "kind", "") == "f" and given.dtype.itemsize < 8
    if narrow and given.ndim:
        return [_as_written(own, cell) for own, cell in zip(numbers, given, strict=True)]
    return float(str(given)) if narrow else numbers


def without_nulls(value: Any) -> Any:
    """A cell of an Arrow table without the nulls in its structures: Arrow gives each the keys of all of them."""
    if isinstance(value, Mapping):
        if value.keys() == {"bytes", "path"}:  # an image or a sound, as `datasets` stores it
            return value
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def json_value(where: str, name: str, value: Any) -> Any:
    """A value that JSON can spell, as it is.

    Raises:
        UserError: JSON cannot spell it, or it holds half a character.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: '{name}' holds half a character (\\ud... escape)") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: '{name}' is nothing that JSON can spell: {short(error)}") from None
    return value


class TwiceError(ValueError):
    """An object of JSON has two values under one key."""


def strict_json(spelt: str) -> Any:
    """Parses JSON text.

    Raises:
        TwiceError: A key occurs twice in one object, so which of its values is meant is not known.
        ValueError: It is no JSON.
        RecursionError: It is nested too deeply.
    """
    return json.loads(spelt, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise TwiceError(f"the key {quoted(twice)} stands twice in one object; rename one of them, or leave one out")
    return found


def parsed(where: str, name: str, value: Any) -> Any:
    """A list or object that may be given as JSON text.

    Raises:
        UserError: It is text, but not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return strict_json(value)
    except TwiceError as error:
        raise UserError(f"{where}: '{name}': {error}") from None
    except (ValueError, RecursionError) as error:
        python = "[{'" in value or "{'" in value[:2]
        remedy = "it is in Python's notation; write it with json.dumps" if python else short(error)
        raise UserError(f"{where}: '{name}' is text that is not JSON ({remedy}): {quoted(value, 40)}") from None


def listed(value: Any) -> Any:
    """A cell that may be a list, also as JSON text of one, as tables hold it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = strict_json(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list) else value
    return value


def short(error: BaseException) -> str:
    """The first line of an error's text, cut to a readable length."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    return first if len(first) <= 200 else first[:197] + "..."
