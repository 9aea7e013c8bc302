"""Escapes untrusted text for HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

from retort.errors import visible

__all__ = ["escape", "listed", "path"]


def escape(text: str) -> str:
    """Escapes a text for one line of a page: no markup and no control characters."""
    return html.escape(visible(text))


def path(text: str) -> str:
    """Escapes a path or a long name, which may be broken after its separators."""
    shown = escape(text)
    for separator in "/\\_":
        shown = shown.replace(separator, f"{separator}<wbr>")
    return shown


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
