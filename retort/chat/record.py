"""A record of what models that talk were asked and answered: an answer in it is not asked for, or paid for, again."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from retort.chat.base import ChatReply, ChatRequest, Failure
from retort.chat.budget import Spent
from retort.errors import UserError

__all__ = ["Record", "again_after", "digest_of", "given_up_after"]

#: Failures that lie with the way to a model; the same question may be answered at another time.
PASSING = ("unreachable", "timeout", "http")


def digest_of(fingerprint: str, request: ChatRequest, attempt: int = 0) -> str:
    """A digest of all that an answer depends on.

    Args:
        fingerprint: Of the model.
        request: What it is asked.
        attempt: Number of the attempt, from 0.

    Returns:
        Hex BLAKE2b of 16 bytes.
    """
    messages = [[own.role, own.content, dict(own.extra)] for own in request.messages]
    settings = [request.purpose, request.max_tokens, request.temperature, request.seed]
    values = [fingerprint, messages, settings, None if request.schema is None else dict(request.schema), attempt]
    text = json.dumps(values, sort_keys=True, default=dict)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Record:
    """Questions and answers, found again by content.

    An answer of a model counts at any time. A failure on the way to it counts in its own step only, in which the
    question is not asked again: so a run that answers from this record takes the same course.

    Attributes:
        fingerprint: Of the model that answers.
        step: Returns the number of the step that is being computed.
        spent: What all calls of the record cost.
    """

    def __init__(self, fingerprint: str, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Begins with the rows of another record, if any, whose cost is not counted."""
        self.fingerprint = fingerprint
        self.step: Callable[[], int] = lambda: 0
        self.spent = Spent()
        self._keep: Callable[[Mapping[str, Any]], None] = lambda row: None
        self._replies: dict[str, ChatReply | Failure] = {}
        self._failures: dict[tuple[str, int], Failure] = {}
        self._news: dict[str, ChatReply | Failure] = {}
        self._lock = threading.Lock()
        for row in rows:
            self._index(row)

    def open(
        self, rows: Iterable[Mapping[str, Any]], keep: Callable[[Mapping[str, Any]], None], step: Callable[[], int]
    ) -> None:
        """Goes on with the record of a run.

        Args:
            rows: Its rows so far.
            keep: Takes a row, which is on the disk when it returns.
            step: See the attributes.

        Raises:
            UserError: It is of another model.
        """
        self._keep, self.step = keep, step
        for row in rows:
            if row.get("model", self.fingerprint) != self.fingerprint:
                raise UserError(
                    "judge.jsonl holds answers of another model than the one that answers now; name that one again "
                    "(judge.model, judge.name), or start a new run with another --out"
                )
            self._index(row)
            self.spent += _cost(row)

    def find(self, key: str) -> ChatReply | Failure | None:
        """What is known to be the answer to a request, by its digest; None where it is not known."""
        failure = self._failures.get((key, self.step()))
        return failure or self._replies.get(key)

    def add(
        self,
        key: str,
        request: ChatRequest,
        answer: ChatReply | Failure,
        *,
        attempt: int,
        seconds: float,
        paid: bool = True,
    ) -> None:
        """Adds an answer; it may be called from several threads.

        Args:
            key: The request's digest.
            request: What was asked.
            answer: What came.
            attempt: Number of the attempt, from 0.
            seconds: Until the answer was there.
            paid: Whether a model was asked, and not another record.
        """
        row = {
            "step": self.step(),
            "key": key,
            "model": self.fingerprint,
            "purpose": request.purpose,
            "attempt": attempt,
            "messages": [own.as_dict() for own in request.messages],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "schema": request.schema is not None,
            "calls": int(paid and getattr(answer, "asked", True)),
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "seconds": round(seconds, 3),
        }
        if isinstance(answer, Failure):
            row |= {"reason": answer.reason, "message": answer.message}
        else:
            row |= {"text": answer.text, "ended": answer.ended}
        with self._lock:
            self._keep(row)
            self._index(row)
            self.spent += _cost(row)
            if not isinstance(answer, Failure) or answer.reason not in PASSING:
                self._news[key] = answer

    def news(self) -> dict[str, ChatReply | Failure]:
        """Returns the answers of the model that were added since this was called last, by digest of the request."""
        with self._lock:
            news, self._news = self._news, {}
        return news

    def learn(self, answers: Mapping[str, ChatReply | Failure]) -> None:
        """Takes answers that another record keeps, and whose cost is counted there."""
        with self._lock:
            self._replies |= {key: answer for key, answer in answers.items() if key not in self._replies}

    def unusable(self, key: str, failure: Failure) -> None:
        """Adds why an answer that is in the record could not be used."""
        with self._lock:
            self._keep({"step": self.step(), "key": key, "reason": failure.reason, "message": failure.message})

    def _index(self, row: Mapping[str, Any]) -> None:
        if "messages" not in row or row.get("void"):
            return
        key, tokens = row["key"], (row["prompt_tokens"], row["completion_tokens"])
        if "text" in row:
            self._replies[key] = ChatReply(row["text"], *tokens, ended=row["ended"])
        elif row["reason"] in PASSING:
            self._failures[key, row["step"]] = Failure(row["reason"], row["message"], *tokens)
        else:
            self._replies[key] = Failure(row["reason"], row["message"], *tokens)


def again_after(row: Mapping[str, Any], step: int, given_up: Collection[str] = ()) -> Mapping[str, Any]:
    """The row of a record, as a run that goes on after a step takes it: what failed on the way is asked again.

    Args:
        row: The row.
        step: Number of steps that are done.
        given_up: Keys of answers that are asked for again, too (`given_up_after`).
    """
    again = "messages" in row and (row.get("reason") in PASSING or row["key"] in given_up)
    return {**row, "void": True} if again and row["step"] > step else row


def given_up_after(rows: Iterable[Mapping[str, Any]], step: int, attempts: int) -> set[str]:
    """Keys of the last answers to questions that were given up behind a step, as no answer to them could be used.

    A run that goes on asks for each of these once more: a model that was mended would not be heard otherwise.

    Args:
        rows: Of a record.
        step: Number of steps that are done.
        attempts: How often a question is asked.
    """
    own = [row for row in rows if row.get("step", 0) > step]
    useless = {str(row.get("key")) for row in own if "messages" not in row or row.get("reason") == "refused"}
    last = {str(row["key"]) for row in own if "messages" in row and row.get("attempt", 0) >= attempts - 1}
    return useless & last


def _cost(row: Mapping[str, Any]) -> Spent:
    if "messages" not in row or not row["calls"]:
        return Spent()
    return Spent(row["calls"], row["prompt_tokens"], row["completion_tokens"])
