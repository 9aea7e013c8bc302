"""Importance weights for rollouts that another policy generated. Axis letters: see `retort.core`."""

from __future__ import annotations

from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SAMPLED
from retort.core.parts import Weight
from retort.errors import UserError
from retort.quantities import engine_gap


def truncated_rollout_ratio(cap: float) -> Weight:
    r"""Truncated importance sampling: :math:`\min(c, p_{old}(y_t) / p_{engine}(y_t))`, dimensionless.

    It is 1 where the engine reported nothing (given responses, `token_losses` without `engine_logp`).

    Args:
        cap: c, positive.

    Raises:
        UserError: The cap is not positive.
    """
    _check_cap(cap)
    gap = engine_gap()

    def value(context: Context, view: str) -> Tensor:
        return gap.value(context, view).exp().clamp_max(cap)

    return Weight(f"truncated_rollout_ratio({cap:g})", value, uses_old_logp=True, corrects_engine=True)


def truncated_teacher_ratio(cap: float) -> Weight:
    r""":math:`\min(c, p_T(y_t) / p_{old}(y_t))`, dimensionless: what Eq. 3 of arXiv 2605.08737 prints.

    Args:
        cap: c, positive.

    Raises:
        UserError: The cap is not positive.
    """
    _check_cap(cap)

    def value(context: Context, view: str) -> Tensor:
        teacher_N, old_N = context.decided_logps(view)
        return _capped(teacher_N - old_N, cap)

    return Weight(f"truncated_teacher_ratio({cap:g})", value, frozenset({SAMPLED}), uses_old_logp=True)


def truncated_student_ratio(cap: float) -> Weight:
    r""":math:`\min(c, p_S(y_t) / p_{old}(y_t))`, dimensionless: for divergences on later updates on the same batch.

    SDPO (arXiv 2601.20802). It is detached, so it only weighs. At the first update it is 1 (or c, if that is less).

    Args:
        cap: c, positive.

    Raises:
        UserError: The cap is not positive.
    """
    _check_cap(cap)

    def value(context: Context, view: str) -> Tensor:
        return _capped(context.student_logp_N.detach() - context.old_logp_N, cap)

    return Weight(f"truncated_student_ratio({cap:g})", value, uses_old_logp=True)


def _check_cap(cap: float) -> None:
    if not cap > 0:
        raise UserError(f"the cap of an importance ratio must be positive, or none for no correction; it is {cap}")


def _capped(gap_N: Tensor, cap: float) -> Tensor:
    return gap_N.clamp(-20.0, 20.0).exp().clamp_max(cap)
