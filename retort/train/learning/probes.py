"""The probes of a run's controllers, and what becomes of one that a lost server prevented."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from retort.controllers import Probe
from retort.core.needs import Need
from retort.core.rollouts import Group
from retort.core.signals import TeacherSignal
from retort.core.steps import Clock
from retort.method import Method
from retort.train.learning.control import Control
from retort.train.learning.learner import Learner

#: Gives the completions of a probe, in the way of a method's rollouts, with all texts that its views show.
Completions = Callable[[Method, Probe, Clock], Sequence[Group]]
#: Has the teachers score some groups: the method, the groups, and what is asked of each view.
Signals = Callable[[Method, Sequence[Group], Mapping[str, frozenset[Need]]], dict[str, TeacherSignal]]


class Probes:
    """Makes probes.

    Attributes:
        owed: Whether the probe after the last step is still to be made: the step was learnt, so it was saved without.
    """

    def __init__(self, control: Control, completions: Completions, learner: Learner, signals: Signals) -> None:
        """Nothing is owed.

        Args:
            control: The controllers.
            completions: Generates them.
            learner: Averages over their tokens.
            signals: Has the teachers score them.
        """
        self._control, self._completions, self._learner, self._signals = control, completions, learner, signals
        self.owed = False
        self._late: dict[str, float] = {}

    def due(self, method: Method, clock: Clock) -> dict[str, float]:
        """Makes the probes that are due, see `Control.probe`."""
        return self._control.probe(method, clock, partial(self.measure, method))

    def catch_up(self, method: Method, clock: Clock) -> None:
        """Makes the probe that is owed; `take_late` gives its numbers."""
        if self.owed and clock.done:  # a method that just took over begins with a probe of its own
            self._late = self.due(method, clock)
        self.owed = False

    def take_late(self) -> dict[str, float]:
        """The numbers of a probe that was made late, once."""
        found, self._late = self._late, {}
        return found

    def measure(self, method: Method, probe: Probe, clock: Clock) -> dict[str, float]:
        """Means of a probe's values over all tokens of the completions of its held-out prompts."""
        groups = self._completions(method, probe, clock)
        needs = frozenset(need for part in probe.parts.values() for need in part.needs)
        signals = self._signals(method, groups, {probe.against: needs} if needs else {})
        batch = self._learner.batch(method, groups, signals, clock)
        return self._learner.averages(batch, probe.parts, probe.against)
