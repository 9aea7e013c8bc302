"""The score pass: values of a whole batch computed before its first update, for the trainer and for `functional`.

It is a pass of the student, without gradients; a teacher's scoring is `retort.teachers`. `scored` stores statistics and
the weights that a denominator sums. It stores the old log-probs (`old_logp`) and baselines only where several updates
are made on the batch and the method uses old log-probs; otherwise `Context.old_logp_N` is the live value, detached.

Statistics, denominators and controllers work on the table of the whole batch. Of several ranks each holds that table
(`retort.ranks`), so nothing here knows about them. Axis letters: see `retort.core`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from retort.controllers import Controller, Observation
from retort.core.definition import Values
from retort.core.parts import Part
from retort.core.steps import Clock, Steps
from retort.loss.terms import finish_stats, part_values, stat_values, stored_values
from retort.method import Method


class Evaluate(Protocol):
    """Evaluates a function of the context at every step of a batch, without gradient: a pass of the student."""

    def __call__(self, values: Values, steps: Steps, clock: Clock) -> Mapping[str, Tensor]:
        """Returns named values, [N] each, in the order of `steps`."""
        ...


def scored(
    method: Method,
    steps: Steps,
    clock: Clock,
    valid: Mapping[str, Tensor | None],
    evaluate: Evaluate,
    *,
    several: bool,
) -> Steps:
    """Returns the steps with all values that the method stores for the batch.

    Args:
        method: The method.
        steps: The steps of the batch.
        clock: The progress of the run.
        valid: Each view's `TeacherSignal.valid_N`.
        evaluate: Runs the student as it is now; not called where the method stores nothing.
        several: Several updates are made on the batch, so the values that they compare with are taken now.
    """
    if method.stats:
        measured = any(stat.part is not None for stat, _ in method.stats.values())
        values = evaluate(stat_values(method), steps, clock) if measured else {}
        steps = steps.with_stored(finish_stats(method, values, steps, clock, valid))
    if several or method.weighs_batch:
        steps = steps.with_stored(evaluate(stored_values(method, weights_only=not several), steps, clock))
    return steps


def averages(
    parts: Mapping[str, Part],
    view: str,
    steps: Steps,
    clock: Clock,
    valid: Mapping[str, Tensor | None],
    evaluate: Evaluate,
) -> dict[str, float]:
    """Means of parts over the steps that are valid for the view, with the student as it is now.

    Args:
        parts: Parts by name; without any, nothing is evaluated.
        view: The view that the parts read.
        steps: As in `scored`.
        clock: As in `scored`.
        valid: As in `scored`.
        evaluate: As in `scored`.
    """
    if not parts:
        return {}
    valid_N, found = valid.get(view), dict[str, float]()
    for name, values_N in evaluate(part_values(parts, view), steps, clock).items():
        kept_N = values_N if valid_N is None else values_N[valid_N]
        found[name] = float(kept_N.double().mean()) if len(kept_N) else 0.0
    return found


def observe(
    controller: Controller,
    steps: Steps,
    clock: Clock,
    valid: Mapping[str, Tensor | None],
    evaluate: Evaluate,
) -> Observation:
    """What a controller observes of a batch before the update; arguments as in `scored`."""
    means = averages(controller.observes, controller.against, steps, clock, valid, evaluate)
    rollouts = steps.rollouts()
    return Observation(means, clock.done, clock.total, rollouts.reward_R, rollouts.steps_R, clock.longest)
