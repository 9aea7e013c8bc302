"""Prompts with images: placeholders of the chat template, and the tokens that stand for each image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retort.align.chat import Renderer, reads_parts_alone, rendered
from retort.core.images import PLACEHOLDER, PromptImage
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError

#: As many image-text models write it: images and texts are parts of a list, and a turn that is a text is left out.
PARTS = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }} {% for part in message.content -%}
{%- if part.type == 'image' %} <image> {% elif part.type == 'text' %}{{ part.text }}{% endif -%}
{%- endfor %} <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant{% endif -%}"""
TWICE = PARTS.replace("<image>", "<image> <image>")
ONE, OTHER = (PromptImage.of(Image.new("RGB", (side, 4))) for side in (8, 12))


def tokenizer(template: str) -> Any:
    words = ["?", "user", "assistant", "system", "hello", "world"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.chat_template = template
    return made


@dataclass
class Wide:
    """As many tokens as the image is wide, between the ids 0 and 1."""

    placeholder: int

    def ids(self, image: PromptImage) -> list[int]:
        return [0, *[self.placeholder] * image.size[0], 1]


def model(template: str = PARTS) -> tuple[Any, Wide]:
    made = tokenizer(template)
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made, Wide(made.convert_tokens_to_ids("<image>"))


def asked(*turns: tuple[str, str, tuple[PromptImage, ...]]) -> Prompt:
    return Prompt("row", tuple(Message(role, text, images=images) for role, text, images in turns), plain=False)


TALK = asked(
    ("system", "hello", ()),
    ("user", f"{PLACEHOLDER}hello{PLACEHOLDER}world", (ONE, OTHER)),
    ("assistant", "world", ()),
    ("user", f"hello {PLACEHOLDER}", (ONE,)),
)


def test_each_placeholder_becomes_the_tokens_of_its_image() -> None:
    made, image_tokens = model()
    context = rendered(TALK, made, image_tokens=image_tokens)
    assert [own.digest for own in context.media] == [ONE.digest, OTHER.digest, ONE.digest]
    assert [own.payload for own in context.media] == [ONE, OTHER, ONE]
    for own in context.media:
        part = context.ids[own.position : own.position + own.length]
        assert part == image_tokens.ids(own.payload)
    words = [made.convert_ids_to_tokens(token) for token in context.ids]
    assert words.count("<image>") == 8 + 12 + 8
    # Between the images stand the texts, and nothing of the conversation is left out.
    texts = [word for word in words if word in ("hello", "world")]
    assert texts == ["hello", "hello", "world", "world", "hello"]


def test_a_template_that_reads_parts_alone_is_given_parts_also_of_texts() -> None:
    made, _ = model()
    assert reads_parts_alone(made)
    assert not reads_parts_alone(tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"))
    text = Prompt("row", (Message("user", "hello world"),))
    assert [made.convert_ids_to_tokens(token) for token in rendered(text, made).ids][2:4] == ["hello", "world"]


def test_a_text_that_spells_the_placeholder_shows_no_image() -> None:
    made, image_tokens = model()
    spelling = asked(("user", f"{PLACEHOLDER}hello <image>", (ONE,)))
    context = Renderer(made, image_tokens=image_tokens)(spelling)
    assert [own.length for own in context.media] == [ONE.size[0] + 2]
    bare = Renderer(made, image_tokens=image_tokens)(asked(("user", "hello <image>", ())))
    assert not bare.media
    assert image_tokens.placeholder not in bare.ids


@pytest.mark.parametrize("template", [TWICE, "{% for m in messages %}{{ m.role }}{% endfor %}"])
def test_a_template_that_writes_another_number_of_placeholders_is_refused(template: str) -> None:
    made, image_tokens = model(template)
    with pytest.raises(UserError, match=r"prompt 'row': .* placeholders for 1 images"):
        rendered(asked(("user", f"{PLACEHOLDER}hello", (ONE,))), made, image_tokens=image_tokens)


def test_a_model_of_text_alone_is_given_no_image() -> None:
    made, _ = model()
    with pytest.raises(UserError, match=r"prompt 'row' holds an image, and .* reads text alone"):
        rendered(asked(("user", f"{PLACEHOLDER}hello", (ONE,))), made)


def test_prompts_that_differ_in_an_image_alone_are_told_apart() -> None:
    made, image_tokens = model()
    render = Renderer(made, image_tokens=image_tokens)
    one, other = (asked(("user", f"{PLACEHOLDER}hello", (image,))) for image in (ONE, OTHER))
    assert render(one).key == render(replace(one, id="x")).key != render(other).key


def test_the_tokens_of_an_image_are_never_cut() -> None:
    made, image_tokens = model()
    context = rendered(TALK, made, image_tokens=image_tokens)
    first = context.media[0]
    whole = context.part(first.position, first.position + first.length)
    assert whole.media[0].position == 0
    for start, end in ((0, first.position + 1), (first.position + 1, len(context))):
        with pytest.raises(ValueError, match="cut the tokens of an image"):
            context.part(start, end)


def test_a_turn_that_is_joined_to_another_keeps_the_images_of_both() -> None:
    prompt = asked(("user", f"hello {PLACEHOLDER}", (ONE,)))
    joined = prompt.then([Message("user", f"{PLACEHOLDER} world", images=(OTHER,))])
    assert joined.images == (ONE, OTHER)
    assert joined.messages[-1].content.count(PLACEHOLDER) == 2
