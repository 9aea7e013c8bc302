"""The processor of the task shapes: one token per word, sixteen per picture, and a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from retort.tasks.shapes.pictures import CELL, COLOURS, GRID, SHAPES, SIDE

if TYPE_CHECKING:
    from transformers import LlavaProcessor

CONTEXT = 160
PATCH, IMAGE_TOKENS = CELL, GRID * GRID
PIXEL_MEAN, PIXEL_STD = 0.9, 0.3  # backgrounds are about 0
PAD, EOS, UNKNOWN, USER, ASSISTANT, IMAGE = "<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<image>"
WORDS = (
    *(".", ",", "?", ";", *map(str, range(9)), *SHAPES, *COLOURS, "bar"),
    *("a", "and", "above", "answer", "are", "below", "colour", "column", "has", "have", "here", "hint", "how", "in"),
    *("is", "it", "left", "looking", "makes", "many", "of", "often", "picture", "right", "row", "rows", "shape"),
    *("shapes", "solution", "tallest", "that", "the", "them", "at", "what", "which"),
)
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<user> "
    "{% if message.content is string %}{{ message.content }} {% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% elif message.role == 'assistant' %}<assistant> {{ message.content }} <eos> "
    "{% else %}{{ raise_exception('only the roles user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: The sections that the models know, before a prompt; the recipe's `[templates]` say the same.
TEMPLATES: Mapping[str, str] = {"hint": "hint {text} ;", "solution": "solution {text} ;"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer; decoding puts a space between tokens."""
    words = [PAD, EOS, UNKNOWN, USER, ASSISTANT, IMAGE, *WORDS]
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    made.chat_template = TEMPLATE
    return made


def build_processor() -> LlavaProcessor:
    """The tokenizer, and what makes pixel values of pictures: any picture becomes `SIDE` pixels wide and high.

    The vision tower puts one vector before those of the patches, which the model drops: `default` says so.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        images,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )
