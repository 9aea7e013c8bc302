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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from retort.align.calls import Call, Malformed, calls_of
from retort.core.random_streams import key
from retort.core.rollouts import Message, Prompt, Status
from retort.envs.base import Episode, FailedEpisode, Reply
from retort.envs.dispatch import Raised, Result, called, raised, stepped
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
    * `call(name, arguments)`, which plays one call of a tool and returns what `step` returns. It gets only calls of
      `tools` whose arguments fit their schemas. `step` gets the turns without a call; where there is no `step`, such a
      turn is told to call a tool;
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
            UserError: The first observation is no text; or that message holds an image; or tools are asked for and
                there are none.
        """
        if prompt.messages[-1].images:
            raise UserError(
                f"row '{prompt.id}' holds an image, and the environment {self.name} writes the prompt itself, as text; "
                "leave the image out, or write an environment with begin_group (retort.envs.base)"
            )
        return [self._begun(prompt) for _ in members]

    def _begun(self, prompt: Prompt) -> Episode:
        try:
            game = self.make()
            seen: Any = game.reset(prompt.readable, key(0, "environment", prompt.id))
            calling = callable(getattr(game, "call", None))
            own = tuple(getattr(game, "tools", ())) if calling or self.tools else ()
        except Exception as error:
            return FailedEpisode(prompt, f"{self.name}: {raised('reset', error)}")
        if calling and not own:
            raise UserError(f"environment {self.name}: it has a method `call` and no `tools`; list the tools there")
        tools = own if self.tools else prompt.tools
        if self.tools and not tools:
            raise UserError(f"rollout.tools: the environment {self.name} has no tools to offer; leave it out")
        if not isinstance(seen, str):
            at = f"environment {self.name}, row '{prompt.id}': reset"
            raise UserError(f"{at} gave an observation that is no text but {quoted(seen)}; return a str")
        begun = replace(prompt, messages=(*prompt.messages[:-1], Message("user", seen)), tools=tools)
        if calling:
            return _Calling(begun, game, self.name, own=own, role="tool" if self.tools else "user")
        return _Playing(begun, game, self.name)


@dataclass
class _Playing:
    """An episode in progress."""

    prompt: Prompt
    game: Any
    name: str
    turns: int = 0

    def reply(self, text: str) -> Reply:
        return self._replied(lambda at: stepped(self.game, text, at))

    def _replied(self, play: Callable[[str], Result]) -> Reply:
        """The reply of the next turn, which a function plays that takes the turn's name."""
        self.turns += 1
        try:
            found = play(f"environment {self.name}, row '{self.prompt.id}', turn {self.turns}")
            most = self._most()
        except Raised as error:
            return Reply(over=True, status=Status.ERROR, feedback=f"{self.name}: turn {self.turns}: {error}")
        over = found.done or self.turns >= most
        status = Status.TRUNCATED if over and (not found.done or found.truncated) else Status.COMPLETED
        measures = {"success": float(over and found.success), "tool_errors": found.tool_errors}
        return Reply(found.messages, over, found.reward, status, measures=measures)

    def _most(self) -> int:
        try:
            return int(getattr(self.game, "max_turns", None) or MOST_TURNS)
        except Exception as error:
            raise raised("max_turns", error) from error

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


@dataclass
class _Calling(_Playing):
    """An episode in progress whose environment plays calls of its tools.

    Attributes:
        own: The tools.
        role: Role of the replies to calls.
    """

    own: tuple[Mapping[str, Any], ...] = ()
    role: str = "user"

    def reply(self, text: str) -> Reply:
        return self.called(text, calls_of(text))

    def called(self, text: str, calls: Sequence[Call | Malformed]) -> Reply:
        """Takes the student's next turn, whose calls are known already."""
        if calls:
            return self._replied(lambda at: called(self.game, calls, self.own, turn=self.turns, role=self.role, at=at))
        if callable(getattr(self.game, "step", None)):
            return super().reply(text)
        names = ", ".join(str(tool.get("function", tool).get("name")) for tool in self.own)
        words = f"error: this turn has no call; call one of the tools: {names}"
        return self._replied(lambda _: Result((Message("user", words),), tool_errors=1))
