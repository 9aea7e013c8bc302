"""What a caller may do while a run is at work: look at it, log it elsewhere, end it early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retort.train.events.hooks import Stop
from retort.train.run import Run

__all__ = ["Callback", "Stop"]


class Callback:
    """Called by a run. Any object with one of these methods will do; what it has not is not called.

    Nothing that a callback returns or raises changes what is computed. What it raises ends the run, which is saved
    first. What it remembers is not: a resumed run calls whatever it is given then.
    """

    def on_step(self, run: Run, metrics: Mapping[str, Any]) -> Stop | None:
        """A batch of rollouts was learnt from.

        Args:
            run: The run; `run.step` batches are done.
            metrics: The step's line of `metrics.jsonl`, flat.
        """

    def on_eval(self, run: Run, scores: Mapping[str, float]) -> Stop | None:
        """The student was judged on the held-out prompts: before the first step, every `eval.every` steps, at the end.

        Args:
            run: The run; `run.step` batches are done.
            scores: Means by the names of the before/after table (`avg@8`, `reverse_kl`, `length`, ...).
        """

    def on_end(self, run: Run) -> None:
        """The run came to its end, also by a `Stop`, and all its files are written (not so if it was interrupted)."""
