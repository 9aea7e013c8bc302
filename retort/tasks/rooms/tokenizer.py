"""The tokenizer of Rooms: one token per word of the game, with a chat template, in Hugging Face format."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

CONTEXT = 512
PAD, EOS, UNKNOWN, USER, ASSISTANT = "<pad>", "<eos>", "<unk>", "<user>", "<assistant>"
WORDS = [
    *(".", ",", "?", "what", "go", "take", "open", "fix", "feel", "climb", "north", "east", "south", "west"),
    *("red", "blue", "goal", "key", "door", "trap", "at", "ways", "here", "hold", "jammed", "cellar", "dark", "ladder"),
    *("taken", "opened", "fixed", "fine", "closed", "wall", "fell", "found", "nothing", "no"),
]
ROOMS = [f"{column}{row}" for column in "abcd" for row in range(1, 5)]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<user> {{ message.content }} "
    "{% elif message.role == 'assistant' %}<assistant> {{ message.content }} <eos> "
    "{% else %}{{ raise_exception('only the roles user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(own: Sequence[str] = (*WORDS, *ROOMS), context: int = CONTEXT) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; decoding puts a space between tokens.

    Args:
        own: The words that it knows.
        context: Tokens of the longest sequence.
    """
    words = [PAD, EOS, UNKNOWN, USER, ASSISTANT, *own]
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )
    made.chat_template = TEMPLATE
    return made
