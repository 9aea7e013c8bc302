"""Alignment of a student's ids with a teacher's: how the teacher reads them, and scores at the student's ids.

An alignment belongs to a pair of models. Where an id is the same token for both it is `SameIds`; where the teacher has
the same tokens under other ids it is an `IdMap`. Code that scores or generates with a teacher asks its alignment and
knows nothing of ids itself. W is the width of the teacher's logits that are read; other axis letters: `retort.core`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
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
    """Alignment of a student's and a teacher's ids. `tests/contracts/test_alignment.py` is its contract."""

    @property
    def vocab(self) -> int:
        """V: the teacher scores the student's ids below this."""
        ...

    @property
    def width(self) -> int:
        """W: the teacher uses its own ids below this."""
        ...

    @property
    def stops(self) -> StopMap:
        """The teacher's reading of the student's stop, in the student's ids."""
        ...

    @property
    def digest(self) -> str:
        """A text that is the same for alignments that do the same."""
        ...

    def read(self, sequence: TokenSequence) -> TokenSequence:
        """Translates a sequence to the teacher's ids; decided stops of the student become the teacher's stop.

        Raises:
            SignalError: The teacher has no id for a token.
        """
        ...

    def logits(self, logits_CW: Tensor, temperature: float) -> Tensor:
        """The teacher's logits [C, W] at the student's ids, [C, V]; minus infinity where it has none.

        Args:
            logits_CW: The teacher's logits; may be changed.
            temperature: The temperature of the distribution, at which stops are merged.
        """
        ...

    def logits_of(self, product: Callable[[slice | Tensor], Tensor], ids: slice, temperature: float) -> Tensor:
        """Some columns of `logits`, from no more of the teacher's than they need.

        Args:
            product: Ids of the teacher's -> its logits [C, K] at them; may be changed.
            ids: Of the student's, from `start` to `stop`.
            temperature: As in `logits`.
        """
        ...

    def to_student(self, ids: Sequence[int]) -> list[int]:
        """Ids of the teacher's as the student's for the same tokens, -1 where it has none; stops are not swapped."""
        ...

    def for_vocab(self, vocab: int) -> Alignment:
        """The same alignment for fewer ids of the student's.

        Raises:
            UserError: This alignment cannot be cut.
        """
        ...

    def with_stops(self, stops: StopMap) -> Alignment:
        """The same with other stops."""
        ...

    def itself(self) -> SameIds:
        """The alignment of the teacher with itself, for text that it generated in its own ids."""
        ...

    def describe(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
        """One sentence on the differences, with the tokens' names; empty if there is none."""
        ...


@dataclass(frozen=True, eq=False)
class SameIds:
    """The alignment in which an id is the same token for both; only their stops may differ.

    Attributes:
        vocab: Number of ids that both share.
        stops: See `retort.align.stops.StopMap`.
    """

    vocab: int
    stops: StopMap = field(default_factory=StopMap)

    @property
    def width(self) -> int:
        """See `Alignment`."""
        return self.vocab

    @property
    def digest(self) -> str:
        """See `Alignment`."""
        return f"same ids {self.vocab} {_stops_text(self.stops)}"

    def read(self, sequence: TokenSequence) -> TokenSequence:
        """See `Alignment`."""
        return sequence.mapped(self.stops.swap)

    def logits(self, logits_CW: Tensor, temperature: float) -> Tensor:
        """See `Alignment`. Works in place, because the product is large and the caller gives it up."""
        return _stopped(logits_CW, self.stops, temperature)

    def logits_of(self, product: Callable[[slice | Tensor], Tensor], ids: slice, temperature: float) -> Tensor:
        """See `Alignment`."""
        return _stopped_of(product, ids, self.stops, temperature)

    def to_student(self, ids: Sequence[int]) -> list[int]:
        """See `Alignment`."""
        return list(ids)

    def for_vocab(self, vocab: int) -> SameIds:
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
    """The alignment of the same tokens under other ids.

    Attributes:
        theirs_V: The teacher's id for each id of the student's, int64; -1 where it has none.
        width: See `Alignment`; above every id in `theirs_V`.
        stops: See `retort.align.stops.StopMap`; in the student's ids.
    """

    theirs_V: Tensor
    width: int
    stops: StopMap = field(default_factory=StopMap)

    @property
    def vocab(self) -> int:
        """See `Alignment`."""
        return len(self.theirs_V)

    @property
    def digest(self) -> str:
        """See `Alignment`."""
        ids = hashlib.blake2b(self.theirs_V.numpy().tobytes(), digest_size=16).hexdigest()
        return f"ids {ids} of {self.width} {_stops_text(self.stops)}"

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

    def logits_of(self, product: Callable[[slice | Tensor], Tensor], ids: slice, temperature: float) -> Tensor:
        """See `Alignment`."""

        def at(ours: slice | Tensor) -> Tensor:
            theirs_K = self.theirs_V[ours]
            logits_CK = product(theirs_K.clamp_min(0))
            logits_CK[:, theirs_K < 0] = -math.inf
            return logits_CK

        return _stopped_of(at, ids, self.stops, temperature)

    def to_student(self, ids: Sequence[int]) -> list[int]:
        """See `Alignment`."""
        return [self._ours.get(token, -1) for token in ids]

    def for_vocab(self, vocab: int) -> IdMap:
        """See `Alignment`. Refused, because the teacher's first ids are not the student's first ids."""
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
    """The attributes of a model that an alignment reads."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def stops(self) -> StopTokens: ...

    def head(self) -> Any: ...


def align_ids(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> SameIds | IdMap:
    """The alignment that two tokenizers imply, without stops or rows that a model lacks.

    Raises:
        OtherTokenizer: A token or a text means something else to the teacher (see `check_same_tokenizer`).
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
        student: The model whose ids signals use.
        teacher: The model that scores.
        with_stops: Whether the teacher reads the student's stop as its own.

    Raises:
        UserError: Their tokenizers disagree, an id has no row, or a primary stop is not among the ids of both.
    """
    found = align_ids(student.tokenizer, teacher.tokenizer)
    vocab = min(found.vocab, student.head().width, teacher.head().width)
    found, stops = found.for_vocab(vocab), teacher.stops
    if not with_stops:
        return found
    if isinstance(found, IdMap):
        primary, *_ = found.to_student([stops.primary])
        stops = StopTokens(frozenset(found.to_student(sorted(stops.ids))), primary)
    return found.with_stops(stop_map(student.stops, stops, width=vocab))


def _renumbered(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[int] | None:
    """The teacher's ids in the order of the student's, if both have the very same tokens and cut text alike."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    # Unused ids have no partner: such a pair is refused, as one with other tokens is.
    whole = all(sorted(vocab.values()) == list(range(len(vocab))) for vocab in (ours, theirs))
    if not whole or ours.keys() != theirs.keys():
        return None
    found = [theirs[token] for token in sorted(ours, key=ours.__getitem__)]
    for probe in PROBES:
        ids = encoded(student, probe)
        if encoded(teacher, probe) != (None if ids is None else [found[i] for i in ids]):
            return None
    return found


def _stops_text(stops: StopMap) -> str:
    return f"stops {sorted(stops.swap.items())} {list(stops.merged)} {stops.into}"


def _stopped(logits_CV: Tensor, stops: StopMap, temperature: float) -> Tensor:
    """Swaps the two primary stops, and merges the teacher's further stops; in place."""
    if stops.swap:
        here, there = list(stops.swap), list(stops.swap.values())
        logits_CV[:, here] = logits_CV[:, there]
    if stops.merged:
        _merge(logits_CV, stops, temperature)
    return logits_CV


def _stopped_of(at: Callable[[slice | Tensor], Tensor], ids: slice, stops: StopMap, temperature: float) -> Tensor:
    """`_stopped` of some columns: logits before it, by the student's ids, are asked of these and of the stops."""
    logits_CK = at(ids)
    if not stops:
        return logits_CK
    named = sorted({*stops.swap, *stops.swap.values(), *((stops.into, *stops.merged) if stops.merged else ())})
    place = {token: index for index, token in enumerate(named)}
    swap, merged = {place[a]: place[b] for a, b in stops.swap.items()}, tuple(place[token] for token in stops.merged)
    few = _stopped(at(torch.tensor(named)), StopMap(swap, merged, place.get(stops.into, -1)), temperature)
    mine = [token for token in named if ids.start <= token < ids.stop]
    logits_CK[:, [token - ids.start for token in mine]] = few[:, [place[token] for token in mine]]
    return logits_CK


def _merge(logits_CV: Tensor, stops: StopMap, temperature: float) -> None:
    """Moves the probability of the teacher's further stops to one id, except a share that keeps each finite.

    This happens at the temperature of the distribution, so that the probabilities add up there.
    """
    merged, kept = list(stops.merged), math.log(KEPT)
    exact = torch.float64 if logits_CV.dtype == torch.float64 else torch.float32
    stop_CS = logits_CV[:, [stops.into, *merged]].to(exact)
    # The map divides as the reader will: exp(logit / temperature), up to one factor per row.
    together_C = torch.logsumexp(stop_CS / temperature, dim=-1)
    logits_CV[:, stops.into] = ((together_C + math.log1p(-len(merged) * KEPT)) * temperature).to(logits_CV.dtype)
    logits_CV[:, merged] = ((together_C + kept) * temperature).to(logits_CV.dtype)[:, None]
