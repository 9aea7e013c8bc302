"""The aligned units of tokens in a block of steps. Axis letters: see `retort.core`; F counts the units.

A unit is a run of the student's tokens and a run of the teacher's that are the same bytes, such that no shorter pair
inside it is. Where both have one tokenizer, every token is a unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retort.core.distribution import Distribution
from retort.core.needs import require_finite
from retort.errors import SignalError

if TYPE_CHECKING:
    from retort.core.signals.theirs import TeacherTokens


@dataclass(eq=False)
class Units:
    """The units of a block, in order, and the teacher's distribution where each begins.

    Attributes:
        first_F: Index in the block of each unit's first step.
        unit_C: Index of each step's unit; -1 outside of all units.
        own_F: Tokens of the unit on the student's side.
        theirs_F: Tokens on the teacher's side.
        logp_F: The teacher's log-prob of its tokens of the unit, summed, nats.
        matched_F: True where the unit is one token on both sides, and the pair of ids is shared.
        distribution: Computes the teacher's distribution at the first teacher token of each unit, [F, V_T].
        shared: The student's and the teacher's ids that are the same bytes, [S] each; None: all ids, which are the same
            on both sides.
        raw_F: The teacher's logits of its tokens of the unit, summed, where they are known.
        stops: Ids that end a completion, the student's and the teacher's; None where they are not known.
        place_F: Index of each unit's first token in `theirs`.
        theirs: The teacher's own tokens, where they are known.
        source: Name of the teacher or view, for messages.
    """

    first_F: Tensor
    unit_C: Tensor
    own_F: Tensor
    theirs_F: Tensor
    logp_F: Tensor
    matched_F: Tensor
    distribution: Callable[[], Distribution]
    shared: tuple[Tensor, Tensor] | None
    raw_F: Tensor | None = None
    stops: tuple[Tensor, Tensor] | None = None
    place_F: Tensor | None = None
    theirs: TeacherTokens | None = None
    source: str = "teacher"

    @staticmethod
    def single(teacher: Distribution, logp_C: Tensor, source: str) -> Units:
        """The units of two models with one tokenizer: every token is one.

        Args:
            teacher: The teacher's distribution at every step.
            logp_C: Its log-prob of each step's token, nats.
            source: Name of the teacher or view.
        """
        order_C = torch.arange(len(logp_C), device=logp_C.device)
        one_C = torch.ones_like(order_C)
        return Units(order_C, order_C, one_C, one_C, logp_C, one_C.bool(), lambda: teacher, None, source=source)

    @property
    def count(self) -> int:
        """F, the number of units."""
        return len(self.first_F)

    @property
    def sizes_C(self) -> Tensor:
        """The units as one column [C]: the teacher's tokens of a unit at its first step, 0 at its others, NaN outside.

        It has the dtype of `logp_F`.
        """
        begun_C = self.at_first(self.theirs_F.to(self.logp_F.dtype))
        return begun_C.masked_fill(self.unit_C < 0, math.nan)

    @cached_property
    def teacher(self) -> Distribution:
        """The teacher's distribution at the first teacher token of each unit, [F, V_T]; computed once.

        Raises:
            SignalError: A logit is NaN or infinite.
        """
        return self._sound(self.distribution())

    @cached_property
    def teacher_at_last(self) -> Distribution:
        """The teacher's distribution at the last teacher token of each unit, [F, V_T]; computed once.

        Raises:
            SignalError: A logit is NaN or infinite, or the teacher's tokens are not known.
        """
        if self.shared is None:
            return self.teacher
        place_F, theirs = self.their_tokens()
        return self._sound(theirs.distribution(place_F + self.theirs_F - 1))

    def teacher_rest(self, *, last: bool) -> Tensor:
        """The teacher's log-prob of all its tokens of each unit but the first, or but the last, summed, nats, [F].

        Raises:
            SignalError: The teacher's tokens are not known.
        """
        if self.shared is None:
            return torch.zeros_like(self.logp_F)
        place_F, theirs = self.their_tokens()
        return theirs.total(place_F if last else place_F + 1, self.theirs_F - 1)

    def their_tokens(self) -> tuple[Tensor, TeacherTokens]:
        """The index of each unit's first token among the teacher's own tokens, [F], and those.

        Raises:
            SignalError: They are not known.
        """
        if self.place_F is None or self.theirs is None:
            raise SignalError(f"{self.source}: its signal has no tokens of the teacher's, which this method reads")
        return self.place_F, self.theirs

    def _sound(self, found: Distribution) -> Distribution:
        require_finite("a logit (or the sum of all)", found.normaliser_C, self.source)
        return found

    def student(self, distribution: Distribution, *, last: bool = False) -> Distribution:
        """The student's live distribution at the first step of each unit, [F, V], from that of all steps.

        Args:
            distribution: That of all steps of the block.
            last: Take the last step of each unit.
        """
        if self.count == len(self.unit_C):  # every step begins a unit
            return distribution
        index_F = self.first_F + self.own_F - 1 if last else self.first_F
        return Distribution(distribution.logits_CV[index_F], distribution.shard)

    def sum(self, values_C: Tensor) -> Tensor:
        """Sums over the student's tokens of each unit, [F]."""
        # Steps outside of all units are added to one more number, which is left out.
        index_C = torch.where(self.unit_C < 0, self.count, self.unit_C)
        return values_C.new_zeros(self.count + 1).index_add(0, index_C, values_C)[: self.count]

    def at_first(self, values_F: Tensor) -> Tensor:
        """The units' numbers at the first step of each, and 0 elsewhere, [C]."""
        return values_F.new_zeros(len(self.unit_C)).index_copy(0, self.first_F, values_F)

    def everywhere(self, values_F: Tensor, otherwise_C: Tensor) -> Tensor:
        """The units' numbers at every step of each, and other numbers outside of all units, [C]."""
        if self.count == 0:
            return otherwise_C
        return torch.where(self.unit_C < 0, otherwise_C, values_F[self.unit_C.clamp_min(0)])

    def known_stops(self) -> tuple[Tensor, Tensor]:
        """The ids that end a completion, the student's and the teacher's.

        Raises:
            SignalError: They are not known.
        """
        if self.stops is None:
            raise SignalError(f"{self.source}: its signal has no stop ids, which a term on the stop decision needs")
        return self.stops
