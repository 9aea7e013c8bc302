"""Environments of text: the protocol for your own, `reset` and `step`, and what plays episodes with them.

    class Guess:
        max_turns = 8

        def reset(self, task, seed):
            self.number = seed % 100
            return "guess a number below 100"

        def step(self, text):
            right = text.strip() == str(self.number)
            return ("right" if right else "wrong"), float(right), right, {"success": right}

`rollout.env=my_module:Guess` plays it. Model output is hostile: `step` gets any text at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Protocol

from retort.core.random_streams import key
from retort.core.rollouts import Message, Prompt, Status
from retort.envs.base import Episode, FailedEpisode, Reply
from retort.errors import UserError, quoted

__all__ = ["MEASURES", "MOST_TURNS", "TextEnvironment", "TextEpisodes"]

#: What is measured of every episode: whether it succeeded (0 or 1), and how many turns were no valid call.
MEASURES = ("success", "tool_errors")
#: Most turns of an episode where the environment states no `max_turns`.
MOST_TURNS = 64


class TextEnvironment(Protocol):
    """An environment that a model acts in by writing text. One object plays one episode.

    It may also have:

    * `max_turns`, the most turns of an episode, read after `reset`;
    * `tools`, functions that the model may call, as JSON schemas in the form of chat templates;
    * `expert()`, a list of texts that lead from here to a success, where an expert is known;
    * `close()`, called once at the end.
    """

    def reset(self, task: str, seed: int) -> str:
        """Begins an episode and returns what the model reads first.

        Args:
            task: The text of a row of the data, which the model reads only if the observation repeats it.
            seed: Follows from the row's `id`, so that all samples of a row begin alike, in every run.
        """
        ...

    def step(self, text: str) -> tuple[str, float, bool, Mapping[str, Any]]:
        """Plays one turn.

        Args:
            text: What the model wrote, without control tokens.

        Returns:
            The observation, which is the next message to the model; the turn's reward (an episode's is their sum);
            whether the episode is done; and a mapping in which `success` (a success by this turn), `tool_errors`
            (number of invalid calls in this turn) and `truncated` (it is done because something ran out) are read.
        """
        ...


class TextEpisodes:
    """The adapter: plays episodes of text environments. It is an `Environment`.

    An environment that raises ends that episode with `Status.ERROR` and its words; the run goes on.
    """

    def __init__(self, make: Callable[[], TextEnvironment], name: str, *, tools: bool = False) -> None:
        """Builds the adapter.

        Args:
            make: Makes the environment of one episode, say its class.
            name: Its name in messages.
            tools: Offer the environment's tools to the chat template.
        """
        self.make = make
        self.name = name
        self.tools = tools

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        """See `Environment`. The first observation replaces the prompt's last message.

        Raises:
            UserError: The first observation is no text; or tools are asked for and there are none.
        """
        return [self._begun(prompt) for _ in members]

    def _begun(self, prompt: Prompt) -> Episode:
        try:
            game = self.make()
            seen: Any = game.reset(prompt.text, key(0, "environment", prompt.id))
            tools = tuple(getattr(game, "tools", ())) if self.tools else prompt.tools
        except Exception as error:
            return FailedEpisode(prompt, f"{self.name}: reset raised {_words(error)}")
        if self.tools and not tools:
            raise UserError(f"rollout.tools: the environment {self.name} has no tools to offer; leave it out")
        messages = (*prompt.messages[:-1], _message(seen, f"environment {self.name}, row '{prompt.id}': reset"))
        return _Playing(replace(prompt, messages=messages, tools=tools), game, self.name)


@dataclass
class _Playing:
    """An episode in progress."""

    prompt: Prompt
    game: TextEnvironment
    name: str
    turns: int = 0

    def reply(self, text: str) -> Reply:
        self.turns += 1
        try:
            found: Any = self.game.step(text)
            most = int(getattr(self.game, "max_turns", None) or MOST_TURNS)
        except Exception as error:
            words = f"{self.name}: turn {self.turns}: step raised {_words(error)}"
            return Reply(over=True, status=Status.ERROR, feedback=words)
        at = f"environment {self.name}, row '{self.prompt.id}', turn {self.turns}: step"
        if not isinstance(found, tuple) or len(found) != 4 or not isinstance(found[3], Mapping):
            raise UserError(f"{at} returned {quoted(found)}; return observation, reward, done and a mapping")
        seen, reward, done, info = found
        if not isinstance(reward, Real) or not math.isfinite(reward):
            raise UserError(f"{at} gave the reward {quoted(reward)}; give a finite number")
        message, over = _message(seen, at), bool(done) or self.turns >= most
        errors = info.get("tool_errors", 0)
        measures = {"success": float(over and bool(info.get("success"))), "tool_errors": float(errors)}
        cut = over and (not done or bool(info.get("truncated")))
        status = Status.TRUNCATED if cut else Status.COMPLETED
        return Reply((message,), over, float(reward), status, measures=measures)

    def expert(self) -> list[str]:
        """Texts that lead from here to a success; none where the environment knows no expert."""
        expert = getattr(self.game, "expert", None)
        if expert is None:
            raise UserError(
                f"the environment {self.name} has no method `expert`, behind whose turns the student would begin; "
                "give it one, or set method.curriculum to forward or null"
            )
        return list(expert() or [])

    def close(self) -> None:
        close = getattr(self.game, "close", None)
        if close is not None:
            close()


def _message(seen: object, at: str) -> Message:
    if not isinstance(seen, str):
        raise UserError(f"{at} gave an observation that is no text but {quoted(seen)}; return a str")
    return Message("user", seen)


def _words(error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
