"""Errors for users: one line that says what is wrong, where, and what to do."""

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Literal

__all__ = [
    "FROM_OUTSIDE",
    "BudgetSpentError",
    "RetortError",
    "RunError",
    "SignalError",
    "UnreachableError",
    "UserError",
    "a_kind",
    "counted",
    "did_you_mean",
    "quoted",
    "shortened",
    "visible",
]


class RetortError(Exception):
    """Base of all errors that Retort raises on purpose; the command line prints them as one line."""

    exit_code = 1


class UserError(RetortError, ValueError):
    """The user's input is wrong; the command exits with code 2."""

    exit_code = 2


class RunError(RetortError, RuntimeError):
    """A run had to stop (unusable teacher, disk full, interrupted); the command exits with code 1."""


class SignalError(RunError):
    """A teacher's signal is unusable: not finite, misaligned, or without a quantity that was requested."""


class UnreachableError(RunError):
    """A server that the run needs gave no usable answer for as long as the run waits for one.

    Attributes:
        reason: Of the last attempt: `unreachable` (no connection), `timeout`, or `http` (an error of the server's).
    """

    def __init__(self, text: str, reason: Literal["unreachable", "timeout", "http"] = "unreachable") -> None:
        """Takes the line for the user, and the reason."""
        super().__init__(text)
        self.reason: Literal["unreachable", "timeout", "http"] = reason


class BudgetSpentError(RunError):
    """The calls, tokens or money that the user allowed a run to spend on a model that talks are used up."""


#: Errors whose cause lies outside a run: its settings and data, an answer of a teacher's, a server that is gone.
FROM_OUTSIDE = (UserError, SignalError, UnreachableError, BudgetSpentError)

#: Least similarity of two names, from 0 to 1, at which one counts as a misspelling of the other: `gdk` of `gkd`.
_NEAR = 0.66


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ending of an error message: the nearest known name, or the whole list where nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(known)}" if known else "nothing is known here"


#: Unicode categories that a terminal obeys instead of showing: control, format (bidi among them), surrogates, and line
#: ends.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
#: Format characters that words and emoji are spelt with: joiners, and the soft hyphen.
_SPELLING = "\u00ad\u200c\u200d"


def visible(text: str) -> str:
    r"""Text on one line, with every character that a terminal or a page would obey written as its escape.

    Control characters (C0, DEL, C1), ends of lines, bidi and other format characters, and lone surrogates become
    `\x1b`, `\n`, `\u202e`. All other characters stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        one if one in _SPELLING or unicodedata.category(one) not in _UNSEEN else ascii(one)[1:-1] for one in text
    )


def a_kind(value: object) -> str:
    """The kind of a value with its article: a list, an int, bytes."""
    name = type(value).__name__
    if name in ("bytes", "NoneType"):
        return name
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number of things, in words: 1 row, 2 rows.

    Args:
        count: The number.
        one: The singular.
        many: The plural; by default the singular with an s.
    """
    return f"{count} {one if count == 1 else many or one + 's'}"


def quoted(value: object, limit: int = 100) -> str:
    """A value for a message, as Python writes it, cut in the middle where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with thousands of digits, or tables nested too deeply for repr
        return f"a very large {type(value).__name__}"
    return shortened(text, limit)


def shortened(text: str, limit: int) -> str:
    """A text cut to about `limit` characters: its beginning and its end."""
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]}... ({len(text)} characters) ...{text[-limit // 4 :]}"
