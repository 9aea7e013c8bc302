"""The log-ratio to a teacher that is mixed with the student, and its return. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from retort.advantages.outcome import group_means, members
from retort.core.context import Context
from retort.core.needs import SAMPLED
from retort.core.parts import Advantage, Quantity, Stat
from retort.core.steps import Clock, Steps
from retort.errors import UserError

Return = Literal["token", "future"]


def proximal_log_ratio(teacher_weight: float) -> Quantity:
    r"""The log-ratio to a proximal teacher: :math:`\log((1-\alpha) + \alpha\,p_T(y) / p_{old}(y))`, nats.

    The teacher is replaced by the mixture :math:`\alpha p_T + (1-\alpha) p_S`, so it never falls below log(1 - alpha),
    also where the teacher rules the token out. Its mean over the student's tokens is minus the skewed reverse KL to
    that mixture; as a reward it holds the mixture fixed, which `skew_reverse_kl` does not.

    Args:
        teacher_weight: alpha, above 0 and at most 1, where it is the log-ratio itself.
    """
    if not 0.0 < teacher_weight <= 1.0:
        raise UserError(f"teacher_weight must lie in (0, 1], not {teacher_weight:g}; at 0 nothing would be learnt")

    def value(context: Context, view: str) -> Tensor:
        teacher_N, old_N = context.decided_logps(view)
        if teacher_weight == 1.0:
            return teacher_N - old_N
        mixed_N = teacher_N - old_N + math.log(teacher_weight)
        return torch.logaddexp(mixed_N, torch.full_like(mixed_N, math.log1p(-teacher_weight)))

    return Quantity(f"proximal_log_ratio({teacher_weight:g})", value, frozenset({SAMPLED}))


def proximal_return(teacher_weight: float, returns: Return = "future", *, normalise: bool = True) -> Advantage:
    r"""What a token earns of `proximal_log_ratio` and what follows it, if wanted normalised among its prompt's.

    Args:
        teacher_weight: alpha.
        returns: `token` is the ratio of the token alone; `future` adds the mean over all that follow it in its rollout.
        normalise: Subtract the mean over the steps of the group (of the batch, where groups are not known), and divide
            by their deviation plus 1e-6.
    """
    inner = proximal_log_ratio(teacher_weight)
    if returns == "token" and not normalise:
        return Advantage(inner.name, inner.value, inner.needs)

    def finish(values_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        found_N = values_N.double()
        if returns == "future":
            found_N = found_N + following_mean(found_N, steps)
        return among_siblings(found_N, steps) if normalise else found_N

    def once(context: Context, view: str) -> Tensor:
        return context.signal(view).first_only(inner.value(context, view))

    name = f"proximal_return({teacher_weight:g}, {returns}{', normalised' if normalise else ''})"
    stat = Stat(name, Quantity(inner.name, once, inner.needs), finish)

    def value(context: Context, view: str) -> Tensor:
        return context.steps.stored[name].to(context.student_logp_N.dtype)

    return Advantage(name, value, inner.needs, stats=(stat,))


def among_siblings(values_N: Tensor, steps: Steps) -> Tensor:
    """The values less their mean over all steps of a group, in deviations (of the population, plus 1e-6), [N]."""
    rollouts = steps.rollouts()
    group_N = members(rollouts, "group")[rollouts.number_N]
    apart_N = values_N - group_means(values_N, group_N)
    return apart_N / (group_means(apart_N.square(), group_N).sqrt() + 1e-6)


def following_mean(values_N: Tensor, steps: Steps) -> Tensor:
    """The mean of the values of the steps after each one in its rollout, 0 after the last, [N]."""
    rollouts = steps.rollouts()
    order_N = torch.argsort(steps.position_N, stable=True)
    order_N = order_N[torch.argsort(rollouts.number_N[order_N], stable=True)]
    sorted_N, number_N = values_N[order_N], rollouts.number_N[order_N]
    ends_R = rollouts.steps_R.cumsum(0)
    summed_N = sorted_N.cumsum(0)
    rest_N = summed_N[ends_R - 1][number_N] - summed_N
    left_N = ends_R[number_N] - torch.arange(1, len(sorted_N) + 1, device=sorted_N.device)
    means_N = torch.where(left_N > 0, rest_N / left_N.clamp_min(1), 0.0)
    return torch.empty_like(values_N).index_copy_(0, order_N, means_N)
