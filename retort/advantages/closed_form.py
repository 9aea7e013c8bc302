"""Minus a divergence in closed form, taken as an advantage: for study, since it teaches nothing in expectation."""

from __future__ import annotations

from torch import Tensor

from retort.core.context import Context
from retort.core.parts import Advantage, Divergence


def minus_divergence(divergence: Divergence) -> Advantage:
    r"""Minus a divergence, detached, as the advantage of what was decided, nats.

    It depends on the state alone and not on what was decided there, so its policy gradient has the mean
    :math:`-D \, E[\nabla \log p_S] = 0`: no direction, only variance. Use `pathwise` to learn from a divergence, or
    `log_ratio` for a policy gradient. It is offered because a paper prints it.

    Args:
        divergence: In closed form, D.
    """

    def value(context: Context, view: str) -> Tensor:
        return -divergence.value(context, view).detach()

    return Advantage(f"-{divergence.name}", value, divergence.needs, divergence.also, divergence.stats)
