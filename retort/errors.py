"""Errors for people: one line that says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable

__all__ = ["RetortError", "RunError", "SignalError", "UserError", "did_you_mean"]


class RetortError(Exception):
    """Base of everything Retort raises on purpose; the command line prints it as one line."""

    exit_code = 1


class UserError(RetortError, ValueError):
    """The user's input is wrong; the command exits with code 2."""

    exit_code = 2


class RunError(RetortError, RuntimeError):
    """A run had to stop (teacher gone wrong, disk full, interrupted); the command exits with code 1."""


class SignalError(RunError):
    """A teacher's answer is unusable: not finite, misaligned, or poorer than what was asked for."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ending for an error message: the nearest known name, or the whole list where nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(known)}" if known else "nothing is known here"
