"""Prompts in which the place of an image is not clear are refused before anything is generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from imaged import asked, picture

from retort import config as configuration
from retort.align.chat import Renderer, TemplateOptions
from retort.align.history import Exchange
from retort.core.images import PLACEHOLDER
from retort.core.rollouts import Message, Prompt
from retort.envs.text import TextEpisodes
from retort.errors import UserError
from retort.models.described import describe
from retort.rollout.conversation import Conversation
from retort.train.setup.prepare import prepare
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


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2_vl"])
def test_an_image_in_the_reply_of_an_environment_is_read(image_folder: Callable[[str], Path], family: str) -> None:
    render = reader(image_folder(family))
    tokenizer, options = render.tokenizer, render.template_options
    stop: int = tokenizer.eos_token_id  # type: ignore[assignment]
    talked = Conversation(asked(), [render(asked())], image_tokens=render.image_tokens)
    for text, reply in (
        ("red", Message("user", f"{PLACEHOLDER} and this ?", images=(picture(5),))),
        ("blue", Message("user", "sure \ufffc ?")),
    ):
        talked.decide([*tokenizer.encode(text), stop])
        talked.go_on(talked.replied(Exchange(text, (reply,)), stop, tokenizer, options, None))
    assert [own.payload for own in talked.sequence.media] == [picture(0), picture(5)]
    assert len(talked.sequences) == 2, "a reply of text is added to what stands"
    for own in talked.sequence.media:
        written = tuple(talked.sequence.tokens_L[own.position : own.position + own.length].tolist())
        assert render.image_tokens is not None and written == tuple(render.image_tokens.ids(own.payload))


def test_an_image_that_an_environment_of_text_would_drop_is_refused() -> None:
    with pytest.raises(UserError, match="row '1' holds an image, and the environment add writes the prompt itself"):
        TextEpisodes(lambda: None, "add").begin_group(asked(), [0])  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("vision", ["frozen", "trained"])
def test_a_tower_that_a_student_has_not_is_neither_frozen_nor_trained(vision: str, tiny_run: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"optimizer.vision = {vision}: the student .* reads no images; leave it out"):
        prepare(configuration.resolve({**tiny_run, "optimizer": {"vision": vision}}))
