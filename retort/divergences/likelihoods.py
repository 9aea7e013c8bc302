"""ALM's divergence between the likelihoods of units. Axis letters: see `retort.core`; F as in `Units`."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SPANS
from retort.core.parts import Divergence
from retort.divergences.kl import kl_values
from retort.errors import UserError


def unit_likelihood(
    tau: float = 100.0, divergence: Literal["forward_kl", "reverse_kl", "total_variation"] = "forward_kl"
) -> Divergence:
    r"""Divergence of two binary events, whether a unit is written or not: :math:`D(p_T^{1/\tau}, p_S^{1/\tau})`.

    p is the probability of the unit's tokens, and the event's is its tau-th root (Approximate Likelihood Matching). It
    depends on what was written only, and no ids need to be shared. Nats; total variation lies in [0, 1].

    Args:
        tau: The root, at least 1; without one (at 1) long units are all but impossible on both sides, and equal.
        divergence: D.

    Raises:
        UserError: tau is below 1.
    """
    if not tau >= 1 or math.isinf(tau):
        raise UserError(f"unit_likelihood: tau must be at least 1 and finite, not {tau}")

    def value(context: Context, view: str) -> Tensor:
        units = context.signal(view).units
        ours_F2, theirs_F2 = _event(units.sum(context.student_logp_N) / tau), _event(units.logp_F / tau)
        if divergence == "total_variation":
            found_F = (ours_F2[:, 0].exp() - theirs_F2[:, 0].exp()).abs()
        elif divergence == "forward_kl":
            found_F = kl_values(theirs_F2, ours_F2)
        else:
            found_F = kl_values(ours_F2, theirs_F2)
        return units.at_first(found_F)

    return Divergence(f"unit_likelihood({divergence}, tau {tau:g})", value, frozenset({SPANS}))


def _event(logp_F: Tensor) -> Tensor:
    """Log-probs [F, 2] of an event of log-prob `logp_F` and of its opposite, nats."""
    # A unit that is certain has a log-prob of 0 or, by rounding, above: its opposite's would be minus infinity or NaN.
    logp_F = logp_F.clamp_max(-torch.finfo(logp_F.dtype).eps)
    return torch.stack([logp_F, (-logp_F.expm1()).log()], -1)
