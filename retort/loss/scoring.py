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

from retort.controllers import Controller, Seen
from retort.core.definition import Values
from retort.core.parts import Part
from retort.core.steps import ALONE, Clock, Ranks, Steps
from retort.loss.terms import finish_stats, part_values, stat_values, stored_values
from retort.method import Method


class Evaluate(Protocol):
    """Evaluates a function of the context at every step of a batch, without gradient: a pass of the student."""

    def __call__(self, values: Values, steps: Steps, clock: Clock) -> Mapping[str, Tensor]:
        """Named values, [N] each, by place in `steps`."""
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
    """The steps with all that the method wants stored of the batch.

    Args:
        method: What is learnt.
        steps: Of the batch, those of this worker.
        clock: Where the run is.
        valid: Each view's `TeacherSignal.valid_N`.
        evaluate: Asks the student as it is now; not called where the method needs nothing.
        several: Several updates are made on the batch, so what they compare with is taken now.
        ranks: Who holds the rest of the batch.
    """
    if method.stats:
        measured = any(stat.part is not None for stat, _ in method.stats.values())
        values = evaluate(stat_values(method), steps, clock) if measured else {}
        steps = steps.storing(_finished(method, values, steps, clock, valid, ranks))
    if several or method.weighs_batch:
        steps = steps.storing(evaluate(stored_values(method, weights_only=not several), steps, clock))
    return steps


def _finished(
    method: Method,
    values: Mapping[str, Tensor],
    steps: Steps,
    clock: Clock,
    valid: Mapping[str, Tensor | None],
    ranks: Ranks,
) -> dict[str, Tensor]:
    whole, values, valid, own = _of_all(values, steps, valid, ranks)
    found = finish_stats(method, values, whole, clock, valid)
    return {name: values_N[own] for name, values_N in found.items()}


def _of_all(
    values: Mapping[str, Tensor], steps: Steps, valid: Mapping[str, Tensor | None], ranks: Ranks
) -> tuple[Steps, dict[str, Tensor], dict[str, Tensor | None], slice]:
    """The table of all workers, values and `valid_N` over it, and where the own steps stand in it.

    A view may lack a context for a rollout of one worker and for none of another's, which then has no `valid_N`: it
    gives a column all the same, since what only some workers have is left out of the table.
    """
    device = steps.tokens_N.device
    given = {f"value/{name}": values_N for name, values_N in values.items()}
    for view, valid_N in valid.items():
        every_N = torch.ones(len(steps), dtype=torch.bool, device=device)
        given[f"valid/{view}"] = every_N if valid_N is None else valid_N
    whole, own = ranks.gather(steps.storing(given))
    all_values, all_valid = (
        {name.removeprefix(kind): whole.stored[name] for name in whole.stored if name.startswith(kind)}
        for kind in ("value/", "valid/")
    )
    rest = {name: column_N for name, column_N in whole.stored.items() if not name.startswith(("value/", "valid/"))}
    said = {view: None if bool(valid_N.all()) else valid_N for view, valid_N in all_valid.items()}
    return replace(whole, stored=rest), all_values, said, own


def averages(
    parts: Mapping[str, Part],
    view: str,
    steps: Steps,
    clock: Clock,
    valid: Mapping[str, Tensor | None],
    evaluate: Evaluate,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Means of parts over the steps about which the view says something, with the student as it is now.

    Args:
        parts: By name; without any, nothing is evaluated.
        view: That they ask.
        steps: As in `scored`, as are all others.
        clock: See there.
        valid: See there.
        evaluate: See there.
        ranks: See there.
    """
    if not parts:
        return {}
    own = evaluate(part_values(parts, view), steps, clock)
    _, values, said, _ = _of_all(own, steps, {view: valid.get(view)}, ranks)
    valid_N, found = said[view], dict[str, float]()
    for name, values_N in values.items():
        kept_N = values_N if valid_N is None else values_N[valid_N]
        found[name] = float(kept_N.double().mean()) if len(kept_N) else 0.0
    return found


def look(
    controller: Controller,
    steps: Steps,
    clock: Clock,
    valid: Mapping[str, Tensor | None],
    evaluate: Evaluate,
    ranks: Ranks = ALONE,
) -> Seen:
    """What a controller is shown of a batch before it is learnt from; arguments as in `scored`."""
    means = averages(controller.sees, controller.against, steps, clock, valid, evaluate, ranks)
    rollouts = ranks.gather(steps)[0].rollouts()
    return Seen(means, clock.done, clock.total, rollouts.reward_R, rollouts.steps_R, clock.longest)
