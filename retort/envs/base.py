"""The protocol of environments, and the environment of a single-turn prompt.

An environment plays an episode for every rollout of a visit to a prompt: the student generates a turn, the environment
replies, until it ends the episode. Every environment has to pass `tests/contracts/test_environment.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from retort.core.rollouts import Message, Prompt, Status


@dataclass(frozen=True)
class Reply:
    """The environment's reply to one turn.

    Attributes:
        messages: Messages before the student's next turn; at least one, unless the episode is over. The messages of a
            last reply are not read.
        over: Whether the episode ends here.
        reward: Reward of the turn; an episode's reward is their sum. None where the environment grades nothing.
        status: Status of an episode that is over. One that ended with `Status.ERROR` is not learnt from.
        measures: What else is measured of the turn, by name; an episode's are their sums.
        feedback: What went wrong, in words, of an episode that is over.

    Raises:
        ValueError: There are no messages and the episode goes on; or the reward is no finite number.
    """

    messages: tuple[Message, ...] = ()
    over: bool = False
    reward: float | None = None
    status: Status = Status.COMPLETED
    measures: Mapping[str, float] = field(default_factory=lambda: {})
    feedback: str = ""

    def __post_init__(self) -> None:
        if not self.over and not self.messages:
            raise ValueError("an environment that goes on must say something: give Reply messages, or over=True")
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"an environment's reward must be a finite number, or None, not {self.reward}")


class Episode(Protocol):
    """One episode, for one rollout.

    It may also have a method `called(text, calls)`, which takes the place of `reply` where the student's turn is read
    by its tokenizer: `calls` are the calls of tools in it, see `retort.align.calls.turn_calls`.
    """

    @property
    def prompt(self) -> Prompt:
        """The prompt that student and teachers read first: the one that the episode began with, or one made from it.

        Its `id` is that of the prompt that the episode began with.
        """
        ...

    def reply(self, text: str) -> Reply:
        """Takes the student's next turn, without control tokens. Not called again once the episode is over."""
        ...

    def close(self) -> None:
        """Releases the episode's resources. Called once for each episode, however it ended."""
        ...


class Environment(Protocol):
    """An environment, which plays episodes.

    It may also have:

    * `measures`, the names of what it measures of every episode; else these are `retort.envs.text.MEASURES`;
    * `listen(say)`, which takes what shows the user a line;
    * `metrics()`, numbers by the metric's name, counted since the last call; a step's are summed over the ranks.
    """

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        """Begins an episode for every rollout of one visit to a prompt.

        The first prompt and all replies follow from the prompt, the member and the generated text, so that a repeated
        run goes the same way.

        Args:
            prompt: A row of the data: the task.
            members: The samples of the prompt that are played; one episode each, in this order.
        """
        ...


@dataclass(frozen=True)
class FailedEpisode:
    """An episode that could not begin: it ends with `Status.ERROR` after its first turn, whatever that is.

    Attributes:
        prompt: The prompt that it should have begun with.
        words: What went wrong.
        measures: What is measured of it.
    """

    prompt: Prompt
    words: str
    measures: Mapping[str, float] = field(default_factory=lambda: {})

    def reply(self, text: str) -> Reply:
        """See `Episode`."""
        return Reply(over=True, status=Status.ERROR, feedback=self.words, measures=self.measures)

    def close(self) -> None:
        """See `Episode`."""


class SingleTurn:
    """The environment of single-turn prompts: every episode is over after its first turn."""

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
