"""The share of a batch that the student generates, set by the validation loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from retort.controllers.base import Controller, Probe, State, scalar
from retort.core.parts import Part
from retort.divergences.likelihood import negative_log_likelihood


@dataclass(frozen=True)
class AdaptiveShare(Controller):
    """DistiLLM's adaptive share of student completions, the controller of `adaptive_share`. Its number is `share`."""

    start: float = 0.0
    rise: float = 0.1
    margin: float = 0.1

    def init(self, draw: torch.Generator) -> State:
        return {"share": scalar(self.start), "reference": scalar(float("nan"))}

    def numbers(self, state: State) -> Mapping[str, float]:
        return {"share": float(state["share"])}

    def probed(self, state: State, found: Mapping[str, float]) -> State:
        loss = scalar(found["loss"])
        if bool(state["reference"].isnan()):
            return {**state, "reference": loss}
        if float(loss) < float(state["reference"]) + self.margin:
            return state
        return {"share": scalar(min(1.0, float(state["share"]) + self.rise)), "reference": loss}


def adaptive_share(
    loss: Part | None = None,
    *,
    start: float = 0.0,
    rise: float = 0.1,
    margin: float = 0.1,
    every: int = 100,
    prompts: int = 64,
    name: str = "off_policy",
) -> AdaptiveShare:
    r"""The share of prompts that the student completes, raised whenever the validation loss gets worse.

    From DistiLLM, arXiv 2402.03898, and its released code: the share grows by `rise` where the loss is at least
    `margin` above the reference, which is the loss before training and, after each rise, the loss that caused it. A
    method takes it as `RolloutPlan(on_policy_fraction=it.read("share"), replay=Replay())` and names it among its
    `controllers`. It learns on the prefixes of any source, so its terms must be pathwise.

    Args:
        loss: The part that is averaged over the tokens of held-out responses of the data, nats. None: the negative
            log-likelihood, as in the released code.
        start: Share at the beginning.
        rise: Increase of the share, which ends at 1.
        margin: Least increase of the loss that counts as worse, nats.
        every: Steps between validations (released code: an epoch).
        prompts: Number of prompts held out of the training data for validation.
        name: Name of the controller.
    """
    parts = {"loss": loss or negative_log_likelihood()}
    probe = Probe(parts, source="dataset", every=every, prompts=prompts, at_start=True)
    return AdaptiveShare(name, probe=probe, start=start, rise=rise, margin=margin)
