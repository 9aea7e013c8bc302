"""What a tail bucket leaves out of the reverse KL, from the sampled token. Axis letters: see `retort.core`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SAMPLED, Need
from retort.core.parts import Divergence
from retort.errors import UserError


@dataclass(frozen=True, eq=False)
class Tail:
    """All ids but the teacher's top-k, at each step.

    Attributes:
        student_logp_N: Log of the student's probability of them, nats, live; minus infinity where there are none.
        ratio_N: That minus the teacher's, log(tau_p / tau_q), nats, detached.
        sampled_N: Whether the sampled token is one of them, bool.
    """

    student_logp_N: Tensor
    ratio_N: Tensor
    sampled_N: Tensor


def tail(context: Context, view: str, k: int) -> Tail:
    """The tail behind the teacher's top-k, computed once per block for all parts that read it."""

    def make() -> Tail:
        rows = context.signal(view)
        ids_NK, _ = rows.topk(k)
        everywhere_NK = torch.ones_like(ids_NK, dtype=torch.bool)
        student_N = context.student.logp_outside(ids_NK, everywhere_NK)
        ratio_N = student_N.detach() - rows.logp_outside(ids_NK, everywhere_NK)
        return Tail(student_N, ratio_N, (ids_NK != context.steps.tokens_N[:, None]).all(-1))

    return context.once(("tail", view, k), make)


def tail_residual(k: int = 4) -> Divergence:
    r"""What `topk_kl("reverse", k, "teacher", "bucket")` lacks of the reverse KL, estimated from the sampled token.

    .. math:: [y \notin S]\,(r_y - r_B), \quad r_y = \log\frac{p_S(y)}{p_T(y)}, \quad r_B = \log\frac{\tau_p}{\tau_q}

    S is the teacher's top-k, and the taus are what student and teacher leave to all other ids. Its gradient is
    :math:`[y \notin S]\,(r_y \nabla\log p_S(y) - r_B \nabla\log\tau_p)`. Over y drawn from the student the mean of
    value and gradient, added to the bucket's, are those of the reverse KL over the whole vocabulary, without bias. From
    the second update on a batch on, both are weighed by the importance ratio p_S(y) / p_old(y). Nats. (Tail
    residualisation, arXiv 2610.04882.)

    Args:
        k: Ids of the teacher; at or above the vocabulary nothing is left, and it is 0.
    """
    if k < 1:
        raise UserError(f"tail_residual: k must be at least 1, not {k}")

    def value(context: Context, view: str) -> Tensor:
        found, logp_N = tail(context, view, k), context.student_logp_N
        fixed_N = logp_N.detach()
        own_N = fixed_N - context.signal(view).sampled_logp_N
        drift_N = (fixed_N - context.old_logp_N).exp()
        # Everything elsewhere is masked before it is multiplied: a tail of nothing has no finite log.
        sampled_N = found.sampled_N
        tail_N = found.student_logp_N.masked_fill(~sampled_N, 0.0)
        own_N, ratio_N = own_N.masked_fill(~sampled_N, 0.0), found.ratio_N.masked_fill(~sampled_N, 0.0)
        moved_N = logp_N.masked_fill(~sampled_N, 0.0)
        live_N = own_N * (moved_N - moved_N.detach()).exp() - ratio_N * (tail_N - tail_N.detach()).exp()
        return drift_N * live_N

    return Divergence(
        f"tail_residual(teacher top-{k})",
        value,
        frozenset({SAMPLED, Need("topk", k)}),
        uses_old_logp=True,
        whole_support=True,
    )
