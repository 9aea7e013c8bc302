"""Which method of a run is at work after so many batches: the run's own, or the one that comes before it."""

from __future__ import annotations

from typing import Any, Protocol

from retort.config import Config
from retort.core.steps import Clock
from retort.method import Method


class _Parts(Protocol):
    @property
    def config(self) -> Config: ...
    @property
    def method(self) -> Method: ...
    @property
    def source(self) -> Any: ...
    @property
    def steps(self) -> int: ...
    @property
    def phases(self) -> list[tuple[int, Method]]: ...


class Phased:
    """Parts of a run that know its phases."""

    @property
    def phases(self: _Parts) -> list[tuple[int, Method]]:
        """The step at which each method of the run begins: the method's own, with what comes before it."""
        before = self.method.before
        return [(0, self.method)] if before is None else [(0, before[1]), (before[0], self.method)]

    def at(self: _Parts, step: int) -> tuple[Method, Clock]:
        """The current method after so many batches, and the clock."""
        phases = self.phases
        number = max(index for index, (begins, _) in enumerate(phases) if begins <= step)
        end = phases[number + 1][0] if number + 1 < len(phases) else self.steps
        begins, method = phases[number]
        return method, Clock(step, end, begins, seed=self.config.seed, longest=self.source.limit)
