"""The learning rate over a run: each of its methods has a warm-up and a schedule of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from retort.config.sections import OptimizerSection
from retort.core.schedules import decay
from retort.core.steps import Clock

#: Relative rise of a learning rate from which on a note is written.
_WORTH_A_WORD = 0.01


@dataclass(frozen=True)
class Rates:
    """The learning rate of the current method.

    Attributes:
        settings: The settings of the optimizer.
        scale: 1, or the ratio of a cold start's rate to the run's.
        rollouts: Number of rollouts per batch; fewer where the data gives the completions.
    """

    settings: OptimizerSection
    scale: float
    rollouts: int

    def factor(self, clock: Clock, begun: int) -> Callable[[int], float]:
        """The factor on the learning rate by optimizer step, counted from the start of the run.

        Args:
            clock: The position in the run.
            begun: Number of optimizer steps done when that method took over.
        """
        settings = self.settings
        schedule = decay(settings.schedule, warmup=settings.warmup, floor=settings.final)
        per_batch = min(settings.updates, self.rollouts) * settings.epochs
        return lambda update: self.scale * schedule(update - begun, (clock.total or 0) * per_batch)

    def rise(self, clock: Clock, begun: int, updates: int, steps: int) -> str | None:
        """Returns a sentence where the learning rate rises because a run has more steps now than it had; else None.

        Args:
            clock: The position in the run, in its last method.
            begun: As in `factor`.
            updates: Number of optimizer steps done.
            steps: Number of batches that the run had.
        """
        if updates - begun <= self.settings.warmup:
            return None
        was = self.factor(replace(clock, end=steps), begun)(updates - 1)
        now = self.factor(clock, begun)(updates)
        if now <= was * (1 + _WORTH_A_WORD):
            return None
        rate = self.settings.learning_rate
        return (
            f"the learning rate rises from {was * rate:.3g} to {now * rate:.3g} at step {clock.step + 1}: the schedule "
            f"({self.settings.schedule}) ends with the run, which had {steps} steps and has {clock.end} now"
        )
