"""Which other problems a view shows: drawn at random, or the most alike; and instructions from them."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt

import pytest
from PIL import Image

from retort.core.images import PLACEHOLDER, PromptImage
from retort.core.passages import Passage
from retort.core.rollouts import Message, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.registry import load
from retort.teachers.drafts import Turn
from retort.teachers.induced import induced
from retort.teachers.others import MostAlike, at_random
from retort.teachers.view_input import Stage, ViewInput


def problem(name: str, text: str, response: str | None = "") -> Prompt:
    given = f"solved {name}" if response == "" else response
    return Prompt(name, (Message("user", text),), response=given, answer=f"secret {name}")


OWN = problem("own", "add two apples")
POOL = [
    problem("far", "name a river"),
    OWN,
    problem("near", "add two pears"),
    problem("nearest", "Add two red apples"),
    problem("copy", "add two apples"),
    problem("again", "Add two red apples", "solved nearest"),
    problem("unsolved", "add two apples, please", None),
]


def scene(prompt: Prompt = OWN, pool: list[Prompt] = POOL, member: int = 0, visit: int = 0) -> ViewInput:
    sequence = TokenSequence.of([5]).then([6], decided=True)
    rollouts = tuple(Rollout(prompt, (sequence,), member=place, visit=visit, text="mine") for place in range(2))
    return ViewInput(rollouts[member], rollouts, Stage(pool=pool))


def names(found: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in found]


def test_the_most_alike_come_first_without_the_problem_itself_and_without_copies() -> None:
    choose = MostAlike(3)
    assert names(choose(scene(), 3, 0)) == ["nearest", "near", "far"]
    assert [names(choose(scene(), 1, place)) for place in range(3)] == [["nearest"], ["near"], ["far"]]
    assert choose(scene(), 1, 3) == [], "there is no further one"
    assert choose(scene(), 2, 1) == []
    assert choose(scene(pool=[OWN]), 1, 0) == [], "other data, other words"
    assert choose(scene(pool=[]), 1, 0) == []


def test_the_same_question_about_another_image_is_another_problem() -> None:
    def seen(name: str, shade: int) -> Prompt:
        image = PromptImage.of(Image.new("L", (2, 2), shade))
        return Prompt(name, (Message("user", f"{PLACEHOLDER}What is it?", images=(image,)),), response=name)

    pool = [seen("own", 1), seen("copy", 1), seen("other", 2)]
    for choose in (MostAlike(2), at_random):
        assert names(choose(scene(pool[0], pool), 1, 0)) == ["other"]


def test_likeness_by_hand() -> None:
    pool = [problem("a", "x x y"), problem("b", "y z")]
    choose = MostAlike(2)
    choose(scene(problem("c", "x y unknown"), pool), 1, 0)
    assert choose._index is not None
    rare, common = log(3 / 2) + 1, 1.0  # x in one of two rows; y in both: ln(3 / 3) + 1
    own = sqrt(rare**2 + common**2)
    first = (2 * rare * rare + common) / (own * sqrt(4 * rare**2 + common))
    second = common / (own * sqrt(common + rare**2))
    assert choose._index.likeness(problem("c", "x y unknown")).tolist() == pytest.approx([first, second])
    assert choose._index.likeness(pool[0])[0].item() == pytest.approx(1.0)
    assert choose._index.likeness(problem("d", "unknown")).tolist() == [0.0, 0.0]


def test_ties_keep_the_order_of_the_rows_and_scripts_without_spaces_have_words() -> None:
    pool = [problem(str(number), f"word{number}") for number in range(5)]
    assert names(MostAlike(5)(scene(problem("new", "other"), pool), 5, 0)) == list("01234")
    chinese = [problem("a", "这条河有多长"), problem("b", "这座山有多高")]
    assert names(MostAlike(1)(scene(problem("c", "那座山很高"), chinese), 1, 0)) == ["b"]


@pytest.mark.parametrize("count", [1, 2])
def test_no_two_random_views_show_the_same_problem(count: int) -> None:
    pool = [problem(str(number), f"problem {number}") for number in range(6)]
    for visit in range(12):
        found = [names(at_random(scene(pool=pool, visit=visit), count, place)) for place in range(3)]
        shown = [name for own in found for name in own]
        assert len(shown) == len(set(shown)) == 3 * count
        assert found[2] == names(at_random(scene(pool=pool, visit=visit, member=1), count, 2)), "siblings see the same"
    drawn = {tuple(names(at_random(scene(pool=pool, visit=visit), 1, 0))) for visit in range(30)}
    assert len(drawn) == 6
    assert at_random(scene(pool=pool[:2]), 1, 2) == [], "two rows are not enough for three"
    assert at_random(scene(pool=[OWN, POOL[4], POOL[6]]), 1, 0) == [], "nor are copies and rows without a solution"


def test_an_instruction_is_written_from_other_problems_and_shown_alone() -> None:
    views = induced(2, 1, choose=MostAlike(2))
    draft = views[0].draft
    assert draft is not None
    assert [view.draft is draft for view in views] == [True, True]
    asked = [draft.ask(scene(), (), Turn(place, 0, True)) for place in range(2)]
    assert asked[0] is not None and asked[1] is not None
    assert "solved nearest" in asked[0].text and "solved near\n" in asked[1].text
    assert all(words not in prompt.text for prompt in asked for words in ("solved own", "secret", "mine") if prompt)
    said = tuple(draft.passage(Turn(place, 0, True), f"<think>hm</think>do {place}") for place in range(2))
    known = replace(
        scene(), rollout=replace(scene().rollout, passages=(*said, Passage("other", 0, "student", 0, "no")))
    )
    for place, view in enumerate(views):
        shown = view.prompt(known)
        assert shown is not None
        assert f"do {place}" in shown.text
        assert not any(words in shown.text for words in (f"do {1 - place}", "hm", "solved near", "no\n"))
        assert view.prompt(scene()) is None
    silent = replace(known, rollout=replace(known.rollout, passages=(draft.passage(Turn(0, 0, True), " "),)))
    assert [view.prompt(silent) for view in views] == [None, None]
    assert draft.ask(scene(pool=[OWN]), (), Turn(0, 0, True)) is None


def test_what_the_contexts_of_unisd_show() -> None:
    def shown(**settings: object) -> list[str | None]:
        method = load("unisd", **settings)
        found = [method.views[f"context_{place}"].prompt(scene()) for place in range(3)]
        return [None if prompt is None else prompt.text for prompt in found]

    best = shown()
    assert ["solved nearest" in (best[0] or ""), "solved near\n" in (best[1] or "")] == [True, True]
    assert len(set(shown(preset="token_agreement"))) == 3
    method = load("unisd", context="induced", instruction_tokens=7)
    drafts = {method.views[f"context_{place}"].draft for place in range(3)}
    (draft,) = drafts
    assert draft is not None
    assert (draft.temperature, draft.max_new_tokens, len(draft.authors)) == (0.7, 7, 3)
    assert {author.weights for author in draft.authors} == {method.views["teacher"].weights}
    with pytest.raises(UserError, match="context"):
        load("unisd", context="chosen")
