"""The score pass: values of a whole batch computed before its first update, for the trainer and for `functional`.

It is a pass of the student, without gradients; a teacher's scoring is `retort.teachers`. `scored` stores statistics and
the weights that a denominator sums. It stores the old log-probs (`old_logp`) and baselines only where several updates
are made on the batch and the method uses old log-probs; otherwise `Context.old_logp_N` is the live value, detached.

Statistics, denominators and controllers work on the table of the whole batch, with several workers on that of all of
them (`Ranks`); each worker keeps its own part. Axis letters: see `retort.core`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from retort.controllers import Controller, Observation
from retort.core.definition import Values
from retort.core.parts import Part
from retort.core.steps import ALONE, Clock, Ranks, Steps
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
    ranks: Ranks = ALONE,
) -> Steps:
    """Returns the steps with all values that the method stores for the batch.

    Args:
        method: The method.
        steps: The steps of the batch that this worker holds.
        clock: The progress of the run.
        valid: Each view's `TeacherSignal.valid_N`.
        evaluate: Runs the student as it is now; not called where the method stores nothing.
        several: Several updates are made on the batch, so the values that they compare with are taken now.
        ranks: The workers that hold the batch.
    """
    if method.stats:
        measured = any(stat.part is not None for stat, _ in method.stats.values())
        values = evaluate(stat_values(method), steps, clock) if measured else {}
        steps = steps.with_stored(_finished(method, values, steps, clock, valid, ranks))
    if several or method.weighs_batch:
        steps = steps.with_stored(evaluate(stored_values(method, weights_only=not several), steps, clock))
    return steps


def _finished(
    method: Method,
    values: Mapping[str, Tensor],
    steps: Steps,
    clock: Clock,
    valid: Mapping[str, Tensor | None],
    ranks: Ranks,
) -> dict[str, Tensor]:
    whole, values, valid, own = _gathered(values, steps, valid, ranks)
    found = finish_stats(method, values, whole, clock, valid)
    return {name: values_N[own] for name, values_N in found.items()}


def _gathered(
    values: Mapping[str, Tensor], steps: Steps, valid: Mapping[str, Tensor | None], ranks: Ranks
) -> tuple[Steps, dict[str, Tensor], dict[str, Tensor | None], slice]:
    """The table of all workers, values and `valid_N` over it, and the slice of this worker's steps.

    A view may lack a context for a rollout of one worker and for none of another's, which then has no `valid_N`. It
    gives a column all the same, because a column that only some workers have is left out of the table.
    """
    device = steps.tokens_N.device
    given = {f"value/{name}": values_N for name, values_N in values.items()}
    for view, valid_N in valid.items():
        every_N = torch.ones(len(steps), dtype=torch.bool, device=device)
        given[f"valid/{view}"] = every_N if valid_N is None else valid_N
    whole, own = ranks.gather(steps.with_stored(given))
    all_values, all_valid = (
        {name.removeprefix(kind): whole.stored[name] for name in whole.stored if name.startswith(kind)}
        for kind in ("value/", "valid/")
    )
    rest = {name: column_N for name, column_N in whole.stored.items() if not name.startswith(("value/", "valid/"))}
    valid_by_view = {view: None if bool(valid_N.all()) else valid_N for view, valid_N in all_valid.items()}
    return replace(whole, stored=rest), all_values, valid_by_view, own


def averages(
    parts: Mapping[str, Part],
    view: str,
    steps: Steps,
    clock: Clock,
    valid: Mapping[str, Tensor | None],
    evaluate: Evaluate,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Means of parts over the steps that are valid for the view, with the student as it is now.

    Args:
        parts: Parts by name; without any, nothing is evaluated.
        view: The view that the parts read.
        steps: As in `scored`.
        clock: As in `scored`.
        valid: As in `scored`.
        evaluate: As in `scored`.
        ranks: As in `scored`.
    """
    if not parts:
        return {}
    own = evaluate(part_values(parts, view), steps, clock)
    _, values, valid_by_view, _ = _gathered(own, steps, {view: valid.get(view)}, ranks)
    valid_N, found = valid_by_view[view], dict[str, float]()
    for name, values_N in values.items():
        kept_N = values_N if valid_N is None else values_N[valid_N]
        found[name] = float(kept_N.double().mean()) if len(kept_N) else 0.0
    return found


def observe(
    controller: Controller,
    steps: Steps,
    clock: Clock,
    valid: Mapping[str, Tensor | None],
    evaluate: Evaluate,
    ranks: Ranks = ALONE,
) -> Observation:
    """What a controller observes of a batch before the update; arguments as in `scored`."""
    means = averages(controller.observes, controller.against, steps, clock, valid, evaluate, ranks)
    rollouts = ranks.gather(steps)[0].rollouts()
    return Observation(means, clock.done, clock.total, rollouts.reward_R, rollouts.steps_R, clock.longest)
