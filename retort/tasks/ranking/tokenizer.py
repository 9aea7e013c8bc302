"""The tokenizer of ranked lists: one token per id, per rank and per piece of JSON, in Hugging Face format."""

from __future__ import annotations

import json

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from retort.tasks.ranking.lists import IDS, ITEMS

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
#: The contract: tokens that are structure and not content.
STRUCTURE = ("[", "]", "{", "}", ",", ":", '"id"', '"score"')


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer; words are separated by spaces, so text has to have them.

    Nothing is added around a text and there is no chat template, so a prompt and a response encode separately to the
    same tokens as together. Decoding puts a space between tokens, which JSON allows.
    """
    names = [json.dumps(name) for name in IDS]
    words = [PAD, EOS, UNKNOWN, "rank", *STRUCTURE, *names, *map(str, range(1, max(ITEMS) + 1))]
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=96,
    )
