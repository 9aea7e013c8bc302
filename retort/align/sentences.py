"""The sentence that each token of a completion belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from retort.align.text import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["sentences"]

#: A sentence ends after its mark (and closing quotes or brackets) where a space follows, and at every line's end.
_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]+|\n+")


def sentences(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The sentence of each token, from 0 and never falling.

    Sentences are split by rule and not by a trained splitter (NLTK's Punkt): there is no data to download, and an
    abbreviation sometimes ends a sentence.

    Args:
        ids: Ids of a completion.
        tokenizer: Tokenizer of the model that generated it.
    """
    text = decode(tokenizer, ids)
    ends = [found.end() for found in _END.finditer(text)]
    found: list[int] = []
    reached = sentence = 0
    for token in ids:
        piece = decode(tokenizer, [token]).strip()
        # A piece of a character decodes to nothing in the text: such a token lies where the last one ended.
        at = text.find(piece, reached, reached + len(piece) + 8) if piece else -1
        start = reached if at < 0 else at
        while sentence < len(ends) and ends[sentence] <= start:
            sentence += 1
        found.append(sentence)
        reached = start + (len(piece) if at >= 0 else 0)
    return found
