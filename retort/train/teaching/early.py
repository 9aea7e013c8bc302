"""Teachers that answer elsewhere are asked as soon as a group is written, and not when the batch is learnt from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import NoReturn, Self

from torch import Tensor

from retort.core.rollouts import Group, Status
from retort.core.signals import TeacherSignal, end_to_end
from retort.errors import FROM_OUTSIDE, RetortError
from retort.method import Method
from retort.ranks import here
from retort.train.teaching.asking import Needs, ask
from retort.train.teaching.teachers import Teachers


class EarlyTeachers:
    """Asks the teachers of a run in other threads than the one that learns.

    That is possible where every view's teacher is in another process, so that nothing here is computed by two threads,
    and where it need not know what the student says of its own tokens, which is known when they are learnt from. Texts
    that models write for the views, and a cache of scores, are left to the thread that learns.

    A question is about one group, whenever it is asked and in whatever order groups are written, so that the answers
    depend on no clock. On several ranks, each of which asks about its share of the whole batch, and of a teacher with
    another tokenizer, whose units are numbered through the batch, it is about all of them.
    """

    def __init__(self, teachers: Teachers, requests: int) -> None:
        """Asks nobody yet.

        Args:
            teachers: The teachers of the run.
            requests: Groups that are asked about at the same time.
        """
        self._teachers, self._requests = teachers, requests

    def begin(self, method: Method, step: int) -> Answers:
        """Begins a batch.

        Args:
            method: Whose views.
            step: The step that learns from it.
        """
        teachers = self._teachers
        elsewhere = all(view.model in teachers.remote for view in method.views.values())
        early = elsewhere and teachers.drafting is None and teachers.cached is None
        spans = any("spans" in own.capabilities for own in teachers.behind(method).values())
        split = early and not spans and here().size == 1
        needs = teachers.wanted(method, step) if early else {}
        return Answers(teachers, method, needs, early=early, requests=self._requests if split else 0)


class Answers:
    """What teachers say of one batch. It is a context manager: behind it nobody is asked any more."""

    def __init__(self, teachers: Teachers, method: Method, needs: Needs, *, early: bool, requests: int) -> None:
        """Begins without a question.

        Args:
            teachers: Who is asked.
            method: Whose views.
            needs: What to ask, by view.
            early: Whether they are asked here at all.
            requests: Groups that are asked about at the same time; 0: all groups are one question.
        """
        self._teachers, self._method, self._needs, self._early = teachers, method, needs, early
        self._pool = ThreadPoolExecutor(requests, thread_name_prefix="retort-teachers") if requests else None
        self._asked: dict[tuple[int, ...], tuple[Group, Future[dict[str, TeacherSignal]]]] = {}
        self._times: list[tuple[float, float]] = []

    def hear(self, group: Group) -> None:
        """Asks about a group that is written and graded, while others are not. One that fails is left out of it."""
        if self._pool is not None and all(rollout.status != Status.ERROR for rollout in group):
            self._future(self._pool, group)

    def of(self, groups: Sequence[Group]) -> dict[str, TeacherSignal] | RetortError:
        """What the teachers say of a batch, or why they do not; nothing where they are asked later.

        Args:
            groups: The batch: what was heard, and what was not.
        """
        if not self._early:
            return {}
        try:
            asked = self._teachers if self._pool is None else self
            return self._timed(lambda: ask(asked, self._method, groups, self._needs, _Absent(), here()))
        except _StudentAskedError:
            return {}
        except FROM_OUTSIDE as error:
            return error

    def score(
        self,
        method: Method,
        groups: Sequence[Group],
        needs: Needs,
        student_ids: Callable[[int], Tensor],
        student_entropy: Callable[[], Tensor] | None = None,
    ) -> dict[str, TeacherSignal]:
        """See `Teachers.score`; each group is a question of its own."""
        assert self._pool is not None
        futures = [self._future(self._pool, group) for group in groups]
        found = [own.result() for own in futures]
        return {view: end_to_end([own[view] for own in found]) for view in needs}

    @property
    def seconds(self) -> float:
        """How long some question or other was under way."""
        total, until = 0.0, 0.0
        for began, ended in sorted(self._times):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _future(self, pool: ThreadPoolExecutor, group: Group) -> Future[dict[str, TeacherSignal]]:
        key = tuple(id(rollout) for rollout in group)  # kept beside its group, so that no other object takes it
        if key not in self._asked:
            self._asked[key] = group, pool.submit(self._timed, lambda: self._said(group))
        return self._asked[key][1]

    def _said(self, group: Group) -> dict[str, TeacherSignal]:
        ids, entropy = (partial(own, self._method, [group]) for own in (_Absent().top_ids, _Absent().entropies))
        return self._teachers.score(self._method, [group], self._needs, ids, entropy)

    def _timed(self, work: Callable[[], dict[str, TeacherSignal]]) -> dict[str, TeacherSignal]:
        began = time.perf_counter()
        try:
            return work()
        finally:
            self._times.append((began, time.perf_counter()))


class _StudentAskedError(Exception):
    """A teacher has to know what the student says, before it is asked anything."""


class _Absent:
    """The student, which is learning from another batch."""

    def top_ids(self, method: Method, groups: Sequence[Group], k: int) -> NoReturn:
        raise _StudentAskedError

    def entropies(self, method: Method, groups: Sequence[Group]) -> NoReturn:
        raise _StudentAskedError
