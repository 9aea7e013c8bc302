"""Weights by how far a teacher agrees with the direction that an outcome gives. Axis letters: see `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SAMPLED
from retort.core.parts import Advantage, Weight
from retort.core.schedules import Schedule
from retort.errors import UserError


def directed(delta_N: Tensor, advantage_N: Tensor, bound: float) -> Tensor:
    r""":math:`\mathrm{clip}(\exp(\mathrm{sign}(A)\,\delta), 1-\epsilon, 1+\epsilon)`, [N]; 1 where A is 0.

    Args:
        delta_N: log p_T - log p_old of the sampled token, nats; may be infinite.
        advantage_N: A, the advantage.
        bound: epsilon, the bound.
    """
    return (advantage_N.sign() * delta_N.clamp(-20.0, 20.0)).exp().clamp(1.0 - bound, 1.0 + bound)


def directed_ratio(
    advantage: Advantage, *, share: float | Schedule = 1.0, bound: float = 0.2, negative_only: bool = False
) -> Weight:
    r"""The weight :math:`(1-\lambda) + \lambda\,\mathrm{clip}(e^{\mathrm{sign}(A)\delta_t}, 1-\epsilon, 1+\epsilon)`.

    With :math:`\delta_t = \log p_T(y_t) - \log p_{old}(y_t)`. It scales the term whose advantage is A: a token counts
    for more where a teacher that knows the solution agrees with the direction of A. It is positive, so it never changes
    the sign of A, and lies between :math:`1 - \lambda\epsilon` and :math:`1 + \lambda\epsilon`. RLSD, arXiv 2604.03128.

    Args:
        advantage: A, the advantage of the term; where it is 0, the weight is 1.
        share: lambda, in [0, 1]; a schedule may change it during the run.
        bound: epsilon, in [0, 1).
        negative_only: Whether tokens with A > 0 keep the weight 1.

    Raises:
        UserError: A number is outside of its range.
    """
    if not 0.0 <= bound < 1.0:
        raise UserError(f"directed_ratio: bound must lie in [0, 1), not {bound:g}")
    if not callable(share) and not 0.0 <= share <= 1.0:
        raise UserError(f"directed_ratio: share must lie in [0, 1], not {share:g}")

    def value(context: Context, view: str) -> Tensor:
        advantage_N = advantage.value(context, view)
        part = context.clock.at(share)
        teacher_N, old_N = context.decided_logps(view)
        ratio_N = directed(teacher_N - old_N, advantage_N, bound)
        if negative_only:
            ratio_N = torch.where(advantage_N > 0, torch.ones_like(ratio_N), ratio_N)
        return (1.0 - part) + part * ratio_N

    name = "a schedule" if callable(share) else f"{share:g}"
    return Weight(
        f"directed_ratio({name}, bound {bound:g})",
        value,
        advantage.needs | {SAMPLED},
        advantage.also,
        advantage.stats,
        uses_old_logp=True,
    )
