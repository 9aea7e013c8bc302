"""Prompts in which the place of an image is not clear are refused before anything is generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from imaged import asked

from retort.align.chat import Renderer, TemplateOptions
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError
from retort.models.described import describe
from retort.train.setup.templates import check_rendered


def reader(folder: Path, template_options: TemplateOptions | None = None) -> Renderer:
    found = describe(folder.name, str(folder), "student", stop=None, trust_remote_code=False)
    return Renderer(found.tokenizer, template_options or TemplateOptions(), found.image_tokens)


def talk(*texts: str) -> Prompt:
    roles = ("user", "assistant") * len(texts)
    return Prompt("row 3", tuple(Message(role, text) for role, text in zip(roles, texts, strict=False)))


@pytest.mark.parametrize(
    ("family", "prompt", "written"),
    [
        ("llava", talk("<image> which colour ?"), "<image>"),
        ("qwen2_vl", talk("which <image> ?"), "<image>"),
        ("qwen2_vl", talk("a", "b", "<|vision_start|><|image_pad|><|vision_end|> ?"), r"<\|image_pad\|>"),
    ],
    ids=["own", "written", "in-a-later-turn"],
)
def test_a_placeholder_without_an_image_is_refused_for_a_model_that_reads_images(
    image_folder: Callable[[str], Path], family: str, prompt: Prompt, written: str
) -> None:
    with pytest.raises(UserError, match=f"row 'row 3' writes the placeholder {written}, and has no image"):
        check_rendered([talk("hi"), prompt], {"student": reader(image_folder(family))})


def test_a_placeholder_is_text_to_a_model_of_text_beside_an_image_and_in_an_answer(
    image_folder: Callable[[str], Path], model_folder: Callable[..., Path]
) -> None:
    check_rendered([talk("<image> is a tag")], {"student": reader(model_folder(chat=True))})
    beside = [asked("spell <image>"), talk("a", "<image>", "b")]
    assert "1 control tokens" in check_rendered(beside[:1], {"student": reader(image_folder("llava"))})[0]
    check_rendered(beside, {"student": reader(image_folder("llava"))})


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_an_image_in_a_prompt_that_is_rendered_already_is_refused(
    image_folder: Callable[[str], Path], family: str
) -> None:
    prompt = dataclasses.replace(asked("<|vision_start|><|image_pad|><|vision_end|> ?"), plain=True)
    with pytest.raises(UserError, match="holds an image, whose place only a chat template can write"):
        reader(image_folder(family), TemplateOptions(rendered=True))(prompt)


def test_an_image_is_refused_where_there_is_no_chat_template(image_folder: Callable[[str], Path]) -> None:
    render = reader(image_folder("llava"))
    render.tokenizer.chat_template = None
    with pytest.raises(UserError, match="whose place a chat template writes, and the tokenizer .* has none"):
        render(dataclasses.replace(asked(), plain=True))
