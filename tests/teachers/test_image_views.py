"""Views of images: what a teacher sees in place of the student's images or beside them, and when there is nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pipeline
import pytest
from imaged import asked, picture

from retort.core.images import PLACEHOLDER, PromptImage
from retort.core.rollouts import Message, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.registry import load
from retort.teachers.image_views import changed_images, pixelated, privileged_images
from retort.teachers.moving import live
from retort.teachers.view import View
from retort.teachers.view_input import Stage, ViewInput
from retort.teachers.views import examples, peers, privileged
from retort.train.setup.needs import need_columns


def seen(view: View, prompt: Prompt, *, text: str = "", pool: tuple[Prompt, ...] = ()) -> Prompt | None:
    sequence = TokenSequence.of([0]).then([0], decided=True)
    group = tuple(Rollout(prompt, (sequence,), member=member, text=text, reward=1.0) for member in range(2))
    return view.prompt(ViewInput(group[0], group, Stage(pool=pool)))


def digests(prompt: Prompt | None) -> list[str]:
    assert prompt is not None
    return [image.digest for image in prompt.images]


def test_every_image_is_changed_in_every_turn_and_once() -> None:
    calls: list[str] = []

    def change(image: PromptImage) -> PromptImage:
        calls.append(image.digest)
        return picture(50 + len(calls), image.size)

    one, two = picture(1), picture(2)
    turns = (
        Message("user", f"{PLACEHOLDER} and {PLACEHOLDER}", images=(one, two)),
        Message("assistant", "yes"),
        Message("user", f"again {PLACEHOLDER}", images=(one,)),
    )
    prompt, view = Prompt("1", turns, plain=False), changed_images(change)
    first, second = seen(view, prompt), seen(view, prompt)
    assert digests(first) == digests(second)
    assert calls == [one.digest, two.digest], "a picture that was changed is kept"
    assert first is not None and first.text == prompt.text
    assert digests(first)[0] == digests(first)[2] != one.digest
    assert prompt.images == (one, two, one), "the student's prompt stays"


def test_pixelated_images_have_the_same_size_and_another_digest() -> None:
    prompt = asked(images=2)
    found = seen(pixelated(0.1), prompt)
    assert found is not None
    assert [image.size for image in found.images] == [image.size for image in prompt.images]
    assert not set(digests(found)) & set(digests(prompt))
    assert pixelated(0.1).model == "teacher"
    assert pixelated(0.1, model="student", weights=live()).weights == live()


def test_without_an_image_there_is_no_context() -> None:
    assert seen(pixelated(0.1), asked(images=0)) is None
    assert seen(privileged_images(), asked(images=1)) is None
    assert seen(View.same_prompt(), asked(images=0)) is not None


def test_images_of_a_teacher_take_the_place_of_as_many() -> None:
    prompt = asked(images=2, more=2)
    found = seen(privileged_images("teacher"), prompt)
    assert digests(found) == [image.digest for image in prompt.teacher_images]
    assert found is not None and found.text == prompt.text


@pytest.mark.parametrize(("own", "more"), [(0, 1), (1, 2), (2, 1)])
def test_other_images_of_a_teacher_come_before_the_last_turn(own: int, more: int) -> None:
    prompt = asked("what ?", images=own, more=more)
    earlier = Message("user", f"{PLACEHOLDER} hello", images=(picture(7),))
    prompt = dataclasses.replace(prompt, messages=(earlier, *prompt.messages))
    if len(prompt.images) == more:
        prompt = dataclasses.replace(prompt, teacher_images=(*prompt.teacher_images, picture(9)))
    found = seen(privileged_images(), prompt)
    assert found is not None
    assert found.messages[0] == earlier
    last, count = found.messages[-1], len(prompt.teacher_images)
    assert last.content == PLACEHOLDER * (count + own) + "what ?"
    assert last.images == (*prompt.teacher_images, *prompt.messages[-1].images)
    parts = last.as_dict()["content"]
    assert [part["type"] for part in parts] == ["image"] * (count + own) + ["text"]


def test_texts_for_a_teacher_stand_around_the_image() -> None:
    """A caption as the hint: the image stays where it was, and a placeholder in another's text stands for none."""
    hint = f"a red {PLACEHOLDER} square"
    prompt = dataclasses.replace(asked("which colour ?"), privileged={"hint": hint})
    found = seen(privileged("hint", model="teacher"), prompt)
    assert found is not None
    assert found.images == prompt.images
    assert found.text.count(PLACEHOLDER) == 1
    assert "a red [image] square" in found.text
    shown = seen(peers(), prompt, text=f"it is {PLACEHOLDER} red")
    assert shown is not None and shown.text.count(PLACEHOLDER) == 1
    others = tuple(
        dataclasses.replace(asked(f"number {place}"), id=f"other-{place}", response="blue") for place in range(3)
    )
    solved = seen(examples(2), prompt, pool=others)
    assert solved is not None and solved.text.count(PLACEHOLDER) == 1 and "blue" in solved.text


def test_both_teachers_of_dopd_see_the_image_that_is_for_them_alone() -> None:
    method, prompt = load("dopd", hint="images"), asked(images=1, more=1)
    shown = {name: seen(view, prompt) for name, view in method.views.items()}
    assert shown.keys() == {"teacher", "privileged_student"}
    assert all(digests(found) == [prompt.teacher_images[0].digest] for found in shown.values())
    assert {name: view.model for name, view in method.views.items()} == {
        "teacher": "teacher",
        "privileged_student": "student",
    }
    assert method.views["privileged_student"].weights == live()
    assert load("dopd", hint="images", routing="none").views.keys() == {"teacher"}


def test_uni_opd_shows_its_teacher_the_images_of_the_prompt() -> None:
    prompt = asked(images=2)
    assert seen(load("uni_opd").views["teacher"], prompt) is prompt


@pytest.mark.parametrize(
    ("name", "settings", "rows", "message"),
    [
        ("va_opd", {}, (0, 0), r"shows its teacher images \(view 'pixelated'\), and no .* `images`"),
        (
            "dopd",
            {"hint": "images"},
            (1, 1),
            r"no training prompt has an image for the teacher alone.*`teacher_images`",
        ),
    ],
)
def test_data_without_images_are_refused(
    name: str, settings: dict[str, Any], rows: tuple[int, int], message: str
) -> None:
    prompts = [asked(images=count) for count in rows]
    with pytest.raises(UserError, match=message) as caught:
        need_columns(load(name, **settings), prompts, [])
    assert "\n" not in str(caught.value)


def test_rows_without_an_image_among_others_are_noted() -> None:
    notes: list[str] = []
    need_columns(load("va_opd"), [asked(images=1), asked(images=0)], notes)
    assert len(notes) == 1
    assert "1 of 2 training prompts, '1' first, have no image for view 'pixelated'" in notes[0]


def test_a_run_on_text_alone_is_refused_before_anything_is_generated(tiny_run: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"'va_opd' shows its teacher images .* or choose a method that needs none"):
        pipeline.prepared(tiny_run, "va_opd")
