"""What a teacher with another tokenizer makes of a student's sequence: its tokens, the units, and what is in none.

Axes: A the student's decided tokens, B the teacher's, U units, L all tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from retort.align.retokenize import Retokenized
from retort.align.spans import Unit, anchored
from retort.core.sequences import TokenSequence

__all__ = ["AlignedTurns", "Collected", "Coverage"]


@dataclass(frozen=True)
class Coverage:
    """How much of completions a teacher supervises. Bytes are those of the text; control tokens have none.

    Attributes:
        single: Bytes in units of one token on each side.
        spans: Bytes in longer units.
        lost: Bytes in no unit, by reason: `invalid` (no UTF-8, and what shares a unit with it), `unknown` (the
            teacher's token for unknown text), `unread` (the teacher's tokenizer drops them), `beyond` (behind the
            teacher's context), `unanchored` (anchor segments only: behind the last unit of one token on each side),
            `long` (see `AlignedTurns.within`).
        rewritten: The teacher's tokens in units that spell other bytes than those that they stand for, because its
            tokenizer normalises.
        controls: Control tokens of the student's that are one of the teacher's, too, stops among them.
        controls_lost: Control tokens of the student's that the teacher does not read.
        lengths: Number of units by (the student's tokens, the teacher's tokens).
    """

    single: int = 0
    spans: int = 0
    lost: Mapping[str, int] = field(default_factory=lambda: {})
    rewritten: int = 0
    controls: int = 0
    controls_lost: int = 0
    lengths: Mapping[tuple[int, int], int] = field(default_factory=lambda: {})

    @property
    def bytes(self) -> int:
        """All bytes of the text."""
        return self.single + self.spans + sum(self.lost.values())

    def __add__(self, other: Coverage) -> Coverage:
        """The coverage of both."""
        return Coverage(
            self.single + other.single,
            self.spans + other.spans,
            dict(Counter(self.lost) + Counter(other.lost)),
            self.rewritten + other.rewritten,
            self.controls + other.controls,
            self.controls_lost + other.controls_lost,
            dict(Counter(self.lengths) + Counter(other.lengths)),
        )


@dataclass(frozen=True, eq=False)
class AlignedTurns:
    """A student's sequence as a teacher reads it. A unit's tokens are neighbours, and units come in order.

    Attributes:
        sequence: The teacher's tokens, decided where they spell what the student decided.
        unit_A: Unit of each token that the student decided, int64; -1 where it has none.
        unit_B: Unit of each decided token of the teacher's, int64; -1 where it has none.
        coverage: What is in units and what is not.
        bytes_A: Bytes of text that each token of the student's spells, int64; 0 for control tokens.
    """

    sequence: TokenSequence
    unit_A: Tensor
    unit_B: Tensor
    coverage: Coverage
    bytes_A: Tensor

    @cached_property
    def student_U(self) -> Tensor:
        """Number of the student's tokens in each unit, int64."""
        return torch.bincount(self.unit_A[self.unit_A >= 0])

    @cached_property
    def teacher_U(self) -> Tensor:
        """Number of the teacher's tokens in each unit, int64."""
        return torch.bincount(self.unit_B[self.unit_B >= 0])

    @property
    def single_U(self) -> Tensor:
        """Whether a unit is one token on each side, bool."""
        return (self.student_U == 1) & (self.teacher_U == 1)

    def within(self, longest: int) -> Coverage:
        """The coverage where longer units are left out: their bytes are lost as `long`.

        Args:
            longest: Most tokens of a unit on either side, at least 1.
        """
        long_U = (self.student_U > longest) | (self.teacher_U > longest)
        if not bool(long_U.any()):
            return self.coverage
        long_A = (self.unit_A >= 0) & long_U[self.unit_A.clamp_min(0)]
        count = int(self.bytes_A[long_A].sum())
        lost = {**self.coverage.lost, "long": count}
        return replace(self.coverage, spans=self.coverage.spans - count, lost=lost)


class Collected:
    """What has been read of a sequence so far. Units are slices of A and of B."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self._ids_L: list[int] = []
        self._mask_L: list[bool] = []
        #: Bytes of each of the student's tokens, and why it is in no unit if it is in none.
        self._bytes_A: list[int] = []
        self._reason_A: list[str] = []
        #: Whether each of the teacher's tokens spells other bytes than those that it stands for.
        self._rewritten_B: list[bool] = []

    def read(self, ids: Sequence[int]) -> None:
        """Adds tokens that are only read."""
        self._ids_L += ids
        self._mask_L += [False] * len(ids)

    def text(self, spelt: Sequence[bytes]) -> int:
        """Adds the student's tokens of a text; returns the index of the first in A."""
        first = len(self._bytes_A)
        self._bytes_A += map(len, spelt)
        self._reason_A += ["invalid"] * len(spelt)
        return first

    def control(self, theirs: int | None) -> None:
        """Adds a control token of the student's, and the teacher's, if it has one."""
        here, there = len(self._bytes_A), len(self._rewritten_B)
        self._bytes_A.append(0)
        self._reason_A.append("control")
        if theirs is not None:
            self.decide(Retokenized([theirs], [b""], [False], [False]))
            self.units.append((slice(here, here + 1), slice(there, there + 1)))

    def decide(self, theirs: Retokenized) -> int:
        """Adds decided tokens of the teacher's; returns the index of the first in B."""
        first = len(self._rewritten_B)
        self._ids_L += theirs.ids
        self._mask_L += [True] * len(theirs.ids)
        self._rewritten_B += theirs.rewritten
        return first

    def lose(self, tokens: Iterable[int], reason: str) -> None:
        """Gives the reason why text tokens of the student's are in no unit."""
        for index in tokens:
            if self._reason_A[index] != "control":
                self._reason_A[index] = reason

    def anchor(self, first: int) -> None:
        """Joins the units from one on into anchor segments."""
        minimal = self.units[first:]
        for ours, _ in minimal:
            self.lose(range(ours.start, ours.stop), "unanchored")
        self.units[first:] = anchored(minimal)

    def aligned(self, longest: int | None) -> AlignedTurns:
        """All of it, up to the end of the teacher's context."""
        ids_L, mask_L = self._ids_L[:longest], self._mask_L[:longest]
        decided = sum(mask_L)
        unit_A, unit_B = [-1] * len(self._bytes_A), [-1] * decided
        lengths = Counter[tuple[int, int]]()
        for unit, (ours, theirs) in enumerate(self.units):
            if theirs.stop > decided:
                self.lose(range(ours.start, len(unit_A)), "beyond")
                break
            width, other = ours.stop - ours.start, theirs.stop - theirs.start
            lengths[width, other] += 1
            unit_A[ours], unit_B[theirs] = [unit] * width, [unit] * other
        sequence = TokenSequence(torch.tensor(ids_L, dtype=torch.long), torch.tensor(mask_L, dtype=torch.bool))
        coverage = self._coverage(unit_A, unit_B, lengths)
        return AlignedTurns(sequence, _indices(unit_A), _indices(unit_B), coverage, _indices(self._bytes_A))

    def _coverage(self, unit_A: list[int], unit_B: list[int], lengths: Mapping[tuple[int, int], int]) -> Coverage:
        sizes = Counter(unit_A), Counter(unit_B)
        counts, lost = Counter[str](), Counter[str]()
        for unit, size, reason in zip(unit_A, self._bytes_A, self._reason_A, strict=True):
            if reason == "control":
                counts["controls" if unit >= 0 else "controls_lost"] += 1
            elif unit >= 0:
                counts["single" if sizes[0][unit] == sizes[1][unit] == 1 else "spans"] += size
            elif size:
                lost[reason] += size
        rewritten = zip(unit_B, self._rewritten_B, strict=False)
        return Coverage(
            lost=dict(lost),
            rewritten=sum(other for unit, other in rewritten if unit >= 0),
            lengths=dict(lengths),
            **counts,
        )


def _indices(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
