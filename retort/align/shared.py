"""The ids that two vocabularies have in common: the same bytes, inside a text.

Axis K: the shared tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retort.align.pieces import piece_table
from retort.align.stops import StopTokens
from retort.align.text import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SharedVocabulary", "shared", "vocabulary_bytes"]


@dataclass(frozen=True, eq=False)
class SharedVocabulary:
    """Pairs of ids that spell the same bytes. It unpacks into the student's ids and the teacher's.

    Attributes:
        student_K: The student's ids, int64, rising; the pair of stops comes last.
        teacher_K: The teacher's id for each.
        student_vocab: Number of the student's tokens, control tokens included.
        teacher_vocab: Number of the teacher's.
        ambiguous: Strings that both have and that are left out, because one side has two tokens for them.
    """

    student_K: Tensor
    teacher_K: Tensor
    student_vocab: int
    teacher_vocab: int
    ambiguous: int = 0

    def __iter__(self) -> Iterator[Tensor]:
        """The student's ids, then the teacher's."""
        return iter((self.student_K, self.teacher_K))

    def __len__(self) -> int:
        """K, the number of pairs."""
        return len(self.student_K)

    @property
    def student_lacking(self) -> int:
        """Number of the student's tokens that the teacher lacks."""
        return self.student_vocab - len(self)

    @property
    def teacher_lacking(self) -> int:
        """Number of the teacher's tokens that the student lacks."""
        return self.teacher_vocab - len(self)


def shared(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_stops: StopTokens | None = None,
    teacher_stops: StopTokens | None = None,
) -> SharedVocabulary:
    """The ids of both tokenizers that spell the same bytes inside a text.

    Control tokens are left out, except the pair of primary stops. A string for which one side has two tokens is left
    out, too; but a token for a single byte (`<0x0A>`) gives way to an ordinary token for the same byte, which the
    tokenizer uses instead.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's.
        student_stops: The student's stop tokens; None: no pair of stops.
        teacher_stops: The teacher's.
    """
    ours, theirs = _by_bytes(student), _by_bytes(teacher)
    ambiguous = 0
    pairs: list[tuple[int, int]] = []
    for piece, here in ours.items():
        there = theirs.get(piece, [])
        if len(here) == len(there) == 1:
            pairs.append((here[0], there[0]))
        elif there:
            ambiguous += 1
    pairs.sort()
    if student_stops is not None and teacher_stops is not None:
        stops = student_stops.primary, teacher_stops.primary
        pairs = [*(pair for pair in pairs if pair[0] != stops[0] and pair[1] != stops[1]), stops]
    both_K = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    sizes = len(piece_table(student).tokens), len(piece_table(teacher).tokens)
    return SharedVocabulary(both_K[:, 0].contiguous(), both_K[:, 1].contiguous(), *sizes, ambiguous)


def vocabulary_bytes(tokenizer: PreTrainedTokenizerBase, width: int) -> list[bytes]:
    """The bytes that each of `width` ids spells inside a text; none for control tokens and ids without a token."""
    found = [b""] * width
    for token, piece in zip(*_spelt(tokenizer), strict=True):
        if token < width:
            found[token] = piece
    return found


def _by_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, list[int]]:
    """The ids of text tokens by the bytes that they spell."""
    table = piece_table(tokenizer)
    spelling = table.spellings[0] if table.spellings else ""
    ids, spelt = _spelt(tokenizer)
    found: dict[bytes, list[int]] = {}
    for token, piece in zip(ids, spelt, strict=True):
        if piece:
            found.setdefault(piece, []).append(token)
    for piece, same in found.items():
        if len(same) > 1:
            used = [token for token in same if not table.is_single(token, spelling)]
            found[piece] = used or same
    return found


def _spelt(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bytes]]:
    """The ids of text tokens, and the bytes that each spells inside a text; none for a part that cannot be told."""
    table = piece_table(tokenizer)
    ids = [token for token in table.tokens if table.is_text(token)]
    return ids, table.spell(ids, table.spellings[0]) if table.spellings else _decoded(tokenizer, ids)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[bytes]:
    """The bytes that each token adds behind another one; none for a part of a character."""
    anchor = next((token for token in ids if decode(tokenizer, [token]).isalpha()), None)
    if anchor is None:
        return [b""] * len(ids)
    before = decode(tokenizer, [anchor])
    texts = [decode(tokenizer, [anchor, token]) for token in ids]
    return [text[len(before) :].encode() if text.startswith(before) and "\ufffd" not in text else b"" for text in texts]
