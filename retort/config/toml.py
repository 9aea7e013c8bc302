"""Parsers of settings: TOML files, and arguments of the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retort.errors import UserError, quoted
from retort.files import reason

#: Sections within sections that a word may name; no setting lies deeper than two.
_DEEPEST = 8


def read_toml(path: Path) -> dict[str, Any]:
    """Reads the settings of a TOML file.

    Raises:
        UserError: It is missing, no file, unreadable or no TOML.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, for ever
            raise UserError(f"{path}: not a file; name a TOML file")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no text, or a number of thousands of digits
        raise UserError(f"{path}: not a readable TOML file: {error}") from None


def overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Parses nested settings from `section.key=value` words; values are read as TOML where they can be, else as text.

    Raises:
        UserError: A word has no key or no value, lies too deep, or contradicts one before it.
    """
    nested: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError(f"{quoted(pair)} is neither a .toml file nor key=value ({_example(pair)})")
        place = nested
        *sections, last = key.split(".")
        if len(sections) > _DEEPEST:
            raise UserError(f"{quoted(pair)}: no setting lies so deep; write section.key=value")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{quoted(pair)}: {section} was given a value before, so it has no key '{last}'")
        place[last] = value(text)
    return nested


def _example(word: str) -> str:
    """What could have been meant by a word that is no setting."""
    from retort import registry  # not needed by settings that can be read

    return (
        f"a method is chosen by --method {word}" if word in registry.names() else "such as method.entropy_threshold=0.6"
    )


def value(text: str) -> Any:
    """Parses a setting's value: TOML, or null/none, or the text itself."""
    if text.lower() in ("null", "none"):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, a number of thousands of digits, or brackets without an end
        return text
