"""How a teacher reads the student's tokens, and how what it says becomes values at the student's ids.

An alignment belongs to a pair of models. Where an id is the same token for both it is `SameIds`; where the teacher has
the same tokens under other ids it is an `IdMap`. Whoever scores or writes with a teacher asks its alignment and knows
nothing of ids itself. W is the width of the teacher's logits that are read; other axis letters: see `retort.core`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from retort.align.stops import KEPT, StopMap, StopTokens, describe_stop_map, stop_map
from retort.align.tokens import PROBES, check_same_tokenizer, encoded
from retort.core.sequences import TokenSequence
from retort.errors import SignalError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Alignment", "IdMap", "SameIds", "align_ids", "align_pair"]


class Alignment(Protocol):
    """What is known of the ids of a student and a teacher. `tests/contracts/test_alignment.py` is its contract."""

    @property
    def vocab(self) -> int:
        """V: ids of the student's that the teacher speaks of are those below."""
        ...

    @property
    def width(self) -> int:
        """W: ids of the teacher's that it speaks with are those below."""
        ...

    @property
    def stops(self) -> StopMap:
        """How the teacher reads the student's stop, in the student's ids."""
        ...

    def read(self, sequence: TokenSequence) -> TokenSequence:
        """A sequence of the student's in the teacher's ids, with the teacher's stop for the student's where decided.

        Raises:
            SignalError: The teacher has no id for a token.
        """
        ...

    def logits(self, logits_CW: Tensor, temperature: float) -> Tensor:
        """The teacher's logits [C, W] at the student's ids, [C, V]; minus infinity where it has none.

        Args:
            logits_CW: May be changed.
            temperature: At which the distribution is read: stops are merged there.
        """
        ...

    def ours(self, ids: Sequence[int]) -> list[int]:
        """Ids of the teacher's as the student's for the same tokens, -1 where it has none; stops are not swapped."""
        ...

    def about(self, vocab: int) -> Alignment:
        """The same about fewer ids of the student's.

        Raises:
            UserError: This alignment cannot be cut.
        """
        ...

    def with_stops(self, stops: StopMap) -> Alignment:
        """The same with other stops."""
        ...

    def itself(self) -> SameIds:
        """That of the teacher with itself: for what it wrote in its own ids."""
        ...

    def describe(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
        """One sentence on what differs, with the tokens' names; empty if nothing does."""
        ...


@dataclass(frozen=True, eq=False)
class SameIds:
    """An id is the same token for both; only their stops may differ.

    Attributes:
        vocab: Ids that both share: those below.
        stops: See `retort.align.stops.StopMap`.
    """

    vocab: int
    stops: StopMap = field(default_factory=StopMap)

    @property
    def width(self) -> int:
        """See `Alignment`."""
        return self.vocab

    def read(self, sequence: TokenSequence) -> TokenSequence:
        """See `Alignment`."""
        return sequence.mapped(self.stops.swap)

    def logits(self, logits_CW: Tensor, temperature: float) -> Tensor:
        """See `Alignment`. In place: the product is the caller's to give, and large."""
        return _stopped(logits_CW, self.stops, temperature)

    def ours(self, ids: Sequence[int]) -> list[int]:
        """See `Alignment`."""
        return list(ids)

    def about(self, vocab: int) -> SameIds:
        """See `Alignment`."""
        return replace(self, vocab=vocab)

    def with_stops(self, stops: StopMap) -> SameIds:
        """See `Alignment`."""
        return replace(self, stops=stops)

    def itself(self) -> SameIds:
        """See `Alignment`."""
        return SameIds(self.vocab)

    def describe(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
        """See `Alignment`."""
        return describe_stop_map(self.stops, student, teacher) if self.stops else ""


@dataclass(frozen=True, eq=False)
class IdMap:
    """The same tokens under other ids.

    Attributes:
        theirs_V: The teacher's id for each id of the student's, int64; -1 where it has none.
        width: See `Alignment`: above every id in it.
        stops: See `retort.align.stops.StopMap`; in the student's ids.
    """

    theirs_V: Tensor
    width: int
    stops: StopMap = field(default_factory=StopMap)

    @property
    def vocab(self) -> int:
        """See `Alignment`."""
        return len(self.theirs_V)

    def read(self, sequence: TokenSequence) -> TokenSequence:
        """See `Alignment`."""
        tokens_L = sequence.mapped(self.stops.swap).tokens_L
        known_L = tokens_L < self.vocab
        theirs_L = torch.where(known_L, self.theirs_V[tokens_L.clamp_max(self.vocab - 1)], -1)
        lacking = (theirs_L < 0).nonzero()
        if len(lacking):
            raise SignalError(f"the teacher has no id for the student's token id {int(tokens_L[lacking[0]])}")
        return replace(sequence, tokens_L=theirs_L)

    def logits(self, logits_CW: Tensor, temperature: float) -> Tensor:
        """See `Alignment`."""
        theirs_V = self.theirs_V.to(logits_CW.device)
        logits_CV = logits_CW.index_select(1, theirs_V.clamp_min(0))
        if self._lacks:
            logits_CV[:, theirs_V < 0] = -math.inf
        return _stopped(logits_CV, self.stops, temperature)

    def ours(self, ids: Sequence[int]) -> list[int]:
        """See `Alignment`."""
        return [self._ours.get(token, -1) for token in ids]

    def about(self, vocab: int) -> IdMap:
        """See `Alignment`. A part of its ids would not be the first ones of the teacher's."""
        if vocab != self.vocab:
            raise UserError(
                f"the models of this run share only {vocab} ids, and a teacher that has other ids for the student's "
                f"tokens is about all {self.vocab}; resize the embeddings of the model that lacks some"
            )
        return self

    def with_stops(self, stops: StopMap) -> IdMap:
        """See `Alignment`."""
        return replace(self, stops=stops)

    def itself(self) -> SameIds:
        """See `Alignment`."""
        return SameIds(self.width)

    def describe(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
        """See `Alignment`. Stops are named by the student's ids."""
        other = sum(ours != theirs for ours, theirs in enumerate(self.theirs_V.tolist()))
        words = f"{other} of {self.vocab} tokens have another id for the teacher, which is read as the student's"
        return f"{words}; {describe_stop_map(self.stops, student, student)}" if self.stops else words

    @cached_property
    def _lacks(self) -> bool:
        return bool((self.theirs_V < 0).any())

    @cached_property
    def _ours(self) -> dict[int, int]:
        return {theirs: ours for ours, theirs in enumerate(self.theirs_V.tolist()) if theirs >= 0}


class _Model(Protocol):
    """What is asked of a model."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def stops(self) -> StopTokens: ...

    def head(self) -> Any: ...


def align_ids(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> SameIds | IdMap:
    """What two tokenizers tell of their ids; nothing of stops, or of rows that a model lacks.

    Raises:
        UserError: A token or a text means something else to the teacher (see `check_same_tokenizer`).
    """
    try:
        return SameIds(check_same_tokenizer(student, teacher))
    except UserError:
        theirs = _renumbered(student, teacher)
        if theirs is None:
            raise
        return IdMap(torch.tensor(theirs), len(theirs))


def align_pair(student: _Model, teacher: _Model, *, with_stops: bool = True) -> Alignment:
    """The alignment of two models: their ids, as far as both have rows for them, and their stops.

    Args:
        student: Whose ids signals are in.
        teacher: Who reads and answers.
        with_stops: Read the student's stop as the teacher's.

    Raises:
        UserError: Their tokenizers disagree, an id has no row, or a primary stop is not among the ids of both.
    """
    found = align_ids(student.tokenizer, teacher.tokenizer)
    vocab = min(found.vocab, student.head().width, teacher.head().width)
    found, stops = found.about(vocab), teacher.stops
    if not with_stops:
        return found
    if isinstance(found, IdMap):
        primary, *_ = found.ours([stops.primary])
        stops = StopTokens(frozenset(found.ours(sorted(stops.ids))), primary)
    return found.with_stops(stop_map(student.stops, stops, width=vocab))


def _renumbered(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[int] | None:
    """The teacher's ids in the order of the student's, if both have the very same tokens and cut text alike."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    # Ids that are nobody's have no partner: such a pair is refused, as one with other tokens is.
    whole = all(sorted(vocab.values()) == list(range(len(vocab))) for vocab in (ours, theirs))
    if not whole or ours.keys() != theirs.keys():
        return None
    found = [theirs[token] for token in sorted(ours, key=ours.__getitem__)]
    for probe in PROBES:
        ids = encoded(student, probe)
        if encoded(teacher, probe) != (None if ids is None else [found[i] for i in ids]):
            return None
    return found


def _stopped(logits_CV: Tensor, stops: StopMap, temperature: float) -> Tensor:
    """Swaps the two primary stops, and merges the teacher's further stops; in place."""
    if stops.swap:
        here, there = list(stops.swap), list(stops.swap.values())
        logits_CV[:, here] = logits_CV[:, there]
    if stops.merged:
        _merge(logits_CV, stops, temperature)
    return logits_CV


def _merge(logits_CV: Tensor, stops: StopMap, temperature: float) -> None:
    """Gives the probability of the teacher's further stops to one id, but for a share that keeps each finite.

    At the temperature at which the distribution is read, so that their probabilities add up there.
    """
    merged, kept = list(stops.merged), math.log(KEPT)
    exact = torch.float64 if logits_CV.dtype == torch.float64 else torch.float32
    stop_CS = logits_CV[:, [stops.into, *merged]].to(exact)
    # The map divides as the reader will: exp(logit / temperature), up to one factor per row.
    together_C = torch.logsumexp(stop_CS / temperature, dim=-1)
    logits_CV[:, stops.into] = ((together_C + math.log1p(-len(merged) * KEPT)) * temperature).to(logits_CV.dtype)
    logits_CV[:, merged] = ((together_C + kept) * temperature).to(logits_CV.dtype)[:, None]
