"""The generalised Jensen-Shannon divergence. Axis letters: see `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import DENSE
from retort.core.parts import Divergence
from retort.divergences.kl import kl_values
from retort.divergences.mixture import mixture
from retort.errors import UserError


def jsd_values(teacher_logp_NV: Tensor, student_logp_NV: Tensor, teacher_weight: float) -> Tensor:
    r"""JSD per row, nats, of log-probs [N, V] -> [N].

    .. math:: w\,KL(p_T \Vert M) + (1-w)\,KL(p_S \Vert M), \quad M = w\,p_T + (1-w)\,p_S

    This is the definition. It is always finite: an id that both rule out contributes 0.
    """
    if not 0.0 < teacher_weight < 1.0:
        raise UserError(
            f"jsd: teacher_weight must lie strictly between 0 and 1, not {teacher_weight}: at the ends the divergence "
            "vanishes; use forward_kl (for 0) or reverse_kl (for 1)"
        )
    mixture_NV = mixture(teacher_logp_NV, student_logp_NV, teacher_weight)
    towards_teacher_N = kl_values(teacher_logp_NV, mixture_NV)
    towards_student_N = kl_values(student_logp_NV, mixture_NV)
    return teacher_weight * towards_teacher_N + (1.0 - teacher_weight) * towards_student_N


def jsd(teacher_weight: float = 0.5) -> Divergence:
    """Jensen-Shannon divergence with weight `teacher_weight` (0 < w < 1) on the teacher in the mixture.

    The weight is on the *teacher* (GKD, TRL); some systems put it on the student, which is this with 1 - w. As w -> 0
    it vanishes like w * forward_kl, as w -> 1 like (1 - w) * reverse_kl: the ends are other divergences.
    """
    if not 0.0 < teacher_weight < 1.0:
        jsd_values(torch.zeros(1, 1), torch.zeros(1, 1), teacher_weight)  # raises the error, with the reason

    def value(context: Context, view: str) -> Tensor:
        return context.student.jsd(context.signal(view).distribution, teacher_weight)

    return Divergence(f"jsd(teacher_weight={teacher_weight:g})", value, frozenset({DENSE}))
