"""Skewed KL divergences of DistiLLM. Axis letters: see `retort.core`."""

from __future__ import annotations

from torch import Tensor

from retort.core.context import Context
from retort.core.needs import DENSE
from retort.core.parts import Divergence
from retort.divergences.kl import forward_kl, kl_values, reverse_kl
from retort.divergences.mixture import mixture
from retort.errors import UserError


def skew_forward_kl(skew: float = 0.1) -> Divergence:
    r"""Skewed forward KL, :math:`D_{KL}(p_T \Vert a\,p_T + (1-a)\,p_S)`, nats (DistiLLM, arXiv 2402.03898).

    Args:
        skew: a, 0 <= a < 1. At 0 it is the forward KL; towards 1 it vanishes. Never above -ln a.
    """
    _check("skew_forward_kl", skew)
    if skew == 0.0:
        return forward_kl()

    def value(context: Context, view: str) -> Tensor:
        teacher_NV, student_NV = context.signal(view).logp_NV, context.student_logp_NV
        return kl_values(teacher_NV, mixture(teacher_NV, student_NV, skew))

    return Divergence(f"skew_forward_kl({skew:g})", value, frozenset({DENSE}))


def skew_reverse_kl(skew: float = 0.1) -> Divergence:
    r"""Skewed reverse KL, :math:`D_{KL}(p_S \Vert (1-a)\,p_T + a\,p_S)`, nats (DistiLLM, arXiv 2402.03898).

    Args:
        skew: a, 0 <= a < 1. At 0 it is the reverse KL; towards 1 it vanishes. Never above -ln a, and finite where the
            teacher rules out a token that the student may generate.
    """
    _check("skew_reverse_kl", skew)
    if skew == 0.0:
        return reverse_kl()

    def value(context: Context, view: str) -> Tensor:
        teacher_NV, student_NV = context.signal(view).logp_NV, context.student_logp_NV
        return kl_values(student_NV, mixture(teacher_NV, student_NV, 1.0 - skew))

    return Divergence(f"skew_reverse_kl({skew:g})", value, frozenset({DENSE}))


def _check(name: str, skew: float) -> None:
    if not 0.0 <= skew < 1.0:
        raise UserError(f"{name}: skew must be at least 0 and below 1 (where the divergence is 0), not {skew}")
