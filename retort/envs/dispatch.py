"""What came of a turn in an environment of text: of its method `step`, or of `call` for each call in the turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from retort.align.calls import Call, Malformed, refused
from retort.core.rollouts import Message
from retort.errors import UserError, quoted

__all__ = ["Raised", "Result", "called", "raised", "result_of", "stepped", "tool_message"]


@dataclass(frozen=True)
class Result:
    """What came of a turn.

    Attributes:
        messages: What the model reads next.
        reward: Reward of the turn.
        done: Whether the episode is done.
        success: Whether this turn made it a success.
        truncated: Whether it is done because something ran out.
        tool_errors: Number of invalid calls in the turn.
    """

    messages: tuple[Message, ...]
    reward: float = 0.0
    done: bool = False
    success: bool = False
    truncated: bool = False
    tool_errors: float = 0.0


class Raised(Exception):
    """An environment's own code raised; the text says which method and what."""


def raised(method: str, error: Exception) -> Raised:
    """The error of a method of an environment, in one line."""
    said = " ".join(str(error).split())[:300]
    return Raised(f"{method} raised {type(error).__name__}{f': {said}' if said else ''}")


def result_of(found: object, at: str) -> Result:
    """What a method returned: observation, reward, done and a mapping.

    Args:
        found: What it returned.
        at: Its name in messages.

    Raises:
        UserError: It is something else, or the observation is no text, or the reward no finite number.
    """
    if not isinstance(found, tuple) or len(found) != 4 or not isinstance(found[3], Mapping):
        raise UserError(f"{at} returned {quoted(found)}; return observation, reward, done and a mapping")
    seen, reward, done, info = found
    if not isinstance(reward, Real) or not math.isfinite(reward):
        raise UserError(f"{at} gave the reward {quoted(reward)}; give a finite number")
    if not isinstance(seen, str):
        raise UserError(f"{at} gave an observation that is no text but {quoted(seen)}; return a str")
    return Result(
        (Message("user", seen),),
        float(reward),
        bool(done),
        bool(info.get("success")),
        bool(info.get("truncated")),
        float(info.get("tool_errors", 0)),
    )


def stepped(game: Any, text: str, at: str) -> Result:
    """What came of `step`.

    Args:
        game: The environment.
        text: What the model wrote.
        at: The turn's name in messages.

    Raises:
        Raised: `step` raised.
        UserError: See `result_of`.
    """
    try:
        found = game.step(text)
    except Exception as error:
        raise raised("step", error) from error
    return result_of(found, f"{at}: step")


def called(
    game: Any, calls: Sequence[Call | Malformed], tools: Sequence[Mapping[str, Any]], *, turn: int, role: str, at: str
) -> Result:
    """What came of `call`, for each call of a turn in order, up to one that ends the episode.

    A call that cannot be read, names no tool, or does not fit the tool's schema does not reach the environment. It is
    replied to in words and counted.

    Args:
        game: The environment.
        calls: The calls; at least one.
        tools: The environment's tools, in the form of chat templates.
        turn: Number of the turn, from 1.
        role: Role of the replies: `tool`, one message for each call; or `user`, one message for all.
        at: The turn's name in messages.

    Raises:
        Raised: `call` raised.
        UserError: See `result_of`.
    """
    known = {str(tool.get("function", tool).get("name")) for tool in tools}
    total, said = Result(()), list[Message]()
    for place, call in enumerate(calls):
        words = refused(call, tools)
        if words is None and isinstance(call, Call):
            try:
                found = game.call(call.name, dict(call.arguments))
            except Exception as error:
                raise raised("call", error) from error
            own = result_of(found, f"{at}: call")
        else:
            own = Result((Message("user", f"error: {words}"),), tool_errors=1)
        name = call.name if call.name in known else "unknown"
        said.append(tool_message(name, own.messages[0].content, call, turn, place))
        errors = total.tool_errors + own.tool_errors
        total = replace(own, reward=total.reward + own.reward, tool_errors=errors)
        if own.done:
            break
    if role != "tool":
        said = [Message(role, "\n".join(message.content for message in said))]
    return replace(total, messages=tuple(said))


def tool_message(name: str, content: str, call: Call | Malformed, turn: int, place: int = 0) -> Message:
    """The reply to a call, with the fields that chat templates read.

    Args:
        name: Name of the tool.
        content: What the tool said.
        call: The call; its own id is used, where it has one.
        turn: Number of the turn, from 1.
        place: Index of the call in the turn.
    """
    own = call.id if isinstance(call, Call) else ""
    # Nine letters and digits: the templates of Mistral refuse other ids.
    return Message("tool", content, {"name": name, "tool_call_id": own or f"call{turn:03d}{place:02d}"})
