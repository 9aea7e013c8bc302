"""The denominators of terms, and the only place where per-step losses become a scalar. Axis letters: see `retort.core`.

Every term has its own denominator, counted over the *whole optimizer batch* (all micro-batches, all ranks). So the
loss of a step does not depend on how the batch was cut, and adding a term never rescales another. `loss_scales`
computes the factor of each step from it, `scalar` multiplies and sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retort.core.losses import TokenLoss, times


@dataclass(frozen=True)
class Denominator:
    """The number that a term is divided by.

    Attributes:
        kind: `tokens` (all counted steps), `weighted` (the sum of the weights: of a gate, the open steps),
            `rollouts` (mean over rollouts of the mean over their steps), `sums` (mean over rollouts of the sum over
            their steps), `weighted_rollouts` (mean over rollouts of the weighted mean over their steps), `turns` (mean
            over all turns of the mean over their steps), `turn_sums` (mean over rollouts of the sum over their turns of
            the mean over a turn's steps), `constant`.
        value: The number, for `constant`.
        by: For the weighted kinds, the stored value that is summed; None for the term's own weight. For `rollouts` and
            `sums`, the stored value that is 0 at steps, and so in rollouts, that do not count; None if all do.
        among: For `rollouts`, `turns` and `turn_sums`, the stored value that is not 0 in the rollouts (or turns) that
            the mean is over, those of other terms included; None: those in which this term counts a step.
    """

    kind: Literal["tokens", "weighted", "rollouts", "sums", "weighted_rollouts", "turns", "turn_sums", "constant"]
    value: float = 1.0
    by: str | None = None
    among: str | None = None


def tokens() -> Denominator:
    """All counted steps."""
    return Denominator("tokens")


def weighted(by: str | None = None) -> Denominator:
    """The sum of the term's weights, or of a number that is stored for every step of the batch."""
    return Denominator("weighted", by=by)


def rollout_means(by: str | None = None, among: str | None = None) -> Denominator:
    """The mean over rollouts of the mean over their steps; steps where the stored value `by` is 0 do not count.

    With `among`, over the rollouts in which that stored value is not 0, whether or not the term counts a step there.
    """
    return Denominator("rollouts", by=by, among=among)


def rollout_sums(by: str | None = None) -> Denominator:
    """The sum over a rollout's steps, and the mean over rollouts: a long one counts for more."""
    return Denominator("sums", by=by)


def turn_means(among: str | None = None) -> Denominator:
    """The mean over turns of the mean over their steps: every turn counts alike, also those of a long episode.

    `among` as in `rollout_means`.
    """
    return Denominator("turns", among=among)


def turn_sums(among: str | None = None) -> Denominator:
    """The mean over rollouts of the sum over turns of the mean over a turn's steps; `among` as in `rollout_means`."""
    return Denominator("turn_sums", among=among)


def weighted_rollout_means(by: str | None = None) -> Denominator:
    """The mean over rollouts of the mean weighted within each; a weight common to a rollout's steps cancels."""
    return Denominator("weighted_rollouts", by=by)


def constant(value: float) -> Denominator:
    """A fixed number."""
    return Denominator("constant", value)


def loss_scales(
    denominator: Denominator,
    *,
    counted_N: Tensor,
    rollout_N: Tensor,
    weight_N: Tensor | None = None,
    turn_N: Tensor | None = None,
    among_N: Tensor | None = None,
) -> Tensor:
    """The loss scale of each step of the whole optimizer batch, [N]: one over its denominator.

    Args:
        denominator: The term's denominator.
        counted_N: Steps that count, bool.
        rollout_N: Index of the rollout of each step; needed for `rollouts`.
        weight_N: The term's weights over the whole batch; needed for `weighted`.
        turn_N: Number of the turn of each step, counted over all rollouts; needed for `turns` and `turn_sums`.
        among_N: Not 0 at steps of the rollouts that the mean is over; None: those of counted steps.
    """
    ones_N = counted_N.double()  # so that one third is exact in a float64 check
    if denominator.kind == "constant":
        return ones_N / denominator.value
    if denominator.kind in ("turns", "turn_sums"):
        if turn_N is None:
            raise ValueError("means of turns need the turns of the whole batch")
        over = _rollout_scales(denominator, ones_N, turn_N, None)  # holds one over the number of turns
        units_N = turn_N if denominator.kind == "turns" else rollout_N
        return over * _count(ones_N, turn_N) / _count(ones_N if among_N is None else among_N, units_N)
    if denominator.kind in ("rollouts", "sums", "weighted_rollouts"):
        own = _rollout_scales(denominator, ones_N, rollout_N, weight_N)
        if among_N is None:
            return own
        return own * _count(own, rollout_N) / _count(among_N, rollout_N)
    if denominator.kind == "weighted":
        if weight_N is None:
            raise ValueError("a weighted denominator needs the weights of the whole batch")
        total = (weight_N.double() * ones_N).sum()
        return torch.where(total > 0, ones_N / total, torch.zeros_like(ones_N))
    return ones_N / ones_N.sum().clamp_min(1)


def _rollout_scales(
    denominator: Denominator,
    ones_N: Tensor,
    rollout_N: Tensor,
    weight_N: Tensor | None,
) -> Tensor:
    """See `loss_scales`."""
    if denominator.kind == "weighted_rollouts":
        if weight_N is None:
            raise ValueError("a weighted denominator needs the weights of the whole batch")
        counted_N = weight_N.double() * ones_N
    else:
        counted_N = ones_N if weight_N is None else ones_N * (weight_N != 0)
        ones_N = counted_N
    steps_R = torch.zeros(int(rollout_N.max()) + 1 if len(rollout_N) else 0, dtype=ones_N.dtype)
    steps_R = steps_R.to(ones_N.device).index_add_(0, rollout_N, counted_N)
    rollouts = (steps_R > 0).sum().to(ones_N.dtype).clamp_min(1)
    if denominator.kind == "sums":
        return ones_N / rollouts
    steps_N = steps_R[rollout_N]
    return torch.where(steps_N > 0, ones_N / (torch.where(steps_N > 0, steps_N, 1.0) * rollouts), 0.0)


def _count(values_N: Tensor, number_N: Tensor) -> Tensor:
    """How many numbers there are with a value that is not 0, at least 1."""
    return (torch.bincount(number_N[values_N != 0]) > 0).sum().double().clamp_min(1)


def scalar(terms: Mapping[str, TokenLoss], scale_N: Mapping[str, Tensor], coefs: Mapping[str, float]) -> Tensor:
    """Sum over terms of coef * sum over steps of value * weight * scale; differentiable.

    `scale_N` are the loss scales of the steps at hand, cut from those of the whole batch: micro-batches add up to the
    batch.
    """
    losses = [times(coefs[name], total(term, scale_N[name])) for name, term in terms.items()]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def total(term: TokenLoss, scale_N: Tensor) -> Tensor:
    """One term's part of the loss, before its coefficient; a step that does not count cannot make it NaN."""
    value_N = torch.where(term.counted_N, term.value_N, torch.zeros_like(term.value_N))
    return times(scale_N.to(value_N.dtype), times(term.weight_N.to(value_N.dtype), value_N)).sum()
