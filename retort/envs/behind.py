"""Episodes that begin behind an expert's first turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from retort.core.rollouts import Message, Prompt
from retort.envs.base import Environment, Episode, FailedEpisode, Reply
from retort.errors import UserError

__all__ = ["BehindExpert"]


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
        return [self._moved(episode) for episode in self.environment.begin_group(prompt, members)]

    def _moved(self, episode: Episode) -> Episode:
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
        for turn, text in enumerate(way[: max(0, len(way) - self.turns)], 1):
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
