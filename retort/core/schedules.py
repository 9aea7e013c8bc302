"""Numbers that change during the run: schedules, functions from a step to a number, and controller outputs.

A method's schedules count batches of rollouts; the learning rate counts optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from retort.errors import UserError

#: (step, total steps) -> value. Steps count from 0; total is None where the end is not known.
Schedule = Callable[[int, int | None], float]
ScheduleName = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class ControllerOutput:
    """A number that one of the method's controllers gives, read again for every batch (`retort.controllers`).

    Attributes:
        controller: Name of the controller.
        number: Name of its number.
    """

    controller: str
    number: str

    def __str__(self) -> str:
        return f"{self.controller}.{self.number}"


#: A number that may change: fixed, a function of the step, or the output of a controller.
ScalarOrSchedule = float | Schedule | ControllerOutput


def at(
    scalar: ScalarOrSchedule, step: int, total_steps: int | None, controller_outputs: Mapping[str, float] | None = None
) -> float:
    """The value of a number or schedule at a step.

    Raises:
        UserError: It is the output of a controller that gave no such number.
    """
    if isinstance(scalar, ControllerOutput):
        if str(scalar) not in (controller_outputs or {}):
            raise UserError(
                f"no controller gives '{scalar}' (given: {', '.join(sorted(controller_outputs or {})) or 'nothing'})"
            )
        return (controller_outputs or {})[str(scalar)]
    return scalar(step, total_steps) if callable(scalar) else scalar


def line(start: float, end: float) -> Schedule:
    """A straight line from `start` at step 0 towards `end`, which it would reach after the last step."""

    def value(step: int, total_steps: int | None) -> float:
        if total_steps is None:
            raise UserError("a line from start to end needs the number of steps (total_steps)")
        return start + (end - start) * min(1.0, step / total_steps)

    return value


def decay(name: ScheduleName, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """A factor that rises linearly from 1 / warmup to 1 over `warmup` steps and then decays from 1 towards `floor`.

    Args:
        name: `constant`, `linear`, or half a `cosine`; the latter two reach `floor` at the last step.
        warmup: Number of warm-up steps.
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
    """Half a cosine from `start` to `end` over the run; `start` where the run's length is not known."""

    def value(step: int, total_steps: int | None) -> float:
        done = 0.0 if total_steps is None else min(1.0, step / max(1, total_steps))
        return end + (start - end) / 2 * (1.0 + math.cos(math.pi * done))

    return value
