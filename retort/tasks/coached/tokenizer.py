"""The tokenizer of coached Countdown: Countdown's own, and behind its tokens a few words."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from retort.tasks.coached.problems import WORDS
from retort.tasks.countdown import tokenizer as countdown

CONTEXT = 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer; the ids of Countdown's tokens are Countdown's, so that its weights can be used.

    Nothing is added around a text and there is no chat template, so a prompt and a response encode separately
    to the same tokens as together. Decoding puts a space between tokens.
    """
    known = countdown.build_tokenizer().get_vocab()
    vocab = {**known, **{word: len(known) + index for index, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=countdown.UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=countdown.PAD,
        eos_token=countdown.EOS,
        unk_token=countdown.UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
