"""Protocols of models that only talk: `ChatModel` answers in text, `Asker` in values that were read from it.

A reply is hostile: it never steers anything but the value that is read from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from retort.core.rollouts import Message

T = TypeVar("T")

#: Why there is no usable answer: nobody answered, too late, an error of the server, a conversation longer than the
#: model's context, no text, text without an end, a refusal to answer, or text in another form than was asked for.
Reason = Literal["unreachable", "timeout", "http", "long", "empty", "cut", "refused", "form"]


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to be continued by one turn.

    Attributes:
        purpose: What the answer is for, one word for the record and the counts: `rubric`, `verdicts`, `reference`, ...
        messages: The conversation; its last turn is the user's.
        max_tokens: Tokens of the longest answer.
        temperature: Temperature of sampling; 0 asks for the most likely answer.
        seed: Number that a model which can samples with.
        schema: JSON schema of the answer; a server that can is asked to keep to it. None: free text.
    """

    purpose: str
    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    schema: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class ChatReply:
    """An answer as it came.

    Attributes:
        text: The answer; thoughts that the server keeps apart are not in it.
        prompt_tokens: Tokens that were read, as the model's own tokenizer counts them.
        completion_tokens: Tokens that were generated.
        ended: Whether the answer came to its own end, within `max_tokens`.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    ended: bool = True


@dataclass(frozen=True)
class Failure:
    """No usable answer.

    Attributes:
        reason: One of a few words, for counts.
        message: What happened, one line for the user, made safe to print.
        prompt_tokens: As `ChatReply`, where tokens were spent all the same.
        completion_tokens: As `ChatReply`.
        asked: Whether a request was made at all.
    """

    reason: Reason
    message: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    asked: bool = True


#: Takes the number of a request and its answer, as soon as that is there; one call at a time, from any thread.
Heard = Callable[[int, ChatReply | Failure], object]


class ChatModel(Protocol):
    """A model that continues conversations. Its contract is `tests/contracts/test_chat.py`."""

    @property
    def name(self) -> str:
        """Name for messages: a path, or the address and the model's name there; never a key."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of which model this is: of its weights, or of address and name where weights are out of reach."""
        ...

    def chat(self, requests: Sequence[ChatRequest], heard: Heard | None = None) -> list[ChatReply | Failure]:
        """Answers each request, in order; an answer depends only on its own request, and never raises because of it.

        Args:
            requests: What is asked.
            heard: Takes each answer when it comes, in any order: an answer that was paid for outlives what comes later.

        Raises:
            UserError: Nobody can be asked at all: the key is refused, or there is no such model.
        """
        ...


class Unusable(Exception):
    """Raised by `Question.read`: the text does not have the form that was asked for. Its text says how it differs."""


@dataclass(frozen=True)
class Question(Generic[T]):
    """A request and how its answer is read.

    Attributes:
        request: What is asked.
        read: Makes a value of the text, or raises `Unusable`, upon which the model is asked again.
    """

    request: ChatRequest
    read: Callable[[str], T]


class Asker(Protocol):
    """Asks until an answer can be read, within attempts and a budget, and keeps a record of every exchange."""

    @property
    def fingerprint(self) -> str:
        """As `ChatModel`."""
        ...

    def ask(self, questions: Sequence[Question[T]]) -> list[T | Failure]:
        """Returns for each question, in order, what was read from its answer, or why there is none.

        Raises:
            BudgetSpentError: The budget of the run is used up; no answer of this call is lost from the record.
        """
        ...
