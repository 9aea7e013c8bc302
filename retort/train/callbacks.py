"""What a caller may do while a run is at work: look at it, log it elsewhere, end it early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retort.train.events.hooks import Stop
from retort.train.run import Run

__all__ = ["Callback", "Stop"]


class Callback:
    """An object that a run calls. One of these methods is enough; a missing one is not called.

    Nothing that a callback returns or raises changes what is computed. An exception ends the run, which is
    saved first. The state of a callback is not saved: a resumed run calls the callbacks that it is given then.
    """

    def on_step(self, run: Run, metrics: Mapping[str, Any]) -> Stop | None:
        """Runs after the student learnt from a batch of rollouts.

        Args:
            run: The run; `run.step` batches are done.
            metrics: The step's line of `metrics.jsonl`, flat.
        """

    def on_eval(self, run: Run, scores: Mapping[str, float]) -> Stop | None:
        """Runs after an evaluation: before the first step, every `eval.every` steps, and at the end.

        Args:
            run: The run; `run.step` batches are done.
            scores: Means by the names of the before/after table (`avg@8`, `reverse_kl`, `length`, ...).
        """

    def on_end(self, run: Run) -> None:
        """Runs when the run has ended, also by a `Stop`, and all its files are written (not if it was interrupted)."""
