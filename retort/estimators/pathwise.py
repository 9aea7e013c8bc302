"""Pathwise estimator: differentiates the divergence itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import Need
from retort.core.parts import Divergence, Part
from retort.errors import UserError


@dataclass(frozen=True)
class Pathwise:
    """Back-propagates a divergence; `pathwise` makes it."""

    divergence: Divergence

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts that it evaluates."""
        return (self.divergence,)

    @property
    def needs(self) -> frozenset[Need]:
        """Its needs of the teacher."""
        return self.divergence.needs

    @property
    def stored(self) -> Mapping[str, Part]:
        """Values that must be taken before the first update on a batch: none."""
        return {}

    @property
    def uses_old_logp(self) -> bool:
        """Whether the divergence does: some are corrected for the tokens that were drawn."""
        return self.divergence.uses_old_logp

    @property
    def reads_hidden(self) -> bool:
        """False: it reads logits."""
        return False

    def token_loss(self, context: Context, view: str, term: str, weight_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns value and weight at each step; 0 where the weight is 0, so infinity behind a gate is harmless."""
        value_N = self.divergence.at(context, view)
        if weight_N is None:
            return value_N, torch.ones_like(context.student_logp_N.detach())
        return torch.where(weight_N == 0, torch.zeros_like(value_N), value_N), weight_N

    def shown(self, context: Context, view: str, term: str) -> dict[str, Tensor]:
        """Further numbers of each token for the record: none, since its value says it all."""
        return {}


def pathwise(divergence: Divergence) -> Pathwise:
    """The estimator that differentiates `divergence`.

    Raises:
        UserError: The divergence's own gradient is not that of any divergence (k1); the message gives the reason.
    """
    if divergence.not_pathwise is not None:
        raise UserError(f"pathwise({divergence.name}) is refused: {divergence.not_pathwise}")
    return Pathwise(divergence)
