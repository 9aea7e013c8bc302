"""The definition of the row statistics and their gradient: slow and simple, in float64 if the input is.

`retort.divergences.kl_values` and `jsd_values` define the same on log-probs; this package must not import them.

Axis letters: see `retort.core`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retort.kernels.rows import RowStatistics, Upstream, as_compute, check_logits, summed_by_id

__all__ = ["row_gradient", "row_statistics"]


def row_statistics(
    student_CV: Tensor,
    teacher_CV: Tensor | None = None,
    *,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    jsd_weight: float | None = None,
) -> RowStatistics:
    """Normalisers, entropies and divergences of each row, nats.

    Args:
        student_CV: Logits [C, V], any float dtype; -inf is an impossible id.
        teacher_CV: The teacher's logits, same shape; without them only the student's statistics are computed.
        student_scale: Factor of the student's logits (a model's scale over the temperature), > 0.
        teacher_scale: Factor of the teacher's logits.
        jsd_weight: Weight of the teacher in the mixture, 0 < w < 1; None for no JSD.

    Returns:
        Statistics in fp32, or float64 for float64 logits.

    Raises:
        ValueError: Shapes, scales or arguments that do not fit together.
        UserError: A JSD weight at or beyond the ends.
    """
    check_logits(student_CV, teacher_CV, student_scale, teacher_scale, jsd_weight)
    student_lse_C, student_logp_CV = _normalised(student_CV, student_scale)
    student_entropy_C = _where_finite(_entropy(student_logp_CV), student_lse_C)
    if teacher_CV is None:
        return RowStatistics(student_lse_C, student_entropy_C)
    teacher_lse_C, teacher_logp_CV = _normalised(teacher_CV, teacher_scale)
    jsd_C = mixture_kl_C = None
    if jsd_weight is not None:
        mixture_CV = _mixture(teacher_logp_CV, student_logp_CV, jsd_weight)
        mixture_kl_C = _where_finite(_kl(student_logp_CV, mixture_CV), student_lse_C, teacher_lse_C)
        jsd_C = (1.0 - jsd_weight) * mixture_kl_C + jsd_weight * _kl(teacher_logp_CV, mixture_CV)
    return RowStatistics(
        student_lse_C,
        student_entropy_C,
        teacher_lse_C,
        _where_finite(_entropy(teacher_logp_CV), teacher_lse_C),
        _where_finite(_kl(student_logp_CV, teacher_logp_CV), student_lse_C, teacher_lse_C),
        _where_finite(_kl(teacher_logp_CV, student_logp_CV), student_lse_C, teacher_lse_C),
        jsd_C,
        mixture_kl_C,
    )


def row_gradient(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    statistics: RowStatistics,
    *,
    lse_C: Tensor | None = None,
    entropy_C: Tensor | None = None,
    reverse_C: Tensor | None = None,
    forward_C: Tensor | None = None,
    jsd_C: Tensor | None = None,
    jsd_weight: float | None = None,
    ids_CK: Tensor | None = None,
    ids_grad_CK: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    out_CV: Tensor | None = None,
) -> Tensor:
    r"""Gradient of a function of the row statistics with respect to the student's unscaled logits.

    With p, q the probabilities of student and teacher and m = w q + (1 - w) p, each statistic's own gradient with
    respect to a scaled logit is

    .. math::
        \text{lse}: p \qquad \text{entropy}: -p(\log p + H) \qquad \text{forward}: p - q \qquad
        \text{reverse}: p(\log\tfrac pq - KL) \qquad \text{jsd}: (1-w)\,p(\log\tfrac pm - KL(p \Vert m))

    and that of an id's log-prob is onehot - p. A term whose coefficient is 0 is 0 even where its statistic is infinite;
    with another coefficient an infinite reverse KL makes the row's gradient NaN.

    Args:
        student_CV: The student's logits [C, V] that the statistics were computed from.
        teacher_CV: The teacher's logits, same shape; None if no divergence takes part.
        statistics: The result of `row_statistics` for them.
        lse_C: Derivative of the loss by the student's log-sum-exp, [C]; None for 0, like all that follow.
        entropy_C: Derivative by the student's entropy.
        reverse_C: Derivative by KL(student || teacher).
        forward_C: Derivative by KL(teacher || student).
        jsd_C: Derivative by the Jensen-Shannon divergence.
        jsd_weight: As in `row_statistics`; goes with `jsd_C`.
        ids_CK: int64 ids [C, K] whose log-probs the loss reads; an id that occurs twice counts twice.
        ids_grad_CK: Derivatives [C, K] of the loss by those log-probs.
        student_scale: As in `row_statistics`.
        teacher_scale: As in `row_statistics`.
        out_CV: Tensor for the result; its dtype is that of the result. It may be `student_CV` itself. None for a new
            tensor in the dtype of the logits.

    Returns:
        `out_CV`, or the new tensor.

    Raises:
        ValueError: Shapes or arguments that do not fit together.
    """
    check_logits(student_CV, teacher_CV, student_scale, teacher_scale, jsd_weight)
    upstream = Upstream(lse_C, entropy_C, reverse_C, forward_C, jsd_C, jsd_weight, ids_CK, ids_grad_CK)
    upstream.check(student_CV, teacher_CV, statistics)
    logp_CV = as_compute(student_CV) * student_scale - statistics.student_lse_C[:, None]
    logq_CV = None
    if teacher_CV is not None and statistics.teacher_lse_C is not None:
        logq_CV = as_compute(teacher_CV) * teacher_scale - statistics.teacher_lse_C[:, None]
    slope_CV = _slope(logp_CV, logq_CV, statistics, upstream)
    if ids_CK is not None and ids_grad_CK is not None:
        at_CK = slope_CV.gather(1, ids_CK) + summed_by_id(ids_CK, ids_grad_CK.to(slope_CV.dtype), slope_CV.shape[1])
        slope_CV = slope_CV.scatter(1, ids_CK, at_CK)
    slope_CV = slope_CV * student_scale
    return slope_CV.to(student_CV.dtype) if out_CV is None else out_CV.copy_(slope_CV)


def _normalised(logits_CV: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [C] and log-probs [C, V] of scaled logits."""
    scaled_CV = as_compute(logits_CV) * scale
    lse_C = scaled_CV.logsumexp(-1)
    lse_C = lse_C.masked_fill(lse_C == math.inf, math.nan)
    return lse_C, scaled_CV - lse_C[:, None]


