"""An asker in this process that the rules of Countdown answer, with replies that a test may spoil."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from support import group_of

from retort.chat import ChatRequest, Failure, Question, Unusable
from retort.core.grading import RubricPlan
from retort.core.rollouts import Group, Message, Prompt
from retort.rewards.base import Grader
from retort.rewards.references import AskedReferences
from retort.rewards.rubric_grader import RubricGrader
from retort.serve.rules import Spoken, reply, rules_of
from retort.teachers.templates import templates

T = TypeVar("T")
#: (a request, the reply of the rules) -> the reply that is read, or why there is none.
Spoil = Callable[[ChatRequest, str], str | Failure]

PROMPT = Prompt("countdown-45", (Message("user", "45 from 3 5 12 :"),), answer="45")
RIGHT, CLOSE, WRONG = "12 - 3 = 9 , 9 * 5 = 45", "12 - 3 = 8 , 9 * 5 = 45", "nothing"


class Ruled:
    """See above.

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
        text = self._spoil(request, reply(rules_of("rules:countdown"), messages, request.seed))
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
