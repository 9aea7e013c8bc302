"""The party that answers: the models of a run by name, and whose weights the student has as its own teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from retort.core.needs import Need
from retort.core.rollouts import Group
from retort.core.signals import TeacherSignal
from retort.loss.terms import check_needs, wanted
from retort.method import Method
from retort.models.lm import LanguageModel
from retort.models.sharding import gathered
from retort.ranks import here
from retort.teachers.base import Teacher, answers
from retort.teachers.itself import OwnWeights
from retort.teachers.local import LocalTeacher


@dataclass(frozen=True, eq=False)
class Teachers:
    """Who answers.

    Attributes:
        models: By the name that a view gives.
        own: Weights of the student as its own teacher, where some view is of it.
        start: Digest of the student before training, where a self-teacher is that one.
    """

    models: Mapping[str, Teacher]
    own: OwnWeights | None = None
    start: str | None = None

    @property
    def lms(self) -> dict[str, LanguageModel]:
        """The frozen models in this process, by name."""
        return {name: model.lm for name, model in self.models.items() if isinstance(model, LocalTeacher)}

    def behind(self, method: Method) -> dict[str, Teacher]:
        """Who answers each view of a method."""
        return {name: self.models[view.model] for name, view in method.views.items()}

    def check(self, method: Method) -> None:
        """Raises `UserError` unless every view's teacher can answer what the method asks of it."""
        check_needs(method, {view: teacher.capabilities for view, teacher in self.behind(method).items()})

    def wanted(self, method: Method, step: int = 0) -> dict[str, frozenset[Need]]:
        """What each view is asked at a step: all that is needed, and what the curves would like if it can be had."""
        return {view: wanted(method, view, own.capabilities, step) for view, own in self.behind(method).items()}

    def score(
        self,
        method: Method,
        groups: Sequence[Group],
        needs: Mapping[str, frozenset[Need]],
        student_ids: Callable[[int], Tensor],
    ) -> dict[str, TeacherSignal]:
        """What the teachers say about every step of some rollouts.

        Args:
            method: Whose views.
            groups: Rollouts, those of a visit to a prompt together.
            needs: What to ask, by view; a view that is not named is not asked.
            student_ids: Gives the student's k most likely ids, for teachers that cannot hand over a whole distribution.
        """
        views = {name: view for name, view in method.views.items() if name in needs}
        return answers(self.behind(method), views, groups, needs.__getitem__, method.temperature, student_ids)

    def lags(self) -> dict[str, float]:
        """How far each moving self-teacher is from the student, see `OwnWeights.lags`."""
        return {} if self.own is None else self.own.lags()

    def spread(self) -> None:
        """Keeps slices of what the student's own teachers hold, once the student is spread over ranks."""
        if self.own is not None:
            self.own.spread()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs of weights that have moved; of several ranks, rank 0 has it."""
        return {} if self.own is None else gathered(self.own.tensors(), here())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts `tensors` back; those of others are not looked at."""
        if self.own is not None:
            self.own.restore(tensors)

    def with_models(self, models: Mapping[str, Teacher]) -> Teachers:
        """The same with other models in the place of some."""
        return replace(self, models={**self.models, **models})
