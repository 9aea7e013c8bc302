"""Settings that self-taught methods share: how the teacher follows the student, and what it sees."""

from __future__ import annotations

from typing import Literal

from retort.errors import UserError
from retort.teachers import moving
from retort.teachers.view import View
from retort.teachers.views import privileged

Follow = Literal["frozen", "ema", "live"]
#: Columns of the data, in the words of the template of their name.
Shown = tuple[Literal["solution", "answer", "hint", "outcome", "demonstration", "wrong"], ...]


def itself(shows: Shown, weights: Follow, update_rate: float) -> View:
    """The student that sees more than its prompt; only an average looks at `update_rate`.

    Raises:
        UserError: It would see nothing more.
    """
    if not shows:
        raise UserError("method.shows is empty: a teacher that sees what the student sees has nothing to teach it")
    follow = {"frozen": moving.frozen, "live": moving.live, "ema": lambda: moving.ema(update_rate)}[weights]
    return privileged(*shows, weights=follow())
