"""A text in another model's tokens, each with the bytes of the text that it stands for.

The bytes always tile the text. Where the tokens spell the very text, they are the tokens' own bytes. A tokenizer that
normalises (lower case, NFC, blanks joined) spells another text; then its own offsets say what each token stands for,
and such tokens are named. A tokenizer that gives no offsets is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retort.align.encode import ENCODING, Spelt, ordinary, spelt
from retort.align.pieces import inner_pieces, piece_table, unknown_token
from retort.errors import SignalError, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Retokenized", "retokenize"]

#: Texts to put before one that a tokenizer would begin with a blank of its own.
_ANCHORS = ("\n", "a", ":", "\u00e9")


@dataclass(frozen=True)
class Retokenized:
    """A text in N tokens.

    Attributes:
        ids: The tokens' ids.
        pieces: The bytes of the text that each stands for; together the whole text. What a tokenizer drops belongs to
            the token before it, except blanks: with all that follows them they belong to the next token.
        rewritten: Whether a token spells other bytes than those that it stands for.
        unknown: Whether a token is the one for unknown text, which says nothing about the bytes that it stands for.
    """

    ids: list[int]
    pieces: list[bytes]
    rewritten: list[bool]
    unknown: list[bool]

    def __add__(self, other: Retokenized) -> Retokenized:
        """The two texts one after the other."""
        return Retokenized(
            self.ids + other.ids,
            self.pieces + other.pieces,
            self.rewritten + other.rewritten,
            self.unknown + other.unknown,
        )


def retokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Retokenized:
    """A text in a tokenizer's tokens, as the continuation of another text.

    No token goes before or behind it, and a blank that the tokenizer puts before every text (SentencePiece) is removed.
    Control tokens that the text spells are text; where the tokenizer would make a control token of one all the same,
    the text is cut behind that token's first character.

    Args:
        tokenizer: The tokenizer; a slow one must be reversible.
        text: Text that a model generated.

    Returns:
        Its tokens; none for an empty text, or where the tokenizer drops the whole text.

    Raises:
        SignalError: The tokenizer cannot encode the text, or does not say what its tokens stand for.
    """
    if not text:
        return Retokenized([], [], [], [])
    try:
        return _whole(tokenizer, text)
    except Spelt as error:
        return _in_parts(tokenizer, text, error.token)
    except SignalError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SignalError(
            f"the tokenizer{_named(tokenizer)} cannot encode {_quoted(text)}, so its model cannot read it: {why}"
        ) from error


def _whole(tokenizer: PreTrainedTokenizerBase, text: str) -> Retokenized:
    whole = text.encode()
    anchors = ["", *_ANCHORS]
    for anchor in anchors:
        ids = _behind(anchor, text, tokenizer)
        own = [] if ids is None else inner_pieces(tokenizer, ids)
        if ids is not None and b"".join(own) == whole:
            return Retokenized(ids, own, [False] * len(ids), _unknown(tokenizer, ids))
        if not anchor and not _begins_with_blank(tokenizer):
            anchors = [""]
            break
    for anchor in sorted(anchors, key=len, reverse=True):
        found = _by_offsets(tokenizer, anchor, text)
        if found is not None:
            return found
    raise SignalError(
        f"the tokenizer{_named(tokenizer)} encodes {_quoted(text)} to tokens that spell another text, and gives no "
        "offsets that say which bytes each stands for; use a fast tokenizer (tokenizer.json), or another teacher"
    )


def _in_parts(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> Retokenized:
    cut = text.index(name) + 1
    if len(name) < 2 or cut == len(text):
        raise SignalError(
            f"the tokenizer{_named(tokenizer)} encodes {_quoted(name)} only as a control token, so its model cannot "
            "read a text that spells it; use another teacher"
        )
    return retokenize(tokenizer, text[:cut]) + retokenize(tokenizer, text[cut:])


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text, without control tokens that a tokenizer adds at either end unasked."""
    ids, table, unknown = ordinary(text, tokenizer), piece_table(tokenizer), unknown_token(tokenizer)

    def added(token: int) -> bool:
        return token in table.control and token != unknown

    while ids and added(ids[0]):
        ids = ids[1:]
    while ids and added(ids[-1]):
        ids = ids[:-1]
    return ids


def _behind(anchor: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The ids of a text behind an anchor; None where the anchor has other ids then."""
    if not anchor:
        return _plain(text, tokenizer)
    head, both = _plain(anchor, tokenizer), _plain(anchor + text, tokenizer)
    return both[len(head) :] if head and both[: len(head)] == head else None


def _begins_with_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a blank before a text."""
    return b"".join(inner_pieces(tokenizer, _plain("a", tokenizer))).startswith(b" ")


def _unknown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bool]:
    unknown = unknown_token(tokenizer)
    return [token == unknown for token in ids]


def _by_offsets(tokenizer: PreTrainedTokenizerBase, anchor: str, text: str) -> Retokenized | None:
    """The tokens of a text and what they stand for by the tokenizer's offsets; None where it gives none."""
    if not tokenizer.is_fast:
        return None
    both = anchor + text
    with ENCODING:
        encoded: Any = tokenizer(
            both,
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=bool(spelt(both, tokenizer)),
        )
    expected = _plain(both, tokenizer)
    ids, spans = list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    added = next((at for at in range(len(ids) - len(expected) + 1) if ids[at : at + len(expected)] == expected), None)
    if added is None:
        return None
    ids, spans = expected, spans[added : added + len(expected)]
    first = next((at for at, (_, end) in enumerate(spans) if end > len(anchor)), len(ids))
    if any(start < len(anchor) for start, _ in spans[first:]):
        return None
    ids, spans = ids[first:], [(start - len(anchor), end - len(anchor)) for start, end in spans[first:]]
    own = inner_pieces(tokenizer, ids)
    tiled = _tiled(text, spans, own)
    rewritten = [piece != spelling for piece, spelling in zip(tiled, own, strict=True)]
    return Retokenized(ids, tiled, rewritten, _unknown(tokenizer, ids))


def _tiled(text: str, spans: Sequence[tuple[int, int]], own: Sequence[bytes]) -> list[bytes]:
    """The bytes of a text, dealt to tokens by their spans of characters.

    Tokens that share characters have their own bytes if these are the text's; otherwise the last of them has all.
    """
    found: list[bytes] = []
    reached = index = 0
    while index < len(spans):
        end, behind = spans[index][1], index + 1
        while behind < len(spans) and spans[behind][0] < end:
            end, behind = max(end, spans[behind][1]), behind + 1
        following = spans[behind][0] if behind < len(spans) else len(text)
        end = max(end, reached)
        while end < following and not text[end].isspace():
            end += 1
        end = end if behind < len(spans) else len(text)
        data = text[reached:end].encode()
        parts = list(own[index:behind])
        found += parts if b"".join(parts) == data else [*[b""] * (len(parts) - 1), data]
        reached, index = end, behind
    return found


def _quoted(text: str) -> str:
    return repr(visible(text[:40])) + ("..." if len(text) > 40 else "")


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f" of {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
