"""Kullback-Leibler divergences, exact or on the teacher's top-k. Axis letters: see `retort.core`.

The exact ones only forward to `Distribution.reverse_kl` and `Distribution.forward_kl` in `retort/core/distribution.py`:
the gradients are there, and the values in `_kl`, which they call. `retort.kernels` computes the same numbers on a
GPU. `kl_values` below is the definition, on log-probs, that the tests hold them to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import POLICY, Need
from retort.core.parts import Divergence
from retort.errors import UserError


@dataclass(frozen=True)
class Support:
    """The ids that a divergence sums over: the whole vocabulary (`top` is None), or the teacher's `top` most likely.

    Attributes:
        top: Number of ids.
        renormalised: Whether the teacher's probabilities of them are divided by their sum.
    """

    top: int | None = None
    renormalised: bool = True


def full() -> Support:
    """The whole vocabulary."""
    return Support()


def teacher_top(k: int, *, renormalised: bool = True) -> Support:
    """The teacher's `k` most likely ids (k at or above the vocabulary means all of it)."""
    if k < 1:
        raise UserError(f"teacher_top: k must be at least 1, not {k}")
    return Support(k, renormalised)


def kl_values(p_logp_NV: Tensor, q_logp_NV: Tensor) -> Tensor:
    """KL(P || Q) per row, nats, of log-probs [N, V] -> [N]; differentiable in both. The definition.

    An id that P rules out (-inf) contributes exactly 0, whatever Q is. An id that only Q rules out makes the divergence
    infinite, and the result is infinity, never NaN, even where P's probability underflows. Q need not sum to one over
    the ids given (a support).
    """
    possible_NV = p_logp_NV > -math.inf
    # Replaced before the product on both sides: -inf * 0 would be NaN in the value and, worse, in the gradient, where
    # it would reach even a step whose weight is 0.
    p_NV = p_logp_NV.masked_fill(~possible_NV, 0.0)
    q_NV = q_logp_NV.masked_fill(~possible_NV | (q_logp_NV == -math.inf), 0.0)
    term_NV = torch.where(possible_NV, p_NV.exp() * (p_NV - q_NV), 0.0)
    return torch.where(possible_NV & (q_logp_NV == -math.inf), math.inf, term_NV).sum(-1)


def forward_kl(support: Support | None = None) -> Divergence:
    r"""Forward KL, mode covering: :math:`D_{KL}(p_T \Vert p_S)`, nats; over the whole vocabulary, or of two Gaussians.

    With `teacher_top(k)` the teacher is renormalised inside its top-k while the student keeps its full-vocabulary
    softmax (EOPD, arXiv 2603.07079): the gradient with respect to a student logit is :math:`p_S - \tilde p_T`, so
    probability outside the k ids is pushed down, and the minimum is the truncated teacher, not the teacher. Not
    renormalised, value and gradient are those times the teacher's mass on the k ids, but for a constant in the value,
    which may be below 0.
    """
    chosen = full() if support is None else support
    top = chosen.top
    if top is None:

        def exact(context: Context, view: str) -> Tensor:
            return context.policy.forward_kl(context.signal(view).policy)

        return Divergence("forward_kl", exact, frozenset({POLICY}))

    def truncated(context: Context, view: str) -> Tensor:
        ids_NK, teacher_logp_NK = context.signal(view).topk(top)
        kept_logp_NK = teacher_logp_NK.log_softmax(-1) if chosen.renormalised else teacher_logp_NK
        return kl_values(kept_logp_NK, context.student.logp_at(ids_NK))

    how = "" if chosen.renormalised else ", not renormalised"
    return Divergence(f"forward_kl(teacher top-{top}{how})", truncated, frozenset({Need("topk", top)}))


def reverse_kl() -> Divergence:
    r"""Reverse KL, mode seeking: :math:`D_{KL}(p_S \Vert p_T)`, nats; over all ids, or of two Gaussians."""

    def exact(context: Context, view: str) -> Tensor:
        return context.policy.reverse_kl(context.signal(view).policy)

    return Divergence("reverse_kl", exact, frozenset({POLICY}))
