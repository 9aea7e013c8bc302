"""Advantages from a verifier's rewards: numbers per rollout, taken over the whole batch. Axis letters: `retort.core`.

Every number here is a `Stat` without a part: it costs no forward pass, and does not depend on how a batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.parts import Advantage, Stat
from retort.core.steps import Clock, Rollouts, Steps
from retort.errors import UserError

Scope = Literal["group", "batch"]
#: (rewards [R], lengths in steps [R], longest completion allowed) -> rewards [R].
Shape = Callable[[Tensor, Tensor, int | None], Tensor]


def per_rollout(
    name: str,
    number: Callable[[Rollouts, Steps, Clock], Tensor],
    *,
    rewards: bool = True,
    groups: bool = False,
) -> Stat:
    """Spreads a number per rollout over its steps.

    Args:
        name: Name under which it is stored.
        number: (the rollouts of the batch, all its steps, the clock) -> [R], float64.
        rewards: Whether it needs rewards.
        groups: Whether it compares the rollouts of one prompt.
    """

    def finish(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
        rollouts = steps.rollouts()
        return number(rollouts, steps, clock)[rollouts.number_N]

    return Stat(name, None, finish, rewards=rewards, groups=groups)


def graded(rollouts: Rollouts) -> Tensor:
    """The rewards, [R]; a run without a verifier is refused before it gets here."""
    if rollouts.reward_R is None:
        raise UserError("this method learns from rewards, and the rollouts of this batch have none")
    return rollouts.reward_R


def members(rollouts: Rollouts, scope: Scope) -> Tensor:
    """The index of each rollout's group, or 0 for all where the scope is the batch, [R]."""
    if scope == "batch" or rollouts.group_R is None:
        return torch.zeros_like(rollouts.steps_R)
    return rollouts.group_R


def group_means(values_R: Tensor, group_R: Tensor) -> Tensor:
    """The mean of each rollout's group, [R]."""
    count_G = torch.bincount(group_R)
    return (values_R.new_zeros(len(count_G)).index_add_(0, group_R, values_R) / count_G)[group_R]


def length_bonus(coef: float) -> Shape:
    r"""Adds to a positive reward for a short completion: :math:`r\,(1 + \beta(1 - |y| / L_{max}))`; others stay.

    Args:
        coef: beta. Where the longest completion allowed is not known, the longest of the batch is used.
    """
    if coef < 0:
        raise UserError(f"length_bonus: coef must not be negative, but is {coef}")

    def shaped(reward_R: Tensor, length_R: Tensor, longest: int | None) -> Tensor:
        most = longest if longest is not None else int(length_R.max())
        return reward_R + reward_R.clamp_min(0.0) * coef * (1.0 - length_R.to(reward_R.dtype) / most)

    return shaped


def group_advantage(
    *, std: bool = True, scope: Scope = "group", shape: Shape | None = None, population: bool = False
) -> Advantage:
    r"""GRPO's advantage of a rollout, the same at all its steps: :math:`(r_i - \bar r_G) / (\sigma_G + 10^{-6})`.

    0 in a group of one, and in one whose rewards are all equal. The deviation is that of a sample (n - 1).

    Args:
        std: Whether to divide by the deviation; Dr. GRPO does not.
        scope: The rollouts of the mean and deviation: those of the prompt, or of the batch.
        shape: A function applied to the rewards first, see `length_bonus`.
        population: Whether the deviation is that of the population (n) instead.
    """
    name = f"group_advantage({('population' if population else 'std') if std else 'mean'}, {scope})"

    def number(rollouts: Rollouts, steps: Steps, clock: Clock) -> Tensor:
        reward_R = graded(rollouts)
        if shape is not None:
            reward_R = shape(reward_R, rollouts.steps_R, clock.longest)
        group_R = members(rollouts, scope)
        above_R = reward_R - group_means(reward_R, group_R)
        if not std:
            return above_R
        spread_R = group_means(above_R**2, group_R)
        if not population:
            count_R = torch.bincount(group_R)[group_R]
            spread_R = spread_R * count_R / (count_R - 1).clamp_min(1)
        return above_R / (spread_R.sqrt() + 1e-6)

    return stored_advantage(per_rollout(name, number, groups=scope == "group"))


def running_advantage(controller: str, shape: Shape | None = None) -> Advantage:
    r""":math:`(r_i - \bar r) / \sigma_r` against all batches so far, whose statistics a `RunningRewards` keeps.

    During its warm-up, it is the reward minus a fixed baseline. Where all rewards so far were equal, nothing is
    divided.

    Args:
        controller: Name of the controller.
        shape: A function applied to the rewards first; the controller's must be the same.
    """

    def number(rollouts: Rollouts, steps: Steps, clock: Clock) -> Tensor:
        reward_R = graded(rollouts)
        if shape is not None:
            reward_R = shape(reward_R, rollouts.steps_R, clock.longest)
        return (reward_R - clock.controller_outputs[f"{controller}.mean"]) / clock.controller_outputs[
            f"{controller}.std"
        ]

    return stored_advantage(per_rollout(f"running_advantage({controller})", number))


def stored_advantage(stat: Stat) -> Advantage:
    """An advantage that is a statistic of the whole batch."""

    def value(context: Context, view: str) -> Tensor:
        return context.steps.stored[stat.name].to(context.student_logp_N.dtype)

    return Advantage(stat.name, value, stats=(stat,))
