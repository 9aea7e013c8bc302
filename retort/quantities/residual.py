"""The tail behind a teacher's top-k, and the noise of what is sampled there. Axis letters: see `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import DENSE, Need
from retort.core.parts import Quantity
from retort.divergences.residual import tail


def sampled_tail(k: int) -> Quantity:
    """1 where the sampled token is not in the teacher's top-k, else 0; its mean estimates the student's tail."""

    def value(context: Context, view: str) -> Tensor:
        return tail(context, view, k).sampled_N.to(context.student_logp_N.dtype)

    return Quantity(f"sampled_tail(top-{k})", value, frozenset({Need("topk", k)}))


def residual_variance(k: int) -> Quantity:
    r"""Total variance over the sampled token of the gradient of `tail_residual` in the student's logits, nats squared.

    Exact, as `retort.quantities.gradient_variance` is of the plain log-ratio, with which it is to be compared; the
    bucket beside it has no variance. It is infinite where the teacher rules out a token of the student's tail.
    """

    def value(context: Context, view: str) -> Tensor:
        student, rows = context.whole_student, context.signal(view)
        ids_NK, _ = rows.topk(k)
        inside_NV = torch.zeros_like(student.p_CV, dtype=torch.bool).scatter_(-1, ids_NK, True)
        may_NV = ~inside_NV & (student.logp_CV > -torch.inf)
        banned_NV = may_NV & (rows.distribution.logp_CV == -torch.inf)
        own_NV = torch.where(may_NV & ~banned_NV, student.logp_CV - rows.distribution.logp_CV, 0.0)
        p_NV = student.p_CV
        drawn_NV = torch.where(may_NV, p_NV, 0.0)
        mass_N1 = drawn_NV.sum(-1, keepdim=True)
        # Its share of the tail; 0 where the tail is nothing.
        among_NV = drawn_NV / mass_N1.clamp_min(torch.finfo(p_NV.dtype).tiny)
        shared_N1 = tail(context, view, k).ratio_N[:, None].nan_to_num(0.0, 0.0, 0.0)
        # Where id v is drawn the gradient is own_v e_v + (shared - own_v) p - shared among.
        left_NV = shared_N1 - own_NV
        square_NV = (
            own_NV.square()
            + 2 * own_NV * (left_NV * p_NV - shared_N1 * among_NV)
            + left_NV.square() * p_NV.square().sum(-1, keepdim=True)
            - 2 * left_NV * shared_N1 * (p_NV * among_NV).sum(-1, keepdim=True)
            + shared_N1.square() * among_NV.square().sum(-1, keepdim=True)
        )
        mean_NV = drawn_NV * own_NV + (drawn_NV * left_NV).sum(-1, keepdim=True) * p_NV - mass_N1 * shared_N1 * among_NV
        found_N = ((drawn_NV * square_NV).sum(-1) - mean_NV.square().sum(-1)).clamp_min(0.0)
        return found_N.masked_fill(banned_NV.any(-1), torch.inf)

    return Quantity(f"residual_variance(top-{k})", value, frozenset({DENSE}))
