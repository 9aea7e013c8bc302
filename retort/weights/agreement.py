"""Weights by the agreement of a self-teacher with itself in other contexts. Axis letters: see `retort.core`.

UniSD, arXiv 2605.06597; the maps from disagreement to weight are those of its code, since the paper gives none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SAMPLED
from retort.core.parts import Quantity, Stat, Weight, unchanged
from retort.core.steps import Clock, Steps, quantile
from retort.errors import UserError

Level = Literal["token", "sequence"]
Spread = Literal["variance", "range"]


def disagreement(logp_KN: Tensor, spread: Spread, level: Level) -> Tensor:
    """Spread of K log-probs of the same token or rollout, [N].

    Args:
        logp_KN: Log-probs [K, N], nats.
        spread: `variance` (of a sample for tokens, of K numbers for sequences, as in the code) or `range`.
        level: Whether the numbers are of tokens or of sequences.
    """
    if spread == "range":
        return logp_KN.amax(0) - logp_KN.amin(0)
    return logp_KN.var(0, correction=1 if level == "token" else 0)


def token_weights(apart_N: Tensor, gamma: float) -> Tensor:
    r""":math:`\max(0.01, 1 / (1 + \gamma \hat d_t))`, with d over its 95th percentile, at most 10, [N]."""
    usual = quantile(apart_N, 0.95).clamp_min(torch.finfo(apart_N.dtype).tiny)
    return (1.0 / (1.0 + gamma * (apart_N / usual).clamp_max(10.0))).clamp_min(0.01)


def sequence_weights(apart_R: Tensor, gamma: float) -> Tensor:
    r""":math:`\max(10^{-6}, \exp(-\gamma d))`, [R]."""
    return (-gamma * apart_R).exp().clamp_min(1e-6)


def agreement(
    views: Sequence[str], *, level: Level, gamma: float, spread: Spread = "variance", name: str = "agreement"
) -> Weight:
    """A larger weight where the auxiliary views give the sampled token (or the rollout) nearly the same log-prob.

    Args:
        views: The auxiliary views, at least two.
        level: Each token has its own weight, or each rollout, by the mean over its tokens.
        gamma: Strength; 0 for a weight of 1.
        spread: See `disagreement`.
        name: Name of the stored values: `<name>`, and `<name>.apart`, the disagreement.

    Raises:
        UserError: There are fewer than two views, or gamma is negative.
    """
    if len(views) < 2:
        raise UserError(f"agreement needs at least 2 contexts to compare, not {len(views)}")
    if gamma < 0:
        raise UserError(f"agreement: gamma must not be negative, but is {gamma}")
    also = {view: frozenset({SAMPLED}) for view in views}

    def logp(of: str) -> Quantity:
        def value(context: Context, view: str) -> Tensor:
            return context.finite_logp_N(of)

        # Each statistic needs all views, so that a rollout for which one of them has no context is left out.
        return Quantity(f"{of}_logp", value, also=also)

    def apart(last_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        logp_KN = torch.stack([*(steps.stored[f"{name}.{view}"] for view in views[:-1]), last_N]).double()
        if level == "token":
            return disagreement(logp_KN, spread, level)
        rollouts = steps.rollouts()
        mean_KR = torch.stack([rollouts.mean(logp_N) for logp_N in logp_KN])
        return disagreement(mean_KR, spread, level)[rollouts.number_N]

    def weights(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
        apart_N = steps.stored[f"{name}.apart"]
        return token_weights(apart_N, gamma) if level == "token" else sequence_weights(apart_N, gamma)

    stats = (
        *(Stat(f"{name}.{view}", logp(view), unchanged) for view in views[:-1]),
        Stat(f"{name}.apart", logp(views[-1]), apart),
        Stat(name, logp(views[-1]), weights),
    )

    def value(context: Context, view: str) -> Tensor:
        return context.steps.stored[name].to(context.student_logp_N.dtype)

    return Weight(f"{name}({level}, {len(views)} views)", value, stats=stats)
