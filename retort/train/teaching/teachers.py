"""The party that scores: the models of a run by name, and the student's weights as its own teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from retort.core.needs import Need
from retort.core.rollouts import Group
from retort.core.signals import TeacherSignal
from retort.loss.terms import check_needs, check_temperature, wanted
from retort.method import Method
from retort.models.lm import LanguageModel
from retort.ranks import here
from retort.teachers.base import Remote, ScoreRequest, Teacher, view_signals
from retort.teachers.itself import OwnWeights, SelfTeacher
from retort.teachers.local import LocalTeacher
from retort.teachers.several import SeveralTeachers
from retort.train.teaching.cached import Cached
from retort.train.teaching.drafting import Drafting


@dataclass(frozen=True, eq=False)
class Teachers:
    """The teachers of a run.

    Attributes:
        models: Teachers by the name in a view.
        own: The weights of the student as its own teacher, where some view is of it.
        start: Digest of the student before training, where a self-teacher is that one.
        every: Steps from one check of the teachers on servers to the next; 0: none.
        tolerance: Nats by which the log-probs of such a check may differ on average.
        cached: Those of them that are asked through a cache, where the settings name one.
        drafting: Who writes the texts that views show; None where no view shows any.
    """

    models: Mapping[str, Teacher]
    own: OwnWeights | None = None
    start: str | None = None
    every: int = 0
    tolerance: float = 0.0
    cached: Cached | None = None
    drafting: Drafting | None = None

    @property
    def remote(self) -> dict[str, Remote]:
        """Those that other processes hold, by name: a teacher, or the model behind one."""
        behind = {name: (model, getattr(model, "lm", None)) for name, model in self.models.items()}
        return {name: one for name, both in behind.items() for one in both if isinstance(one, Remote)}

    def verify(self, step: int) -> None:
        """Checks, at every so many steps, that servers still have the models that they had.

        Raises:
            UserError: One has another model.
            UnreachableError: One does not answer.
        """
        if step and self.every and step % self.every == 0:
            for remote in self.remote.values():
                remote.verify(self.tolerance)

    def listen(self, say: Callable[[str], object]) -> None:
        """Has the user told where a server is waited for."""
        for remote in self.remote.values():
            remote.listen(say)

    @property
    def lms(self) -> dict[str, LanguageModel]:
        """The frozen models in this process, by name."""
        return {name: model.lm for name, model in self.models.items() if isinstance(model, LocalTeacher)}

    def behind(self, method: Method) -> dict[str, Teacher]:
        """The teacher of each view of a method."""
        return {name: self.models[view.model] for name, view in method.views.items()}

    def check(self, method: Method) -> None:
        """Raises `UserError` unless every view's teacher can give the signals that the method needs."""
        able = {view: teacher.capabilities for view, teacher in self.behind(method).items()}
        check_needs(method, able)
        check_temperature(method, able)

    def wanted(self, method: Method, step: int = 0) -> dict[str, frozenset[Need]]:
        """The needs of each view at a step: those of the method, and those of its curves that the teacher can meet."""
        return {view: wanted(method, view, own.capabilities, step) for view, own in self.behind(method).items()}

    def with_passages(self, method: Method, groups: Sequence[Group]) -> list[Group]:
        """The groups of a batch with the texts that the method's views show; all ranks ask for them together."""
        return list(groups) if self.drafting is None else self.drafting.passages(method, groups)

    def score(
        self,
        method: Method,
        groups: Sequence[Group],
        needs: Mapping[str, frozenset[Need]],
        student_ids: Callable[[int], Tensor],
        student_entropy: Callable[[], Tensor] | None = None,
    ) -> dict[str, TeacherSignal]:
        """Has the teachers score every step of some rollouts.

        Args:
            method: The method whose views are scored.
            groups: The rollouts, grouped by visit to a prompt.
            needs: The needs by view; other views are not scored.
            student_ids: Gives the student's k most likely ids, for teachers that cannot hand over a whole distribution.
            student_entropy: Gives the student's entropy at every step, to look ahead only where a method asks for it.
        """
        views = {name: view for name, view in method.views.items() if name in needs}
        own = {} if self.cached is None else self.cached.teachers
        asked = {name: own.get(method.views[name].model, other) for name, other in self.behind(method).items()}
        return view_signals(asked, views, groups, needs.__getitem__, method.temperature, student_ids, student_entropy)

    def all_wanted(self, method: Method) -> list[dict[str, frozenset[Need]]]:
        """All that `wanted` gives at some step, without what a cache would store alike."""
        steps = sorted({0, 1, *(watch.every for watch in method.watch)})
        # Where hidden states are stored, they meet all needs at once.
        found = {
            tuple(
                (view, None if ScoreRequest(method.views[view], own).whole else own) for view, own in needs.items()
            ): needs
            for needs in (self.wanted(method, step) for step in steps)
        }
        return list(found.values())

    def metrics(self) -> dict[str, float]:
        """Numbers for the metrics of a step; all ranks ask for them together.

        They are the distance of each moving self-teacher from the student (`OwnWeights.lags`), and what was found in
        the cache (`Cached.metrics`).
        """
        lags = {} if self.own is None else self.own.lags()
        return lags if self.cached is None else {**lags, **self.cached.metrics(here())}

    def spread(self, *, sharded: bool) -> list[str]:
        """Spreads the teachers over ranks, once the student is; in a single process it does nothing.

        Args:
            sharded: Whether the layers of frozen models are sliced, or whole on every rank (`ranks.teacher`).

        Returns:
            Notes for the user on what is not spread.

        Raises:
            UserError: A family whose layers cannot be spread.
        """
        world = here()
        if world.size == 1:
            return []
        if self.own is not None:
            self.own.spread()
        if not sharded:
            return []
        for lm in self.lms.values():
            lm.spread_layers(world)
        if not any(lm.sharding.in_step for lm in self.lms.values()):
            return ["ranks.teacher = sharded changes nothing: this run has no frozen model of its own to spread"]
        kept = [
            name
            for name, own in self.models.items()
            if not isinstance(own, LocalTeacher | SelfTeacher | SeveralTeachers)
        ]
        return [f"every rank asks {name} by itself: only frozen models that Retort loads are spread" for name in kept]

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint: weights that have moved."""
        return {} if self.own is None else self.own.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`, and ignores those of other parts."""
        if self.own is not None:
            self.own.restore(tensors)

    def with_models(self, models: Mapping[str, Teacher]) -> Teachers:
        """Returns these teachers with some models replaced."""
        return replace(self, models={**self.models, **models}, cached=None)
