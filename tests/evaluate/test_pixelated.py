"""A second evaluation on pixelated images: the same prompts and random numbers, right answers, and what changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pipeline
import pytest
from imaged import asked

from retort.core.rollouts import Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.evaluate.evaluator import Evaluator
from retort.evaluate.measures import bounds, measure, ordered
from retort.evaluate.pixelated import CHANGED, ORIGINAL, PIXELATED, Pixelated, final_answer

SEQUENCE = TokenSequence.of([0]).then([0], decided=True)


def numbered(count: int, images: int = 1) -> list[Prompt]:
    return [replace(asked(images=images), id=str(place)) for place in range(count)]


class Looks:
    """Two completions of each prompt: the first one looks at the image, the second one guesses."""

    def __init__(self, sharp: set[str], *, grades: bool = True) -> None:
        self.sharp, self.grades = sharp, grades
        self.asked: list[Prompt] = []

    def __call__(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        self.asked += prompts
        return [self._one(prompt, member) for prompt in prompts for member in range(2)]

    def _one(self, prompt: Prompt, member: int) -> Rollout:
        sees = member == 0 and bool(prompt.images) and prompt.images[0].digest in self.sharp
        text = f"{'I see it' if sees else 'perhaps'} , the answer is {'red' if sees else 'blue'}"
        reward = float("red" in text) if self.grades else None
        return Rollout(prompt, (SEQUENCE,), member=member, text=text, reward=reward)


def sharp(prompts: Sequence[Prompt]) -> set[str]:
    return {image.digest for prompt in prompts for image in prompt.images}


def test_right_answers_and_answers_that_change() -> None:
    prompts = [*numbered(2), *numbered(1, images=0), *numbered(1)]
    looks = Looks(sharp(prompts))
    found = Pixelated(looks, samples=2).measures(prompts, looks(prompts))
    assert found == [{ORIGINAL: [1.0, 0.0], PIXELATED: [0.0, 0.0], CHANGED: [1.0, 0.0]}] * 3
    again = looks.asked[len(prompts) :]
    assert [prompt.id for prompt in again] == ["0", "1", "0"], "the same names, and so the same random numbers"
    assert all(prompt.images[0].size == prompts[0].images[0].size for prompt in again)
    assert not sharp(again) & sharp(prompts)


def test_where_nobody_grades_only_the_change_is_known() -> None:
    prompts = numbered(1)
    looks = Looks(sharp(prompts), grades=False)
    assert Pixelated(looks, samples=2).measures(prompts, looks(prompts)) == [{CHANGED: [1.0, 0.0]}]


def test_text_is_not_answered_again() -> None:
    prompts = numbered(3, images=0)
    looks = Looks(set())
    assert Pixelated(looks, samples=2).measures(prompts, looks(prompts)) == []
    assert len(looks.asked) == 3


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("here , it is red . answer red", "in row 2 it is red . answer  Red .", True),
        ("it is red . answer red", "it is red . answer blue", False),
        ("<think>the answer is 4</think>so \\boxed{5}", "\\boxed{ 5 }", True),
        ("\\boxed{5}", "\\boxed{6}", False),
        ("The answer is: (B).", "Answer: (b)", True),
        ("red", "red ", True),
        ("red", "blue", False),
        ("answer", "answer", True),
        ("<think>a", "<think>b", True),  # neither comes to an answer
    ],
)
def test_answers_are_compared_and_not_the_words_around_them(one: str, other: str, same: bool) -> None:
    assert (final_answer(one) == final_answer(other)) == same


def test_a_hostile_text_is_read_in_no_time() -> None:
    for text in ("\\boxed{" * 200_000, "answer " * 200_000, "{" * 10**6):
        assert len(final_answer(text)) <= 1000


def test_they_are_shares_with_labels_and_stand_together() -> None:
    assert ordered(["length", CHANGED, PIXELATED, ORIGINAL, "avg@8"]) == [
        "avg@8",
        ORIGINAL,
        PIXELATED,
        CHANGED,
        "length",
    ]
    for name in (ORIGINAL, PIXELATED, CHANGED):
        assert measure(name).kind == "share" and "image" in measure(name).words
        assert bounds(name) == (0.0, 1.0)


def test_the_setting_reaches_the_evaluator(tiny_run: dict[str, Any]) -> None:
    for given, wanted in (({}, True), ({"eval": {**tiny_run["eval"], "pixelated": False}}, False)):
        setup = pipeline.prepared({**tiny_run, **given}, "opd")
        evaluator = Evaluator.from_config(setup.config, setup.held_out, setup.eval_grader, vocab=setup.learner.vocab)
        assert evaluator.pixelated is wanted
