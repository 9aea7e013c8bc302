"""Settings that self-taught methods share: how the teacher follows the student, and what it sees."""

from __future__ import annotations

from typing import Literal

from retort.errors import UserError
from retort.teachers import moving
from retort.teachers.view import View
from retort.teachers.views import privileged

Whose = Literal["self", "outside"]
Follow = Literal["frozen", "ema", "live"]
#: Columns of the data, in the words of the template of their name.
Shown = tuple[Literal["solution", "answer", "hint", "outcome", "demonstration", "wrong"], ...]


def itself(teacher: Whose, shows: Shown, weights: Follow, update_rate: float) -> View:
    """The student, or a run's teacher, that sees more than the prompt.

    Only an average uses `update_rate`. An outside teacher never moves, and uses neither that nor `weights`.

    Raises:
        UserError: It would see nothing more.
    """
    if not shows:
        raise UserError("method.shows is empty: a teacher that sees what the student sees has nothing to teach it")
    if teacher == "outside":
        return privileged(*shows, model="teacher")
    follow = {"frozen": moving.frozen, "live": moving.live, "ema": lambda: moving.ema(update_rate)}[weights]
    return privileged(*shows, weights=follow())
