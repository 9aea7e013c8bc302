"""Dials that move with the run: functions from a step to a number.

A method's dials move with batches of rollouts, the learning rate with optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from retort.errors import UserError

#: (step, total steps) -> value. Steps count from 0; total is None where the end is not known.
Schedule = Callable[[int, int | None], float]
ScheduleName = Literal["constant", "linear", "cosine"]


def at(dial: float | Schedule, step: int, total_steps: int | None) -> float:
    """The value of a dial, fixed or scheduled, at a step."""
    return dial(step, total_steps) if callable(dial) else dial


def decay(name: ScheduleName, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """A factor that rises linearly from 1 / warmup to 1 over `warmup` steps and then decays from 1 towards `floor`.

    Args:
        name: `constant`, `linear`, or half a `cosine`; the latter two reach `floor` at the last step.
        warmup: Steps.
        floor: Final factor, between 0 and 1.
    """

    def value(step: int, total_steps: int | None) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if name == "constant":
            return 1.0
        if total_steps is None:
            raise UserError(f"schedule '{name}' needs the number of steps (total_steps)")
        done = (step - warmup) / max(1, total_steps - warmup)
        left = 1.0 - done if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return floor + (1.0 - floor) * max(0.0, left)

    return value


def anneal(start: float, end: float) -> Schedule:
    """Half a cosine from `start` to `end` over the run; `start` where it is not known how long that is."""

    def value(step: int, total_steps: int | None) -> float:
        done = 0.0 if total_steps is None else min(1.0, step / max(1, total_steps))
        return end + (start - end) / 2 * (1.0 + math.cos(math.pi * done))

    return value
