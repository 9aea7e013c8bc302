"""Prompts of the families that people use are read as their templates write them, or it is said what is wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, tokenizer_of

from retort.align.chat import Renderer, TemplateOptions, as_text, conversation, dated, render
from retort.align.template import looks_rendered, of_another_family, thinks, turns, unlike_a_turn
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError
from retort.train.setup.templates import check_rendered, thinking_note

THOUGHT = "<think>\nTwo and two.\n</think>\n\n4"
TALKS = {
    "single": [("user", "What is 2 + 2?")],
    "blanks": [("user", "  What is 2 + 2?\n\n")],
    "system": [("system", "Be brief."), ("user", "What is 2 + 2?")],
    "turns": [("user", "What is 2 + 2?"), ("assistant", "4"), ("user", "And 3 + 3?")],
    "thought": [("user", "What is 2 + 2?"), ("assistant", THOUGHT), ("user", "And 3 + 3?")],
}
#: Families whose templates write nothing before an answer.
HEADLESS = ("mistral-nemo", "mistral-v3", "mistral-small")
MADE: dict[str, Any] = {}


def made(name: str) -> Any:
    """A family's tokenizer, with its own template again."""
    tokenizer = MADE.setdefault(name, tokenizer_of(name))
    tokenizer.chat_template = FAMILIES[name].template
    return tokenizer


def prompt(*talk: tuple[str, str], plain: bool = False) -> Prompt:
    return Prompt("row", tuple(Message(*turn) for turn in talk), plain=plain)


def own_ids(tokenizer: Any, talk: list[tuple[str, str]], **told: Any) -> list[int]:
    """What anybody gets who asks the tokenizer."""
    turns_of_it = [{"role": role, "content": text} for role, text in talk]
    found = tokenizer.apply_chat_template(turns_of_it, add_generation_prompt=True, tokenize=True, **told)
    return list(found["input_ids"] if hasattr(found, "keys") else found)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_tokenizers_own_template(name: str, talk: str) -> None:
    if TALKS[talk][0][0] == "system" and not FAMILIES[name].system:
        with pytest.raises(UserError, match="prompt 'row'.*System role not supported"):
            render(prompt(*TALKS[talk]), made(name))
        return
    for thinking in (None, True, False):
        told = {} if thinking is None else {"enable_thinking": thinking}
        found = render(prompt(*TALKS[talk]), made(name), TemplateOptions(thinking))
        assert found == own_ids(made(name), TALKS[talk], **told), thinking
    assert render(prompt(*TALKS[talk], plain=True), made(name)) == own_ids(made(name), TALKS[talk])


def test_these_templates_write_what_the_published_ones_write() -> None:
    """Against the copies that TRL ships, where it is installed."""
    files = {"qwen2.5": "qwen2_5", "qwen3": "qwen3", "llama3.1": "llama3_1", "llama3.2": "llama3_2"}
    files |= {"gemma2": "gemma", "gemma3": "gemma3", "deepseek-r1": "deepseekv3"}
    package = importlib.util.find_spec("trl")
    if package is None or package.origin is None:
        pytest.skip("TRL is not installed (the extra `benchmarks`)")
    for name, file in files.items():
        path = Path(package.origin).parent / "chat_templates" / f"{file}.jinja"
        for talk in TALKS.values() if path.exists() else ():
            if FAMILIES[name].system or talk[0][0] != "system":
                own = own_ids(made(name), talk, enable_thinking=False)
                assert own == own_ids(made(name), talk, enable_thinking=False, chat_template=path.read_text()), name


def test_thinking_is_left_to_the_template_unless_it_is_set() -> None:
    qwen, llama = made("qwen3"), made("llama3.1")
    asked = prompt(*TALKS["single"])
    assert (
        render(asked, qwen) == render(asked, qwen, TemplateOptions(True)) != render(asked, qwen, TemplateOptions(False))
    )
    assert [thinks(qwen, TemplateOptions(thinking)) for thinking in (None, True, False)] == ["on", "on", "off"]
    assert thinks(llama, TemplateOptions(True)) is None
    pair = {"student": qwen, "teacher": llama}
    assert thinking_note(pair, TemplateOptions()) == (
        "thinking (`enable_thinking`) is on for the student, unknown to the teacher's template, left to the template "
        "(rollout.thinking)"
    )
    assert "off for the student" in thinking_note(pair, TemplateOptions(False))
    assert "rollout.thinking = true changes nothing" in thinking_note({"student": llama}, TemplateOptions(True))
    assert thinking_note({"student": llama}, TemplateOptions()) == ""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_day_that_is_fixed_is_the_day_that_is_written(name: str) -> None:
    tokenizer, asked = made(name), prompt(*TALKS["single"])
    then, later = (render(asked, tokenizer, TemplateOptions(date=day)) for day in ("2001-02-03", "2001-02-04"))
    assert (then != later) == dated(tokenizer) == (name in ("llama3.2", "mistral-small"))
    if dated(tokenizer):
        text = tokenizer.decode(then)
        assert "03 Feb 2001" in text or "2001-02-03" in text
        days = [date.today().isoformat()]
        now = render(asked, tokenizer)
        days.append(date.today().isoformat())  # another one at midnight
        assert now in [render(asked, tokenizer, TemplateOptions(date=day)) for day in days]


