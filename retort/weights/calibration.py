"""Calibration of a teacher: right rollouts rank above wrong ones, and both are balanced. Axes: see `retort.core`.

Uni-OPD, arXiv 2605.03677. A rollout is right if its reward is at least a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from retort.advantages.outcome import Scope, graded, members, per_rollout
from retort.core.context import Context
from retort.core.needs import SAMPLED
from retort.core.parts import Advantage, Quantity, Stat, Weight
from retort.core.random_streams import uniforms
from retort.core.steps import Clock, Rollouts, Steps
from retort.errors import UserError

Gap = Literal["mean", "minmax"]
Direction = Literal["both", "correct_up", "incorrect_down"]


def surplus(right_R: Tensor, group_R: Tensor, uniform_R: Tensor, ratio: float) -> Tensor:
    """The rollouts to leave out for right : wrong = ratio in their group, bool [R].

    Only the larger side of a mixed group loses rollouts, those with the lowest random number first. A group where the
    target for that side is less than one rollout stays as it is.

    Args:
        right_R: Whether each rollout is right, bool.
        group_R: Index of each one's group.
        uniform_R: Random numbers that decide which go first.
        ratio: 0 keeps only the wrong ones of a mixed group, infinity only the right ones.
    """
    out_R = torch.zeros_like(right_R)
    for group in _numbers(group_R):
        own_R = group_R == group
        right, wrong = (own_R & right_R).nonzero().squeeze(-1), (own_R & ~right_R).nonzero().squeeze(-1)
        if not len(right) or not len(wrong):
            continue
        if ratio == 0 or math.isinf(ratio):
            out_R[right if ratio == 0 else wrong] = True
            continue
        for side, allowed in ((right, int(len(wrong) * ratio)), (wrong, int(len(right) / ratio))):
            if len(side) > allowed >= 1:
                out_R[side[torch.argsort(uniform_R[side], stable=True)[: len(side) - allowed]]] = True
                break
    return out_R


def balance(ratio: float, *, scope: Scope = "group", threshold: float = 0.5, name: str = "balance") -> Weight:
    """1 on rollouts that are kept, 0 on those drawn to be left out; give `name` to a denominator to leave them out.

    Args:
        ratio: Right : wrong, see `surplus`.
        scope: Balance within each prompt's rollouts, or within the batch.
        threshold: Least reward of a right rollout.
        name: Name of the stored value.

    Raises:
        UserError: The ratio is negative or not a number.
    """
    if not ratio >= 0:
        raise UserError(f"balance: the ratio of right to wrong rollouts must not be negative, but is {ratio}")

    def number(rollouts: Rollouts, steps: Steps, clock: Clock) -> Tensor:
        right_R = graded(rollouts) >= threshold
        ids_R = steps.rollout_N.new_zeros(len(right_R)).index_copy_(0, rollouts.number_N, steps.rollout_N)
        # Drawn by the rollout's own index, so that a masked rollout does not change the draws of the others.
        uniform = uniforms(clock.seed, "balance", clock.step, count=int(ids_R.max()) + 1).to(ids_R.device)
        return 1.0 - surplus(right_R, members(rollouts, scope), uniform[ids_R], ratio).double()

    stat = per_rollout(name, number, groups=scope == "group")
    return Weight(f"balance({ratio:g}, {scope})", _read(name), stats=(stat,))


def _read(name: str) -> Callable[[Context, str], Tensor]:
    def value(context: Context, view: str) -> Tensor:
        return context.steps.stored[name].to(context.student_logp_N.dtype)

    return value


def _numbers(group_R: Tensor) -> range:
    """Numbers of groups, some of which may have no rollout."""
    return range(int(group_R.max()) + 1 if len(group_R) else 0)


def order_gap(right: Tensor, wrong: Tensor, gap: Gap) -> float:
    """Gap of right returns above wrong ones: between their means, or between the lowest right and highest wrong."""
    ends = (right.mean(), wrong.mean()) if gap == "mean" else (right.min(), wrong.max())
    return float(ends[0] - ends[1])


def shifts(
    return_R: Tensor, right_R: Tensor, group_R: Tensor, *, margin: float, gap: Gap, direction: Direction
) -> Tensor:
    """The shift of every token of each rollout, nats, [R], so that its group's gap is at least the margin.

    Args:
        return_R: Mean log-ratio of each rollout, nats.
        right_R: Whether each rollout is right, bool.
        group_R: Index of each one's group; a group of only right or only wrong rollouts stays as it is.
        margin: Least gap, nats.
        gap: See `order_gap`.
        direction: Shift right ones up, wrong ones down, or half of both.
    """
    found_R = torch.zeros_like(return_R)
    for group in _numbers(group_R):
        right_G, wrong_G = (group_R == group) & right_R, (group_R == group) & ~right_R
        if not right_G.any() or not wrong_G.any():
            continue
        shift = max(0.0, margin - order_gap(return_R[right_G], return_R[wrong_G], gap))
        half = shift / 2 if direction == "both" else shift
        if direction != "incorrect_down":
            found_R[right_G] = half
        if direction != "correct_up":
            found_R[wrong_G] = -half
    return found_R


def ordered(return_R: Tensor, right_R: Tensor, group_R: Tensor, *, margin: float, gap: Gap, retained: float) -> Tensor:
    """The rollouts that stay once the worst of their groups are dropped and the gap is the margin or more, bool [R].

    It drops one at a time, the right one of lowest or the wrong one of highest return, whichever widens the gap more.
    It stops when the gap is wide enough, when neither widens it, or when fewer than max(1, int(retained n)) would stay.

    Args:
        return_R: Mean log-ratio of each rollout, nats.
        right_R: Whether each rollout is right, bool.
        group_R: Index of each one's group.
        margin: Least gap, nats.
        gap: See `order_gap`.
        retained: Share of a group that stays.
    """
    kept_R = torch.ones_like(right_R)
    for group in _numbers(group_R):
        own = (group_R == group).nonzero().squeeze(-1)
        by_return = own[torch.argsort(return_R[own], stable=True)]
        right, wrong = by_return[right_R[by_return]], by_return[~right_R[by_return]]
        least = max(1, int(len(own) * retained))
        while len(right) and len(wrong) and len(right) + len(wrong) > least:
            now = order_gap(return_R[right], return_R[wrong], gap)
            if now >= margin:
                break
            fewer_right = order_gap(return_R[right[1:]], return_R[wrong], gap) if len(right) > 1 else -math.inf
            fewer_wrong = order_gap(return_R[right], return_R[wrong[:-1]], gap) if len(wrong) > 1 else -math.inf
            if max(fewer_right, fewer_wrong) <= now:
                break
            if fewer_right >= fewer_wrong:
                kept_R[right[0]], right = False, right[1:]
            else:
                kept_R[wrong[-1]], wrong = False, wrong[:-1]
    return kept_R


def calibrated_log_ratio(
    kind: Literal["shift", "mask"] | None = "shift",
    *,
    margin: float = 0.4,
    gap: Gap = "mean",
    scope: Scope = "group",
    direction: Direction = "both",
    retained: float = 0.25,
    over: Weight | None = None,
    threshold: float = 0.5,
    name: str = "margin",
) -> Advantage:
    """The log-ratio, nats, shifted or masked by rollout until right ones are preferred to wrong ones.

    Args:
        kind: `shift`: see `shifts`. `mask`: 0 in rollouts that `ordered` leaves out. None: the plain log-ratio.
        margin: Least gap of a group, nats; minus infinity changes nothing.
        gap: See `order_gap`.
        scope: Groups are each prompt's rollouts, or the batch.
        direction: Direction of a shift, see `shifts`.
        retained: Share of a group that a mask keeps.
        over: A `balance`: rollouts that it leaves out do not enter the returns that are compared. None: all do.
        threshold: Least reward of a right rollout.
        name: Name of the stored values: `<name>.return` (mean log-ratio, an infinite one counts as 100 nats),
            `<name>.shift`, `<name>.kept`.
    """

    def ratio(context: Context, view: str) -> Tensor:
        teacher_N, old_N = context.decided_logps(view)
        return teacher_N - old_N

    if kind is None:
        return Advantage("log_ratio", ratio, frozenset({SAMPLED}))
    # Finite, so that one token that the teacher rules out does not decide the shift of all the others.
    part = Quantity("log_ratio", lambda context, view: context.gap_N(view), frozenset({SAMPLED}))

    def mean(ratio_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        rollouts = steps.rollouts()
        return rollouts.mean(ratio_N.double())[rollouts.number_N]

    def moved(ratio_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        """For `shift`, the shift. For `mask`, 1 where the rollout is kept."""
        rollouts = steps.rollouts()
        right_R, group_R = graded(rollouts) >= threshold, members(rollouts, scope)
        return_R = rollouts.mean(ratio_N.double())
        within_R = torch.ones_like(right_R)
        if over is not None:
            within_R = rollouts.mean(steps.stored[over.stats[0].name]) > 0.5
        given = (return_R[within_R], right_R[within_R], group_R[within_R])
        if kind == "shift":
            found_R = torch.zeros_like(return_R)
            found_R[within_R] = shifts(*given, margin=margin, gap=gap, direction=direction)
        else:
            found_R = torch.ones_like(return_R)
            found_R[within_R] = ordered(*given, margin=margin, gap=gap, retained=retained).double()
        return found_R[rollouts.number_N]

    stored = f"{name}.{'shift' if kind == 'shift' else 'kept'}"

    def value(context: Context, view: str) -> Tensor:
        ratio_N = ratio(context, view)
        moved_N = context.steps.stored[stored].to(ratio_N.dtype)
        return ratio_N + moved_N if kind == "shift" else torch.where(moved_N > 0, ratio_N, torch.zeros_like(ratio_N))

    stats = (
        *(() if over is None else over.stats),
        Stat(f"{name}.return", part, mean),
        Stat(stored, part, moved, rewards=True, groups=scope == "group"),
    )
    return Advantage(f"calibrated_log_ratio({kind}, {margin:g})", value, frozenset({SAMPLED}), stats=stats)


def within_reach(limit: float) -> Weight:
    """1 where student and teacher differ by less than `limit` nats at the sampled token, else 0; 1 at infinity."""

    def value(context: Context, view: str) -> Tensor:
        gap_N = context.live_logp_N(view).detach() - context.signal(view).sampled_logp_N
        return torch.ones_like(gap_N) if math.isinf(limit) else (gap_N.abs() < limit).to(gap_N.dtype)

    return Weight(f"|gap| < {limit:g}", value, frozenset({SAMPLED}))
