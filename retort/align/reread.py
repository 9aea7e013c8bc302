"""A student's completions as a teacher with another tokenizer reads them, and the units that both have in common.

The teacher reads the very bytes that the student generated, tokenized by its own tokenizer: one text for each stretch
between control tokens, never joined with the prompt before it. Prompts and what an environment replies come from the
caller, rendered for the teacher; a completion is never rendered. Everything that the teacher cannot read is counted by
its reason, and nothing is moved. `docs/tokenizers.md` has the rules.

Axes: A the student's decided tokens, B the teacher's, U units, L all tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from retort.align.aligned import AlignedTurns, Collected
from retort.align.pieces import piece_table, pieces, unknown_token
from retort.align.retokenize import retokenize
from retort.align.spans import Mode, units
from retort.align.stops import StopTokens
from retort.align.text import control_tokens
from retort.core.sequences import TokenSequence
from retort.errors import SignalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TeacherText"]


class TeacherText:
    """Reads a student's sequences as a teacher with another tokenizer does.

    A control token is read as one where both have it: any of the student's stops is a stop of the teacher's (the one
    of the same name, else the primary one; the student's primary stop is always the teacher's), another control token
    is the added token of the same name. The token for unknown text is never read. The teacher reads nothing in the
    position of a control token that it lacks, and what follows begins a new text.

    Example:
        A student of single letters and a teacher of longer words:

        >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from retort.align.reread import TeacherText
        >>> from retort.align.stops import StopTokens
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
        self.tokenizers = student, teacher
        self._student, self._teacher = student, teacher
        self._mode: Mode = mode
        self._longest = longest
        self._theirs = _controls(student, teacher, student_stops, teacher_stops)

    @property
    def controls(self) -> Mapping[int, int]:
        """The teacher's id for each control token of the student's that it reads as one, stops among them."""
        return self._theirs

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
        found, following = Collected(), iter(contexts)
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

    def _turn(self, ids: list[int], before: list[int], found: Collected) -> None:
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

    def _text(self, spelt: Sequence[bytes], found: Collected) -> None:
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

    def _stretch(self, own: Sequence[bytes], whole: Sequence[bool], first: int, found: Collected) -> None:
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


def _controls(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, ours: StopTokens, theirs: StopTokens
) -> dict[int, int]:
    """The teacher's id for each control token of the student's that it has, too."""
    names: list[dict[str, int]] = []
    for tokenizer in (student, teacher):
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()} | control_tokens(tokenizer)
        unknown = unknown_token(tokenizer)
        names.append({name: i for name, i in added.items() if i != unknown})
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
