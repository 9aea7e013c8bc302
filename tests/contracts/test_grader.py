"""What every grader must do: a later one adds a line to `GRADERS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
from ruled import PROMPT as COUNTDOWN
from ruled import rubric_grader
from support import group_of

from retort.core.rollouts import Group, Message, Prompt
from retort.rewards import ByText, Grade, Grader
from retort.rewards.base import graded
from retort.rewards.user import user_grader
from retort.rewards.verify import VERIFIERS, MathVerifier
from retort.train.setup.prompts import builtin_prompts

SUM = Prompt("sum", (Message("user", "5 + 7 ="),), answer="12")
#: Whatever a model may write, besides a right completion.
TEXTS = ["", " ", "12", "13", "\x00\ud800", "(" * 5000, r"\boxed{9^{9^{9}}}", r"\boxed{12}", "<think>12", "12 " * 500]


def length(prompt: Prompt, completion: str) -> float:
    return min(1.0, len(completion) / 10)


def verdict(prompt: Prompt, completion: str) -> Grade:
    return Grade(float(completion == prompt.answer), {"length": len(completion)}, f"{len(completion)} characters")


class Shortest:
    """Of the user's own: right are the shortest completions to a prompt; a lone one has nothing to be compared with."""

    def grade(self, group: Group) -> Sequence[float | Grade | None]:
        if len(group) == 1:
            return [None]
        least = min(len(rollout.text) for rollout in group)
        return [Grade(len(r.text) == least, {"longer": len(r.text) - least}) for r in group]


class Ranked(Grader):
    """Written to the protocol: a reward by rank among the completions to a prompt, and the rank in words."""

    name = "ranked"
    explains = True

    def can_grade(self, prompt: Prompt) -> bool:
        return prompt.answer is not None

    def grade(self, group: Group) -> list[Grade | None]:
        if not self.can_grade(group[0].prompt):
            return [None] * len(group)
        texts = sorted({rollout.text for rollout in group})
        places = [texts.index(rollout.text) for rollout in group]
        return [Grade(place / len(texts), {"place": float(place)}, f"number {place + 1}") for place in places]


def of_task(name: str) -> tuple[Callable[[], Grader], Prompt]:
    built_in = name in ("countdown", "ranking", "coached", "bait", "shapes")
    return lambda: ByText(VERIFIERS[name]()), builtin_prompts(name, "train", 1)[0] if built_in else SUM


GRADERS: dict[str, tuple[Callable[[], Grader], Prompt]] = {
    **{name: of_task(name) for name in VERIFIERS},
    "a function": (lambda: user_grader(length, "length", SUM), SUM),
    "a function that returns a Grade": (lambda: user_grader(verdict, "verdict", SUM), SUM),
    "an object that compares siblings": (lambda: user_grader(Shortest(), "shortest", SUM), SUM),
    "a class of the protocol": (Ranked, SUM),
    "a rubric": (rubric_grader, replace(COUNTDOWN, response="12 - 3 = 9 , 9 * 5 = 45")),
}
pytestmark = pytest.mark.parametrize("kind", GRADERS)


@cache  # a worker process of its own takes a second to start
def setting(kind: str) -> tuple[Grader, Group]:
    """A grader, and a group of completions to a prompt that it can grade, a right one among them."""
    make, prompt = GRADERS[kind]
    return make(), group_of(prompt, [*TEXTS, str(prompt.response or prompt.answer)])


def test_each_rollout_has_a_grade_in_order(kind: str) -> None:
    grader, group = setting(kind)
    grades = grader.grade(group)
    assert isinstance(grades, list)
    assert len(grades) == len(group)
    assert grader.can_grade(group[0].prompt)
    assert all(isinstance(grade, Grade) for grade in grades)
    assert len({grade.reward for grade in grades if grade is not None}) > 1, "nothing is told apart"
    assert grader.grade(group[::-1]) == grades[::-1]


def test_grades_are_plain_and_finite(kind: str) -> None:
    grader, group = setting(kind)
    for grade in (grade for grade in grader.grade(group) if grade is not None):
        assert 0 <= grade.reward <= 1
        assert isinstance(grade.reward, float)
        assert all(isinstance(name, str) and math.isfinite(part) for name, part in grade.parts.items())
        assert isinstance(grade.feedback, str) or (grade.feedback is None and not grader.explains)
    assert isinstance(grader.name, str) and grader.name


def test_the_same_group_has_the_same_grades(kind: str) -> None:
    grader, group = setting(kind)
    first = grader.grade(group)
    grader.start_batch()
    assert grader.grade(group) == first
    if kind != MathVerifier.name:  # that of another takes a second to start
        assert GRADERS[kind][0]().grade(group) == first


def test_what_it_cannot_grade_has_none(kind: str) -> None:
    grader, group = setting(kind)
    prompt = replace(group[0].prompt, answer=None)
    if not grader.can_grade(prompt):
        assert grader.grade(group_of(prompt, ["12", "13"])) == [None, None]
        assert [one.reward for one in graded(grader, group_of(prompt, ["12"]))] == [None]
    alone = grader.grade(group[:1])
    assert len(alone) == 1


def test_rollouts_stay_as_they_are(kind: str) -> None:
    grader, group = setting(kind)
    before = [(r.prompt, r.text, r.reward, r.feedback, r.sequence.tokens_L.tolist()) for r in group]
    grader.grade(group)
    assert [(r.prompt, r.text, r.reward, r.feedback, r.sequence.tokens_L.tolist()) for r in group] == before


def test_a_batch_is_graded_group_by_group(kind: str) -> None:
    grader, group = setting(kind)
    again = tuple(replace(rollout, visit=1) for rollout in group[:3])  # the same prompt, come to once more
    found = graded(grader, [*group, *again])
    grades = [*grader.grade(group), *grader.grade(again)]
    assert [one.reward for one in found] == [None if grade is None else grade.reward for grade in grades]
    assert [dict(one.reward_parts) for one in found] == [dict(grade.parts) if grade else {} for grade in grades]
    assert [one.feedback for one in found] == [(grade and grade.feedback) or "" for grade in grades]
    assert [dict(one.measures) for one in found] == [dict(grade.measures) if grade else {} for grade in grades]
    plain = [replace(one, reward=None, reward_parts={}, feedback="", measures={}) for one in found]
    assert plain == [*group, *again]
    assert grader.grade_all([group, again]) == [grader.grade(group), grader.grade(again)]
    assert graded(grader, []) == [] == grader.grade_all([])


def test_what_is_given_up_is_counted(kind: str) -> None:
    grader, group = setting(kind)
    before = grader.given_up
    grader.grade(group)
    assert grader.given_up - before == (2 if kind == MathVerifier.name else 0)  # a tower of powers, a pile of brackets
