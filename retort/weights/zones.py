"""Zones by both models' entropies over a whole batch. Axis letters: see `retort.core`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import ENTROPY
from retort.core.parts import Stat, Weight, unchanged
from retort.core.steps import Clock, Steps
from retort.errors import UserError
from retort.quantities.entropy import student_entropy, teacher_entropy

Scope = Literal["batch", "rollout"]
#: A zone's number in `zones`.
SILENT, SURE, UNSURE = 0, 1, 2


def zones(teacher_N: Tensor, student_N: Tensor, *, silent: float, unsure: float) -> Tensor:
    """The zone of each of N steps, from both entropies, nats; shares are exact to one step, ties go by position.

    Args:
        teacher_N: The teacher's entropy.
        student_N: The student's entropy.
        silent: Share of steps in `SILENT`: of those that are not unsure, the ones on which the student is surest.
        unsure: Share of steps in `UNSURE`: those on which the teacher is least sure.
    """
    count = len(teacher_N)
    zone_N = torch.full((count,), float(SURE), dtype=teacher_N.dtype, device=teacher_N.device)
    by_teacher = torch.argsort(teacher_N, stable=True)
    cut = count - round(unsure * count)
    zone_N[by_teacher[cut:]] = UNSURE
    rest = by_teacher[:cut].sort().values  # by position, so that a tie goes to the earlier one
    quiet = rest[torch.argsort(student_N[rest], stable=True)][: min(cut, round(silent * count))]
    zone_N[quiet] = SILENT
    return zone_N


class Zones:
    """The weights of a batch's zones; they share the statistics behind them."""

    def __init__(self, *, silent: float, unsure: float, scope: Scope = "batch", name: str = "zone") -> None:
        """Builds zones of these shares.

        Args:
            silent: See `zones`.
            unsure: See `zones`.
            scope: Whether shares hold over the batch, or in every rollout.
            name: Name of the stored values: `<name>`, `<name>.teacher_entropy`, and `<name>.taught`, 1 where not
                silent.

        Raises:
            UserError: The shares are negative or more than 1 together.
        """
        if silent < 0 or unsure < 0 or silent + unsure > 1:
            raise UserError(f"shares of zones must be at least 0 and at most 1 together, not {silent} and {unsure}")

        def finish(student_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
            teacher_N = steps.stored[f"{name}.teacher_entropy"]
            if scope == "batch":
                return zones(teacher_N, student_N, silent=silent, unsure=unsure)
            zone_N = torch.empty_like(student_N)
            rollouts = int(steps.rollout_N.max()) + 1 if len(student_N) else 0
            for rollout in range(rollouts):
                own = steps.rollout_N == rollout
                zone_N[own] = zones(teacher_N[own], student_N[own], silent=silent, unsure=unsure)
            return zone_N

        def taught(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
            return (steps.stored[name] != SILENT).to(steps.stored[name].dtype)

        self.name = name
        self.stats = (
            Stat(f"{name}.teacher_entropy", teacher_entropy(), unchanged),
            Stat(name, student_entropy(), finish),
            Stat(f"{name}.taught", student_entropy(), taught),
        )

    def weight(self, zone: int) -> Weight:
        """1 in a zone, 0 elsewhere."""

        def value(context: Context, view: str) -> Tensor:
            zone_N = context.steps.stored[self.name]
            return (zone_N == zone).to(zone_N.dtype)

        return Weight(f"{self.name} {zone}", value, frozenset({ENTROPY}), stats=self.stats)
