"""The learning rate over a run: every method of it has a warm-up and a schedule of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from retort.schedules import decay
from retort.steps import Clock
from retort.train.setup import Setup

#: Share by which a learning rate must rise to be worth a word.
_WORTH_A_WORD = 0.01


def factor(run: Setup, setup: Setup, clock: Clock, begun: int) -> Callable[[int], float]:
    """What the learning rate is multiplied by at an optimizer step, counted from the start of the run.

    Args:
        run: Of the whole run.
        setup: With the method at hand.
        clock: Where the run is.
        begun: Optimizer steps done when that method took over.
    """
    settings, cold = run.config.optimizer, run.config.cold_start.learning_rate
    schedule = decay(settings.schedule, warmup=settings.warmup, floor=settings.final)
    # A batch is the same number of rollouts at every step, or (with given answers) one less often than a prompt's
    # samples.
    per_batch = min(settings.updates, setup.batch_prompts * setup.method.rollout.samples) * settings.epochs
    scale = cold / settings.learning_rate if cold and setup is not run else 1.0
    return lambda update: scale * schedule(update - begun, (clock.total or 0) * per_batch)


def rise(run: Setup, setup: Setup, clock: Clock, begun: int, updates: int, steps: int) -> str | None:
    """One sentence where the learning rate rises because a run has more steps now than it had; else None.

    Args:
        run: As in `factor`, as are `setup`, `clock` and `begun`.
        setup: See above.
        clock: See above.
        begun: See above.
        updates: Optimizer steps done.
        steps: Batches that the run had.
    """
    settings = run.config.optimizer
    if clock.end != run.steps or updates - begun <= settings.warmup:
        return None
    was = factor(run, setup, replace(clock, end=steps), begun)(updates - 1)
    now = factor(run, setup, clock, begun)(updates)
    if now <= was * (1 + _WORTH_A_WORD):
        return None
    rate = settings.learning_rate
    return (
        f"the learning rate rises from {was * rate:.3g} to {now * rate:.3g} at step {clock.step + 1}: the schedule "
        f"({settings.schedule}) ends with the run, which had {steps} steps and has {run.steps} now"
    )
