"""What a server of an environment and its clients say to one another: paths, and prompts, turns and replies as JSON.

Both sides check what they read. Text goes through as it is; images do not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from retort.align.calls import Call, Malformed
from retort.core.rollouts import Message, Prompt, Status
from retort.envs.base import Episode, FailedEpisode, Reply
from retort.errors import UserError

#: Of the protocol; a server and a client of different versions refuse each other.
VERSION = 1
ABOUT, BEGIN, REPLY = "/v1/environment", "/v1/environment/begin", "/v1/environment/reply"
EXPERT, CLOSE = "/v1/environment/expert", "/v1/environment/close"
#: Answer of a server that knows nothing of an episode: it was started again, or has dropped it.
GONE = 410
#: What the name of an environment begins with for `retort serve`: `env:rooms`.
PREFIX = "env:"
#: Most bytes of a request and of an answer, most episodes of a group, and most characters of a group's name.
MOST_BYTES, MOST_MEMBERS, MOST_NAME = 2**24, 4096, 100

_Name = Annotated[str, Field(min_length=1, max_length=MOST_NAME)]


class _Sent(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class AboutAsked(_Sent):
    """What a client asks first: whether the environment's tools shall be offered."""

    tools: bool


class About(_Sent):
    """An environment as its server describes it.

    Attributes:
        protocol: Version of the protocol.
        version: Version of Retort.
        name: The environment's name, as in `rollout.env`.
        measures: Names of what it measures.
        rewards: Whether it rewards its episodes; else a verifier does.
    """

    protocol: int
    version: str = Field(max_length=100)
    name: str = Field(max_length=1000)
    measures: list[str] = Field(max_length=1000)
    rewards: bool


class SentMessage(_Sent):
    """A `Message` without images."""

    role: str
    content: str
    extra: dict[str, Any]

    @staticmethod
    def of(message: Message, where: str) -> SentMessage:
        """A message as it is sent.

        Raises:
            UserError: It holds an image.
        """
        if message.images:
            raise UserError(
                f"{where} holds an image, and between a run and an environment behind a server goes text alone; leave "
                "the image out, or name the environment itself in rollout.env"
            )
        return SentMessage(role=message.role, content=_clean(message.content), extra=dict(message.extra))

    @property
    def message(self) -> Message:
        """The message."""
        return Message(self.role, self.content, self.extra)


class SentPrompt(_Sent):
    """A `Prompt` without images; those for a teacher stay where they are."""

    id: str
    messages: list[SentMessage] = Field(min_length=1)
    plain: bool
    answer: str | None
    response: str | None
    privileged: dict[str, str]
    clean: list[SentMessage] | None
    domain: str
    tools: list[dict[str, Any]]

    @staticmethod
    def of(prompt: Prompt) -> SentPrompt:
        """A prompt as it is sent.

        Raises:
            UserError: A message holds an image.
        """
        where = f"row '{prompt.id}'"
        return SentPrompt(
            id=prompt.id,
            messages=[SentMessage.of(own, where) for own in prompt.messages],
            plain=prompt.plain,
            answer=prompt.answer,
            response=prompt.response,
            privileged=dict(prompt.privileged),
            clean=None if prompt.clean is None else [SentMessage.of(own, where) for own in prompt.clean],
            domain=prompt.domain,
            tools=[dict(tool) for tool in prompt.tools],
        )

    def prompt(self, before: Prompt | None = None) -> Prompt:
        """The prompt; `before` gives what was not sent."""
        messages = tuple(own.message for own in self.messages)
        return replace(
            Prompt(self.id, messages) if before is None else before,
            id=self.id,
            messages=messages,
            plain=self.plain,
            answer=self.answer,
            response=self.response,
            privileged=self.privileged,
            clean=None if self.clean is None else tuple(own.message for own in self.clean),
            domain=self.domain,
            tools=tuple(self.tools),
        )


class Begin(_Sent):
    """A group to be begun.

    Attributes:
        environment: Name of the environment that is meant.
        tools: As in `AboutAsked`.
        group: A name for it that no other group has. A group is begun once, however often that is asked for.
        prompt, members: See `Environment.begin_group`.
    """

    environment: str
    tools: bool
    group: _Name
    prompt: SentPrompt
    members: list[int] = Field(min_length=1, max_length=MOST_MEMBERS)


