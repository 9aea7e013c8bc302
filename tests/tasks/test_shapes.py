"""The visual task: pictures, questions, their checker, and what a run makes of the rows."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image
from tests.support import group_of

from retort import config as configuration
from retort.config import recipe
from retort.core.images import PLACEHOLDER
from retort.core.rollouts import Message, Prompt
from retort.rewards.base import ByText
from retort.rewards.choose import verifier_for
from retort.tasks.shapes import answer_in, check, noted, rows
from retort.tasks.shapes.pictures import COLOURS, SHAPES, SIDE, Item, draw
from retort.tasks.shapes.problems import KINDS, NOTE_IS_RIGHT, OPENINGS, Problem, Question, drawn, problem
from retort.train.setup.prompts import builtin_prompts

ITEMS = (
    Item((1, 3), "triangle", "blue"),
    Item((3, 1), "square", "red"),
    Item((3, 2), "ring", "black"),
    Item((4, 4), "ring", "yellow"),
)
BARS = tuple(
    Item((height, column), "bar", colour)
    for column, (height, colour) in enumerate(zip((5, 8, 3, 6), ("yellow", "red", "green", "black"), strict=True), 1)
)
WHITE = (255, 255, 255)
ASKED = [
    (Question("colour", "triangle"), ITEMS, "blue", "the triangle is in row 1 , column 3 , and it is blue"),
    (Question("beside", "square", "right of"), ITEMS, "ring", "in row 3 , column 1 , and right of it is a ring"),
    (Question("count", "ring"), ITEMS, "2", "the rows have 0 , 0 , 1 , 1 of them , and that makes 2"),
    (Question("tallest", "bar"), BARS, "red", "the tallest bar is in column 2 , and it is red"),
]


@pytest.mark.parametrize(("question", "items", "answer", "response"), ASKED, ids=KINDS)
def test_a_problem_of_each_kind(question: Question, items: tuple[Item, ...], answer: str, response: str) -> None:
    for suggested in question.answers:
        one = Problem(question, items, WHITE, suggested)
        assert one.answer == answer
        assert noted(one.prompt) == noted(f"hint {one.caption} ; {one.prompt}") == suggested
        for opening in OPENINGS:
            assert response in one.response(opening)
            assert check(answer, one.response(opening))


def test_a_caption_says_what_is_there() -> None:
    shapes, bars = (Problem(question, items, WHITE, "red").caption for question, items, *_ in (ASKED[0], ASKED[3]))
    assert shapes.startswith("blue triangle row 1 column 3 , red square row 3 column 1 , ")
    assert bars == "yellow bar 5 , red bar 8 , green bar 3 , black bar 6"


def test_a_picture_shows_its_items() -> None:
    picture = draw(ITEMS, WHITE, [(3, 1)])
    assert (picture.size, picture.mode) == ((SIDE, SIDE), "RGB")
    assert picture.getpixel((19, 6)) == COLOURS["blue"], "the foot of the triangle, in row 1, column 3"
    assert picture.getpixel((16, 0)) == WHITE, "beside its top"
    assert picture.getpixel((3, 19)) == COLOURS["red"]
    assert picture.getpixel((7, 23)) not in (WHITE, COLOURS["red"]), "the corner of the shaded cell"
    assert picture.getpixel((11, 19)) == WHITE, "the hole of the ring"
    chart = draw(BARS, WHITE)
    assert [chart.getpixel((column * 8 + 4, 0)) == COLOURS["red"] for column in range(4)] == [False, True, False, False]


def test_all_shapes_differ_wherever_they_stand() -> None:
    drawn_ = {
        draw([Item((1, 1), shape, "red", shift)], WHITE).tobytes()
        for shape in SHAPES
        for shift in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    assert len(drawn_) == 4 * len(SHAPES)


def test_rows_repeat_and_are_held_out() -> None:
    assert rows("train", 20) == rows("train", 30)[:20] == rows("train", 20, seed=0)
    assert rows("train", 20) != rows("train", 20, seed=1)
    assert not any(drawn("train", index).held_out for index in range(200))
    assert all(drawn("held_out", index).held_out for index in range(50))
    known = {(one.question, one.items) for one in (drawn("train", index) for index in range(500))}
    assert len(known) == 500
    for split, count in (("train", 4097), ("held_out", 513), ("other", 1)):
        with pytest.raises(ValueError, match="shapes: the splits are"):
            rows(split, count)  # type: ignore[arg-type]


def test_a_picture_and_its_question_are_of_one_split_whatever_the_note_says() -> None:
    one = drawn("held_out", 0)
    for suggested in one.question.answers:
        assert Problem(one.question, one.items[::-1], WHITE, suggested).held_out


def test_the_note_alone_is_worth_less_than_half() -> None:
    some = [drawn("train", index) for index in range(1500)]
    assert sum(one.noted == one.answer for one in some) / len(some) == pytest.approx(NOTE_IS_RIGHT, abs=0.04)
    assert {one.question.kind for one in some} == set(KINDS)
    for kind in KINDS:
        own = [one for one in some if one.question.kind == kind]
        answers = [one.answer for one in own]
        most = max(answers.count(answer) for answer in set(answers)) / len(answers)
        assert most < 0.35, f"{kind}: who always answers the same is right too often"


def test_another_picture_for_the_same_question() -> None:
    rng = random.Random(0)
    one = problem(rng, "train")
    assert all(problem(rng, "train", one.question).question == one.question for _ in range(5))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("it is red . answer red", "red"),
        ("answer blue . no , answer red", "red"),
        ("answer red .", "red ."),
        ("answer red or blue", "red or blue"),
        ("answer", ""),
        ("red", None),
        ("", None),
        ("answer " * 1000, ""),
    ],
)
def test_what_is_said(text: str, answer: str | None) -> None:
    assert answer_in(text) == answer
    assert check("red", text) == (answer == "red")


@pytest.mark.parametrize("text", ["", "often", ". often", "often .", "what is 1 + 1 ?", "a . often", "the often ."])
def test_a_text_without_a_note(text: str) -> None:
    assert noted(text) is None


def test_the_verifier_counts_who_followed_a_wrong_note() -> None:
    right, wrong = (
        Prompt("x", (Message("user", Problem(ASKED[0][0], ITEMS, WHITE, suggested).prompt),), answer="blue")
        for suggested in ("blue", "red")
    )
    verifier = verifier_for("shapes", [right, wrong])
    assert verifier is not None and verifier.name == "shapes"
    texts = ["answer blue", "answer red", "answer green", "red"]
    grades = [grade for grade in ByText(verifier).grade(group_of(wrong, texts)) if grade is not None]
    assert [grade.reward for grade in grades] == [1.0, 0.0, 0.0, 0.0]
    assert [grade.parts["followed"] for grade in grades] == [0.0, 1.0, 0.0, 0.0]
    for grade in ByText(verifier).grade(group_of(right, texts)):
        assert grade is not None and not grade.parts


def test_prompts_carry_pictures() -> None:
    for one, row in zip(builtin_prompts("shapes", "train", 5), rows("train", 5), strict=True):
        (turn,) = one.messages
        assert turn.content.count(PLACEHOLDER) == len(turn.images) == len(one.images) == 1
        assert turn.as_dict()["content"] == [{"type": "image"}, {"type": "text", "text": row["prompt"][1:]}]
        assert one.teacher_images == row["teacher_images"] != one.images
        assert one.privileged == {"hint": row["hint"], "solution": row["solution"]}
        shown = Image.open(io.BytesIO(one.images[0].encoded()))
        assert shown.size == one.images[0].size == one.teacher_images[0].size == (SIDE, SIDE)
        assert len(one.images[0].encoded()) < 1500


def test_the_recipe() -> None:
    settings = configuration.resolve(recipe("shapes"))
    assert (settings.data, settings.student, settings.teacher) == ("shapes", "shapes:student", "shapes:teacher")
