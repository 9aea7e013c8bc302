"""The grader of episodes: their environment gave the reward while they were played."""

from __future__ import annotations

from retort.core.rollouts import Group, Prompt, Rollout, Status
from retort.rewards.base import Grade, Grader

__all__ = ["ByEnvironment"]


class ByEnvironment(Grader):
    """Passes on what the environment gave; an episode that was cut off before it gave anything has 0.

    An episode that its environment ended without any reward has no grade: that environment gives none.
    """

    def __init__(self, name: str) -> None:
        """Takes the environment's name, for messages."""
        self._name = name

    @property
    def name(self) -> str:
        """The environment's name."""
        return self._name

    def can_grade(self, prompt: Prompt) -> bool:
        """See `Grader`: the environment rewards every episode."""
        return True

    def grade(self, group: Group) -> list[Grade | None]:
        """See `Grader`."""
        return [_grade(rollout) for rollout in group]


def _grade(rollout: Rollout) -> Grade | None:
    if rollout.reward is None and rollout.status == Status.COMPLETED:
        return None
    return Grade(rollout.reward or 0.0, feedback=rollout.feedback or None)
