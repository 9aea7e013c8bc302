"""Masses of teacher, base and student at the positions of a structure. Axis letters: see `retort.core`.

A position belongs to the structure (the contract) if the teacher gives its most likely token at least a threshold; the
masses are those that each model gives to that token (arXiv 2605.08737).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import DENSE, Need
from retort.core.parts import Quantity, Stat
from retort.core.steps import Clock, Steps
from retort.quantities.extrapolation import lambda_star, with_budget

BaseMode = Literal["implied", "direct"]
#: Masses are kept away from 0 and 1 by the precision of fp32.
_EDGE = 1e-7
_TOP = Need("topk", 1)


def student_tail() -> Quantity:
    """The probability that the student gives to all but the teacher's most likely token: 1 - q."""

    def value(context: Context, view: str) -> Tensor:
        ids_C1, _ = context.signal(view).topk(1)
        return -context.student.logp_at(ids_C1).squeeze(-1).detach().expm1()

    return Quantity("contract_tail", value, frozenset({_TOP}))


def masses(threshold: float, base: str, base_mode: BaseMode) -> tuple[Stat, Stat, Stat]:
    """Statistics of the whole batch: `contract_typical`, `contract_safe`, `contract_base`.

    The first two are the mean and the largest over rollouts of the teacher's mean mass; the largest is a proxy for the
    paper's largest over positions, which tends to 1 and would predict nothing. The third is the base's: the mean of its
    masses (`direct`), or the teacher's typical mass times the exponential of minus the mean log-ratio (`implied`). NaN
    where there is no structure.
    """

    def teacher(context: Context, view: str) -> Tensor:
        mass_C = context.signal(view).topk(1)[1].squeeze(-1).exp()
        return mass_C.masked_fill(mass_C < threshold, math.nan)

    def direct(context: Context, view: str) -> Tensor:
        ids_C1, logp_C1 = context.signal(view).topk(1)
        mass_C = context.signal(base).logp_at(ids_C1).squeeze(-1).exp()
        return mass_C.masked_fill(logp_C1.squeeze(-1).exp() < threshold, math.nan)

    def geometric(context: Context, view: str) -> Tensor:
        ids_C1, logp_C1 = context.signal(view).topk(1)
        log_ratio_C = (logp_C1 - context.signal(base).logp_at(ids_C1)).squeeze(-1)
        # `finish` puts the teacher's own mass back; positions where the base rules the token out are left out.
        log_ratio_C = log_ratio_C.clamp_max(-math.log(_EDGE))
        return log_ratio_C.masked_fill(logp_C1.squeeze(-1).exp() < threshold, math.nan)

    def implied(values_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        return (-_rollout_means(values_N, steps).nanmean()).exp().expand(len(values_N)).to(values_N.dtype)

    top, also = frozenset({_TOP}), {base: frozenset({DENSE})}
    other = Quantity("contract_base", geometric if base_mode == "implied" else direct, top, also)
    return (
        Stat("contract_typical", Quantity("contract_mass", teacher, top), _over(torch.nanmean)),
        Stat("contract_safe", Quantity("contract_mass", teacher, top), _over(_largest)),
        Stat("contract_base", other, implied if base_mode == "implied" else _over(torch.nanmean)),
    )


def threshold_weight(
    context: Context, *, which: Literal["safe", "typical"], cap: float, base_mode: BaseMode, budget: bool = False
) -> float:
    """lambda* as the batch's masses predict it; NaN where the batch has no structure, infinite where there is no cliff.

    Args:
        context: The context, with the statistics of `masses`.
        which: The teacher's mass: the largest, or the typical one.
        cap: c, the largest importance ratio.
        base_mode: The same as for `masses`.
        budget: Whether to move it to the run's number of steps.
    """
    if not len(context.steps.tokens_N):
        return math.nan
    typical, teacher, base = (float(context.steps.stored[f"contract_{name}"][0]) for name in ("typical", which, "base"))
    if math.isnan(teacher) or math.isnan(base):
        return math.nan
    if base_mode == "implied":
        base = typical * base
    inside: Callable[[float], float] = lambda mass: min(max(mass, _EDGE), 1.0 - _EDGE)  # noqa: E731
    found = lambda_star(inside(teacher), inside(base), cap)
    steps = context.clock.total or context.clock.done + 1
    return with_budget(found, steps) if budget and math.isfinite(found) else found


def weight_below_cliff(context: Context, reward_weight: float, cap: float, margin: float, base_mode: BaseMode) -> float:
    """The reward weight, or `margin` below the predicted cliff if that is less; where lowered, it is at least 1."""
    found = threshold_weight(context, which="safe", cap=cap, base_mode=base_mode, budget=True)
    return reward_weight if math.isnan(found) else min(reward_weight, max(1.0, found - margin))


def cliff(
    kind: str, cap: float, base_mode: BaseMode, reward_weight: float = 1.0, margin: float | None = None
) -> Quantity:
    """A number of the prediction to watch, the same at every step of a batch; NaN (left out) where there is none.

    Args:
        kind: `safe`, `typical` and `budget` (lambda*), `tail_boundary` ((1 - p) / c), `teacher_mass` and `base_mass` (p
            and b), `in_effect` (lambda itself).
        cap: c, the largest importance ratio.
        base_mode: The same as for `masses`.
        reward_weight: For `in_effect`, the setting.
        margin: For `in_effect`: None if lambda is not lowered below the cliff.
    """

    def number(context: Context) -> float:
        if kind in ("safe", "typical"):
            return threshold_weight(context, which=kind, cap=cap, base_mode=base_mode)  # type: ignore[arg-type]
        if kind == "budget":
            return threshold_weight(context, which="safe", cap=cap, base_mode=base_mode, budget=True)
        if kind == "in_effect":
            held = margin is not None
            return weight_below_cliff(context, reward_weight, cap, margin, base_mode) if held else reward_weight  # type: ignore[arg-type]
        typical = float(context.steps.stored["contract_typical"][0]) if len(context.steps.tokens_N) else math.nan
        if kind == "tail_boundary":
            return (1.0 - typical) / cap
        if kind == "teacher_mass":
            return typical
        base = float(context.steps.stored["contract_base"][0]) if len(context.steps.tokens_N) else math.nan
        return typical * base if base_mode == "implied" else base

    def value(context: Context, view: str) -> Tensor:
        found = number(context)
        found = found if math.isfinite(found) else math.nan
        return torch.full(
            context.steps.tokens_N.shape, found, dtype=torch.float64, device=context.steps.tokens_N.device
        )

    star = kind in ("safe", "typical", "budget")
    name = f"lambda_star_{kind}" if star else ("reward_weight" if kind == "in_effect" else f"contract_{kind}")
    return Quantity(name, value)


def _over(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Steps, Clock], Tensor]:
    def finish(values_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        return reduce(_rollout_means(values_N, steps)).expand(len(values_N)).to(values_N.dtype)

    return finish


def _largest(values_R: Tensor) -> Tensor:
    kept_R = values_R[~values_R.isnan()]
    return kept_R.max() if len(kept_R) else torch.full((), math.nan, dtype=values_R.dtype, device=values_R.device)


def _rollout_means(values_N: Tensor, steps: Steps) -> Tensor:
    """Means within rollouts, [R]; NaN for a rollout without any position of the structure."""
    rollout_N = steps.rollout_N.to(values_N.device)
    kept_N = ~values_N.isnan()
    count = int(rollout_N.max()) + 1 if len(rollout_N) else 0
    total_R = torch.zeros(count, dtype=torch.float64, device=values_N.device)
    total_R.index_add_(0, rollout_N[kept_N], values_N[kept_N].double())
    return total_R / torch.bincount(rollout_N[kept_N], minlength=count)
