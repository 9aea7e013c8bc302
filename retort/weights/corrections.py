"""Corrections for a rollout engine whose probabilities differ from the trainer's. Axis letters: see `retort.core`.

With xi = p_old(y) / p_engine(y), detached: tokens came from the engine, so their gradients are weighed by xi. A few
huge weights are worse than a small bias, so every kind bounds it in some way. Where a token came from data, or the
engine reported nothing, xi is 1. Log-ratios are clamped to +-20.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.parts import Stat, Weight
from retort.core.steps import Clock, Steps
from retort.errors import UserError
from retort.quantities.log_ratio import MAX_LOG_RATIO, engine_gap

Correction = Literal["token", "token_mask", "sequence", "sequence_mask", "geometric"]


def corrected(gap_N: Tensor, rollout_N: Tensor, kind: Correction, low: float, high: float) -> Tensor:
    """The weight of each step, [N].

    Args:
        gap_N: log xi, nats.
        rollout_N: Index of the rollout of each step.
        kind: `token`: min(xi, high) (truncated importance sampling). `token_mask`: xi where it lies in [low, high],
            else 0 (IcePop). `sequence`: the product over the rollout, at most `high`, on all its steps.
            `sequence_mask`: the product, or 0 where it is above `high`. `geometric`: 1 where the geometric mean over
            the rollout lies in [low, high], else 0.
        low: Bound from below, where there is one.
        high: Bound from above.
    """
    if kind in ("token", "token_mask"):
        ratio_N = gap_N.exp()
        return ratio_N.clamp_max(high) if kind == "token" else ratio_N * ((ratio_N >= low) & (ratio_N <= high))
    rollouts = int(rollout_N.max()) + 1 if len(rollout_N) else 0
    total_R = gap_N.new_zeros(rollouts).index_add_(0, rollout_N, gap_N)
    if kind == "geometric":
        steps_R = torch.bincount(rollout_N, minlength=rollouts).clamp_min(1)
        mean_N = (total_R / steps_R).exp()[rollout_N]
        return ((mean_N >= low) & (mean_N <= high)).to(gap_N.dtype)
    ratio_N = total_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[rollout_N]
    return ratio_N.clamp_max(high) if kind == "sequence" else ratio_N * (ratio_N <= high)


def effective_sample_size(weight_N: Tensor) -> float:
    """(sum w)^2 / (n sum w^2), between 1/n and 1; 0 where all weights are 0."""
    square = float(weight_N.double().square().sum())
    return float(weight_N.double().sum()) ** 2 / (len(weight_N) * square) if square else 0.0


def engine_correction(
    kind: Correction = "token",
    *,
    low: float | None = None,
    high: float | None = None,
    mean_one: bool = False,
    name: str = "importance",
) -> Weight:
    """A weight that corrects for the engine; multiply it with a term's own (`both`).

    All kinds but `token` and `token_mask`, and `mean_one`, depend on other steps: that costs a pass over the batch
    before the first update. Watch it with `summed_up=effective_sample_size` to see how much of a batch it leaves.

    Args:
        kind: See `corrected`.
        low: Null for 0.5 (`token_mask`) or 0.999 (`geometric`).
        high: Null for 2 (`token`, `sequence`, `sequence_mask`), 5 (`token_mask`) or 1.001 (`geometric`).
        mean_one: Divide by the mean over the batch afterwards.
        name: Name of the stored value, where the weight depends on other steps.

    Raises:
        UserError: The bounds leave nothing.
    """
    floor = low if low is not None else {"token_mask": 0.5, "geometric": 0.999}.get(kind, 0.0)
    ceiling = high if high is not None else {"token_mask": 5.0, "geometric": 1.001}.get(kind, 2.0)
    if not 0.0 <= floor < ceiling or math.isnan(ceiling):
        raise UserError(f"engine_correction: low ({floor}) must not be negative and must lie below high ({ceiling})")

    gap = engine_gap()

    def finish(gap_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        weight_N = corrected(gap_N, steps.rollout_N.to(gap_N.device), kind, floor, ceiling)
        mean = weight_N.mean()
        return weight_N / mean if mean_one and mean > 0 else weight_N

    def stored(context: Context, view: str) -> Tensor:
        return context.steps.stored[name]

    def own(context: Context, view: str) -> Tensor:
        gap_N = gap.value(context, view).detach()
        return corrected(gap_N, torch.zeros_like(context.steps.tokens_N), kind, floor, ceiling)

    if kind in ("token", "token_mask") and not mean_one:  # these depend on the step alone: no pass over the batch
        return Weight(f"{name}({kind})", own, uses_old_logp=True, corrects_engine=True)
    return Weight(f"{name}({kind})", stored, stats=(Stat(name, gap, finish),), corrects_engine=True)
