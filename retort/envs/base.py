"""What an environment is, and the one of a prompt that nobody answers.

An environment plays an episode for every rollout of a visit to a prompt: the student writes a turn, the environment
replies, until it says that this is the end. `tests/contracts/test_environment.py` is what each has to pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from retort.core.rollouts import Message, Prompt, Status


@dataclass(frozen=True)
class Reply:
    """What an environment answers to one turn.

    Attributes:
        messages: What it says before the student's next turn; at least one, unless the episode is over. What it says
            last, when nobody answers any more, is read by nobody.
        over: Whether the episode ends here.
        reward: What the turn earned; an episode's reward is their sum. None where the environment grades nothing.
        status: Of an episode that is over.

    Raises:
        ValueError: Nothing is said, and it goes on; or the reward is no finite number.
    """

    messages: tuple[Message, ...] = ()
    over: bool = False
    reward: float | None = None
    status: Status = Status.COMPLETED

    def __post_init__(self) -> None:
        if not self.over and not self.messages:
            raise ValueError("an environment that goes on must say something: give Reply messages, or over=True")
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"an environment's reward must be a finite number, or None, not {self.reward}")


class Episode(Protocol):
    """One play, for one rollout."""

    @property
    def prompt(self) -> Prompt:
        """What the student reads first, and teachers with it: the prompt it was begun with, or one made from that.

        Its `id` is that of the prompt it was begun with.
        """
        ...

    def reply(self, text: str) -> Reply:
        """Takes the student's next turn, without control tokens. Not asked again after it said that it is over."""
        ...

    def close(self) -> None:
        """Gives back what the episode holds. Called once for each that was begun, however it went."""
        ...


class Environment(Protocol):
    """Who plays."""

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        """Begins an episode for every rollout of one visit to a prompt.

        What it begins with, and what it does, follows from the prompt, the member and what is written; a run that is
        repeated goes the same way.

        Args:
            prompt: A row of the data: what the task is.
            members: Which of the samples of the prompt are played; an episode for each, in this order.
        """
        ...


class SingleTurn:
    """The environment of a prompt that is answered once: every episode is over after its first turn."""

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        """See `Environment`."""
        return [_Once(prompt) for _ in members]


@dataclass(frozen=True)
class _Once:
    prompt: Prompt

    def reply(self, text: str) -> Reply:
        return Reply(over=True)

    def close(self) -> None:
        pass
