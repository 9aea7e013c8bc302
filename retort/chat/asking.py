"""Asks a model until its answer can be read, within a budget, and keeps a record of every exchange."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from retort.chat.base import ChatModel, ChatReply, ChatRequest, Failure, Question, Unusable
from retort.chat.budget import Budget, Prices, Spent, at_most
from retort.chat.fence import between, shown
from retort.chat.record import Record, digest_of
from retort.errors import BudgetSpentError, UserError, counted, quoted, shortened, visible

__all__ = ["ATTEMPTS", "Asking"]

T = TypeVar("T")

#: How often a question is asked, at most, until its answer can be read.
ATTEMPTS = 3
#: Most characters of an unusable answer, and of what is wrong with it, that the model is shown.
_QUOTED = 300


class Asking:
    """An `Asker`.

    An answer that is empty, cut off, a refusal or of another form is asked for again, with the reason. One that nobody
    gave is not: the model's own patience was for that. A question that was asked before is answered from the record.

    Attributes:
        model: Who answers; None: the record alone.
        record: What was asked and answered.
        attempts: How often a question is asked, at most.
        prices: What tokens cost, where that is known.
        budget: What may be spent.

    Example:
        >>> from retort.chat import ChatReply, ChatRequest, Question
        >>> from retort.chat.asking import Asking
        >>> from retort.types import Message
        >>> class Echo:
        ...     name, fingerprint = "echo", "echo 1"
        ...     def chat(self, requests, heard=None):
        ...         return [ChatReply(request.messages[-1].content, 1, 1) for request in requests]
        >>> request = ChatRequest("sum", (Message("user", "4"),), max_tokens=8)
        >>> Asking(Echo()).ask([Question(request, read=int)])
        [4]
    """

    def __init__(
        self,
        model: ChatModel | None,
        *,
        record: Record | None = None,
        attempts: int = ATTEMPTS,
        budget: Budget | None = None,
        prices: Prices | None = None,
    ) -> None:
        """Asks nothing yet.

        Args:
            model: See the attributes, as for all others.
            record: One of the model's; by default an empty one.
            attempts: See the attributes.
            budget: By default without limits.
            prices: By default nothing costs anything.

        Raises:
            UserError: There is neither a model nor a record.
        """
        if model is None and record is None:
            raise UserError("nobody answers: name a model (judge.model), or a record of answers (judge.replay)")
        self.model, self.attempts = model, attempts
        self.record = record or Record(model.fingerprint if model is not None else "")
        self.budget, self.prices = budget or Budget(), prices or Prices()
        self._limit, self._shown, self._failed = self.budget, Spent(), Counter[str]()

    @property
    def fingerprint(self) -> str:
        """See `Asker`."""
        return self.record.fingerprint

    @property
    def name(self) -> str:
        """Of the model, for messages."""
        return self.model.name if self.model is not None else "the record in judge.replay"

    def listen(self, say: Callable[[str], object]) -> None:
        """Has lines for the user taken by `say` from now on, where the model has any."""
        listen = getattr(self.model, "listen", None)
        if listen is not None:
            listen(say)

    def open(
        self,
        rows: Iterable[Mapping[str, Any]],
        keep: Callable[[Mapping[str, Any]], None],
        step: Callable[[], int],
        *,
        ways: int = 1,
    ) -> None:
        """Goes on with the record of a run, whose cost counts against the budget.

        Args:
            rows: See `Record.open`, as for `keep` and `step`.
            keep: See there.
            step: See there.
            ways: How many ask at the same time, each with a share of the budget.

        Raises:
            UserError: The record is of another model.
        """
        self.record.open(rows, keep, step)
        self._limit = self.budget.shared(ways, self.record.spent, self.prices)
        self._shown = self.record.spent

    def ask(self, questions: Sequence[Question[T]]) -> list[T | Failure]:
        """See `Asker`.

        Raises:
            BudgetSpentError: The next call might be beyond the budget, so it was not made.
            UserError: The record alone answers, and does not know an answer; or nobody can be asked at all.
        """
        found: dict[int, T | Failure] = {}
        left = {number: question.request for number, question in enumerate(questions)}
        for attempt in range(self.attempts):
            asked, left = left, {}
            answers = self._answers(list(asked.values()), attempt)
            for (number, request), answer in zip(asked.items(), answers, strict=True):
                value = found[number] = _read(questions[number], answer)
                if not isinstance(value, Failure):
                    continue
                self._failed[value.reason] += 1
                if isinstance(answer, ChatReply):
                    self.record.unusable(digest_of(self.fingerprint, request, attempt), value)
                if isinstance(answer, ChatReply) or answer.reason == "refused":
                    left[number] = _once_more(questions[number].request, value, answer, attempt + 1)
            if not left:
                break
        return [found[number] for number in range(len(questions))]

    def metrics(self) -> dict[str, float]:
        """What was spent since this was called last, for the metrics of a step; empty where nothing was asked."""
        spent, before = self.record.spent, self._shown
        self._shown, failed, self._failed = spent, self._failed, Counter[str]()
        found: dict[str, float] = {
            "calls": spent.calls - before.calls,
            "prompt_tokens": spent.prompt_tokens - before.prompt_tokens,
            "completion_tokens": spent.completion_tokens - before.completion_tokens,
        }
        if not any(found.values()) and not failed:
            return {}
        found |= {"money": self.prices.of(spent) - self.prices.of(before)} if self.prices != Prices() else {}
        found |= {"unusable": failed.total()} | {f"unusable/{reason}": count for reason, count in failed.items()}
        return {f"judge/{name}": value for name, value in found.items()}

    def _answers(self, requests: Sequence[ChatRequest], attempt: int) -> list[ChatReply | Failure]:
        """The answers to some requests: of the record, or of the model as far as the budget reaches."""
        keys = [digest_of(self.fingerprint, request, attempt) for request in requests]
        found, left = dict[str, ChatReply | Failure](), dict[str, ChatRequest]()
        for key, request in zip(keys, requests, strict=True):
            known = self.record.find(key)
            if known is None:
                left.setdefault(key, request)
            elif key not in found:
                found[key] = known
                if self.model is None:  # the run's own record is whole, too
                    self.record.add(key, request, known, attempt=attempt, seconds=0.0, paid=False)
        while left:
            found |= self._asked({key: left.pop(key) for key in self._affordable(left)}, attempt)
        return [found[key] for key in keys]

    def _affordable(self, requests: Mapping[str, ChatRequest]) -> list[str]:
        """Keys of the first of some requests that are within the budget together, whatever they cost.

        Raises:
            BudgetSpentError: Not even the first is.
            UserError: There is no model to be asked.
        """
        if self.model is None:
            one = next(iter(requests.values()))
            raise UserError(
                f"judge.replay holds no answer to a question of step {self.record.step()} ({quoted(one.purpose)}); it "
                "is a record of another run, or of an earlier state of this one; name the right one, or judge.model"
            )
        keys, planned = list[str](), self.record.spent
        for key, request in requests.items():
            planned += at_most(request)
            limit = self._limit.exceeded_by(planned, self.prices)
            if limit is None:
                keys.append(key)
            elif keys:
                break
            else:
                raise BudgetSpentError(self._spent(request, len(requests)))
        return keys

    def _spent(self, request: ChatRequest, wanted: int) -> str:
        """The line for the user where the budget is used up."""
        spent, most = self.record.spent, at_most(request)
        limit = self.budget.exceeded_by(spent + most, self.prices) or "its share of the budget"
        money = f", {self.prices.of(spent):.4g} in money" if self.prices != Prices() else ""
        return (
            f"judge.{limit} is used up: {counted(spent.calls, 'call')} and {counted(spent.tokens, 'token')} were "
            f"spent{money}, {counted(wanted, 'question')} more would be asked, the next with up to "
            f"{counted(most.tokens, 'token')}; resume with a higher one"
        )

    def _asked(self, requests: Mapping[str, ChatRequest], attempt: int) -> dict[str, ChatReply | Failure]:
        """The answers of the model to some requests, which are in the record when they come."""
        assert self.model is not None
        keys, found, start = list(requests), dict[str, ChatReply | Failure](), time.monotonic()

        def heard(number: int, answer: ChatReply | Failure) -> None:
            key, seconds = keys[number], time.monotonic() - start
            found[key] = answer
            self.record.add(key, requests[key], answer, attempt=attempt, seconds=seconds)

        answers = self.model.chat(list(requests.values()), heard)
        for number, answer in enumerate(answers):
            if keys[number] not in found:  # a model that says all at the end
                heard(number, answer)
        return found


def _read(question: Question[T], answer: ChatReply | Failure) -> T | Failure:
    """What is read from an answer."""
    if isinstance(answer, Failure):
        return answer
    tokens = answer.prompt_tokens, answer.completion_tokens
    if not answer.ended:
        return Failure("cut", f"the answer was cut off after {question.request.max_tokens} tokens", *tokens)
    if not answer.text.strip():
        return Failure("empty", "the answer was empty", *tokens)
    try:
        return question.read(answer.text)
    except Unusable as error:
        return Failure("form", visible(shortened(str(error), _QUOTED)), *tokens)
    except RecursionError:
        return Failure("form", "the answer is nested too deeply", *tokens)


def _once_more(request: ChatRequest, failure: Failure, answer: ChatReply | Failure, attempt: int) -> ChatRequest:
    """A request as it is made again, with what was wrong with the last answer; what it said is hostile text."""
    text = answer.text if isinstance(answer, ChatReply) else ""
    began = f" It began:\n{between(shortened(text, _QUOTED), 'earlier-answer')}" if text.strip() else ""
    words = (
        f"An earlier answer to this could not be used: {shown(shortened(failure.message, _QUOTED))}.{began}\n"
        "Answer once more, in exactly the form that was asked for."
    )
    *before, last = request.messages
    messages = (*before, replace(last, content=f"{last.content}\n\n{words}"))
    return replace(request, messages=messages, seed=request.seed + attempt)
