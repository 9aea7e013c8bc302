"""Asking the teachers about a batch: each rank about its own groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor

from retort.core.needs import Need
from retort.core.rollouts import Group
from retort.core.signals import TeacherSignal
from retort.method import Method
from retort.ranks import Share, World

#: What is asked, by view.
Needs = Mapping[str, frozenset[Need]]


class Student(Protocol):
    """Who tells what the student says of its own tokens."""

    def top_ids(self, method: Method, groups: Sequence[Group], k: int) -> Tensor:
        """Its most likely ids at the steps of some groups, see `Teachers.score`."""
        ...

    def entropies(self, method: Method, groups: Sequence[Group]) -> Tensor:
        """Its entropy there, nats, [N], on the CPU."""
        ...


class Scoring(Protocol):
    """Who is asked: the teachers, or who asks them in another way."""

    def score(
        self,
        method: Method,
        groups: Sequence[Group],
        needs: Needs,
        student_ids: Callable[[int], Tensor],
        student_entropy: Callable[[], Tensor] | None = None,
    ) -> dict[str, TeacherSignal]:
        """See `retort.train.teaching.teachers.Teachers.score`."""
        ...


def ask(
    teachers: Scoring,
    method: Method,
    groups: Sequence[Group],
    needs: Needs,
    student: Student,
    world: World,
) -> dict[str, TeacherSignal]:
    """What the teachers say about this rank's share of a batch, with counts of the whole batch.

    Args:
        teachers: Who is asked.
        method: Whose views.
        groups: The whole batch, the same on all ranks.
        needs: What to ask, by view.
        student: Who is learning; asked only where a teacher has to know.
        world: The ranks.
    """
    share = Share.of(groups, world)
    asked = groups[share.groups]
    found: dict[str, TeacherSignal] = {}
    # An error of one rank's teacher, such as a server that is gone, is raised on all of them.

    def score() -> None:
        ids, entropy = partial(student.top_ids, method, asked), partial(student.entropies, method, asked)
        found.update(teachers.score(method, asked, needs, ids, entropy))

    world.each(score)
    counts = share.counts([signal.counts for signal in found.values()])
    pairs = zip(found.items(), counts, strict=True)
    return {view: replace(signal, counts=counted) for (view, signal), counted in pairs}
