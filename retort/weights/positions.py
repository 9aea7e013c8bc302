"""Weights by the position of a token in its completion. Axis letters: see `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.parts import Stat, Weight
from retort.core.steps import Clock, Steps
from retort.errors import UserError


def after(skip: int) -> Weight:
    """0 at the first `skip` tokens of a completion, 1 from there on.

    It counts only tokens that are in the loss, over all turns of the student.
    """
    if skip < 0:
        raise UserError(f"skip must be at least 0 tokens, not {skip}")

    def finish(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
        return (steps.position_N >= skip).double()

    return _stored(Stat(f"after({skip})", None, finish))


def position_weights(u: Tensor, *, min_weight: float, midpoint: float, width: float) -> Tensor:
    r""":math:`a_{min} + (1 - a_{min})\,\sigma((u - \tau) / s)` of relative positions, of the same shape.

    Args:
        u: Relative positions, 0 at the start of a completion and 1 at its end.
        min_weight: a_min, the least weight.
        midpoint: tau, the relative position of half the rise.
        width: s, the width of the rise.
    """
    return min_weight + (1.0 - min_weight) * torch.sigmoid((u - midpoint) / width)


def late(min_weight: float = 0.25, midpoint: float = 0.3, width: float = 0.1) -> Weight:
    r"""A larger weight for later tokens: `position_weights` of :math:`u_t = (t - 0.5) / T`, t = 1..T in the completion.

    It depends on the relative position alone: neither on padding nor on the batch. It is not normalised to a mean of 1.
    From PW-OPSD, arXiv 2605.21606.

    Args:
        min_weight: a_min, in [0, 1]; 1 weighs all tokens alike.
        midpoint: tau, the relative position of half the rise.
        width: s > 0, the width of the rise, in relative positions.
    """
    if not 0.0 <= min_weight <= 1.0:
        raise UserError(f"min_weight must lie in [0, 1], not {min_weight}")
    if not width > 0:
        raise UserError(f"width must be positive, not {width}; a very small one makes a step at the midpoint")

    def finish(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
        rollouts = steps.rollouts()
        steps_N = rollouts.steps_R[rollouts.number_N].double()
        u_N = (steps.position_N.double() + 0.5) / steps_N
        return position_weights(u_N, min_weight=min_weight, midpoint=midpoint, width=width)

    return _stored(Stat(f"late({min_weight:g}, {midpoint:g}, {width:g})", None, finish))


def _stored(stat: Stat) -> Weight:
    def value(context: Context, view: str) -> Tensor:
        return context.steps.stored[stat.name].to(context.student_logp_N.dtype)

    return Weight(stat.name, value, stats=(stat,))
