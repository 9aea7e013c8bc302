"""Teachers that answer elsewhere are asked as soon as a batch is written, and not when it is learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from retort.core.rollouts import Group
from retort.core.signals import TeacherSignal
from retort.errors import FROM_OUTSIDE, RetortError
from retort.method import Method
from retort.ranks import ONE
from retort.train.teaching.asking import ask
from retort.train.teaching.teachers import Teachers


class EarlyTeachers:
    """Asks the teachers of a run from another thread than the one that learns.

    That is possible where every view's teacher is in another process, so that nothing here is computed by two threads,
    and where it need not know what the student says of its own tokens, which is known when they are learnt from. Texts
    that models write for the views, and a cache of scores, are left to the thread that learns.
    """

    def __init__(self, teachers: Teachers) -> None:
        """Asks nobody yet."""
        self._teachers = teachers

    def __call__(self, method: Method, step: int, groups: Sequence[Group]) -> dict[str, TeacherSignal] | RetortError:
        """What the teachers say of a batch, or why they do not; nothing where they are asked later.

        Args:
            method: Whose views.
            step: The step that learns from the batch.
            groups: The batch.
        """
        teachers = self._teachers
        elsewhere = all(view.model in teachers.remote for view in method.views.values())
        if not elsewhere or teachers.drafting is not None or teachers.cached is not None:
            return {}
        try:
            return ask(teachers, method, groups, teachers.wanted(method, step), _Absent(), ONE)
        except _StudentAskedError:
            return {}
        except FROM_OUTSIDE as error:
            return error


class _StudentAskedError(Exception):
    """A teacher has to know what the student says, before it is asked anything."""


class _Absent:
    """The student, which is learning from another batch."""

    def top_ids(self, method: Method, groups: Sequence[Group], k: int) -> NoReturn:
        raise _StudentAskedError

    def entropies(self, method: Method, groups: Sequence[Group]) -> NoReturn:
        raise _StudentAskedError
