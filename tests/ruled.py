"""Judges by rules for tests: in this process, with replies that a test may spoil, and as a server in a thread."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

from served import answering
from support import group_of

from retort.chat import ChatRequest, Failure, Question, Unusable
from retort.core.grading import RubricPlan
from retort.core.rollouts import Group, Message, Prompt
from retort.rewards.base import Grader
from retort.rewards.references import AskedReferences
from retort.rewards.rubric_grader import RubricGrader
from retort.serve.rules import RULES, Rules, Spoken, application, reply
from retort.teachers.templates import templates

T = TypeVar("T")
#: (a request, the reply of the rules) -> the reply that is read, or why there is none.
Spoil = Callable[[ChatRequest, str], str | Failure]

PROMPT = Prompt("countdown-45", (Message("user", "45 from 3 5 12 :"),), answer="45")
RIGHT, CLOSE, WRONG = "12 - 3 = 9 , 9 * 5 = 45", "12 - 3 = 8 , 9 * 5 = 45", "nothing"


class Ruled:
    """An asker that the rules of Countdown answer.

    Attributes:
        asked: Every request, in order.
    """

    fingerprint = "the rules of countdown"

    def __init__(self, spoil: Spoil = lambda request, text: text) -> None:
        self._spoil, self.asked = spoil, list[ChatRequest]()

    def ask(self, questions: Sequence[Question[T]]) -> list[T | Failure]:
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question[T]) -> T | Failure:
        request = question.request
        self.asked.append(request)
        messages = [Spoken(role="user", content=message.content) for message in request.messages]
        text = self._spoil(request, reply(RULES["countdown"], messages, request.seed))
        if isinstance(text, Failure):
            return text
        try:
            return question.read(text)
        except Unusable as error:
            return Failure("form", str(error))


def rubric_grader(
    asker: Ruled | None = None, plan: RubricPlan | None = None, verifier: Grader | None = None
) -> RubricGrader:
    """A grader by rubric that asks the rules for everything."""
    asker, plan = asker or Ruled(), plan or RubricPlan()
    return RubricGrader(asker, plan, AskedReferences(asker, plan, 0), templates({}), verifier=verifier)


def answers(*texts: str) -> Group:
    """A group of these completions to `PROMPT`."""
    return group_of(PROMPT, texts)


def _sum(text: str) -> int | None:
    found = re.fullmatch(r"(\d+) \+ (\d+) =", text)
    return None if found is None else int(found[1]) + int(found[2])


#: Rules for the sums of the tests' small data file, which tell the completions of random models apart.
SUMS = Rules(
    (
        ("right", "It is the sum.", "task", 5),
        ("number", "There is a number in it.", "task", 2),
        ("short", "It has at most five words.", "quality", 1),
        ("even", "It has an even number of characters.", "reasoning", 1),
    ),
    _sum,
    lambda total, text: [
        text.strip() == str(total),
        bool(re.search(r"\d", text)),
        len(text.split()) <= 5,
        len(text) % 2 == 0,
    ],
    lambda total, seed: str(total),
)


@contextlib.contextmanager
def in_thread(rules: Rules = RULES["countdown"], name: str = "rules:countdown") -> Iterator[str]:
    """The address of a judge by rules in a thread of this process."""
    with answering(application(name, rules)) as url:
        yield url


@cache
def sums_url() -> str:
    """The address of a judge of `SUMS`, which serves until the tests end."""
    return _KEPT.enter_context(in_thread(SUMS, "rules:sums"))


_KEPT = contextlib.ExitStack()


def judged(settings: dict[str, Any], method: Any) -> dict[str, Any]:
    """Settings of a run on the tests' small data file, with the judge that a method learns from."""
    return settings if method.grading is None else {**settings, "judge": {"model": sums_url()}}
