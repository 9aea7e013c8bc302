"""A cold start of a student that decides denoising steps: trajectories out of samples of its teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from retort.config import Config
from retort.core.rollouts import Prompt
from retort.core.trajectory import Trajectory
from retort.errors import UserError
from retort.flows.examples import examples
from retort.flows.model import FlowModel
from retort.flows.sampling import FlowRequest, Key
from retort.method import Method
from retort.methods._cold_start import with_cold_start
from retort.teachers.base import Teacher
from retort.teachers.flow import FlowTeacher
from retort.teachers.routed import RoutedTeacher
from retort.train.source.order import Visit

#: Names the flow model that makes the samples of a prompt.
Maker = Callable[[Prompt], FlowModel]


def with_examples(config: Config, method: Method) -> Method:
    """The method with the cold start before it that the settings ask for.

    Raises:
        UserError: One from the data, or attempts: what a flow model makes is always finished.
    """
    cold = config.cold_start
    if not cold.steps:
        return method
    if cold.answers != "teacher":
        raise UserError(
            f"cold_start.answers = {cold.answers}: the data hold no samples to learn denoising from; its teachers make "
            "them (cold_start.answers = teacher)"
        )
    if cold.attempts != type(cold)().attempts:
        raise UserError("cold_start.attempts is for answers in words; a sample is always finished, so leave it out")
    cold_started = with_cold_start(method, cold.steps, loss=cold.loss)
    assert cold_started.before is not None
    first = cold_started.before[1]
    # One sample a prompt, seen again and again, would be learnt by heart: every visit has samples of its own.
    fresh = replace(first.rollout, keep=False, attempts=None)
    return replace(cold_started, before=(cold.steps, replace(first, rollout=fresh)))


def maker(teacher: Teacher) -> Maker:
    """Who makes the samples of each prompt: the teacher, or of several the expert that the prompt is routed to."""
    if isinstance(teacher, RoutedTeacher):
        return lambda prompt: maker(teacher.teachers[teacher.route(prompt)])(prompt)
    assert isinstance(teacher, FlowTeacher)  # `several` combines flow models in no other way
    return lambda prompt: teacher.model


@dataclass(frozen=True, eq=False)
class Examples:
    """Makes the trajectories of a cold start.

    Attributes:
        of: Who makes the samples of a prompt.
        seed: The seed of the run.
        steps: Denoising steps of a sample, without noise.
        batch: Latents per forward pass.
        count: Steps to learn out of each sample, as many as a trajectory of the student has decisions.
    """

    of: Maker
    seed: int
    steps: int
    batch: int
    count: int

    def __call__(self, members: Sequence[tuple[Visit, int]]) -> list[Trajectory]:
        """A trajectory for each visit and member."""
        keys: list[Key] = [(self.seed, "teacher", visit.epoch, visit.prompt.id, member) for visit, member in members]
        requests = [FlowRequest(visit.prompt.text, key, key) for (visit, _), key in zip(members, keys, strict=True)]
        models = [self.of(visit.prompt) for visit, _ in members]
        return examples(models, requests, keys, count=self.count, steps=self.steps, batch=self.batch)
