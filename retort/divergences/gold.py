"""GOLD's distance of distributions merged over aligned units. Axis letters: see `retort.core`; F as in `Units`.

U counts ids, of either side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.needs import SPANS
from retort.core.parts import Divergence
from retort.core.signals import Units
from retort.divergences.jsd import jsd_values
from retort.errors import UserError

Merge = Literal["observed", "bayesian"]


def merged_distance(
    merge: Merge = "observed",
    *,
    hybrid: bool = False,
    teacher_weight: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
) -> Divergence:
    r"""GOLD's distance of the sorted numbers of both models, one list per unit (TRL's `GOLDTrainer`).

    .. math:: \sum_i | m_S^{(i)} - m_T^{(i)} |, \quad
              m_{observed}(u) = p(u \mid x) \prod_{j>1} p(v_j), \quad
              m_{bayesian}(u) = p(u \mid x, v_{<k}) \prod_{j<k} p(v_j)

    where :math:`v_1 \ldots v_k` are a model's own tokens of the unit. So m is right for what was written; it does not
    add up to one where a unit has several tokens, which is by design. The gradient reaches every token of the unit.

    Args:
        merge: The position whose distribution counts: the first (`observed`), or the last (`bayesian`).
        hybrid: Compare shared ids by the Jensen-Shannon divergence, nats, and sort only the others; both sums are
            weighted and added.
        teacher_weight: The teacher's weight in that divergence, strictly between 0 and 1.
        matched_weight: Weight of the shared ids; None: their share of the teacher's ids.
        unmatched_weight: Weight of the others; None: one minus that. Both weights are given, or neither.

    Raises:
        UserError: One weight without the other, one that is negative, or a teacher's weight outside of (0, 1).
    """
    if merge not in ("observed", "bayesian"):
        raise UserError(f"merged_distance: merge must be observed or bayesian, not {merge}")
    if (matched_weight is None) != (unmatched_weight is None):
        raise UserError("merged_distance: matched_weight and unmatched_weight: give both, or neither")
    weights = None if matched_weight is None or unmatched_weight is None else (matched_weight, unmatched_weight)
    if weights is not None and min(weights) < 0:
        given = f"{weights[0]:g} and {weights[1]:g}"
        raise UserError(f"merged_distance: matched_weight and unmatched_weight must not be negative: {given}")
    if not 0.0 < teacher_weight < 1.0:
        raise UserError(f"merged_distance: teacher_weight must lie strictly between 0 and 1, not {teacher_weight}")

    def value(context: Context, view: str) -> Tensor:
        units = context.signal(view).units
        (student, ours_F), (teacher, theirs_F) = _merged(context, units, merge)

        def scores(distribution: Distribution, rest_F: Tensor, ids_U: Tensor | None) -> Tensor:
            """Log of m, of all ids from the largest down, or of given ids, [F, U]."""
            rows = len(distribution.logits_CV)
            every = distribution.logits_CV.shape[1]
            ids_FU = distribution.topk(every)[0] if ids_U is None else ids_U.expand(rows, -1)
            return distribution.logp_at(ids_FU) + rest_F[:, None]

        if not hybrid:
            found_F = _gap(scores(student, ours_F, None).exp(), scores(teacher, theirs_F, None).exp())
            return units.at_first(found_F)
        own, their = _ids(units, student, teacher)
        share = len(their[0]) / teacher.logits_CV.shape[1]
        matched, unmatched = (share, 1.0 - share) if weights is None else weights
        shared_F = jsd_values(scores(teacher, theirs_F, their[0]), scores(student, ours_F, own[0]), teacher_weight)
        others = (scores(student, ours_F, own[1]).exp(), scores(teacher, theirs_F, their[1]).exp())
        # With no others on one side there is nothing to be compared with, and the code leaves the sum out.
        others_F = _gap(*(p_FU.sort(-1, descending=True).values for p_FU in others)) if all(map(_any, others)) else 0.0
        return units.at_first(matched * shared_F + unmatched * others_F)

    name = f"merged_distance({merge}{', hybrid' if hybrid else ''})"
    return Divergence(name, value, frozenset({SPANS}))


def _merged(
    context: Context, units: Units, merge: Merge
) -> tuple[tuple[Distribution, Tensor], tuple[Distribution, Tensor]]:
    """Either side's distribution at the position that counts, and the log-prob of its other tokens of the unit, [F]."""
    last = merge == "bayesian"
    logp_C = context.student_logp_N
    their_first_F = units.first_F + units.own_F - 1 if last else units.first_F
    elsewhere_C = torch.ones_like(logp_C, dtype=torch.bool).index_fill(0, their_first_F, False)
    rest_F = units.sum(torch.where(elsewhere_C, logp_C, 0.0))
    student = units.student(context.whole_student, last=last)
    teacher = units.teacher_at_last if last else units.teacher
    return (student, rest_F), (teacher, units.teacher_rest(last=last))


def _gap(ours_FU: Tensor, theirs_FU: Tensor) -> Tensor:
    """Sum of the distances of two lists of sorted numbers, of which the shorter goes on with zeros, [F]."""
    width = max(ours_FU.shape[1], theirs_FU.shape[1])
    ours_FU, theirs_FU = (functional.pad(m_FU, (0, width - m_FU.shape[1])) for m_FU in (ours_FU, theirs_FU))
    return (ours_FU - theirs_FU).abs().sum(-1)


def _ids(
    units: Units, student: Distribution, teacher: Distribution
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The ids of either side that are shared, in pairs, and those that are not."""
    every = [torch.arange(side.logits_CV.shape[1], device=side.logits_CV.device) for side in (student, teacher)]
    shared = units.shared or (every[0], every[1])
    found: list[tuple[Tensor, Tensor]] = []
    for all_V, ids_S in zip(every, shared, strict=True):
        found.append((ids_S, all_V[torch.ones_like(all_V, dtype=torch.bool).index_fill(0, ids_S, False)]))
    return found[0], found[1]


def _any(values_FU: Tensor) -> bool:
    return values_FU.shape[1] > 0
