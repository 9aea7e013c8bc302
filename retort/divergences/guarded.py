"""Divergences with a guard: a cap, and a hinge against a wrong example. Axis letters: `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SAMPLED
from retort.core.parts import Divergence, Stat
from retort.core.steps import Clock, Steps
from retort.core.steps import quantile as at
from retort.errors import UserError


def capped(divergence: Divergence, cap: float, *, quantile: bool = False) -> Divergence:
    r""":math:`\min(D_t, c)`; where D is at c or above, the gradient is 0.

    Args:
        divergence: D, summed over the vocabulary; the cap applies to that sum.
        cap: c, nats; infinity changes nothing. With `quantile`, c is this quantile of D over the batch, and is stored
            as `cap`.
        quantile: See `cap`.

    Raises:
        UserError: The cap is not positive, or is no quantile.
    """
    if not cap > 0 or (quantile and cap > 1):
        raise UserError(f"capped: the cap must be positive, and at most 1 as a quantile; it is {cap}")

    def finish(values_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        found = at(values_N.double(), cap) if len(values_N) else values_N.new_zeros(())
        return found.to(values_N.dtype).expand_as(values_N)

    def value(context: Context, view: str) -> Tensor:
        value_N = divergence.value(context, view)
        cap_N = context.steps.stored["cap"].to(value_N.dtype) if quantile else torch.full_like(value_N, cap)
        return torch.where(value_N < cap_N, value_N, cap_N.detach())

    stats = (Stat("cap", divergence, finish),) if quantile else ()
    name = f"capped({divergence.name}, {'quantile ' if quantile else ''}{cap:g})"
    return Divergence(name, value, divergence.needs, divergence.also, (*divergence.stats, *stats))


def contrastive_hinge(margin: float = 0.5, *, wrong: str = "wrong") -> Divergence:
    r"""A hinge, nats: the student shall be nearer to the teacher with the right example than to the wrong one.

    .. math:: \max(0,\ m + |\log p_S - \log p_T| - |\log p_S - \log p_W|)

    at the sampled token; one that a teacher rules out counts as 100 nats below the student's. UniSD, arXiv 2605.06597.
    It is not 0 at :math:`p_S = p_T` unless the wrong one is m away.

    Args:
        margin: m, nats.
        wrong: View of the teacher that is shown the wrong example.
    """

    def value(context: Context, view: str) -> Tensor:
        student_N = context.live_logp_N(view)
        good_N, bad_N = context.finite_logp_N(view), context.finite_logp_N(wrong)
        hinge_N = (margin + (student_N - good_N).abs() - (student_N - bad_N).abs()).clamp_min(0.0)
        return context.signal(view).first_only(hinge_N)

    return Divergence(f"contrastive_hinge({margin:g})", value, frozenset({SAMPLED}), also={wrong: frozenset({SAMPLED})})
