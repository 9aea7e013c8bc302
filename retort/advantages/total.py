"""The sum of several terms' advantages. Axis letters: see `retort.core`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.losses import times
from retort.core.needs import Need
from retort.core.parts import Advantage, Weight
from retort.core.schedules import ScalarOrSchedule


@dataclass(frozen=True)
class Summand:
    """One term's summand of a sum: its advantage with the term's own coefficient and weight."""

    advantage: Advantage
    coef: ScalarOrSchedule = 1.0
    weight: Weight | None = None

    def at(self, context: Context, view: str) -> Tensor:
        """Coefficient * weight * advantage, nats, [N]; 0 where either factor is, also of an infinite advantage."""
        advantage_N, factor = self.advantage.at(context, view), context.clock.at(self.coef)
        factor_N = torch.full_like(advantage_N, factor)
        if self.weight is not None:
            factor_N = factor_N * self.weight.at(context, view)
        return times(factor_N, advantage_N)


def advantage_sum(*summands: Summand) -> Advantage:
    """The sum of the advantages of terms against one view, which decides where the clip that they share binds.

    Args:
        summands: One for each term.
    """

    def value(context: Context, view: str) -> Tensor:
        return torch.stack([summand.at(context, view) for summand in summands]).sum(0)

    parts = [part for summand in summands for part in (summand.advantage, summand.weight) if part is not None]
    return Advantage(
        " + ".join(summand.advantage.name for summand in summands),
        value,
        frozenset[Need]().union(*(part.needs for part in parts)),
        {view: needs for part in parts for view, needs in part.also.items()},
        tuple(stat for part in parts for stat in part.stats),
    )
