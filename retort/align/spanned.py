"""The alignment of two models with different tokenizers: by units of bytes. `docs/tokenizers.md` has the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from retort.align.aligned import AlignedTurns
from retort.align.pair import SameIds
from retort.align.prefixes import Prefixes
from retort.align.reread import TeacherText
from retort.align.shared import SharedVocabulary, shared, vocabulary_bytes
from retort.align.stops import StopMap, StopTokens
from retort.align.tokens import vocabulary_width
from retort.core.sequences import TokenSequence
from retort.errors import SignalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SpanPair", "Unspelt", "align_spans"]


class Unspelt(SignalError):
    """The student's tokenizer cannot spell all of a text.

    Attributes:
        before: The student's tokens of what stands before that.
    """

    def __init__(self, name: str, before: list[int]) -> None:
        """Takes the name of who generated the text, and what could be spelled."""
        super().__init__(f"the student's tokenizer cannot spell all that {name} generated")
        self.before = before


class _Model(Protocol):
    """The attributes of a model that the alignment reads."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def stops(self) -> StopTokens: ...

    @property
    def context(self) -> int: ...

    def head(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class SpanPair:
    """The alignment of two tokenizers. Unlike an `Alignment`, it compares units of tokens and no single ids.

    Attributes:
        teacher_reader: Reads the student's sequences as the teacher.
        student_reader: Reads the teacher's as the student.
        shared: Pairs of ids that spell the same bytes, for which both models have a row.
        vocab: Number of ids that the student has, in its tokenizer and its rows.
        width: The same of the teacher.
        student_stops: Ids at which the student stops, int64.
        teacher_stops: Ids at which the teacher stops, int64.
        name: The teacher's name, for messages.
        stops: Empty: both sides keep their own stops, and each reads the other's as its own.
    """

    teacher_reader: TeacherText
    student_reader: TeacherText
    shared: SharedVocabulary
    vocab: int
    width: int
    student_stops: Tensor
    teacher_stops: Tensor
    name: str
    stops: StopMap = field(default_factory=StopMap)

    @cached_property
    def prefixes(self) -> Prefixes:
        """What the teacher's tokens mean in the student's, by their bytes; found when it is first asked for."""
        own, their = self.teacher_reader.tokenizers
        return Prefixes(
            vocabulary_bytes(own, self.vocab),
            vocabulary_bytes(their, self.width),
            (self.shared.student_K, self.shared.teacher_K),
            (self.student_stops, self.teacher_stops),
        )

    def read(
        self, sequence: TokenSequence, prompt_ids: Sequence[int], replies: Sequence[Sequence[int]] = ()
    ) -> AlignedTurns:
        """The student's sequence as the teacher reads it: behind and between its own renderings of what was said.

        Args:
            sequence: The student's.
            prompt_ids: The teacher's ids of the prompt.
            replies: The teacher's ids of every reply of an environment, in order.

        Raises:
            SignalError: There are images, or other replies than the sequence has; or the prompt fills the context.
        """
        return self.teacher_reader.read(sequence, [prompt_ids, *replies])

    def units(self, sequence: TokenSequence) -> AlignedTurns:
        """The same for whoever asks about what was decided alone: the teacher reads one token instead of every context.

        So its own context is taken to hold all of it.

        Raises:
            SignalError: There are images.
        """
        read = sum(not bool(run.action_mask_L[0]) for run in sequence.pieces())
        return self.teacher_reader.read(sequence, [[int(self.teacher_stops[0])]] * read)

    def turn_ends(self, sequence: TokenSequence) -> list[int]:
        """The teacher's stop for the student's at the end of every turn that a reply follows, in order.

        Raises:
            SignalError: Such a turn ends in no stop of the student's.
        """
        turns = [run for run in sequence.pieces() if bool(run.action_mask_L[0])]
        ends = [int(run.tokens_L[-1]) for run in turns[:-1]]
        if not set(ends) <= set(self.student_stops.tolist()):
            raise SignalError(
                f"{self.name} has another tokenizer, and in a rollout an environment replies to a turn without a stop, "
                "behind which the teacher's chat template cannot go on"
            )
        return [self.teacher_reader.controls[end] for end in ends]

    def to_student(self, ids: Sequence[int]) -> list[int]:
        """A turn of the teacher's in the student's tokens, with the student's stop.

        Raises:
            Unspelt: The student's tokenizer has no tokens for a part of it, or that is no UTF-8.
        """
        if not ids:
            return []
        found = self.student_reader.read(TokenSequence.of([0]).then(list(ids), decided=True), [[0]])
        read = found.sequence.actions_A.tolist()
        lost = (found.unit_A < 0).nonzero()
        # A completion that was cut off may end inside of a character.
        cut = set(found.coverage.lost) <= {"invalid", "beyond"}
        if not len(lost) or (cut and int(lost[0]) == len(ids) - len(lost)):
            return read
        units = int(found.unit_A[: int(lost[0])].max()) + 1 if int(lost[0]) else 0
        raise Unspelt(self.name, read[: int((found.unit_B < units).logical_and(found.unit_B >= 0).sum())])

    def for_vocab(self, vocab: int) -> SpanPair:
        """The same: models of the student's tokenizer that have fewer ids are no matter to this pair."""
        return self

    def itself(self) -> SameIds:
        """The alignment of the teacher with itself, for text that it generated in its own ids."""
        return SameIds(self.width)

    def describe(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
        """One sentence on what both have in common."""
        pairs = self.shared
        return (
            f"student and teacher have different tokenizers, so units of the same bytes are compared: {len(pairs):,} "
            f"tokens are the same to both, the student has {pairs.student_lacking:,} others and the teacher "
            f"{pairs.teacher_lacking:,}"
        )


def align_spans(student: _Model, teacher: _Model, name: str) -> SpanPair:
    """The alignment of two models by units of bytes. It takes seconds for large vocabularies.

    Args:
        student: The model whose tokens are the steps.
        teacher: The model that scores.
        name: The teacher's name, for messages.

    Raises:
        UserError: A tokenizer of a form that cannot be read.
    """
    widths = [min(model.head().width, vocabulary_width(model.tokenizer)) for model in (student, teacher)]
    pairs = shared(student.tokenizer, teacher.tokenizer, student.stops, teacher.stops)
    with_rows_K = (pairs.student_K < widths[0]) & (pairs.teacher_K < widths[1])
    pairs = SharedVocabulary(
        pairs.student_K[with_rows_K],
        pairs.teacher_K[with_rows_K],
        pairs.student_vocab,
        pairs.teacher_vocab,
        pairs.ambiguous,
    )
    ours, theirs = (student.tokenizer, student.stops), (teacher.tokenizer, teacher.stops)
    return SpanPair(
        TeacherText(ours[0], theirs[0], ours[1], theirs[1], longest=teacher.context),
        TeacherText(theirs[0], ours[0], theirs[1], ours[1], longest=student.context),
        pairs,
        widths[0],
        widths[1],
        torch.tensor(sorted(student.stops.ids)),
        torch.tensor(sorted(teacher.stops.ids)),
        name,
    )
