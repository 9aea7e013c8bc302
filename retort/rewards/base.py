"""Graders, which grade all completions of one visit to a prompt at once, so that they may compare them.

A grader that looks at one completion at a time is a `Verifier`, and `ByText` makes a grader of it. The contract of all
graders is `tests/contracts/test_grader.py`. Model output is hostile: a grader neither raises nor hangs because of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from retort.core.rollouts import Group, Prompt, Rollout, in_groups

__all__ = ["ByText", "GivesFeedback", "GivesParts", "Grade", "Grader", "Verifier", "graded"]


@dataclass(frozen=True)
class Grade:
    """The grade of a completion.

    Attributes:
        reward: From 0 to 1; a completion counts as right from `RIGHT_FROM` (0.5) on.
        parts: Further measures by name, recorded as curves and columns `reward/<name>`; not part of the reward.
        feedback: What is wrong with the completion, in words, for methods that show it to a teacher.
        measures: What was measured while it was graded, by the names of the curves.
    """

    reward: float
    parts: Mapping[str, float] = field(default_factory=lambda: {})
    feedback: str | None = None
    measures: Mapping[str, float] = field(default_factory=lambda: {})


class Grader(Protocol):
    """Grades groups: all rollouts of one visit to one prompt."""

    @property
    def name(self) -> str:
        """Short name, as in the setting `task`."""
        ...

    @property
    def explains(self) -> bool:
        """Whether some grades have feedback (`Grade.feedback`)."""
        return False

    @property
    def given_up(self) -> int:
        """Number of completions so far that counted as wrong because their comparison did not end."""
        return 0

    def can_grade(self, prompt: Prompt) -> bool:
        """Whether completions of a prompt can be graded, judging by the prompt alone."""
        ...

    def start_batch(self) -> None:
        """Begins a batch: its groups share the grader's time limits."""
        return

    def grade(self, group: Group) -> list[Grade | None]:
        """Returns a grade for each rollout, in order; None for one that cannot be graded. Rollouts are not changed.

        Raises:
            UserError: The user's own grader failed, or returned no grade.
        """
        ...

    def grade_all(self, groups: Sequence[Group]) -> list[list[Grade | None]]:
        """Returns the grades of all groups of a batch, in order; one that waits for others grades them at once.

        Raises:
            UserError: As `grade`.
        """
        return [self.grade(group) for group in groups]


def graded(grader: Grader, rollouts: Sequence[Rollout], *, begins: bool = True) -> list[Rollout]:
    """Returns the rollouts of one batch with their grades, in order.

    Args:
        grader: Called once, with all groups.
        rollouts: The rollouts of one visit to a prompt are neighbours.
        begins: Whether the batch begins with them; else they belong to the one before.

    Raises:
        UserError: As `Grader.grade`.
    """
    if begins:
        grader.start_batch()
    found = [grade for grades in grader.grade_all(in_groups(rollouts)) for grade in grades]
    return [
        rollout
        if grade is None
        else replace(
            rollout,
            reward=grade.reward,
            reward_parts=grade.parts,
            feedback=grade.feedback or "",
            measures={**rollout.measures, **grade.measures},
        )
        for rollout, grade in zip(rollouts, found, strict=True)
    ]


class Verifier(Protocol):
    """Grades whether a completion is right. Never raises because of the text, and returns within seconds.

    A verifier that compares with the prompt's answer has `needs_answer = True`, and gets no prompts without one. One
    that gives comparisons up counts them in `given_up`, and begins a batch's limits with `start_batch`.
    """

    @property
    def name(self) -> str:
        """Short name, as in the setting `task`."""
        ...

    def __call__(self, prompt: Prompt, text: str) -> float:
        """Returns 1.0 if the text is a right response to the prompt, else 0.0."""
        ...


@runtime_checkable
class GivesFeedback(Protocol):
    """Optional interface of a verifier: words on what is wrong. Never raises because of the text."""

    def feedback(self, prompt: Prompt, text: str) -> str:
        """What is wrong with the text, in words that the task's models know; empty if nothing is."""
        ...


@runtime_checkable
class GivesParts(Protocol):
    """Optional interface of a verifier: measures of a response besides the reward.

    Parts are recorded (curves `reward/<part>`, columns of the before/after table) and are not part of the reward.
    """

    def parts(self, prompt: Prompt, text: str) -> Mapping[str, float]:
        """Measures of the text by name; one that a prompt does not have is absent. Never raises because of the text."""
        ...


class ByText(Grader):
    """A grader that gives a verifier each completion alone, in order."""

    def __init__(self, verifier: Verifier) -> None:
        """Wraps a verifier."""
        self.verifier = verifier

    @property
    def name(self) -> str:
        """The verifier's name."""
        return self.verifier.name

    @property
    def explains(self) -> bool:
        """Whether the verifier gives feedback."""
        return isinstance(self.verifier, GivesFeedback)

    @property
    def given_up(self) -> int:
        """Number of comparisons that the verifier gave up so far."""
        return int(getattr(self.verifier, "given_up", 0))

    def can_grade(self, prompt: Prompt) -> bool:
        """Whether the prompt has the answer that the verifier needs."""
        return prompt.answer is not None or not getattr(self.verifier, "needs_answer", False)

    def start_batch(self) -> None:
        """Begins the verifier's limits for a batch."""
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
