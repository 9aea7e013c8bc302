"""Episodes that begin behind an expert's first turns."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from retort.core.random_streams import uniforms
from retort.core.rollouts import Message, Prompt
from retort.envs.base import Environment, Episode, FailedEpisode, Reply
from retort.errors import UserError

__all__ = ["AtDrawnTurn", "BehindExpert"]


@dataclass(frozen=True)
class BehindExpert:
    """An environment whose episodes begin where an expert has only its last turns to go (TCOD's backward curriculum).

    What the expert said and was replied to stands in the prompt: nobody decided it, so it has no loss. Episodes of a
    task whose expert has no more turns than that, or of which no expert is known, begin at their beginning.

    Attributes:
        environment: Its episodes have a method `expert`, which returns the texts of a way to success from here, or
            nothing where none is known.
        turns: Turns that the expert leaves to the student, at least 1.
    """

    environment: Environment
    turns: int

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        """See `Environment`.

        Raises:
            UserError: The environment has no experts.
        """
        begun = self.environment.begin_group(prompt, members)
        return [_moved(episode, lambda way: max(0, way - self.turns)) for episode in begun]


@dataclass(frozen=True)
class AtDrawnTurn:
    """An environment whose episodes begin behind so many of an expert's turns as are drawn (ReOPD).

    Of a way of L turns the student gets one of the L, turn t with odds `decay` to the power of t; after that turn the
    episode is over, by the setup's most turns. Otherwise as `BehindExpert`.

    Attributes:
        environment: See `BehindExpert`.
        decay: Odds of a turn against those of the one before it, above 0.
        seed: The run's seed.
        done: Batches done; draws are keyed by it, the prompt and the member.
    """

    environment: Environment
    decay: float
    seed: int
    done: int

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        """See `Environment`.

        Raises:
            UserError: The environment has no experts.
        """
        begun = self.environment.begin_group(prompt, members)
        return [
            _moved(episode, lambda way, member=member: self.turn(way, prompt, member))
            for episode, member in zip(begun, members, strict=True)
        ]

    def turn(self, way: int, prompt: Prompt, member: int) -> int:
        """The turn of a way of so many that the student gets, from 0."""
        if way < 1:
            return 0
        odds = list(accumulate(self.decay**turn for turn in range(way)))
        uniform = float(uniforms(self.seed, "environment", "turn", self.done, prompt.id, member, count=1))
        return bisect(odds, uniform * odds[-1], hi=way - 1)


def _moved(episode: Episode, lead: Callable[[int], int]) -> Episode:
    """An episode behind the first turns of its expert; `lead` gives their number, of the length of the expert's way."""
    if isinstance(episode, FailedEpisode):
        return episode
    expert: Callable[[], Sequence[str] | None] | None = getattr(episode, "expert", None)
    if expert is None:
        raise UserError(
            f"prompt '{episode.prompt.id}': its environment knows no expert, behind whose turns the student would "
            "begin; give it a method `expert`, or set method.curriculum to forward or null"
        )
    way = list(expert() or [])
    messages = list(episode.prompt.messages)
    for turn, text in enumerate(way[: lead(len(way))], 1):
        reply = episode.reply(text)
        if reply.over:
            episode.close()
            why = f": {reply.feedback}" if reply.feedback else ""
            words = f"the expert's way of {len(way)} turns was over after turn {turn}, before the student had one"
            return FailedEpisode(episode.prompt, f"prompt '{episode.prompt.id}': {words}{why}")
        messages += [Message("assistant", text), *reply.messages]
    return _Behind(replace(episode.prompt, messages=tuple(messages)), episode)


@dataclass(frozen=True)
class _Behind:
    """An episode from the student's first turn on."""

    prompt: Prompt
    episode: Episode

    def reply(self, text: str) -> Reply:
        return self.episode.reply(text)

    @property
    def called(self) -> Callable[..., Reply] | None:
        return getattr(self.episode, "called", None)

    def close(self) -> None:
        self.episode.close()
