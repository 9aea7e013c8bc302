"""Text of completions: no clean-up, and the tags of thinking are kept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import make_tokenizer

from retort.align.text import after_thinking, completion_text, decode


def test_blanks_stay_as_they_were_written_whatever_the_tokenizer_says() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["answer", ",", "is", "n't", ".", "<eos>"]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", clean_up_tokenization_spaces=True)
    ids = [0, 1, 2, 3, 4, 5]
    assert tokenizer.decode(ids[:3]) == "answer, is"  # the fault that is kept out
    assert decode(tokenizer, ids) == "answer , is n't . <eos>"
    assert completion_text(tokenizer, ids) == "answer , is n't ."


def test_tags_that_are_control_tokens_stay_in_the_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<other>"]})
    think, end, other = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<other>"])
    a, b = 10, 11
    text = completion_text(tokenizer, [think, a, end, other, b])
    assert "<other>" not in text
    assert text.startswith("<think>")
    assert after_thinking(text) == decode(tokenizer, [b])
    # A template that opens the block: the completion holds its end alone, or not even that.
    assert after_thinking(completion_text(tokenizer, [a], prompt_ids=[b, think])) == ""
    assert after_thinking(completion_text(tokenizer, [a, end, b], prompt_ids=[b, think])) == decode(tokenizer, [b])
    # One that closes it, as for "no thinking".
    assert after_thinking(completion_text(tokenizer, [a], prompt_ids=[think, end])) == decode(tokenizer, [a])


def test_tags_that_are_special_without_being_named_as_such_stay_too() -> None:
    """As Mistral's families have them: flagged in tokenizer.json, and in no list of special tokens."""
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in ("[THINK]", "[/THINK]")])
    think, end = tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    assert think not in tokenizer.all_special_ids
    a, b = 10, 11
    assert decode(tokenizer, [think], skip_special_tokens=True) == ""  # what would be left of it
    assert after_thinking(completion_text(tokenizer, [think, a, end, b])) == decode(tokenizer, [b])


@pytest.mark.parametrize("text", ["a < b", "x <thinker> y", "[think about it]", "I think </b>", "", "1 <|other|> 2"])
def test_text_without_tags_is_whole(text: str) -> None:
    assert after_thinking(text) == text


def test_every_decode_goes_through_the_helper() -> None:
    root = Path(__file__).parents[2] / "retort"
    bare = [
        path.name
        for path in root.rglob("*.py")
        if re.search(r"tokenizer\.(?:batch_)?decode\(", path.read_text(encoding="utf-8")) and path.name != "text.py"
    ]
    assert bare == []
