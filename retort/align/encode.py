"""Ids of texts from data and models: never control tokens, and a response as the continuation of its prompt."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from retort.align.text import control_tokens, decode
from retort.core.images import PLACEHOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ENCODING", "Spelt", "encoded_alone", "ordinary", "response_ids", "spelt", "split_open"]

#: Held while a tokenizer encodes, see `encoded_alone`.
ENCODING = threading.RLock()
#: Texts to put before a response while it is encoded, where it cannot be encoded alone.
_ANCHORS = ("\n", "a", ":", "\u00e9")
#: Ids of a prompt's end that are decoded with a response, to check that nothing comes between them.
_TAIL = 16
#: Characters of the private use area that replace a control token's spelling while a template is filled in.
_MARK, _FIRST = "\uf8f0", 0xE100
_PATTERNS: WeakKeyDictionary[Any, tuple[int, re.Pattern[str] | None]] = WeakKeyDictionary()


class Spelt(Exception):
    """A text spells a control token that this tokenizer cannot encode as ordinary text."""

    def __init__(self, token: str) -> None:
        """Takes the token's name."""
        super().__init__(token)
        self.token = token


def _pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern that finds control tokens in a text; cached, because every prompt is searched."""
    size, found = _PATTERNS.get(tokenizer, (-1, None))
    if size != len(tokenizer):
        found = _made_pattern(tokenizer)
        _PATTERNS[tokenizer] = (len(tokenizer), found)
    return found


def _made_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    # The longest first, because one token's name may begin with another's.
    names = sorted((name for name in control_tokens(tokenizer) if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def spelt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The control tokens that a text spells, in order."""
    pattern = _pattern(tokenizer)
    return [] if pattern is None else pattern.findall(text)


def split_open(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text with a blank after the first character of every control token that it spells (or instead of it)."""
    pattern = _pattern(tokenizer)
    while pattern is not None and pattern.search(text):
        text = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}" if len(found[0]) > 1 else " ", text)
    return text


def encoded_alone(tokenizer: PreTrainedTokenizerBase, text: str, **settings: Any) -> list[int]:
    """The ids of a text, while no other thread encodes.

    Whether a text's control tokens count is a state of the tokenizer that a call sets for itself: with two threads, one
    would encode as the other asked.

    Args:
        tokenizer: Any.
        text: The text.
        settings: Of the tokenizer's `encode`.
    """
    with ENCODING:
        return list(tokenizer.encode(text, **settings))


def ordinary(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text alone, without control tokens whatever it spells.

    Raises:
        Spelt: The tokenizer has no other ids for a token that the text spells.
    """
    names = spelt(text, tokenizer)
    if not names:
        return encoded_alone(tokenizer, text, add_special_tokens=False)
    ids = encoded_alone(tokenizer, text, add_special_tokens=False, split_special_tokens=True)
    tokens, unknown = control_tokens(tokenizer), tokenizer.unk_token
    if {tokens[name] for name in names if name != unknown} & set(ids):
        raise Spelt(names[0])
    return ids


def filled(
    contents: Sequence[str], template: Callable[[Sequence[str]], str], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The ids of a template filled in with contents: the template's control tokens count, the contents' do not.

    Where no content spells one, these are the ids of the filled-in text. Otherwise the text is cut at the template's
    own control tokens, as the tokenizer itself does, and each piece is encoded as ordinary text. As a check, a copy of
    the text without spelt tokens must give the same ids both ways.

    Args:
        contents: Texts from data or models.
        template: Function that fills them in.
        tokenizer: Tokenizer of the model that reads them.

    Raises:
        Spelt: This tokenizer encodes pieces differently from the whole, or cannot encode spelt tokens as text.
    """
    pattern = _pattern(tokenizer)
    names = list(dict.fromkeys(name for content in contents for name in spelt(content, tokenizer)))
    if pattern is None or not names:
        return encoded_alone(tokenizer, template(contents), add_special_tokens=False)
    if any(_MARK in content for content in contents):
        raise Spelt(names[0])
    marks = {name: f"{_MARK}{chr(_FIRST + offset)}" for offset, name in enumerate(names)}
    marked = template([pattern.sub(lambda found: marks[found[0]], content) for content in contents])
    # A control token that template and content spell together would count as well.
    other = [f"x{PLACEHOLDER * content.count(PLACEHOLDER)}" for content in contents]
    if pattern.findall(marked) != pattern.findall(template(other)):
        raise Spelt(names[0])

    def pieces(spelling: Callable[[str], str]) -> list[tuple[bool, str]]:
        found, offset = list[tuple[bool, str]](), 0
        for token in pattern.finditer(marked):
            found += [(False, marked[offset : token.start()]), (True, token[0])]
            offset = token.end()
        found.append((False, marked[offset:]))
        return [(control, text if control else _unmarked(text, marks, spelling)) for control, text in found if text]

    tokens = control_tokens(tokenizer)

    def encoded(found: list[tuple[bool, str]], anchor: str) -> list[int]:
        ids: list[int] = []
        for offset, (control, text) in enumerate(found):
            ids += [tokens[text]] if control else _after(anchor if offset else "", text, tokenizer)
        return ids

    harmless = pieces(lambda name: split_open(name, tokenizer))
    whole = encoded_alone(tokenizer, "".join(text for _, text in harmless), add_special_tokens=False)
    for anchor in ("", *_ANCHORS):  # with an anchor before it, a piece gets no blank of its own
        if encoded(harmless, anchor) == whole:
            return encoded(pieces(lambda name: name), anchor)
    raise Spelt(names[0])


def _after(anchor: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text behind an anchor, without the anchor's ids (as far as they are the same there)."""
    head, both = ordinary(anchor, tokenizer) if anchor else [], ordinary(anchor + text, tokenizer)
    return both[len(head) :] if both[: len(head)] == head else ordinary(text, tokenizer)


def _unmarked(text: str, marks: dict[str, str], spelling: Callable[[str], str]) -> str:
    for name, mark in marks.items():
        text = text.replace(mark, spelling(name))
    return text


def response_ids(prompt_ids: Sequence[int], response: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a response as the continuation of a prompt, without a stop token.

    A SentencePiece tokenizer puts a blank before a text that stands alone, but not before a response. So it is encoded
    after an anchor whose ids are removed, with the first anchor for which prompt and response decode to the one
    followed by the other. If there is none (decoding does not restore what was encoded), the response is encoded alone.

    Args:
        prompt_ids: Ids of the prompt.
        response: Text from the data; control tokens that it spells are text.
        tokenizer: Tokenizer of the prompt.

    Raises:
        Spelt: See `ordinary`.
    """
    tail = list(prompt_ids[-_TAIL:])

    def text(ids: list[int]) -> str:
        return decode(tokenizer, ids)

    alone = ordinary(response, tokenizer)
    before = text(tail)
    if text([*tail, *alone]) == before + response:
        return alone
    for anchor in _ANCHORS:
        ids = _after(anchor, response, tokenizer)
        if text([*tail, *ids]) == before + response:
            return ids
    return alone
