"""Log-ratios of the sampled token: teacher to student, trainer to engine. Axis letters: see `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SAMPLED
from retort.core.parts import Advantage, Quantity

#: Log-ratios are clamped to plus and minus this, nats.
MAX_LOG_RATIO = 20.0


def log_ratio_size() -> Quantity:
    """How far apart teacher and student are at the sampled token: |log p_T - log p_old|, nats."""

    def value(context: Context, view: str) -> Tensor:
        teacher_N, old_N = context.decided_logps(view)
        return (teacher_N - old_N).abs()

    return Quantity("log_ratio_size", value, frozenset({SAMPLED}), uses_old_logp=True)


def outside_bound(advantage: Advantage, bound: float, side: str) -> Quantity:
    """1 where the ratio of `directed_ratio` is cut off, 0 elsewhere.

    Args:
        advantage: As in `directed_ratio`.
        bound: As in `directed_ratio`.
        side: `low` or `high`.
    """

    def value(context: Context, view: str) -> Tensor:
        teacher_N, old_N = context.decided_logps(view)
        delta_N = teacher_N - old_N
        ratio_N = (advantage.value(context, view).sign() * delta_N.clamp(-20.0, 20.0)).exp()
        cut_N = ratio_N < 1.0 - bound if side == "low" else ratio_N > 1.0 + bound
        return cut_N.to(delta_N.dtype)

    return Quantity(f"directed_ratio_{side}", value, frozenset({SAMPLED}), stats=advantage.stats)


def engine_gap() -> Quantity:
    """The logarithm of xi, nats: the trainer's log-prob of the sampled token minus the engine's."""

    def value(context: Context, view: str) -> Tensor:
        if context.steps.engine_logp_N is None:
            return torch.zeros_like(context.old_logp_N)
        gap_N = context.old_logp_N - context.steps.engine_logp_N
        return gap_N.nan_to_num(0.0, posinf=MAX_LOG_RATIO, neginf=-MAX_LOG_RATIO).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    return Quantity("engine_gap", value)
