"""How far a teacher separates the student's candidates. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from retort.core.context import RULED_OUT, Context
from retort.core.needs import logp_at
from retort.core.parts import Quantity
from retort.divergences.support import student_topk
from retort.errors import UserError

Margin = Literal["gap", "log_gap", "advantage"]


def teacher_margin(k: int, kind: Margin = "log_gap") -> Quantity:
    r"""How far the teacher separates the student's `k` most likely ids.

    Args:
        k: Number of candidates, chosen by the student, detached.
        kind: `gap`, between 0 and 1: first minus second probability of the teacher renormalised on them. `log_gap`,
            nats: the same of log-probs, at most 100. `advantage`, nats: the largest :math:`\log p_T - \log p_S` minus
            their mean. 0 where the teacher rules out all of them.

    Raises:
        UserError: Fewer than two candidates.
    """
    if k < 2:
        raise UserError(f"a margin needs at least 2 candidates, not {k}")

    def value(context: Context, view: str) -> Tensor:
        ids_CK, student_logp_CK = student_topk(context, view, k)
        teacher_logp_CK = context.signal(view).logp_at(ids_CK).detach()
        # A ruled-out candidate is behind by a finite number; candidates that are all ruled out are not separated.
        best_C1 = teacher_logp_CK.amax(-1, keepdim=True)
        teacher_logp_CK = torch.where(best_C1 > -math.inf, teacher_logp_CK, student_logp_CK.detach())
        teacher_logp_CK = teacher_logp_CK.maximum(teacher_logp_CK.amax(-1, keepdim=True) - RULED_OUT)
        if kind != "advantage":
            teacher_logp_CK = torch.where(best_C1 > -math.inf, teacher_logp_CK, 0.0)
        if kind == "advantage":
            gain_CK = teacher_logp_CK - student_logp_CK.detach()
            return gain_CK.amax(-1) - gain_CK.mean(-1)
        renormalised_CK = teacher_logp_CK.log_softmax(-1)
        first_two_CK = renormalised_CK.topk(2, dim=-1).values
        if kind == "gap":
            first_two_CK = first_two_CK.exp()
        return first_two_CK[:, 0] - first_two_CK[:, 1]

    return Quantity(f"teacher_margin({kind}, top-{k})", value, frozenset({logp_at(k)}))
