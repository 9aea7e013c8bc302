"""The sentence that each token of a completion belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from retort.align.text import decode
from retort.core.rollouts import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["sentences", "sentences_of"]

#: A sentence ends after its mark (and closing quotes or brackets) where a space follows, and at every line's end.
_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]+|\n+")


def sentences_of(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The sentence of each decided token of a rollout, from 0 and never falling.

    A turn ends a sentence: behind it stands what an environment replied, which is not among the tokens.

    Args:
        rollout: The rollout.
        tokenizer: Tokenizer of the model that generated it.
    """
    ids = rollout.action_ids
    turns: list[int] = [0] * len(ids) if rollout.turn_A is None else rollout.turn_A.tolist()  # pyright: ignore
    found = list[int]()
    for _, turn in groupby(zip(turns, ids, strict=True), lambda pair: pair[0]):
        first = found[-1] + 1 if found else 0
        found += [first + sentence for sentence in sentences([token for _, token in turn], tokenizer)]
    return found


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
