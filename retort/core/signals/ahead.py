"""A signal with a look one token ahead beside it. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retort.core.needs import NeedKind
from retort.core.signals.base import SignalRows, TeacherSignal, refuse, same_length, take_rows
from retort.errors import SignalError


@dataclass(frozen=True, eq=False)
class Ahead(TeacherSignal):
    """A signal, and how sure its teacher would be one token later, after each of the student's most likely ids.

    Attributes:
        of: The signal, with all else that is known.
        ids_NK: The student's ids, most likely first, int64.
        confidence_NK: The teacher's largest probability after each of them; NaN where it was not asked. Anything
            outside [0, 1] is refused (`SignalError`).
    """

    of: TeacherSignal = field(default_factory=lambda: TeacherSignal(torch.empty(0)))
    ids_NK: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    confidence_NK: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "confidence_NK", self.confidence_NK.detach())
        for name, values in (("ids_NK", self.ids_NK), ("confidence_NK", self.confidence_NK)):
            same_length(self, name, values)
        if self.ids_NK.shape != self.confidence_NK.shape:
            shapes = f"{tuple(self.ids_NK.shape)} and {tuple(self.confidence_NK.shape)}"
            raise SignalError(f"{self.source}: ids and confidences must be [N, K] both, not {shapes}")
        outside_NK = (self.confidence_NK < 0.0) | (self.confidence_NK > 1.0 + 1e-4)
        refuse(self, outside_NK, "a confidence one token ahead is no probability")

    @staticmethod
    def beside(of: TeacherSignal, ids_NK: Tensor, confidence_NK: Tensor) -> Ahead:
        """The signal with the look ahead beside it."""
        return Ahead(of.tokens_N, of.source, of, ids_NK, confidence_NK, valid_N=of.valid_N, counts=of.counts)

    @property
    def offers(self) -> frozenset[NeedKind]:
        also: frozenset[NeedKind] = frozenset({"lookahead"})
        return self.of.offers | also

    @property
    def begins_N(self) -> Tensor | None:
        return self.of.begins_N

    @property
    def block_width(self) -> int:
        return self.of.block_width

    def lists(self, width: int) -> Mapping[NeedKind, tuple[Tensor, bool]]:
        return {**self.of.lists(width), "lookahead": (self.ids_NK, self.ids_NK.shape[1] >= width)}

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> SignalRows:
        found = self.of.rows(index_C, vocab)
        found.ahead = take_rows(self.ids_NK, index_C), take_rows(self.confidence_NK, index_C)
        return found

    def precomputed(self, index_C: slice, vocab: int | None = None) -> Ahead:
        of = self.of.precomputed(index_C, vocab)
        return Ahead.beside(of, self.ids_NK[index_C], self.confidence_NK[index_C])

    def select(self, index_N: Tensor) -> Ahead:
        of = self.of.select(index_N)
        return Ahead.beside(of, take_rows(self.ids_NK, index_N), take_rows(self.confidence_NK, index_N))

    def hidden_states(self) -> Tensor:
        return self.of.hidden_states()

    def check_ids(self, ids_NK: Tensor) -> None:
        self.of.check_ids(ids_NK)
