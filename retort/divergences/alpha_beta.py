"""The alpha-beta divergence of ABKD, with the limits of its formula. Axis letters: `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import DENSE
from retort.core.parts import Divergence

#: Exponents (and their sum) below this count as 0: the formula divides by them, and the limit is this close to it.
_ZERO = 1e-6
#: Exponents (and their sum) below this are computed in float64, because the formula suffers from cancellation.
_SMALL = 0.1


def ab_values(teacher_logp_NV: Tensor, student_logp_NV: Tensor, alpha: float, beta: float) -> Tensor:
    r"""The divergence of each row of log-probs [N, V] -> [N].

    .. math:: -\frac{1}{\alpha\beta} \sum_v p_T^\alpha p_S^\beta - \frac{\alpha}{\alpha+\beta} p_T^{\alpha+\beta}
              - \frac{\beta}{\alpha+\beta} p_S^{\alpha+\beta}

    and where that is 0/0, its limits (the released code divides by alpha or beta where the limit has the square):

    .. math::
        \beta = 0: &\ \tfrac{1}{\alpha^2} \sum_v p_T^\alpha \ln\tfrac{p_T^\alpha}{p_S^\alpha}
                      - p_T^\alpha + p_S^\alpha \\
        \alpha = 0: &\ \tfrac{1}{\beta^2} \sum_v p_S^\beta \ln\tfrac{p_S^\beta}{p_T^\beta} - p_S^\beta + p_T^\beta \\
        \alpha + \beta = 0: &\ \tfrac{1}{\alpha^2} \sum_v \ln\tfrac{p_S^\alpha}{p_T^\alpha}
                             + \tfrac{p_T^\alpha}{p_S^\alpha} - 1 \\
        \alpha = \beta = 0: &\ \tfrac12 \sum_v (\ln p_S - \ln p_T)^2
    """
    kind = student_logp_NV.dtype
    if min(abs(alpha), abs(beta), abs(alpha + beta)) < _SMALL:
        teacher_logp_NV, student_logp_NV = teacher_logp_NV.double(), student_logp_NV.double()
    # An id that both rule out is no disagreement; its logarithms would give NaN from 0 * inf.
    no_t_NV, no_s_NV = (logp_NV == -torch.inf for logp_NV in (teacher_logp_NV, student_logp_NV))
    # The term of an id that one side rules out is finite only where its exponent and the sum are positive; else the
    # formula would subtract infinities.
    infinite_NV = torch.zeros_like(no_t_NV)
    if min(alpha, alpha + beta) < _ZERO:
        infinite_NV = infinite_NV | (no_t_NV & ~no_s_NV)
    if min(beta, alpha + beta) < _ZERO:
        infinite_NV = infinite_NV | (no_s_NV & ~no_t_NV)
    settled_NV = infinite_NV | (no_t_NV & no_s_NV)
    t_NV, s_NV = (logp_NV.masked_fill(settled_NV, 0.0) for logp_NV in (teacher_logp_NV, student_logp_NV))
    term_NV = _terms(t_NV, s_NV, alpha, beta).masked_fill(settled_NV, 0.0)
    return term_NV.masked_fill(infinite_NV, torch.inf).sum(-1).to(kind)


def _terms(t_NV: Tensor, s_NV: Tensor, alpha: float, beta: float) -> Tensor:
    no_alpha, no_beta, no_sum = (abs(number) < _ZERO for number in (alpha, beta, alpha + beta))
    if no_alpha and no_beta:
        return (s_NV - t_NV).square() / 2
    if no_beta:
        return _limit(alpha * t_NV, alpha * s_NV) / alpha**2
    if no_alpha:
        return _limit(beta * s_NV, beta * t_NV) / beta**2
    if no_sum:
        gap_NV = alpha * (t_NV - s_NV)
        return (gap_NV.expm1() - gap_NV) / alpha**2
    whole = alpha + beta
    mixed_NV = (alpha * t_NV + beta * s_NV).exp()
    apart_NV = alpha / whole * (whole * t_NV).exp() + beta / whole * (whole * s_NV).exp()
    return (apart_NV - mixed_NV) / (alpha * beta)


def _limit(one_NV: Tensor, other_NV: Tensor) -> Tensor:
    """The sum x ln(x / y) - x + y of numbers given by their logarithms; y where x is 0."""
    none_NV = one_NV == -torch.inf
    one = one_NV.masked_fill(none_NV, 0.0)
    return torch.where(none_NV, 0.0, one.exp() * (one - other_NV.masked_fill(none_NV, 0.0) - 1.0)) + other_NV.exp()


def alpha_beta(alpha: float = 0.5, beta: float = 0.5) -> Divergence:
    """The alpha-beta divergence (ABKD, arXiv 2505.04560): (1, 0) is forward KL, (0, 1) reverse KL.

    Args:
        alpha: Exponent of the teacher's probabilities; a larger one weighs ids of which the teacher is sure.
        beta: Exponent of the student's probabilities. Where an exponent or their sum is not positive, an id that one
            side rules out makes the divergence infinite.
    """

    def value(context: Context, view: str) -> Tensor:
        return ab_values(context.signal(view).logp_NV, context.student_logp_NV, alpha, beta)

    return Divergence(f"alpha_beta({alpha:g}, {beta:g})", value, frozenset({DENSE}))
