"""The grader of episodes: their environment gave the reward while they were played."""

from __future__ import annotations

from retort.core.rollouts import Group, Prompt
from retort.rewards.base import Grade, Grader

__all__ = ["ByEnvironment"]


class ByEnvironment(Grader):
    """Passes on what the environment gave; an episode that ended before it gave anything has 0."""

    def __init__(self, name: str) -> None:
        """Takes the environment's name, for messages."""
        self._name = name

    @property
    def name(self) -> str:
        """The environment's name."""
        return self._name

    def can_grade(self, prompt: Prompt) -> bool:
        """See `Grader`: every episode is graded."""
        return True

    def grade(self, group: Group) -> list[Grade | None]:
        """See `Grader`."""
        return [Grade(rollout.reward or 0.0, feedback=rollout.feedback or None) for rollout in group]
