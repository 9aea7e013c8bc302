"""Divergences that choose between forward and reverse KL, by step or by id. Axis letters: see `retort.core`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.losses import times
from retort.core.needs import DENSE
from retort.core.parts import Divergence
from retort.errors import UserError


def head_weights(teacher_p_NV: Tensor, student_p_NV: Tensor, head_mass: float) -> Tensor:
    """The share [N] of the two distributions' distance that lies on the teacher's head; 1/2 where there is none.

    The head is the set of the teacher's most likely ids with cumulative probability at most `head_mass`. It always
    holds the first id; at 1 it holds every id, however the sum is rounded.
    """
    sorted_NV, order_NV = teacher_p_NV.sort(dim=-1, descending=True)
    inside_NV = sorted_NV.double().cumsum(-1) <= head_mass
    inside_NV[:, 0] = True
    if head_mass >= 1.0:
        inside_NV = torch.ones_like(inside_NV)
    apart_NV = (teacher_p_NV - student_p_NV).abs()
    # Summed in the order of the ids, so that head and whole are rounded alike where they are the same ids.
    inside_NV = torch.zeros_like(inside_NV).scatter(-1, order_NV, inside_NV)
    head_N = (apart_NV * inside_NV).sum(-1)
    whole_N = apart_NV.sum(-1)
    return torch.where(whole_N > 0, head_N / whole_N.clamp_min(torch.finfo(whole_N.dtype).tiny), 0.5)


def akl(head_mass: float = 0.5) -> Divergence:
    r"""Adaptive KL: :math:`w_h\,D_{KL}(p_T \Vert p_S) + (1 - w_h)\,D_{KL}(p_S \Vert p_T)`, nats (arXiv 2404.02657).

    w_h, detached, is the share of :math:`\sum_v |p_T - p_S|` on the teacher's head: forward KL where the student misses
    the head, reverse KL where it misses the tail.

    Args:
        head_mass: mu, the probability of the head, in (0, 1]; the most likely id always belongs to it.
    """
    if not 0.0 < head_mass <= 1.0:
        raise UserError(f"akl: head_mass must lie in (0, 1], not {head_mass}")

    def value(context: Context, view: str) -> Tensor:
        teacher, student = context.signal(view).distribution, context.whole_student
        head_N = head_weights(teacher.p_CV, student.p_CV, head_mass)
        forward_N, reverse_N = student.forward_kl(teacher), student.reverse_kl(teacher)
        return times(head_N, forward_N) + times(1 - head_N, reverse_N)

    return Divergence(f"akl({head_mass:g})", value, frozenset({DENSE}))


def todi(sharpness: float = 1.0) -> Divergence:
    r"""Token-wise distillation, nats: at every id, forward KL's term where the teacher gives more, else reverse KL's.

    .. math:: \sum_v \alpha_v\,p_T \ln\frac{p_T}{p_S} + (1 - \alpha_v)\,p_S \ln\frac{p_S}{p_T},
              \qquad \alpha_v = \sigma(\beta \ln\frac{p_T}{p_S}) \text{, detached}

    From ToDi (Jung et al., 2025). An id that one side rules out makes it infinite, as in either KL: alpha weighs the
    infinite term. An id that both rule out contributes 0.

    Args:
        sharpness: beta >= 0. At 1 alpha is p_T / (p_T + p_S); at 0 both terms weigh one half everywhere.
    """
    if sharpness < 0:
        raise UserError(f"todi: sharpness must not be negative, it is {sharpness}")

    def value(context: Context, view: str) -> Tensor:
        teacher_NV, student_NV = context.signal(view).logp_NV, context.student_logp_NV
        both_NV = (teacher_NV > -math.inf) & (student_NV > -math.inf)
        gap_NV = torch.where(both_NV, teacher_NV, 0.0) - torch.where(both_NV, student_NV, 0.0)
        share_NV = torch.sigmoid(sharpness * gap_NV.detach())
        term_NV = share_NV * teacher_NV.exp() * gap_NV - (1.0 - share_NV) * student_NV.exp() * gap_NV
        # A constant, so that the value is infinite and the gradient of other ids is not NaN.
        one_NV = (teacher_NV == -math.inf) != (student_NV == -math.inf)
        return torch.where(both_NV, term_NV, 0.0).masked_fill(one_NV, math.inf).sum(-1)

    return Divergence(f"todi({sharpness:g})", value, frozenset({DENSE}))


def total_variation() -> Divergence:
    r"""Total variation distance, :math:`\tfrac12 \sum_v |p_T - p_S|`, between 0 and 1 (dimensionless)."""

    def value(context: Context, view: str) -> Tensor:
        return (context.signal(view).logp_NV.exp() - context.student_logp_NV.exp()).abs().sum(-1) / 2

    return Divergence("total_variation", value, frozenset({DENSE}))
