"""The text of a completion, and the part of it after the thinking.

Every completion becomes text here. The tokenizer's own clean-up is off: it would remove blanks before punctuation, and
a verifier, a view or a sibling would read another text than the generated one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["after_thinking", "completion_text", "control_tokens", "decode"]

_WORD = r"(?:think|thinking|thought|thoughts|begin_of_thought|start_thinking|reasoning|scratchpad|inner_prefix)"
_END_WORD = r"(?:end_of_thought|end_thinking|inner_suffix)"
_NAMES = r"(?:[a-z]+[:_])?(?:think|thinking|thought|thoughts|reasoning|scratchpad)(?:_[a-z]+)?"
#: <think>, <seed:think>, [THINK], <|begin_of_thought|>, <|START_THINKING|>, and the tags of Kimi and gpt-oss.
_OPEN = re.compile(
    rf"<{_NAMES}>|\[{_NAMES}\]|<\|{_WORD}\|>|◁think▷|<\|channel\|>(?:analysis|commentary)\b[^<]*<\|message\|>",
    re.IGNORECASE,
)
_CLOSE = re.compile(
    rf"</{_NAMES}>|\[/{_NAMES}\]|<\|/{_WORD}\|>|<\|{_END_WORD}\|>|◁/think▷|<\|channel\|>final\b[^<]*<\|message\|>",
    re.IGNORECASE,
)
#: Pieces of such tags that a tokenizer may hold as special tokens.
_PIECES = re.compile(rf"{_OPEN.pattern}|{_CLOSE.pattern}|<\|(?:channel|message)\|>", re.IGNORECASE)
# Characters of the end of a prompt: more than the longest tag has.
_TAG_TOKENS = 16
_BOUNDS: WeakKeyDictionary[Any, tuple[int, dict[int, str]]] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens by name. Tokens added as ordinary text (`<think>` of many families) are text."""
    found = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return found | {str(name): int(i) for name, i in named}


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """Text of token ids, every blank included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


def completion_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, prompt_ids: Sequence[int] = ()) -> str:
    """Text of a completion without control tokens, except those that bound its thinking.

    Args:
        tokenizer: Tokenizer of the model that generated it.
        ids: Ids of the completion.
        prompt_ids: Ids of the prompt. Where it ends with the tag that opens a thinking block (some templates write it),
            the text begins with this tag, so that the text alone shows whether the block was closed.
    """
    kept = _bounds(tokenizer)
    text, start = "", 0
    for index, token in enumerate(ids):
        if token in kept:
            text += decode(tokenizer, ids[start:index], skip_special_tokens=True) + kept[token]
            start = index + 1
    rest = ids[start:] if start else ids
    return _opened(tokenizer, prompt_ids) + text + decode(tokenizer, rest, skip_special_tokens=True)


def after_thinking(text: str) -> str:
    """The text after the last closed thinking block; empty if a block is open at the end; all if there is none."""
    end = max((tag.end() for tag in _CLOSE.finditer(text)), default=0)
    return "" if _OPEN.search(text, end) else text[end:]


def _bounds(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens that bound thinking; cached by tokenizer, because every completion becomes text here."""
    size, found = _BOUNDS.get(tokenizer, (-1, {}))
    if size != len(tokenizer):
        found = {token: name for name, token in control_tokens(tokenizer).items() if _PIECES.fullmatch(name)}
        _BOUNDS[tokenizer] = len(tokenizer), found
    return found


def _opened(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    if not prompt_ids:
        return ""
    before = decode(tokenizer, prompt_ids[-_TAG_TOKENS:]).rstrip()
    found = [tag for tag in _OPEN.finditer(before) if tag.end() == len(before)]
    return found[-1][0] + "\n" if found else ""
