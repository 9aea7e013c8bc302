"""Mean and spread of the rewards over the whole run, by Welford's algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.controllers.base import Controller, Observation, State, scalar
from retort.errors import UserError


@dataclass(frozen=True)
class RunningRewards(Controller):
    """Numbers `mean` and `std` of all rewards *before* the current batch, which is added after the update.

    EGRSD (arXiv 2605.13255) whitens rewards with it.

    Attributes:
        warmup: Batches during which the numbers are `baseline` and 1.
        baseline: See `warmup`.
        shape: A function applied to rewards first, see `retort.advantages.outcome.Shape`.
    """

    rewards: bool = True
    warmup: int = 10
    baseline: float = 0.5
    shape: Callable[[Tensor, Tensor, int | None], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise UserError(f"running rewards need at least 1 batch of warm-up, not {self.warmup}")

    def init(self, draw: torch.Generator) -> State:
        """The state without any reward."""
        return {name: scalar(0.0) for name in ("batches", "count", "mean", "squares")}

    def numbers(self, state: State) -> Mapping[str, float]:
        """The outputs that schedules and statistics read."""
        if float(state["batches"]) < self.warmup:
            return {"mean": self.baseline, "std": 1.0}
        variance = float(state["squares"]) / max(float(state["count"]) - 1.0, 1.0)
        return {"mean": float(state["mean"]), "std": variance**0.5 if variance > 0 else 1.0}

    def learn(self, state: State, observation: Observation, after: Mapping[str, float]) -> State:
        """The state with the batch's rewards, added at once by Chan's rule."""
        assert observation.reward_R is not None  # a run without rewards is refused before it starts
        assert observation.length_R is not None
        reward_R = observation.reward_R.double().cpu()
        if self.shape is not None:
            reward_R = self.shape(reward_R, observation.length_R.cpu(), observation.longest)
        old, new = float(state["count"]), float(len(reward_R))
        gap = float(reward_R.mean()) - float(state["mean"])
        squares = float(((reward_R - reward_R.mean()) ** 2).sum())
        return {
            "batches": state["batches"] + 1,
            "count": state["count"] + new,
            "mean": state["mean"] + gap * new / (old + new),
            "squares": state["squares"] + squares + gap**2 * old * new / (old + new),
        }
