"""The sum of several terms' advantages. Axis letters: see `retort.core`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import Need
from retort.core.parts import Advantage, Weight
from retort.core.schedules import ScalarOrSchedule


@dataclass(frozen=True)
class Share:
    """One term's share of a sum: its advantage with the term's own coefficient and weight."""

    advantage: Advantage
    coef: ScalarOrSchedule = 1.0
    weight: Weight | None = None

    def at(self, context: Context, view: str) -> Tensor:
        """Coefficient * weight * advantage, nats, [N]; 0 where the weight is 0, also of an infinite advantage."""
        value_N = context.clock.at(self.coef) * self.advantage.at(context, view)
        if self.weight is None:
            return value_N
        weight_N = self.weight.at(context, view)
        return torch.where(weight_N == 0, torch.zeros_like(value_N), weight_N * value_N)


def advantage_sum(*shares: Share) -> Advantage:
    """The sum of the advantages of terms against one view, which decides where the clip that they share binds.

    Args:
        shares: One for each term.
    """

    def value(context: Context, view: str) -> Tensor:
        return torch.stack([share.at(context, view) for share in shares]).sum(0)

    parts = [part for share in shares for part in (share.advantage, share.weight) if part is not None]
    return Advantage(
        " + ".join(share.advantage.name for share in shares),
        value,
        frozenset[Need]().union(*(part.needs for part in parts)),
        {view: needs for part in parts for view, needs in part.also.items()},
        tuple(stat for part in parts for stat in part.stats),
    )
