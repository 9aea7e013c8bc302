"""Calls callbacks and checks them; see `retort.train.callbacks` for their protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from retort.errors import RunError, UserError, quoted

_HOOKS = ("on_step", "on_eval", "on_end")


@dataclass(frozen=True)
class Stop:
    """A value that `on_step` and `on_eval` return to end a run after the current step.

    The run ends as at its last step: saved, evaluated, its model exported; and can be resumed.

    Attributes:
        reason: Why, for the console and the log; by default that a callback asked for it.
    """

    reason: str = "a callback asked for it"


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raises `UserError` for what has none of the methods of a callback."""
    if isinstance(callbacks, (str, Mapping)) or not isinstance(callbacks, Sequence):
        raise UserError(f"callbacks = {quoted(callbacks)}: give a list of callbacks")
    for index, callback in enumerate(callbacks):
        if isinstance(callback, type):
            raise UserError(f"callbacks[{index}] is the class {callback.__name__}; give one of its objects")
        if not any(callable(getattr(callback, hook, None)) for hook in _HOOKS):
            what = f"a {type(callback).__name__} without any of {', '.join(_HOOKS)}"
            raise UserError(f"callbacks[{index}] is {what}; see retort.Callback")


def call(callbacks: Sequence[Any], hook: str, run: object, *arguments: Any) -> str | None:
    """Calls a hook of all callbacks, and returns the first reason to stop, if any.

    Raises:
        RunError: One raised, or returned something else than None or a `Stop`.
    """
    reason = None
    for callback in callbacks:
        method = getattr(callback, hook, None)
        if method is None:
            continue
        name = f"callback {type(callback).__name__}.{hook}"
        try:
            returned: object = method(run, *arguments)
        except (Exception, SystemExit) as error:
            words = " ".join(str(error).split())[:300]
            raise RunError(f"{name} raised {type(error).__name__}{f': {words}' if words else ''}") from error
        if returned is not None and not isinstance(returned, Stop):
            raise RunError(
                f"{name} returned {quoted(returned)}; it returns None, or retort.Stop(reason) to end the run"
            )
        if reason is None and returned is not None:
            reason_given = cast("Stop", returned).reason
            reason = " ".join(str(reason_given).split()) if reason_given is not None else ""
            reason = reason or Stop.reason
    return reason
