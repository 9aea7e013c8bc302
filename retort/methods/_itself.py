"""Settings that self-taught methods share: how the teacher follows the student, and what it sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from retort.errors import UserError
from retort.teachers import moving
from retort.teachers.rationale import reasoned
from retort.teachers.view import View
from retort.teachers.views import privileged

Whose = Literal["self", "outside"]
Follow = Literal["frozen", "ema", "live"]
#: Columns of the data, in the words of the template of their name.
Shown = tuple[Literal["solution", "answer", "hint", "outcome", "demonstration", "wrong"], ...]


def itself(
    teacher: Whose, shows: Shown, weights: Follow, update_rate: float, rationale: Mapping[str, Any] | None = None
) -> View:
    """The student, or a run's teacher, that sees more than the prompt.

    Only an average uses `update_rate`. An outside teacher never moves, and uses neither that nor `weights`.

    Args:
        teacher: Who it is.
        shows: Columns of the data that it sees.
        weights: How its weights follow the student's.
        update_rate: Update rate of an average.
        rationale: How it writes what it makes of them first, see `reasoned`; None: it does not.

    Raises:
        UserError: It would see nothing more.
    """
    if not shows:
        raise UserError("method.shows is empty: a teacher that sees what the student sees has nothing to teach it")
    follow = {"frozen": moving.frozen, "live": moving.live, "ema": lambda: moving.ema(update_rate)}[weights]
    who: dict[str, Any] = {"model": "teacher"} if teacher == "outside" else {"weights": follow()}
    return privileged(*shows, **who) if rationale is None else reasoned(*shows, **who, **rationale)
