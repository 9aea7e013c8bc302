"""Noise of a policy gradient on the sampled token, computed without sampling. Axis letters: see `retort.core`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.losses import times
from retort.core.needs import DENSE, Need
from retort.core.parts import Baseline, Quantity


def gradient_variance(baseline: Baseline | None = None, *, coef: float = 1.0) -> Quantity:
    r"""Total variance over the sampled token of one step's gradient in the student's logits, nats squared.

    .. math:: \sum_v p_v A_v^2 \lVert g_v \rVert^2 - \Big\lVert \sum_v p_v A_v g_v \Big\rVert^2, \quad
              g_v = \nabla_z \log p_S(v), \quad A_v = \log p_T(v) - \log p_S(v) - c\,b

    It is exact, because a step has only V tokens. The second part, the expectation, is the gradient of the reverse KL
    and the same for every baseline. It is infinite where the teacher rules out a token that the student may generate.
    It is that of one step at its prefix, of the live student, without importance ratio or clip, and before the step's
    weight; how the steps of a batch add up it does not say.

    Args:
        baseline: b, of the same view; None for the plain log-ratio.
        coef: c, the factor of the baseline.
    """

    def value(context: Context, view: str) -> Tensor:
        student, teacher = context.student, context.signal(view).distribution
        may_NV = student.logp_CV > -math.inf
        banned_NV = may_NV & (teacher.logp_CV == -math.inf)
        advantage_NV = torch.where(may_NV & ~banned_NV, teacher.logp_CV - student.logp_CV, 0.0)
        if baseline is not None:
            advantage_NV = advantage_NV - times(coef, baseline.value(context, view).detach())[:, None]

        def total(values_NV: Tensor) -> Tensor:
            return context.student.shard.sum(values_NV.sum(-1))

        p_NV = student.p_CV
        square_NV = 1.0 - 2.0 * p_NV + total(p_NV.square())[:, None]
        # A ruled-out id makes the baseline infinite, too; the resulting NaN is replaced below.
        mean_N = total(p_NV * advantage_NV)
        expected_N = total((p_NV * (advantage_NV - mean_N[:, None])).square())
        found_N = (total(p_NV * advantage_NV.square() * square_NV) - expected_N).clamp_min(0.0)
        return found_N.masked_fill(total(banned_NV.to(p_NV.dtype)) > 0, math.inf)

    name = "gradient_variance" if baseline is None else f"gradient_variance({baseline.name}, {coef:g})"
    needs = baseline.needs if baseline is not None else frozenset[Need]()
    # DENSE comes first: a baseline's own, which spans may meet, would be kept instead of an equal one after it.
    return Quantity(name, value, frozenset({DENSE}) | needs)
