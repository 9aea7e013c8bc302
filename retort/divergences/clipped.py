r"""Divergences whose entries, one per token and id, are clipped from above. Axis letters: see `retort.core`.

OPSD (arXiv 2601.18734, its released code since March 2026) caps the contribution of an id to the divergence of a
token, so that a few tokens of style do not make up the loss. The result is no longer a divergence. With U the ids that
are not clipped, the forward one has the gradient

.. math:: \frac{\partial \ell}{\partial z_v} = p_S(v) \sum_{u \in U} p_T(u) - p_T(v)\,[v \in U]

so it may be negative, and a clipped id is not ignored but pushed *down*: just those ids that the teacher wants much
more than the student. Of two ids with p_T = 0.9 and kappa = 0.05, a student at p_S = 0.86 moves to the teacher and one
at 0.84 leaves it for good. The clip presumes a teacher that is near, such as the student itself. Watch `clipped_mass`,
the share of the teacher's probability that is clipped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.needs import DENSE, Need
from retort.core.parts import Divergence, Quantity
from retort.divergences.jsd import jsd
from retort.divergences.kl import Support, forward_kl, reverse_kl
from retort.divergences.mixture import mixture
from retort.errors import UserError


def _entries(p_logp_NV: Tensor, q_logp_NV: Tensor) -> Tensor:
    """The contribution of each id to KL(P || Q), nats, [N, V]: 0 where P rules it out, infinity where only Q does."""
    possible_NV, banned_NV = p_logp_NV > -math.inf, q_logp_NV == -math.inf
    p_NV = p_logp_NV.masked_fill(~possible_NV, 0.0)
    q_NV = q_logp_NV.masked_fill(~possible_NV | banned_NV, 0.0)
    term_NV = torch.where(possible_NV, p_NV.exp() * (p_NV - q_NV), 0.0)
    return torch.where(possible_NV & banned_NV, math.inf, term_NV)


def _of_both(teacher_NV: Tensor, student_NV: Tensor, w: float) -> Tensor:
    """Each id's part of the generalised Jensen-Shannon divergence, and at its ends of the two KLs, nats, [N, V]."""
    if w == 0.0:
        return _entries(teacher_NV, student_NV)
    if w == 1.0:
        return _entries(student_NV, teacher_NV)
    mixture_NV = mixture(teacher_NV, student_NV, w)
    return w * _entries(teacher_NV, mixture_NV) + (1.0 - w) * _entries(student_NV, mixture_NV)


def clipped_values(
    teacher_logp_NV: Tensor, student_logp_NV: Tensor, clip: float, teacher_weight: float = 0.0
) -> Tensor:
    """The clipped divergence per row, nats, of log-probs [N, V] -> [N]; differentiable. The definition.

    Args:
        teacher_logp_NV: The teacher's log-probs, nats.
        student_logp_NV: The student's log-probs, nats.
        clip: kappa, nats, the largest entry.
        teacher_weight: w of the generalised Jensen-Shannon divergence; 0 is the forward KL, 1 the reverse one.
    """
    entry_NV = _of_both(teacher_logp_NV, student_logp_NV, teacher_weight)
    return torch.where(entry_NV > clip, clip, entry_NV).sum(-1)


def clipped(clip: float | None = 0.05, teacher_weight: float = 0.0, support: Support | None = None) -> Divergence:
    r"""A divergence with its entries clipped from above: :math:`\sum_v \min(d_v, \kappa)`, nats. See this module.

    Args:
        clip: kappa, nats. None for no clip: then it is the plain forward KL, Jensen-Shannon divergence or reverse KL.
        teacher_weight: w of the generalised Jensen-Shannon divergence, on the teacher. 0 is the forward KL, where
                :math:`d_v = p_T(v) \log(p_T(v)/p_S(v))`, and 1 the reverse one. These ends are the two KLs; the limits
                there would be 0.
        support: None for the whole vocabulary, or `teacher_top(k)`, both sides renormalised on it.

    Raises:
        UserError: A clip that is not positive, or a weight outside of [0, 1].
    """
    _check(clip, teacher_weight)
    top = None if support is None else support.top
    cap = math.inf if clip is None else clip
    name = f"clipped({'none' if clip is None else f'{clip:g}'}, teacher_weight={teacher_weight:g})"
    if top is not None:

        def truncated(context: Context, view: str) -> Tensor:
            ids_NK, teacher_NK = context.signal(view).topk(top)
            student_NK = context.student.logp_at(ids_NK).log_softmax(-1)
            return clipped_values(teacher_NK.log_softmax(-1), student_NK, cap, teacher_weight)

        return Divergence(f"{name}, teacher top-{top}", truncated, frozenset({Need("topk", top)}))
    if clip is None:
        plain = {0.0: forward_kl, 1.0: reverse_kl}.get(teacher_weight, lambda: jsd(teacher_weight))
        return plain()

    def exact(context: Context, view: str) -> Tensor:
        return context.student.of_entries(*_cut(context.student, context.signal(view).distribution, clip, w=w)[:2])

    w = teacher_weight
    return Divergence(name, exact, frozenset({DENSE}))


def clipped_mass(clip: float | None = 0.05, teacher_weight: float = 0.0, support: Support | None = None) -> Quantity:
    """Share of the teacher's probability on ids whose entry is clipped, between 0 and 1.

    Args:
        clip: As in `clipped`; None clips nothing.
        teacher_weight: As in `clipped`.
        support: As in `clipped`, the probability renormalised on it.
    """
    _check(clip, teacher_weight)
    top = None if support is None else support.top
    cap = math.inf if clip is None else clip

    def exact(context: Context, view: str) -> Tensor:
        teacher = context.signal(view).distribution
        over_CV = _cut(context.student, teacher, cap, teacher_weight)[2]
        return context.student.shard.sum((teacher.p_CV * over_CV).sum(-1))

    if top is None:
        return Quantity("clipped_mass", exact, frozenset({DENSE}))

    def truncated(context: Context, view: str) -> Tensor:
        ids_NK, teacher_NK = context.signal(view).topk(top)
        teacher_NK = teacher_NK.log_softmax(-1)
        student_NK = context.student.logp_at(ids_NK).detach().log_softmax(-1)
        return (teacher_NK.exp() * (_of_both(teacher_NK, student_NK, teacher_weight) > cap)).sum(-1)

    return Quantity("clipped_mass", truncated, frozenset({Need("topk", top)}))


def _cut(student: Distribution, teacher: Distribution, clip: float, w: float) -> tuple[Tensor, Tensor, Tensor]:
    """Entries clipped at `clip`, their derivatives by the student's log-prob, and where they are clipped, [C, V]."""
    t_CV, s_CV = teacher.logp_CV, student.logp_CV
    if w == 0.0:
        value_CV, slope_CV = teacher.p_CV * (t_CV - s_CV), -teacher.p_CV
    elif w == 1.0:
        gap_CV = s_CV - t_CV
        value_CV, slope_CV = student.p_CV * gap_CV, student.p_CV * (gap_CV + 1.0)
    else:
        mixture_CV = torch.logaddexp(t_CV + math.log(w), s_CV + math.log1p(-w))
        slope_CV = (1.0 - w) * student.p_CV * (s_CV - mixture_CV)
        value_CV = w * teacher.p_CV * (t_CV - mixture_CV) + slope_CV
    if not bool(value_CV.isfinite().all()):
        value_CV, slope_CV = _with_banned(value_CV, slope_CV, t_CV, s_CV, w)
    over_CV = value_CV > clip
    return value_CV.clamp_max_(clip), slope_CV.masked_fill_(over_CV, 0.0), over_CV


def _with_banned(value_CV: Tensor, slope_CV: Tensor, t_CV: Tensor, s_CV: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """The same where a side rules an id out (-inf); a row that is no distribution stays NaN."""
    no_t_CV, no_s_CV = t_CV == -math.inf, s_CV == -math.inf
    if w == 0.0 or w == 1.0:
        nothing_CV, infinite_CV = (no_t_CV, no_s_CV) if w == 0.0 else (no_s_CV, no_t_CV)
        value_CV = value_CV.masked_fill(infinite_CV, math.inf).masked_fill(nothing_CV, 0.0)
        return value_CV, slope_CV.masked_fill(infinite_CV | nothing_CV, 0.0)
    # One side rules it out: the other's logarithm to the mixture is minus that of its own weight.
    value_CV = torch.where(no_t_CV, slope_CV, value_CV)
    value_CV = torch.where(no_s_CV, w * t_CV.exp() * -math.log(w), value_CV)
    return value_CV.masked_fill(no_t_CV & no_s_CV, 0.0), slope_CV.masked_fill(no_s_CV, 0.0)


def _check(clip: float | None, teacher_weight: float) -> None:
    if clip is not None and not clip > 0:
        raise UserError(f"clipped: clip must be positive, or none for no clip; it is {clip}")
    if not 0.0 <= teacher_weight <= 1.0:
        raise UserError(f"clipped: teacher_weight must lie in [0, 1], not {teacher_weight}")
