"""The longest completion in stages; a stage begins only if the student's entropy is high enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from retort.controllers.base import Controller, Probe, State, scalar
from retort.errors import UserError
from retort.quantities.entropy import student_entropy


@dataclass(frozen=True)
class LengthStages(Controller):
    r"""Entropy-gated length curriculum, the controller of `length_stages`. Its number is `horizon`, tokens.

    From arXiv 2605.16826, section 5.2: the horizon goes from :math:`L_m` to :math:`L_{m+1}` only if the student's mean
    entropy per token on held-out prompts is at least :math:`H_{min}`; after the first failure it never grows again.
    """

    lengths: tuple[int, ...] = ()
    min_entropy: float | None = None
    share: float = 0.5
    on_failure: Literal["hold", "terminate"] = "hold"

    def init(self, draw: torch.Generator) -> State:
        return {"stage": scalar(0), "failed": scalar(0), "reference": scalar(float("nan"))}

    def numbers(self, state: State) -> Mapping[str, float]:
        return {"horizon": float(self.lengths[int(state["stage"])])}

    def probed(self, state: State, found: Mapping[str, float]) -> State:
        entropy, stage = found["entropy"], int(state["stage"])
        first = bool(state["reference"].isnan())
        reference = entropy if first else float(state["reference"])
        moved = {**state, "reference": scalar(reference)}
        if bool(state["failed"]) or stage == len(self.lengths) - 1:
            return moved
        least = self.share * reference if self.min_entropy is None else self.min_entropy
        if entropy >= least:
            return {**moved, "stage": scalar(stage + 1)}
        return {**moved, "failed": scalar(1)}

    def ended(self, state: State) -> str | None:
        if self.on_failure == "hold" or not bool(state["failed"]):
            return None
        length = self.lengths[int(state["stage"])]
        return f"the student's entropy on held-out prompts fell below its limit at a length of {length} tokens"


def length_stages(
    lengths: tuple[int, ...],
    *,
    min_entropy: float | None = None,
    share: float = 0.5,
    on_failure: Literal["hold", "terminate"] = "hold",
    every: int = 30,
    prompts: int = 64,
    name: str = "length",
) -> LengthStages:
    """The controller of a length curriculum; use its `read("horizon")` as the plan's horizon.

    Args:
        lengths: L_0 < L_1 < ..., tokens.
        min_entropy: H_min, nats. None: `share` of the entropy at the first probe, which itself always passes.
        share: See `min_entropy`; ignored where that is given.
        on_failure: Continue at the last stable length, or end the run.
        every: Steps between probes, each of which can raise the stage by one.
        prompts: Number of prompts held out for the probe.
        name: Name of the controller.

    Raises:
        UserError: The lengths do not grow.
    """
    if not lengths or lengths[0] < 1 or any(b <= a for a, b in pairwise(lengths)):
        raise UserError(f"lengths must be positive and grow, not {list(lengths)}")
    probe = Probe({"entropy": student_entropy()}, source="student", every=every, prompts=prompts)
    return LengthStages(name, probe=probe, lengths=lengths, min_entropy=min_entropy, share=share, on_failure=on_failure)
