"""Graders: what says how good completions are, all of one visit to a prompt at once, so that it may compare them.

A grader that looks at one completion at a time is a `Verifier`, and `ByText` makes a grader of it. What any grader must
do is in `tests/contracts/test_grader.py`. Model output is hostile: whatever it holds, a grader neither raises because
of it nor hangs on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from retort.core.rollouts import Group, Prompt, Rollout, in_groups

__all__ = ["ByText", "GivesFeedback", "GivesParts", "Grade", "Grader", "Verifier", "graded"]


@dataclass(frozen=True)
class Grade:
    """What a completion is worth.

    Attributes:
        reward: From 0 to 1; a completion counts as right from 0.5 on.
        parts: Further measures by name, recorded as curves and columns `reward/<name>`; no part of the reward.
        feedback: What is wrong with the completion, in words, for methods that show it to a teacher.
    """

    reward: float
    parts: Mapping[str, float] = field(default_factory=lambda: {})
    feedback: str | None = None


class Grader(Protocol):
    """Grades groups: all rollouts of one visit to one prompt."""

    @property
    def name(self) -> str:
        """Short name, as in the setting `task`."""
        ...

    @property
    def explains(self) -> bool:
        """Whether some grades say in words what is wrong (`Grade.feedback`)."""
        return False

    @property
    def given_up(self) -> int:
        """How many completions counted as wrong so far because their comparison found no end."""
        return 0

    def can_grade(self, prompt: Prompt) -> bool:
        """Whether completions to a prompt can be graded, as far as the prompt alone says."""
        ...

    def start_batch(self) -> None:
        """Called before the groups of a batch: they share what a grader allows for one."""
        return

    def grade(self, group: Group) -> list[Grade | None]:
        """A grade for each rollout, in order; None for one that cannot be graded. The rollouts stay as they are.

        Raises:
            UserError: What grades is the user's own and failed, or said what is no grade.
        """
        ...


def graded(grader: Grader, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts of one batch with their grades, in order.

    Args:
        grader: Asked once about each group.
        rollouts: Those of one visit to a prompt are neighbours.

    Raises:
        UserError: As `Grader.grade`.
    """
    grader.start_batch()
    found = [grade for group in in_groups(rollouts) for grade in grader.grade(group)]
    return [
        rollout
        if grade is None
        else replace(rollout, reward=grade.reward, reward_parts=grade.parts, feedback=grade.feedback or "")
        for rollout, grade in zip(rollouts, found, strict=True)
    ]


class Verifier(Protocol):
    """Says whether a completion is right. Never raises because of the text, and returns within seconds.

    One that compares with the prompt's answer has `needs_answer = True`, and is not asked about prompts without one.
    One that gives comparisons up counts them in `given_up`, and what it allows for a batch begins with `start_batch`.
    """

    @property
    def name(self) -> str:
        """Short name, as in the setting `task`."""
        ...

    def __call__(self, prompt: Prompt, text: str) -> float:
        """1.0 if the text is a right response to the prompt, else 0.0."""
        ...


@runtime_checkable
class GivesFeedback(Protocol):
    """What a verifier may do besides: say in words what is wrong. Never raises because of the text."""

    def feedback(self, prompt: Prompt, text: str) -> str:
        """What is wrong with the text, in words that the task's models know; empty if nothing is."""
        ...


@runtime_checkable
class GivesParts(Protocol):
    """What a verifier may do besides: measure more of a response than whether it is right.

    Parts are recorded (curves `reward/<part>`, columns of the before/after table) and are no part of the reward.
    """

    def parts(self, prompt: Prompt, text: str) -> Mapping[str, float]:
        """Measures of the text by name; one that a prompt does not have is absent. Never raises because of the text."""
        ...


class ByText(Grader):
    """A grader that asks a verifier about each completion by itself, in order."""

    def __init__(self, verifier: Verifier) -> None:
        """Asks nothing yet."""
        self.verifier = verifier

    @property
    def name(self) -> str:
        """The verifier's."""
        return self.verifier.name

    @property
    def explains(self) -> bool:
        """Whether the verifier gives feedback."""
        return isinstance(self.verifier, GivesFeedback)

    @property
    def given_up(self) -> int:
        """How many comparisons the verifier gave up so far."""
        return int(getattr(self.verifier, "given_up", 0))

    def can_grade(self, prompt: Prompt) -> bool:
        """Whether the prompt has the answer that the verifier needs."""
        return prompt.answer is not None or not getattr(self.verifier, "needs_answer", False)

    def start_batch(self) -> None:
        """Begins what the verifier allows for a batch."""
        start = getattr(self.verifier, "start_batch", None)
        if start is not None:
            start()

    def grade(self, group: Group) -> list[Grade | None]:
        """See `Grader`."""
        return [self._grade(rollout) if self.can_grade(rollout.prompt) else None for rollout in group]

    def _grade(self, rollout: Rollout) -> Grade:
        verifier, asked = self.verifier, (rollout.prompt, rollout.text)
        return Grade(
            verifier(*asked),
            verifier.parts(*asked) if isinstance(verifier, GivesParts) else {},
            verifier.feedback(*asked) if isinstance(verifier, GivesFeedback) else None,
        )
