"""The Countdown tokenizer: one token per number and per symbol, in Hugging Face format."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from retort.tasks.countdown.problems import LARGEST_RESULT, OPERATIONS

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for the numbers 0..255 and the symbols of the game.

    Nothing is added around a text and there is no chat template, so a prompt and a response encode separately
    to the same tokens as together. Decoding puts a space between tokens.
    """
    symbols = [PAD, EOS, UNKNOWN, "from", ":", *OPERATIONS, "=", ","]
    words = [*symbols, *map(str, range(LARGEST_RESULT + 1))]
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()  # also splits text without spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )
