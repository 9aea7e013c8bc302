"""Divergences on a few ids per step: the choice of support, and the treatment of the rest. Axes: `retort.core`.

K here counts the ids of a support; `inside_NK` marks those that belong to it and are not duplicates.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import Need, logp_at
from retort.core.parts import Divergence
from retort.divergences.jsd import jsd_values
from retort.divergences.kl import kl_values
from retort.errors import UserError

SupportChoice = Literal["student", "teacher", "union", "intersection", "symmetric_difference"]
Tail = Literal["renormalised", "bucket"]
Weighting = Literal["student", "teacher", "uniform"]


def student_topk(context: Context, view: str, k: int) -> tuple[Tensor, Tensor]:
    """The student's `k` most likely ids [N, K] and their log-probs under it now, nats [N, K], both detached.

    Where the view's teacher scored a list of ids, they are those: the student's top-k when the batch was scored, which
    may be outdated after several updates. A teacher with the whole distribution can score any ids, so they are the
    current student's.
    """
    ids_NK = context.signal(view).candidates(k)
    return context.student.topk(k) if ids_NK is None else (ids_NK, context.student.logp_at(ids_NK).detach())


def support_ids(context: Context, view: str, support: SupportChoice, k: int) -> tuple[Tensor, Tensor]:
    """Ids [N, K], detached, and which of them belong to the support [N, K]; every id at most once."""
    if support == "teacher":
        theirs_NK, _ = context.signal(view).topk(k)
        return theirs_NK, torch.ones_like(theirs_NK, dtype=torch.bool)
    ours_NK, _ = student_topk(context, view, k)
    if support == "student":
        return ours_NK, torch.ones_like(ours_NK, dtype=torch.bool)
    theirs_NK, _ = context.signal(view).topk(k)
    shared_NKK = ours_NK[:, :, None] == theirs_NK[:, None, :]
    if support == "intersection":
        return ours_NK, shared_NKK.any(2)
    fresh_NK = ~shared_NKK.any(1)  # ids of the teacher that are not among the student's
    mine_NK = torch.ones_like(ours_NK, dtype=torch.bool) if support == "union" else ~shared_NKK.any(2)
    return torch.cat([ours_NK, theirs_NK], 1), torch.cat([mine_NK, fresh_NK], 1)


def _logps(context: Context, view: str, support: SupportChoice, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, log-probs of student (live) and teacher on the support (-inf outside of it), and the mask of the support."""
    ids_NK, inside_NK = support_ids(context, view, support, k)
    teacher_NK = context.signal(view).topk(k)[1] if support == "teacher" else context.signal(view).logp_at(ids_NK)
    student_NK = context.student.logp_at(ids_NK)
    student_NK, teacher_NK = (logp_NK.masked_fill(~inside_NK, -math.inf) for logp_NK in (student_NK, teacher_NK))
    return ids_NK, student_NK, teacher_NK, inside_NK


def topk_kl(
    direction: Literal["reverse", "forward"] = "reverse",
    k: int = 16,
    support: SupportChoice = "student",
    tail: Tail = "renormalised",
) -> Divergence:
    r"""KL between both distributions on a support, nats; its gradient goes through the student's own normalisation.

    Args:
        direction: `reverse` is KL(student || teacher).
        k: Number of ids of each side's top-k; at or above the vocabulary it is the exact KL.
        support: The student's top-k, the teacher's, their union, or their intersection (the value is 0 where it is
            empty).
        tail: `renormalised` on the support (so the mass outside of it is free to move), or a last `bucket` with all the
            rest; merging ids never makes a KL larger.
    """
    _check("topk_kl", k)

    def value(context: Context, view: str) -> Tensor:
        student_NK, teacher_NK = _on_support(context, view, support, k, tail)
        return kl_values(student_NK, teacher_NK) if direction == "reverse" else kl_values(teacher_NK, student_NK)

    name = f"{direction}_kl({support} top-{k}, {tail})"
    return Divergence(name, value, _needs(support, k))


def topk_jsd(
    teacher_weight: float = 0.5, k: int = 100, support: SupportChoice = "student", tail: Tail = "bucket"
) -> Divergence:
    r"""Jensen-Shannon divergence of both distributions on a support, nats; never above that of the whole distributions.

    SDPO (arXiv 2601.20802) and multi-rollout OPD (arXiv 2605.12652) take the student's top-k and a bucket.

    Args:
        teacher_weight: Strictly between 0 and 1, see `jsd`.
        k: As in `topk_kl`.
        support: As in `topk_kl`.
        tail: As in `topk_kl`; renormalised, it may be above that of the whole distributions.
    """
    _check("topk_jsd", k)
    if not 0.0 < teacher_weight < 1.0:
        jsd_values(torch.zeros(1, 1), torch.zeros(1, 1), teacher_weight)  # raises the error, with the reason

    def value(context: Context, view: str) -> Tensor:
        student_NK, teacher_NK = _on_support(context, view, support, k, tail)
        return jsd_values(teacher_NK, student_NK, teacher_weight)

    name = f"jsd({teacher_weight:g} on the teacher, {support} top-{k}, {tail})"
    return Divergence(name, value, _needs(support, k))


def _on_support(context: Context, view: str, support: SupportChoice, k: int, tail: Tail) -> tuple[Tensor, Tensor]:
    """Log-probs of student and teacher as two distributions over the support, and over a last bucket for that tail."""
    ids_NK, student_NK, teacher_NK, inside_NK = _logps(context, view, support, k)
    if tail == "bucket":
        rests = (side.logp_outside(ids_NK, inside_NK)[:, None] for side in (context.student, context.signal(view)))
        student_N1, teacher_N1 = rests
        return torch.cat([student_NK, student_N1], 1), torch.cat([teacher_NK, teacher_N1], 1)
    # An empty support (nothing shared) must not become 0/0: any distribution will do, because it is masked below.
    empty_N1 = ~inside_NK.any(1, keepdim=True)

    def renormalised(logp_NK: Tensor) -> Tensor:
        sound_NK = logp_NK.masked_fill(empty_N1, 0.0).log_softmax(-1)
        return sound_NK.masked_fill(~inside_NK & ~empty_N1, -math.inf)

    return renormalised(student_NK), renormalised(teacher_NK)


def topk_score(k: int = 16, support: SupportChoice = "student", weighting: Weighting = "student") -> Divergence:
    r"""The released per-id form, :math:`\sum_v w_v (\log p_S - \log p_T)`; its gradient holds w and bracket fixed.

    Log-probs are of the whole softmax; w, detached, are the weights on the support. Its gradient,
    :math:`-\sum_v w_v (\log p_T - \log p_S) \nabla \log p_S`, lacks what a KL on a support has through the mass of the
    support; the two are equal only where the support is the vocabulary.

    Args:
        k: Number of ids of each side's top-k.
        support: As in `topk_kl`; `symmetric_difference` takes ids in only one of the lists, with weights that are not
            normalised.
        weighting: w: the student's probabilities renormalised on the support, the teacher's, or equal weights.
    """
    _check("topk_score", k)

    def value(context: Context, view: str) -> Tensor:
        _, student_NK, teacher_NK, inside_NK = _logps(context, view, support, k)
        fixed_NK = student_NK.detach()
        basis_NK = {"student": fixed_NK, "teacher": teacher_NK, "uniform": torch.zeros_like(fixed_NK)}[weighting]
        weight_NK = basis_NK.masked_fill(~inside_NK, 0.0).exp() * inside_NK
        if support != "symmetric_difference":
            weight_NK = weight_NK / weight_NK.sum(1, keepdim=True).clamp_min(torch.finfo(weight_NK.dtype).tiny)
        counted_NK = inside_NK & (weight_NK > 0)
        reward_NK = torch.where(counted_NK, teacher_NK.masked_fill(~counted_NK, 0.0) - fixed_NK, 0.0)
        ratio_NK = (student_NK.masked_fill(~inside_NK, 0.0) - fixed_NK.masked_fill(~inside_NK, 0.0)).exp()
        return -(weight_NK * reward_NK * ratio_NK).sum(1)

    return Divergence(f"topk_score({support} top-{k}, weights {weighting})", value, _needs(support, k))


def _needs(support: SupportChoice, k: int) -> frozenset[Need]:
    own, theirs = Need("topk", k), logp_at(k)
    return frozenset({own}) if support == "teacher" else frozenset({theirs} if support == "student" else {own, theirs})


def _check(name: str, k: int) -> None:
    if k < 1:
        raise UserError(f"{name}: k must be at least 1, not {k}")
