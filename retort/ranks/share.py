"""Which groups of a batch a rank answers for. Axis letters: see `retort.core`.

All ranks hold the whole table of steps. Each asks the teachers about its own groups, and runs the student on them; what
comes of it is gathered, so that every statistic, denominator and metric is taken over the whole batch by every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from retort.core.rollouts import Group
from retort.ranks.world import ONE, World


@dataclass(frozen=True, eq=False)
class Share:
    """A rank's part of a batch: neighbouring groups.

    Attributes:
        world: Who has the other parts.
        groups: Groups that the rank asks about; at least one, so that all ranks ask the same number of times.
        rollouts: Rollouts that it answers for, by their place in the pack; None for all.
        steps: Their steps in N.
        first: Place in N of the first step of `groups`, which is where the rank's signals begin.
    """

    world: World = ONE
    groups: slice = field(default_factory=lambda: slice(None))
    rollouts: range | None = None
    steps: slice = field(default_factory=lambda: slice(None))
    first: int = 0

    @staticmethod
    def of(groups: Sequence[Group], world: World) -> Share:
        """This rank's part of a batch, cut so that all ranks read about as many tokens.

        Args:
            groups: The whole batch, the same on all ranks.
            world: The ranks.
        """
        if world.size == 1:
            return WHOLE_BATCH
        tokens = [sum(rollout.tokens for rollout in group) for group in groups]
        bounds = balanced(tokens, world.size)
        own = slice(bounds[world.rank], bounds[world.rank + 1])
        asked = own if own.stop > own.start else slice(0, 1)
        rollouts = [0, *accumulate(len(group) for group in groups)]
        steps = [0, *accumulate(sum(rollout.steps for rollout in group) for group in groups)]
        return Share(
            world,
            asked,
            range(rollouts[own.start], rollouts[own.stop]),
            slice(steps[own.start], steps[own.stop]),
            steps[asked.start],
        )

    def own(self, rollouts: Sequence[int]) -> list[int]:
        """Those of some rollouts that the rank answers for."""
        return list(rollouts) if self.rollouts is None else [index for index in rollouts if index in self.rollouts]

    def local(self, index_N: Tensor) -> Tensor:
        """Places in the rank's signals of some of its steps."""
        return index_N - self.first if self.first else index_N

    def columns(self, found: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """The whole columns [N] of which each rank has filled in its own steps.

        Args:
            found: By name, [N]; a rank without any steps may have none of them.
            count: N.
        """
        if self.world.size == 1:
            return found
        own = {name: values_N[self.steps].clone() for name, values_N in found.items()}
        parts = self.world.each(lambda: (own, len(range(count)[self.steps])))
        names = list(dict.fromkeys(name for part, _ in parts for name in part))
        return {
            name: torch.cat([part[name] if name in part else torch.full((steps,), math.nan) for part, steps in parts])
            for name in names
        }

    def filled(self, local: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """The whole columns [N] of values that each rank has at the steps of the groups that it asks about.

        Args:
            local: By name, one value for each of these steps.
            count: N.
        """
        if self.world.size == 1:
            return local
        found: dict[str, Tensor] = {}
        for name, values in local.items():
            found[name] = values.new_full((count,), math.nan)
            found[name][self.first : self.first + len(values)] = values
        return self.columns(found, count)

    def valid(self, own: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Each view's `valid_N` over the whole batch, of what the rank's signals say; None where all are valid."""
        if self.world.size == 1:
            return dict(own)
        mine = slice(self.steps.start - self.first, self.steps.stop - self.first) if self.rollouts else slice(0, 0)
        steps = self.steps.stop - self.steps.start
        said = {
            view: torch.ones(steps, dtype=torch.bool) if valid_N is None else valid_N[mine].clone()
            for view, valid_N in own.items()
        }
        parts = self.world.each(lambda: said)
        whole = {view: torch.cat([part[view] for part in parts]) for view in own}
        return {view: None if bool(valid_N.all()) else valid_N for view, valid_N in whole.items()}

    def counts(self, own: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """Sums over ranks of what each counted about its own groups, one table for each of several signals."""
        if self.world.size == 1:
            return [dict(table) for table in own]
        parts = self.world.each(lambda: [dict(table) if self.rollouts else {} for table in own])
        summed: list[dict[str, float]] = [{} for _ in own]
        for part in parts:
            for table, counted in zip(summed, part, strict=True):
                for name, count in counted.items():
                    table[name] = table.get(name, 0.0) + count
        return summed


#: Of a single process.
WHOLE_BATCH = Share()


def balanced(weights: Sequence[int], parts: int) -> list[int]:
    """Where to cut neighbours into parts of about the same weight; no part is empty if there are enough of them.

    Args:
        weights: Of each.
        parts: How many.

    Returns:
        `parts` + 1 places that begin with 0 and end with how many there are.
    """
    ends, count, bounds = [0, *accumulate(weights)], len(weights), [0]
    for part in range(1, parts):
        goal = ends[-1] * part / parts
        nearest = min(range(count + 1), key=lambda place: abs(ends[place] - goal))
        lowest, highest = min(bounds[-1] + 1, count), max(count - (parts - part), bounds[-1])
        bounds.append(max(min(nearest, highest), min(lowest, highest)))
    return [*bounds, count]
