"""A student's completions as a teacher with another tokenizer reads them, and the units that both have in common.

The teacher reads the very bytes that the student generated, tokenized by its own tokenizer: one text for each stretch
between control tokens, never joined with the prompt before it. Prompts and what an environment replies come from the
caller, rendered for the teacher; a completion is never rendered. Everything that the teacher cannot read is counted by
its reason, and nothing is moved. `docs/tokenizers.md` has the rules.

Axes: A the student's decided tokens, B the teacher's, U units, L all tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retort.align.pieces import piece_table, pieces
from retort.align.retokenize import Retokenized, retokenize
from retort.align.spans import Mode, Unit, anchored, units
from retort.align.stops import StopTokens
from retort.align.text import control_tokens
from retort.core.sequences import TokenSequence
from retort.errors import SignalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["AlignedTurns", "Coverage", "TeacherText"]


@dataclass(frozen=True)
class Coverage:
    """How much of completions a teacher supervises. Bytes are those of the text; control tokens have none.

    Attributes:
        single: Bytes in units of one token on each side.
        spans: Bytes in longer units.
        lost: Bytes in no unit, by reason: `invalid` (no UTF-8, and what shares a unit with it), `unknown` (the
            teacher's token for unknown text), `unread` (the teacher's tokenizer drops them), `beyond` (behind the
            teacher's context), `unanchored` (anchor segments only: behind the last unit of one token on each side).
        rewritten: Bytes of the teacher's tokens that spell something else, because its tokenizer normalises.
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
    """

    sequence: TokenSequence
    unit_A: Tensor
    unit_B: Tensor
    coverage: Coverage

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


class TeacherText:
    """Reads a student's sequences as a teacher with another tokenizer does.

        A control token is read as one where both have it: any of the student's stops is a stop of the teacher's (the one of
        the same name, else the primary one; the student's primary stop is always the teacher's), another control token
        is the added token of the same name. The token for unknown text is never read. The teacher reads nothing in the
        position of a control token that it lacks, and what follows begins a new text.

        Example:
            A student of single letters and a teacher of longer words:

            >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
            >>> from transformers import PreTrainedTokenizerFast
            >>> from retort.align.reread import TeacherText
            >>> from retort.align.stops import StopTokens
    from retort.align.text import control_tokens
            >>> from retort.core.sequences import TokenSequence
            >>> def made(vocabulary, merges):
            ...     inner = Tokenizer(models.BPE(vocabulary, merges))
            ...     inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
            ...     return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<s>")
            >>> student = made({"a": 0, "b": 1, "c": 2, "<s>": 3}, [])
            >>> teacher = made({"<s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}, [("a", "b")])
            >>> one, other = StopTokens(frozenset({3}), 3), StopTokens(frozenset({0}), 0)
            >>> generated = TokenSequence.of([2]).then([0, 1, 2, 3], decided=True)
            >>> found = TeacherText(student, teacher, one, other).read(generated, [[3, 3]])
            >>> found.sequence.tokens_L.tolist(), found.unit_A.tolist(), found.unit_B.tolist()
            ([3, 3, 4, 3, 0], [0, 0, 1, 2], [0, 1, 2])
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        student_stops: StopTokens,
        teacher_stops: StopTokens,
        *,
        mode: Mode = "minimal",
        longest: int | None = None,
    ) -> None:
        """Finds the control tokens that both have.

        Args:
            student: The student's tokenizer.
            teacher: The teacher's.
            student_stops: The student's stop tokens.
            teacher_stops: The teacher's.
            mode: See `retort.align.spans.units`.
            longest: Tokens that the teacher's context holds; None where that is not known.
        """
        self._student, self._teacher = student, teacher
        self._mode: Mode = mode
        self._longest = longest
        self._theirs = _controls(student, teacher, student_stops, teacher_stops)

    def read(self, sequence: TokenSequence, contexts: Sequence[Sequence[int]]) -> AlignedTurns:
        """The teacher's tokens of a sequence, and the units.

        Args:
            sequence: The student's sequence: a prompt, then decided tokens and tokens that are only read, in turns.
            contexts: The teacher's ids for each stretch of tokens that the student only read: its own rendering of the
                prompt, and of every reply of an environment.

        Returns:
            The alignment. What goes beyond the teacher's context is left out, and counted.

        Raises:
            SignalError: As many contexts as the sequence has stretches are not given, the first is empty or fills the
                teacher's context, there are images, or the teacher's tokenizer cannot take a text.
        """
        runs = sequence.pieces()
        self._check(sequence, contexts, sum(not bool(run.action_mask_L[0]) for run in runs))
        found, following = _Found(), iter(contexts)
        before: list[int] = []
        for run in runs:
            ids = [int(token) for token in run.tokens_L]
            if bool(run.action_mask_L[0]):
                self._turn(ids, before, found)
            else:
                found.read(next(following))
            before = [*before, *ids]
        return found.aligned(self._longest)

    def _check(self, sequence: TokenSequence, contexts: Sequence[Sequence[int]], stretches: int) -> None:
        if sequence.media:
            raise SignalError("a teacher with another tokenizer reads text only, but the sequence has images or sounds")
        if len(contexts) != stretches:
            raise SignalError(
                f"a sequence with {stretches} stretches of prompt and replies cannot be read by a teacher that has "
                f"{len(contexts)} of its own; render each of them for the teacher"
            )
        if contexts and not len(contexts[0]):
            raise SignalError("the teacher's rendering of the prompt has no tokens, so its first token has no context")
        if contexts and self._longest is not None and len(contexts[0]) >= self._longest:
            raise SignalError(
                f"the prompt has {len(contexts[0])} tokens for the teacher, whose context holds {self._longest}, so it "
                "cannot read the completion; shorten the prompts (rollout.max_prompt_tokens)"
            )

    def _turn(self, ids: list[int], before: list[int], found: _Found) -> None:
        """Reads the decided tokens of one turn: texts, and the control tokens between them."""
        table, first = piece_table(self._student), len(found.units)
        spelt = pieces(self._student, ids, before)
        start = 0
        for index, token in enumerate(ids):
            if token in self._theirs or not table.is_text(token):
                self._text(spelt[start:index], found)
                found.control(self._theirs.get(token))
                start = index + 1
        self._text(spelt[start:], found)
        if self._mode == "anchor":
            found.anchor(first)

    def _text(self, spelt: Sequence[bytes], found: _Found) -> None:
        """Reads a text: every stretch of it that is UTF-8, with the tokens that spell a part of it."""
        first, data, ends = found.text(spelt), b"".join(spelt), list(accumulate(map(len, spelt)))
        for start, end in _stretches(data):
            low, high = bisect_left(ends, start), bisect_right(ends, end)
            # Tokens without bytes at either border are of this stretch, too, and so are those that cross a border.
            low += bool(spelt[low]) and ends[low] == start
            high += high < len(ends) and ends[high] - len(spelt[high]) < end
            bounds = [(ends[index] - len(spelt[index]), ends[index]) for index in range(low, high)]
            own = [data[max(begins, start) : min(stops, end)] for begins, stops in bounds]
            whole = [begins >= start and stops <= end for begins, stops in bounds]
            self._stretch(own, whole, first + low, found)

    def _stretch(self, own: Sequence[bytes], whole: Sequence[bool], first: int, found: _Found) -> None:
        """Reads a stretch of UTF-8.

        Args:
            own: The bytes of it that each of the student's tokens spells.
            whole: Whether a token spells nothing else.
            first: Index in A of the first of these tokens.
            found: What has been read so far.
        """
        theirs = retokenize(self._teacher, b"".join(own).decode())
        there = found.decide(theirs)
        here = range(first, first + len(own))
        if not theirs.ids:
            found.lose(here, "unread")
        for ours, others in units(own, theirs.pieces):
            if not all(whole[ours]):
                found.lose(here[ours], "invalid")
            elif any(theirs.unknown[others]):
                found.lose(here[ours], "unknown")
            else:
                found.units.append(
                    (
                        slice(first + ours.start, first + ours.stop),
                        slice(there + others.start, there + others.stop),
                    )
                )


class _Found:
    """What has been read of a sequence so far. Units are slices of A and of B."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self._ids_L: list[int] = []
        self._mask_L: list[bool] = []
        #: Bytes of each of the student's tokens, and why it is in no unit if it is in none.
        self._bytes_A: list[int] = []
        self._reason_A: list[str] = []
        #: Bytes of each of the teacher's tokens that it spells otherwise.
        self._rewritten_B: list[int] = []

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
        pairs = zip(theirs.pieces, theirs.rewritten, strict=True)
        self._rewritten_B += [len(piece) if rewritten else 0 for piece, rewritten in pairs]
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
        return AlignedTurns(sequence, _indices(unit_A), _indices(unit_B), coverage)

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
            rewritten=sum(size for unit, size in rewritten if unit >= 0),
            lengths=dict(lengths),
            **counts,
        )


def _controls(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, ours: StopTokens, theirs: StopTokens
) -> dict[int, int]:
    """The teacher's id for each control token of the student's that it has, too."""
    names: list[dict[str, int]] = []
    for tokenizer in (student, teacher):
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()} | control_tokens(tokenizer)
        names.append({name: i for name, i in added.items() if i != tokenizer.unk_token_id})
    control = [set(control_tokens(tokenizer).values()) for tokenizer in (student, teacher)]
    found = {
        here: names[1][name]
        for name, here in names[0].items()
        # Where it is text for both, the teacher reads it as text.
        if name in names[1] and (here in control[0] or names[1][name] in control[1])
    }
    stops = {name: i for name, i in names[1].items() if i in theirs.ids}
    named = {i: name for name, i in names[0].items()}
    found |= {here: stops.get(named.get(here, ""), theirs.primary) for here in ours.ids}
    # What goes on for the student does not end the teacher's turn.
    found = {here: there for here, there in found.items() if here in ours.ids or there not in theirs.ids}
    return found | {ours.primary: theirs.primary}


def _stretches(data: bytes) -> list[tuple[int, int]]:
    """The stretches of bytes that are UTF-8, as first and last offset, without empty ones."""
    found: list[tuple[int, int]] = []
    start = 0
    while start < len(data):
        try:
            data[start:].decode()
            end, behind = len(data), len(data)
        except UnicodeDecodeError as error:
            end, behind = start + error.start, start + error.end
        if end > start:
            found.append((start, end))
        start = behind
    return found


def _indices(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