class Begun(_Sent):
    """An episode that was begun; its name is that of its group, and its index there.

    Attributes:
        prompt: See `Episode`; None: the one that was sent.
        called: Whether it has a method `called`.
        expert: Whether it has a method `expert`.
        failed: What went wrong, of a `FailedEpisode`.
        measures: What is measured of that.
    """

    prompt: SentPrompt | None
    called: bool
    expert: bool
    failed: str | None
    measures: dict[str, float]

    @staticmethod
    def of(episode: Episode, asked: Prompt) -> Begun:
        """An episode as it is sent.

        Raises:
            UserError: A message of its prompt holds an image.
        """
        failed = isinstance(episode, FailedEpisode)
        return Begun(
            prompt=None if episode.prompt is asked else SentPrompt.of(episode.prompt),
            called=callable(getattr(episode, "called", None)),
            expert=callable(getattr(episode, "expert", None)),
            failed=episode.words if failed else None,
            measures=_floats(episode.measures) if failed else {},
        )


class SentCall(_Sent):
    """A call of a tool: what a model wrote.

    Attributes:
        name: See `Call`, as for `id`.
        id: Of a `Malformed` empty.
        arguments: Those of a `Call`, as JSON in a text: they may hold what JSON proper does not, such as NaN.
        words: Those of a `Malformed`; None for a `Call`.
    """

    name: str
    id: str
    arguments: str
    words: str | None

    @staticmethod
    def of(call: Call | Malformed) -> SentCall:
        """A call as it is sent."""
        if isinstance(call, Malformed):
            return SentCall(name=call.name, id="", arguments="{}", words=call.words)
        return SentCall(name=call.name, id=call.id, arguments=json.dumps(dict(call.arguments)), words=None)

    @property
    def call(self) -> Call | Malformed:
        """The call.

        Raises:
            ValueError: Its arguments are none.
        """
        if self.words is not None:
            return Malformed(self.words, self.name)
        arguments = json.loads(self.arguments)
        if not isinstance(arguments, dict):
            raise ValueError("the arguments of a call are by name")
        return Call(self.name, arguments, self.id)


class Named(_Sent):
    """A request about an episode: the name of its group, and its index there."""

    group: _Name
    index: int = Field(ge=0, lt=MOST_MEMBERS)


class Turn(Named):
    """A turn of the student's.

    Attributes:
        turn: Its number, from 1. It is played once, however often that is asked for.
        text: What the student wrote, without control tokens.
        calls: The calls in it, of an episode that takes them.
    """

    turn: int = Field(ge=1)
    text: str
    calls: list[SentCall] | None


class SentReply(_Sent):
    """A `Reply` without images."""

    messages: list[SentMessage]
    over: bool
    reward: float | None
    status: Literal["completed", "truncated", "error"]
    measures: dict[str, float]
    feedback: str

    @staticmethod
    def of(reply: Reply, where: str) -> SentReply:
        """A reply as it is sent.

        Raises:
            UserError: A message holds an image.
        """
        return SentReply(
            messages=[SentMessage.of(own, where) for own in reply.messages],
            over=bool(reply.over),
            reward=None if reply.reward is None else float(reply.reward),
            status=reply.status.value,
            measures=_floats(reply.measures),
            feedback=_clean(reply.feedback),
        )

    @property
    def reply(self) -> Reply:
        """The reply.

        Raises:
            ValueError: See `Reply`.
        """
        messages = tuple(own.message for own in self.messages)
        return Reply(messages, self.over, self.reward, Status(self.status), self.measures, self.feedback)


class Way(_Sent):
    """An expert's texts."""

    texts: list[str]


def sent_calls(calls: Sequence[Call | Malformed]) -> list[SentCall]:
    """The calls of a turn as they are sent; one that no JSON can hold cannot be read."""
    found: list[SentCall] = []
    for call in calls:
        try:
            found.append(SentCall.of(call))
        except (TypeError, ValueError, RecursionError):
            found.append(SentCall.of(Malformed("the call cannot be read")))
    return found


def _clean(text: str) -> str:
    """The text with escapes for halves of characters, which an environment may repeat from a call's arguments."""
    return text.encode("utf-8", "backslashreplace").decode()


def _floats(measures: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in measures.items()}
