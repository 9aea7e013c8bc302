"""The source of trajectories: which prompts, how many samples of each, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from retort.controllers import Probe
from retort.core.rollouts import Group, Prompt, Rollout, in_groups
from retort.core.steps import Clock
from retort.core.trajectory import Trajectory
from retort.errors import UserError
from retort.flows.model import FlowModel
from retort.flows.sampling import FlowRequest, FlowSampling, decoded, denoise
from retort.method import Method
from retort.rewards.samples import SampleGrader
from retort.rollout.plan import RolloutPlan
from retort.train.source.order import Visit, visits
from retort.train.source.unended import Unended


@dataclass(eq=False)
class FlowSource:
    """Generates and grades the trajectories of a run.

    Attributes:
        prompts: The training prompts.
        count: Number of prompts per batch.
        seed: The seed of the run.
        model: The student.
        sampling: How it gets from noise to data.
        grader: Grades samples, where rewards are named.
        examples: Makes the trajectories of a cold start, where there is one.
        failed: Always empty: a sample always ends.
        version: Number of optimizer steps behind the student that wrote the last batch.
        unended: Says nothing: a sample always ends.
    """

    prompts: Sequence[Prompt]
    count: int
    seed: int
    model: FlowModel
    sampling: FlowSampling
    grader: SampleGrader | None = None
    examples: Callable[[Sequence[tuple[Visit, int]]], list[Trajectory]] | None = None
    failed: list[str] = field(default_factory=list)
    version: int = 0
    unended: Unended = field(default_factory=Unended)

    @property
    def given_up(self) -> int:
        """No sample is given up."""
        return 0

    @property
    def limit(self) -> int:
        """The most decisions of a trajectory."""
        return self.sampling.steps - 1

    def rollouts(
        self, method: Method, clock: Clock, version: int, difficulty: Mapping[str, float] | None = None
    ) -> list[Group]:
        """Generates and grades the trajectories of a batch, by visit to a prompt.

        Args:
            method: Its plan says how many samples of each prompt.
            clock: The position in the run.
            version: Number of optimizer steps that the student has taken.
            difficulty: Not read; prompts are shuffled anew every time through the data.

        Raises:
            RunError: The student has diverged.
            UserError: A reward of the user's own fails.
        """
        self.version = version
        chosen = visits(self.prompts, seed=self.seed, step=clock.step, count=self.count)
        members = [(visit, member) for visit in chosen for member in range(method.rollout.samples)]
        taught = self.examples is not None and method.rollout.sources == {"teacher"}
        if self.examples is not None and taught:
            paths = self.examples(members)
        else:
            paths = denoise(self.model, [self._request(visit, member) for visit, member in members], self.sampling)
        rollouts = [
            Rollout(
                prompt=visit.prompt,
                sequences=(path,),
                policy_version=version,
                member=member,
                visit=visit.epoch,
                source="teacher" if taught else "student",
            )
            for (visit, member), path in zip(members, paths, strict=True)
        ]
        return in_groups(self._graded(rollouts, paths))

    def _request(self, visit: Visit, member: int) -> FlowRequest:
        where = (self.seed, "rollouts", visit.epoch, visit.prompt.id)
        return FlowRequest(visit.prompt.text, (*where, member), where)

    def _graded(self, rollouts: list[Rollout], paths: Sequence[Trajectory]) -> list[Rollout]:
        if self.grader is None or not rollouts:
            return rollouts
        samples = decoded(self.model, torch.stack([path.last for path in paths]), batch=self.sampling.batch)
        grades = self.grader.grade(samples, [rollout.prompt for rollout in rollouts])
        return [
            replace(rollout, reward=grade.reward, reward_parts=grade.parts)
            for rollout, grade in zip(rollouts, grades, strict=True)
        ]

    def scored(self) -> None:
        """Teachers are asked when a batch is learnt from."""

    def stages(self, times: Mapping[str, float]) -> dict[str, float]:
        """The times of a step as they are: a batch is written while the step waits for it."""
        return dict(times)

    def probed(self, plan: RolloutPlan, probe: Probe, clock: Clock) -> list[Rollout]:
        """Refused: no method with a probe can teach denoising steps.

        Raises:
            UserError: Always.
        """
        raise UserError("a probe completes prompts with text, and this student decides denoising steps")

    def open(self, folder: Path, step: Callable[[], int]) -> None:
        """Keeps no files."""

    def mark(self) -> Callable[[], None]:
        """Has no state: every draw is keyed."""
        return lambda: None

    def go_back(self, step: int) -> None:
        """Keeps no files."""

    def tensors(self) -> dict[str, Tensor]:
        """Has no state."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Has no state."""