def without_beginning(template: str) -> str:
    return template.replace("if add_generation_prompt", "if false")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_that_does_not_begin_the_answer_is_found(name: str) -> None:
    tokenizer = made(name)
    found = turns(tokenizer, TemplateOptions())
    assert found is not None
    assert unlike_a_turn(found) is None
    assert (found.header == "") == (name in HEADLESS)
    tokenizer.chat_template = without_beginning(FAMILIES[name].template)
    fault = unlike_a_turn(turns(tokenizer, TemplateOptions()))  # type: ignore[arg-type]
    if name in HEADLESS:
        assert fault is None
    else:
        assert fault is not None
        assert fault[1]
        assert repr(found.header) in fault[0]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: text.replace("m.content", "''"), ("does not show the user's message", True)),
        # Ends the text after whatever comes last, and begins no answer.
        (lambda text: without_beginning(text) + "{{ '<|endoftext|>' }}", ("ignores add_generation_prompt", True)),
        (
            lambda text: text.replace("prompt %}{{ '<|im_start|>assistant\\n'", "prompt %}{{ '<|im_end|>bot:'"),
            ("'<|im_end|>bot:', but writes '<|im_start|>assistant'", False),
        ),
    ],
)
def test_other_ends_of_a_prompt_are_found(change: Callable[[str], str], fault: tuple[str, bool]) -> None:
    tokenizer = made("qwen2.5")
    tokenizer.chat_template = change(tokenizer.chat_template)
    found = turns(tokenizer, TemplateOptions())
    assert found is not None
    said, fatal = unlike_a_turn(found) or ("", False)
    assert fault[0] in said
    assert fatal == fault[1]


def test_a_template_that_refuses_or_is_not_there_has_no_turns() -> None:
    tokenizer = made("qwen2.5")
    for template in ("{{ raise_exception('no') }}", "{% broken", None):
        tokenizer.chat_template = template
        assert turns(tokenizer, TemplateOptions()) is None
        assert thinks(tokenizer, TemplateOptions()) is None
    assert turns(made("qwen2.5"), TemplateOptions(rendered=True)) is None


@pytest.mark.parametrize("talk", ["single", "turns"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_that_were_rendered_before_are_found_and_can_be_asked_for(name: str, talk: str) -> None:
    tokenizer, bos = made(name), FAMILIES[name].bos or ""
    text = as_text(conversation(prompt(*TALKS[talk]).messages), tokenizer)
    found = turns(tokenizer, TemplateOptions())
    for spelling in (text, f"\n{text}", text.removeprefix(bos)):
        assert looks_rendered(spelling, tokenizer, found), spelling
    before = prompt(("user", text), plain=True)
    fine = [prompt(*TALKS["single"])] * 2
    with pytest.raises(UserError, match=r"1 of 3 prompts look rendered already \(row 'row'.*rollout.rendered=true"):
        check_rendered([*fine, before], {"student": Renderer(tokenizer)})
    # Asked for, the ids are those of the conversation; and not two beginnings, or none.
    taken = Renderer(tokenizer, TemplateOptions(rendered=True))
    assert taken(before).ids == own_ids(tokenizer, TALKS[talk])
    assert taken(prompt(("user", text.removeprefix(bos)), plain=True)).ids == own_ids(tokenizer, TALKS[talk])
    assert check_rendered([before], {"student": taken}) == []
    with pytest.raises(UserError, match=r"prompt 'row' is a conversation.*rollout.rendered"):
        taken(prompt(*TALKS[talk]))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_question_about_control_tokens_was_not_rendered(name: str) -> None:
    tokenizer = made(name)
    found = turns(tokenizer, TemplateOptions())
    assert found is not None
    token = FAMILIES[name].special[0]
    for text in (f"What does {found.user} mean?", f"{token} is what?", "user\nassistant", ""):
        assert looks_rendered(text, tokenizer, found) is None
        assert of_another_family(text, tokenizer) is None
    notes = check_rendered([prompt(("user", f"What is {token}?"))] * 2, {"student": Renderer(tokenizer)})
    assert len(notes) == 1
    assert "2 control tokens" in notes[0]
    assert "ordinary text" in notes[0]


def test_a_prompt_rendered_for_another_family_is_noted() -> None:
    theirs = as_text(conversation(prompt(*TALKS["single"]).messages), made("qwen3"))
    tokenizer = made("llama3.1")
    notes = check_rendered([prompt(("user", theirs)), prompt(*TALKS["single"])], {"student": Renderer(tokenizer)})
    assert len(notes) == 1
    assert "1 of 2 prompts look rendered for another family (row 'row' spells '<|im_start|>user')" in notes[0]


def test_a_base_model_does_not_render_and_its_prompts_may_look_rendered() -> None:
    tokenizer = made("qwen2.5")
    text = as_text(conversation(prompt(*TALKS["single"]).messages), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="look rendered already"):
        check_rendered([prompt(("user", text), plain=True)], {"student": Renderer(tokenizer)})


def test_a_beginning_that_a_template_writes_twice_is_counted_for_whoever_reads_it() -> None:
    tokenizer = made("gemma2")
    tokenizer.chat_template = "{{ bos_token }}" + FAMILIES["gemma2"].template
    asked = [prompt(*TALKS["single"])] * 3
    readers = {"student": Renderer(made("gemma3")), "teacher": Renderer(tokenizer)}
    notes = check_rendered(asked, readers)
    assert len(notes) == 1
    assert "3 of 3 prompts begin with two beginning-of-text tokens for the teacher" in notes[0]
    assert check_rendered(asked, {"student": readers["student"]}) == []
