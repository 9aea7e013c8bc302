"""Weights by what a teacher owes to an image: between the rollouts of a prompt, and within each. Axes: `retort.core`.

VA-OPD, arXiv 2605.21924. A teacher scores the same tokens under two views of the prompt, one of which shows less.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from retort.core.context import RULED_OUT, Context
from retort.core.needs import SAMPLED
from retort.core.parts import Quantity, Stat, Weight, unchanged
from retort.core.steps import Clock, Rollouts, Steps
from retort.errors import UserError

#: Added to the standard deviation of a prompt's rollouts, nats.
EPSILON = 1e-6


def visual_advantage(seen_logp_N: Tensor, poor_logp_N: Tensor) -> Tensor:
    """What the teacher's log-prob of each token gains by the better view, nats, at least 0, [N].

    Args:
        seen_logp_N: Log-prob of the token with the image, nats.
        poor_logp_N: Log-prob with the poorer image, nats. A token that it alone rules out counts `RULED_OUT` nats.
    """
    return (seen_logp_N - poor_logp_N).nan_to_num(0.0, posinf=RULED_OUT, neginf=0.0).clamp_min(0.0)


def sibling_weights(means_R: Tensor, group_R: Tensor, temperature: float) -> Tensor:
    r"""Softmax within each group of standardised means, [R], float64; adds up to 1 in every group.

    .. math:: a_k = \mathrm{softmax}_k\big((\bar v_k - \bar v) / ((\sigma + 10^{-6})\,\tau)\big)

    with the population standard deviation. Equal means give equal weights, and a single rollout has weight 1.

    Args:
        means_R: Mean advantage of each rollout.
        group_R: Index of its group, from 0 without gaps.
        temperature: tau; infinity gives equal weights.
    """
    mean_R = means_R.double()
    count_G = torch.bincount(group_R)

    def over(values_R: Tensor) -> Tensor:
        """Sums over each rollout's group."""
        return values_R.new_zeros(len(count_G)).index_add_(0, group_R, values_R)[group_R]

    size_R = count_G[group_R]
    from_mean_R = mean_R - over(mean_R) / size_R
    deviation_R = (over(from_mean_R.square()) / size_R).sqrt()
    logit_R = from_mean_R / (deviation_R + EPSILON) / temperature
    most_G = logit_R.new_full((len(count_G),), -math.inf).scatter_reduce_(0, group_R, logit_R, "amax")
    odds_R = (logit_R - most_G[group_R]).exp()
    return odds_R / over(odds_R)


def high_group(values_N: Tensor, rollouts: Rollouts, share: float) -> Tensor:
    """The ceil(share * T) largest values of each rollout's T, at least one, bool [N]; ties go to the earlier token.

    The product is exact: a share of 0.2 of 35 tokens is 7.

    Args:
        values_N: One number per step.
        rollouts: The rollouts of these steps.
        share: Above 0 and at most 1.
    """
    exact = Fraction(str(share))
    count_R = torch.tensor([max(1, math.ceil(exact * int(length))) for length in rollouts.steps_R.cpu()])
    count_R = count_R.to(rollouts.steps_R.device)
    order = torch.argsort(values_N, descending=True, stable=True)
    order = order[torch.argsort(rollouts.number_N[order], stable=True)]
    first_R = rollouts.steps_R.cumsum(0) - rollouts.steps_R
    rank_N = torch.empty_like(rollouts.number_N)
    rank_N[order] = torch.arange(len(order), device=order.device) - first_R[rollouts.number_N[order]]
    return rank_N < count_R[rollouts.number_N]


def least(values_N: Tensor) -> float:
    """The smallest of some numbers, as the curve of a step."""
    return float(values_N.min())


def most(values_N: Tensor) -> float:
    """The largest of some numbers, as the curve of a step."""
    return float(values_N.max())


class VisualWeights:
    """The weight of each token in a prompt's loss; its parts share the statistics behind it."""

    def __init__(
        self,
        *,
        temperature: float,
        high_share: float,
        high_weight: float,
        poor: str,
        name: str = "visual",
    ) -> None:
        """Builds the weights of two views of one teacher.

        Args:
            temperature: See `sibling_weights`.
            high_share: See `high_group`.
            high_weight: lambda, the share of a rollout's weight that its high group has.
            poor: The view that shows less; the better one is the term's own.
            name: Name of the stored values: `<name>.advantage`, nats; `<name>.weight`; `<name>.rollout`, the rollout's
                weight; `<name>.high`, 1 in the high group; `<name>.high_share`, the share of the batch's advantage
                that lies there.

        Raises:
            UserError: A setting outside of its range.
        """
        if not temperature > 0.0:
            raise UserError(f"weight_temperature must be positive, not {temperature}")
        if not 0.0 < high_share <= 1.0:
            raise UserError(f"high_share must lie above 0 and at most at 1, not {high_share}")
        if not 0.0 <= high_weight <= 1.0:
            raise UserError(f"high_weight must lie in [0, 1], not {high_weight}")
        needs = {poor: frozenset({SAMPLED})}

        def advantage(context: Context, view: str) -> Tensor:
            return visual_advantage(context.signal(view).sampled_logp_N, context.signal(poor).sampled_logp_N)

        # Each statistic needs both views, so that steps without a context under one of them have no part in any.
        part = Quantity("visual_advantage", advantage, frozenset({SAMPLED}), also=needs)

        def by_rollout(values_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
            rollouts = steps.rollouts()
            group_R = torch.zeros_like(rollouts.steps_R) if rollouts.group_R is None else rollouts.group_R
            return sibling_weights(rollouts.mean(values_N.double()), group_R, temperature)[rollouts.number_N]

        def high(values_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
            return high_group(values_N, steps.rollouts(), high_share).double()

        def weight(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
            rollouts, high_N = steps.rollouts(), steps.stored[f"{name}.high"]
            in_high_N = rollouts.sum(high_N)[rollouts.number_N]
            in_low_N = rollouts.steps_R[rollouts.number_N] - in_high_N
            own_N = torch.where(in_low_N > 0, high_weight, 1.0) / in_high_N
            other_N = (1.0 - high_weight) / in_low_N.clamp_min(1.0)
            return steps.stored[f"{name}.rollout"] * torch.where(high_N > 0, own_N, other_N)

        def share_in_high(values_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
            total = values_N.double().sum()
            inside = (values_N.double() * steps.stored[f"{name}.high"]).sum()
            return torch.where(total > 0, inside / total, 0.0).expand(len(values_N))

        self.name = name
        self.stats = (
            Stat(f"{name}.advantage", part, unchanged),
            Stat(f"{name}.rollout", part, by_rollout, groups=True),
            Stat(f"{name}.high", part, high),
            Stat(f"{name}.weight", part, weight, groups=True),
            Stat(f"{name}.high_share", part, share_in_high),
        )

    def weight(self) -> Weight:
        """The weight of each step; all of a prompt's add up to 1."""

        def value(context: Context, view: str) -> Tensor:
            return context.steps.stored[f"{self.name}.weight"].to(context.student_logp_N.dtype)

        return Weight(f"{self.name} weight", value, stats=self.stats)

    def high(self) -> Weight:
        """1 in the high group, 0 elsewhere, to watch."""

        def value(context: Context, view: str) -> Tensor:
            return context.steps.stored[f"{self.name}.high"]

        return Weight(f"{self.name} high", value)

    def without_advantage(self) -> Quantity:
        """1 at tokens whose advantage is 0, to watch."""

        def value(context: Context, view: str) -> Tensor:
            return (context.steps.stored[f"{self.name}.advantage"] == 0).double()

        return Quantity(f"{self.name} without", value)
