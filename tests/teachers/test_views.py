"""What a teacher is shown: sections, siblings, cuts, nothing at all; and what a student is never shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from retort.align.pair import SameIds
from retort.core.images import PLACEHOLDER, PromptImage
from retort.core.needs import DENSE, SAMPLED
from retort.core.rollouts import Message, Pack, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.load import load_model
from retort.teachers.base import ScoreRequest
from retort.teachers.local import LocalTeacher
from retort.teachers.templates import TEMPLATES, fill, templates
from retort.teachers.view import View
from retort.teachers.view_input import Stage, ViewInput
from retort.teachers.views import clean, examples, peers, privileged

PROMPT = Prompt(
    "p",
    (Message("system", "Be brief."), Message("user", "What is {text}?")),
    answer="9",
    response="It is 9.",
    privileged={"solution": "3 * {prompt} = 9", "hint": "multiply"},
    clean=(Message("user", "What?"),),
)


def written(member: int, text: str = "", reward: float = 0.0, feedback: str = "", prompt: Prompt = PROMPT) -> Rollout:
    sequence = TokenSequence.of([5]).then([6, 7], decided=True)
    return Rollout(prompt, sequence, member=member, text=text, reward=reward, feedback=feedback)


def scene(rollout: Rollout, *others: Rollout, stage: Stage | None = None, limit: int | None = None) -> ViewInput:
    group = tuple(sorted([rollout, *others], key=lambda r: r.member))
    return ViewInput(rollout, group, stage or Stage(), limit)


def test_what_belongs_to_a_turn_stays_with_it_when_it_is_framed() -> None:
    call = Message("assistant", "", {"tool_calls": [{"function": {"name": "add", "arguments": {}}}]})
    turns = (Message("user", "What?"), call, Message("tool", "9", {"tool_call_id": "c1"}))
    asked = replace(PROMPT, messages=turns, tools=({"name": "add"},))
    found = privileged("solution").prompt(scene(written(0, prompt=asked)))
    assert found is not None
    assert found.messages[:2] == turns[:2]
    assert (found.messages[2].extra, found.tools) == ({"tool_call_id": "c1"}, asked.tools)
    assert "= 9" in found.messages[2].content


def test_only_the_turn_itself_says_where_its_images_stand() -> None:
    """Siblings, other problems and templates may spell the character that stands for an image."""
    image = PromptImage.of(Image.new("L", (2, 2)))
    seen = Prompt("seen", (Message("user", f"{PLACEHOLDER}What?", images=(image,)),), privileged={"hint": PLACEHOLDER})
    other = replace(
        seen, id="other", messages=(replace(seen.messages[0], content=f"{PLACEHOLDER}Who?"),), response="Me."
    )
    rollout = Rollout(seen, TokenSequence.of([1]).then([2], decided=True), text="a")
    sibling = replace(rollout, member=1, text=f"It is {PLACEHOLDER}", reward=1.0)
    stage = Stage(pool=[seen, other], templates={**TEMPLATES, "closing": f"End {PLACEHOLDER}"})
    given = ViewInput(rollout, (rollout, sibling), stage)
    for view in (privileged("hint"), peers(), examples(1)):
        assert view.render is not None
        framed = view.render(given)
        assert framed is not None and framed.images == (image,)
        assert framed.text.count(PLACEHOLDER) == 1 and f"{PLACEHOLDER}What?" in framed.text
        assert "End [image]" in framed.text
    bare = Prompt("bare", (Message("user", f"odd {PLACEHOLDER}"),), privileged={"hint": PLACEHOLDER})
    framed = ViewInput(replace(rollout, prompt=bare), ()).framed([PLACEHOLDER])
    assert framed is not None and framed.text.count(PLACEHOLDER) == 2  # without images it is a character like any other


def test_sections_frame_the_last_turn_and_hostile_places_stay_text() -> None:
    found = privileged("solution", "hint").prompt(scene(written(0)))
    assert found is not None
    assert found.messages[0] == PROMPT.messages[0]
    text = found.messages[1].content
    assert text.startswith("What is {text}?")
    assert "3 * {prompt} = 9" in text
    assert text.index("3 *") < text.index("multiply") < text.index(TEMPLATES["closing"])


def test_a_demonstration_may_be_the_given_response_and_a_missing_column_is_no_context() -> None:
    found = privileged("demonstration").prompt(scene(written(0)))
    assert found is not None
    assert "It is 9." in found.messages[1].content
    assert privileged("outcome").prompt(scene(written(0))) is None
    assert privileged("solution", "outcome").prompt(scene(written(0))) is None


def test_the_clean_prompt() -> None:
    found = clean().prompt(scene(written(0)))
    assert found is not None
    assert found.messages == PROMPT.clean
    bare = replace(PROMPT, clean=None)
    assert clean().prompt(scene(written(0, prompt=bare))) is None


def test_peers_are_never_the_rollout_itself() -> None:
    group = [written(0, "zero", 1.0), written(1, "one", 1.0), written(2, "two", 0.0), written(3, "three", 0.0)]
    for own in group:
        found = peers(successes=2, failures=1).prompt(scene(own, *(r for r in group if r is not own)))
        assert found is not None
        text = found.messages[1].content
        assert own.text not in text
        others = [r for r in group if r is not own]
        assert [r.text in text for r in others if r.reward] == [True] * sum(r.reward == 1.0 for r in others)
        assert sum(r.text in text for r in others if not r.reward) == 1


def test_the_only_success_has_no_context_of_its_own_and_feedback_stands_in() -> None:
    right, wrong = written(0, "right", 1.0), written(1, "wrong", 0.0, "2 + 2 = 4")
    view = peers()
    assert view.prompt(scene(right, wrong)) is None
    shown = view.prompt(scene(wrong, right))
    assert shown is not None
    assert "right" in shown.messages[1].content
    assert "2 + 2 = 4" not in shown.messages[1].content  # a success makes feedback unnecessary
    alone = view.prompt(scene(wrong))
    assert alone is not None
    assert "2 + 2 = 4" in alone.messages[1].content
    assert peers(feedback="never").prompt(scene(wrong)) is None


def test_failures_are_drawn_by_the_rollout_and_thoughts_can_be_left_out() -> None:
    own = written(0, "own", 1.0)
    others = [written(member, f"<think>hm {member}</think>text {member}") for member in range(1, 9)]
    view = peers(failures=1, thoughts=False)
    first, again = view.prompt(scene(own, *others)), view.prompt(scene(own, *reversed(others)))
    assert first == again
    assert first is not None
    assert "hm" not in first.messages[1].content
    drawn = {view.prompt(scene(replace(own, visit=visit), *others)) is not None for visit in range(3)}
    assert drawn == {True}
    texts = {str(view.prompt(scene(replace(own, visit=visit), *others))) for visit in range(20)}
    assert len(texts) > 3


def test_examples_are_of_other_prompts_and_the_same_for_siblings() -> None:
    asked = [(*PROMPT.messages[:-1], Message("user", f"another question, {n}")) for n in range(9)]
    pool = [replace(PROMPT, id=f"q{n}", messages=asked[n], response=f"solved {n}") for n in range(9)]
    stage = Stage(pool=[PROMPT, *pool])
    one, two = written(0), written(1)
    found = examples(3).prompt(scene(one, two, stage=stage))
    assert found is not None
    assert found == examples(3).prompt(scene(two, one, stage=stage))
    assert found.messages[1].content.count("<response>\nsolved") == 3
    assert PROMPT.response is not None
    assert PROMPT.response not in found.messages[1].content
    assert found != examples(3, index=1).prompt(scene(one, two, stage=stage))
    assert examples(3).prompt(scene(one, two, stage=Stage(pool=[PROMPT]))) is None
    with pytest.raises(UserError, match="at least 1"):
        examples(0)


def test_templates_are_replaced_by_name_and_checked() -> None:
    assert templates({"hint": "Psst: {text}"})["hint"] == "Psst: {text}"
    with pytest.raises(UserError, match="did you mean 'hint'"):
        templates({"hnt": "{text}"})
    with pytest.raises(UserError, match=r"must hold \{text\} once"):
        templates({"hint": "Psst"})
    with pytest.raises(UserError, match=r"must hold \{sections\} once"):
        templates({"frame": "{prompt}"})
    assert fill("a {text} b {prompt}", text="{prompt}", prompt="{text}") == "a {prompt} b {text}"


def test_a_moving_view_of_another_model_is_refused() -> None:
    from retort.teachers.moving import ema

    with pytest.raises(UserError, match="cannot have moving weights"):
        View(model="teacher", weights=ema(0.1))


# ------------------------------------------------------------------------------------------ scored by a local teacher


@pytest.fixture(scope="module")
def lm(model_folder: Callable[..., Path]) -> Any:
    folder = model_folder(seed=2, padded_to=80)
    return load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))


def told(lm: Any, **more: Any) -> LocalTeacher:
    words = templates({"frame": "{sections} {prompt}", "solution": "{text}", "closing": ""})
    return LocalTeacher(lm, alignment=SameIds(61), batch_tokens=64, stage=Stage(words, **more))


def answered(lm: Any, text: str, actions: list[int], **privileged_texts: str) -> Rollout:
    ids = lm.tokenizer(text)["input_ids"]
    prompt = Prompt(text, (Message("user", text),), privileged=privileged_texts)
    return Rollout(prompt, TokenSequence.of(ids).then(actions, decided=True))


def test_a_rollout_without_context_is_left_out_and_the_others_are_scored_as_ever(lm: Any) -> None:
    with_one, without = answered(lm, "3 + 4 =", [12, 13], solution="7 2"), answered(lm, "1 =", [7, 8, 9])
    said = told(lm).score(in_groups([without, with_one]), ScoreRequest(privileged("solution"), frozenset({SAMPLED})))
    alone = told(lm).score(in_groups([with_one]), ScoreRequest(privileged("solution"), frozenset({SAMPLED})))
    assert said.valid_N is not None
    assert said.valid_N.tolist() == [False] * 3 + [True] * 2
    assert alone.valid_N is None
    torch.testing.assert_close(said.rows(slice(3, 5)).sampled_logp_N, alone.rows(slice(None)).sampled_logp_N)
    assert said.counts["no_context"] == 1
    nobody = told(lm).score(in_groups([without]), ScoreRequest(privileged("solution"), frozenset({DENSE})))
    assert nobody.valid_N is not None
    assert not nobody.valid_N.any()


def test_too_long_a_context_is_cut_at_the_end_of_the_privileged_text_and_counted(lm: Any) -> None:
    long = answered(lm, "3 + 4 =", [12], solution="1 2 3 4 5 6 7 8 9")
    prompts = told(lm, longest=8).prompts(Pack.of([long]), privileged("solution"))
    assert prompts.cut == 1
    assert prompts.contexts[0] is not None
    read = prompts.contexts[0].ids
    assert len(read) <= 8
    ids = lm.tokenizer("1 2 3 4 3 + 4 =")["input_ids"]
    assert read == ids[: len(read)] or read[-4:] == ids[-4:]
    # Where not even the bare frame fits, there is no context.
    assert told(lm, longest=2).prompts(Pack.of([long]), privileged("solution")).contexts == [None]


def test_what_the_teacher_reads_is_the_privileged_text_the_question_and_then_the_students_own_tokens(lm: Any) -> None:
    own = answered(lm, "3 + 4 =", [12, 13], solution="7 2")
    said = told(lm).score(in_groups([own]), ScoreRequest(privileged("solution"), frozenset({SAMPLED})))
    ids = lm.tokenizer("7 2 3 + 4 =")["input_ids"]
    whole = torch.tensor([[*ids, 12, 13]])
    with torch.no_grad():
        logp = lm.model(input_ids=whole).logits[0, :, :61].log_softmax(-1)
    expected = torch.stack([logp[len(ids) - 1, 12], logp[len(ids), 13]])
    torch.testing.assert_close(said.rows(slice(None)).sampled_logp_N, expected)


def test_what_is_shown_is_counted_by_template(lm: Any) -> None:
    words = templates({"frame": "{sections} {prompt}", "success": "{text}", "failure": "{text}", "closing": ""})
    teacher = LocalTeacher(lm, alignment=SameIds(61), batch_tokens=64, stage=Stage(words))
    group = [
        replace(answered(lm, "3 + 4 =", [12]), member=member, reward=reward, text=str(member))
        for member, reward in enumerate((1.0, 0.0, 0.0))
    ]
    found = teacher.prompts(Pack.of(group), peers(failures=1)).counts
    assert (found["shows/success"], found["shows/failure"], found["no_context"]) == (2, 3, 0)
    assert "shows/feedback" not in found
    alone = teacher.prompts(Pack.of(group[1:2]), peers(failures=1)).counts
    assert {name: count for name, count in alone.items() if count} == {"no_context": 1}


@pytest.mark.parametrize("text", ["", "  \n ", "a", "   b"])
def test_a_text_of_nothing_is_no_context(text: str) -> None:
    """Also where all of it was cut off; and one character is something."""
    rollout = written(0, prompt=replace(PROMPT, privileged={"solution": text, "hint": "multiply"}))
    here = scene(rollout)
    for view in (privileged("solution"), privileged("hint", "solution")):
        assert (view.prompt(here) is not None) == bool(text.strip())
    sibling = written(1, text, 1.0)
    assert (peers(thoughts=False).prompt(scene(rollout, sibling)) is not None) == bool(text.strip())
    question = len(PROMPT.messages[1].content)
    for longest in range(question, question + 400):
        found = here.shortened(
            privileged("solution").prompt, lambda made, most=longest: len(made.messages[1].content) <= most
        )
        assert found is None or f"<solution>\n{text.strip()}" in found.messages[1].content


def test_a_sibling_of_thoughts_alone_is_nothing_to_show() -> None:
    own, thinker = written(0), written(1, "<think>hm</think> ", 1.0)
    assert peers(thoughts=False).prompt(scene(own, thinker)) is None
    assert peers(thoughts=True).prompt(scene(own, thinker)) is not None