def _where_finite(values_C: Tensor, *lse_C: Tensor) -> Tensor:
    """Sets values to NaN where a normaliser is not finite: there is no distribution then."""
    for normaliser_C in lse_C:
        values_C = values_C.masked_fill(~normaliser_C.isfinite(), math.nan)
    return values_C


def _entropy(logp_CV: Tensor) -> Tensor:
    return -(logp_CV.exp() * logp_CV.clamp_min(torch.finfo(logp_CV.dtype).min)).sum(-1)


def _kl(p_logp_CV: Tensor, q_logp_CV: Tensor) -> Tensor:
    """KL(P || Q): an id that P rules out adds 0, one that only Q rules out makes it infinite, and nothing NaN."""
    possible_CV, banned_CV = p_logp_CV > -math.inf, q_logp_CV == -math.inf
    gap_CV = torch.where(possible_CV & ~banned_CV, p_logp_CV - q_logp_CV, 0.0)
    return torch.where(possible_CV & banned_CV, math.inf, p_logp_CV.exp() * gap_CV).sum(-1)


def _mixture(teacher_logp_CV: Tensor, student_logp_CV: Tensor, teacher_weight: float) -> Tensor:
    """Log-probs of w q + (1 - w) p."""
    return torch.logaddexp(teacher_logp_CV + math.log(teacher_weight), student_logp_CV + math.log1p(-teacher_weight))


def _slope(logp_CV: Tensor, logq_CV: Tensor | None, statistics: RowStatistics, upstream: Upstream) -> Tensor:
    """Gradient with respect to the scaled logits, without the onehot of the ids."""
    p_CV = logp_CV.exp()
    possible_CV = p_CV != 0
    slope_CV = torch.zeros_like(logp_CV)
    pull_C = upstream.pull_C
    if pull_C is not None:
        slope_CV = slope_CV + pull_C[:, None] * p_CV
    if upstream.entropy_C is not None:
        term_CV = -p_CV * (logp_CV + statistics.student_entropy_C[:, None])
        slope_CV = slope_CV + upstream.entropy_C[:, None] * term_CV.where(possible_CV, 0.0)
    if logq_CV is None:
        return slope_CV
    if upstream.forward_C is not None:
        slope_CV = slope_CV + upstream.forward_C[:, None] * (p_CV - logq_CV.exp())
    if upstream.reverse_C is not None and statistics.reverse_kl_C is not None:
        reverse_C = statistics.reverse_kl_C
        gap_CV = (logp_CV - logq_CV).where(possible_CV & (logq_CV != -math.inf), 0.0)
        term_CV = p_CV * (gap_CV - reverse_C.masked_fill(reverse_C == math.inf, math.nan)[:, None])
        slope_CV = slope_CV + (upstream.reverse_C[:, None] * term_CV).where(upstream.reverse_C[:, None] != 0, 0.0)
    if upstream.jsd_C is not None and upstream.jsd_weight is not None and statistics.mixture_kl_C is not None:
        weight = upstream.jsd_weight
        gap_CV = (logp_CV - _mixture(logq_CV, logp_CV, weight)).where(possible_CV, 0.0)
        term_CV = (1.0 - weight) * p_CV * (gap_CV - statistics.mixture_kl_C[:, None])
        slope_CV = slope_CV + upstream.jsd_C[:, None] * term_CV
    return slope_CV
