"""Environments of verifiers 0.4: `--data verifiers:TASKSET`. The environment's own loop asks for each turn.

A taskset's package gives the tasks, the tools and the rewards; what carries the conversation on is Retort's. The
student writes a turn where the environment asks its model, and the ids that it wrote stay as they are: the conversation
that verifiers sends with its next request is compared with what was said, and only its end is taken.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from typing import Any

from retort.align.calls import Call, Malformed, calls_of
from retort.align.text import after_thinking
from retort.core.rollouts import Message, Prompt, Status
from retort.envs.actions import numbered, numbered_rows
from retort.envs.base import Episode, FailedEpisode, Reply
from retort.envs.verifiers_service import MALFORMED, Asked, Over, Service, Session
from retort.errors import UserError

__all__ = ["Verifiers", "rows"]

#: The number of a split's first row, where it is not the training split: task n of the split `test` is row SECOND + n.
SECOND = 1_000_000
_CALL = re.compile(r"<tool_call>.*?(?:</tool_call>|\Z)", re.DOTALL)


def rows(kind: str, first: int) -> Iterator[dict[str, str]]:
    """Yields a row for every task of a taskset, see `numbered_rows`.

    Args:
        kind: Name of the taskset's package, with settings of the taskset behind it or without: `gsm8k_v1,key=value`.
        first: Number of the first row: 0 for the split `train`, `SECOND` for `test`.

    Raises:
        UserError: There is no such taskset or no such split, or Retort cannot play it.
    """
    service = _service(kind, first >= SECOND)
    for index, row in enumerate(numbered_rows(kind, first)):
        if service.task(index) is None:
            return
        yield row


class Verifiers:
    """The environment: an episode is one rollout of verifiers, and its reward is the sum of the task's rewards."""

    def __init__(self, *, tools: bool = False) -> None:
        """Builds the environment.

        Args:
            tools: Offer the task's tools to the chat template; a task that has tools cannot be played without.
        """
        self.tools = tools

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        """See `Environment`. The conversation that verifiers begins with replaces the prompt's last message.

        Raises:
            UserError: The row names no task; or tools are asked for and there are none, or the other way round.
        """
        kind, number = numbered(prompt.text, 0)
        service = _service(kind, number >= SECOND)
        task = service.task(number % SECOND)
        if task is None:
            raise UserError(f"verifiers: row '{prompt.id}': the taskset {kind} has no task {number % SECOND:,}")
        if service.has_tools(task) != self.tools:
            words = "has no tools to offer; leave it out" if self.tools else "has tools: set rollout.tools=true"
            raise UserError(f"rollout.tools: the taskset {kind} of verifiers {words}")
        sessions = [service.begin(task) for _ in members]
        return [self._begun(prompt, kind, session) for session in sessions]

    def _begun(self, prompt: Prompt, kind: str, session: Session) -> Episode:
        asked = session.next()
        if isinstance(asked, Over):
            session.close()
            return FailedEpisode(prompt, f"verifiers: {kind}: {asked.error or 'it was over before the first turn'}")
        try:
            begun = tuple(_message(own) for own in asked.messages)
        except ValueError as error:
            session.close()
            return FailedEpisode(prompt, f"verifiers: {kind}: {error}")
        own = replace(prompt, messages=(*prompt.messages[:-1], *begun), tools=tuple(asked.tools) or prompt.tools)
        return _Playing(own, session, asked)


@dataclass
class _Playing:
    """An episode in progress; `asked` is the request that waits."""

    prompt: Prompt
    session: Session
    asked: Asked
    ids: Iterator[int] = field(default_factory=count)

    def reply(self, text: str) -> Reply:
        return self.called(text, calls_of(text))

    def called(self, text: str, calls: Sequence[Call | Malformed]) -> Reply:
        self.session.answer(_assistant(text, calls, self.ids) if self.asked.tools else _plain(text))
        event = self.session.next()
        measures = {"success": 0.0, "tool_errors": 0.0}
        if isinstance(event, Over):
            if event.error or not math.isfinite(event.reward):
                words = event.error or f"its reward is {event.reward}"
                return Reply(over=True, status=Status.ERROR, measures=measures, feedback=f"verifiers: {words}")
            status = Status.TRUNCATED if event.truncated else Status.COMPLETED
            measures["success"] = float(event.reward >= 1)
            return Reply(over=True, reward=event.reward, status=status, measures=measures)
        try:
            new = _behind(self.asked, event)
        except ValueError as error:
            return Reply(over=True, status=Status.ERROR, measures=measures, feedback=f"verifiers: {error}")
        measures["tool_errors"] += sum(own.role == "tool" and own.content.startswith("error: ") for own in new)
        self.asked = event
        return Reply(new, measures=measures)

    def close(self) -> None:
        self.session.close()


def _behind(before: Asked, now: Asked) -> tuple[Message, ...]:
    """The messages behind the student's turn.

    Raises:
        ValueError: The conversation before it, or the tools, are others than before.
    """
    said = len(before.messages)
    if now.tools != before.tools:
        raise ValueError("it offers other tools than at the beginning, which a growing conversation cannot show")
    if now.messages[:said] != before.messages or [own["role"] for own in now.messages[said:]][:1] != ["assistant"]:
        raise ValueError("it changed what was said before, and Retort keeps a conversation as it was written")
    new = tuple(_message(own) for own in now.messages[said + 1 :])
    if not new or any(own.role == "assistant" for own in new):
        raise ValueError("it asked for a turn without saying anything, or spoke for the model")
    return new


def _message(said: Mapping[str, Any]) -> Message:
    content = said.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("a message of it is no text")
        content = "\n".join(part["text"] for part in content)
    return Message(said["role"], content, {name: own for name, own in said.items() if name not in ("role", "content")})


def _plain(text: str) -> dict[str, Any]:
    """A turn as an assistant's message of chat completions, its thinking apart."""
    said = after_thinking(text)
    thinking = text[: len(text) - len(said)]
    return {"role": "assistant", "content": said.strip(), **({"reasoning_content": thinking} if thinking else {})}


def _assistant(text: str, calls: Sequence[Call | Malformed], ids: Iterator[int]) -> dict[str, Any]:
    """A turn with its calls as an assistant's message; what is malformed becomes a call that the chat loop refuses."""
    message = _plain(text)
    written = [
        {"name": own.name, "arguments": json.dumps(dict(own.arguments))}
        if isinstance(own, Call)
        else {"name": MALFORMED, "arguments": own.words}
        for own in calls
    ]
    if written:
        made = [{"id": f"call{next(ids)}", "type": "function", "function": own} for own in written]
        message |= {"content": _CALL.sub("", message["content"]).strip() or None, "tool_calls": made}
    return message


@cache
def _service(kind: str, second: bool) -> Service:
    """The running environment of a kind."""
    name, *pairs = kind.split(",")
    settings = dict[str, str]()
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise UserError(f"verifiers:{kind}: '{pair}' is no setting of the taskset; write key=value")
        settings[key.strip()] = value.strip()
    if second and not _has_split(name):
        raise UserError(f"verifiers:{kind}: this taskset has one split only; leave split=test out")
    return Service(name, settings | ({"split": "test"} if second else {}))


def _has_split(name: str) -> bool:
    loaders: Any = importlib.import_module("verifiers.v1.utils.loaders")
    try:
        return "split" in loaders.taskset_config_type(name).model_fields
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(f"verifiers:{name}: {type(error).__name__}: {words}") from None
