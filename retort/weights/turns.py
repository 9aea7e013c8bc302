"""Weights of whole turns, by how far the models are apart in them. Axis letters: see `retort.core`; K is turns."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SAMPLED, Need
from retort.core.parts import Quantity, Stat, Weight
from retort.core.steps import Clock, Steps, Turns
from retort.errors import UserError

#: Numbers of the turns of a rollout that lie closer together than this count as equal (ATOD).
_EQUAL = 1e-8


def relative(values_K: Tensor, turns: Turns) -> Tensor:
    """Numbers of turns, moved to [0, 1] by the least and the largest of each rollout, [K]; 0.5 where all are equal."""
    low_K, high_K = turns.range(values_K)
    width_K = high_K - low_K
    equal_K = width_K < _EQUAL
    return torch.where(equal_K, 0.5, (values_K - low_K) / torch.where(equal_K, 1.0, width_K))


def by_step(values_K: Tensor, turns: Turns, epsilon: float, cap: float) -> Tensor:
    r"""SOD's weights of turns, [K]: :math:`\min((d_1 + \epsilon) / (d_k + \epsilon), 1 + \mathrm{cap})`.

    This is the product of the ratios of neighbouring turns, which telescopes. The cap is outside of the product.

    Args:
        values_K: d, the turns' mean gaps, nats.
        turns: The turns.
        epsilon: Added to both, nats.
        cap: Largest weight above 1; may be infinite.
    """
    weight_K = (turns.first(values_K) + epsilon) / (values_K + epsilon)
    weight_K = weight_K.clamp(max=1.0 + cap)
    # A rollout's first turn has weight 1 exactly, also where rounding would make it another number.
    first_K = torch.ones_like(turns.rollout_K, dtype=torch.bool)
    first_K[1:] = turns.rollout_K[1:] != turns.rollout_K[:-1]
    return torch.where(first_K, torch.ones_like(weight_K), weight_K)


class TurnGaps:
    r"""Gap and surprise of whole turns, stored before the first update on a batch, and weights made of them.

    A turn is a run of the student's tokens between two replies of the environment. Its gap is the mean of
    :math:`|\log p_T - \log p_{old}|` over its tokens, its surprise the mean of :math:`-\log p_{old}`; both in nats.
    Where the teacher rules a token out, its gap counts as 100 nats.
    """

    def __init__(self, name: str = "turn") -> None:
        """Builds them.

        Args:
            name: Name of the stored values: `<name>.gap`, `<name>.surprise`, `<name>.weight`.
        """
        self.name = name
        self._gap = Quantity("|log_ratio|", lambda context, view: context.gap_N(view).abs(), frozenset({SAMPLED}))
        # Of the same steps as the gap: those of rollouts that the teacher's view has.
        self._surprise = Quantity("surprise", lambda context, _: -context.old_logp_N, frozenset({SAMPLED}))
        self._mean_gap = self._stat("gap", self._gap, lambda values_K, turns, steps: values_K)
        self._mean_surprise = self._stat("surprise", self._surprise, lambda values_K, turns, steps: values_K)

    def _stat(self, what: str, part: Quantity, made: Callable[[Tensor, Turns, Steps], Tensor]) -> Stat:
        def finish(values_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
            turns = steps.turns()
            return made(turns.mean(values_N.double()), turns, steps)[turns.number_N]

        return Stat(f"{self.name}.{what}", part, finish)

    def gap(self) -> Quantity:
        """The gap of each step's turn, nats."""
        return self._read(self._mean_gap)

    def surprise(self) -> Quantity:
        """The surprise of each step's turn, nats: an estimate of the student's mean entropy in it."""
        return self._read(self._mean_surprise)

    def relative_to_first(self, cap: float = 0.2, epsilon: float = 1e-6) -> Weight:
        """SOD's weight of a turn (arXiv 2605.07725, Eq. 7): the first turn's gap over its own, at most `1 + cap`.

        Args:
            cap: Largest weight above 1; may be infinite.
            epsilon: Added to both gaps, nats.

        Raises:
            UserError: A number is out of range.
        """
        if math.isnan(cap) or cap < 0:
            raise UserError(f"relative_to_first: cap must not be negative, but is {cap:g}")
        if epsilon <= 0:
            raise UserError(f"relative_to_first: epsilon must be positive, not {epsilon:g}")

        def made(values_K: Tensor, turns: Turns, steps: Steps) -> Tensor:
            return by_step(values_K, turns, epsilon, cap)

        stat = self._stat("weight", self._gap, made)
        return self._weight(f"gap of first turn / gap, at most {1 + cap:g}", (self._mean_gap, stat))

    def gap_or_surprise(self) -> Weight:
        r"""ATOD's weight of a turn (arXiv 2606.27814): :math:`1 - (1 - \tilde d_k)(1 - \tilde h_k)`, in [0, 1].

        d is the gap and h the surprise, each moved to [0, 1] by its least and largest value in the rollout. A rollout
        of one turn, or of turns without a difference, has 0.75 everywhere.
        """

        def made(values_K: Tensor, turns: Turns, steps: Steps) -> Tensor:
            gap_K = relative(turns.mean(steps.stored[self._mean_gap.name].double()), turns)
            return 1.0 - (1.0 - gap_K) * (1.0 - relative(values_K, turns))

        stat = self._stat("weight", self._surprise, made)
        return self._weight("gap or surprise of the turn", (self._mean_gap, self._mean_surprise, stat))

    def _weight(self, name: str, stats: tuple[Stat, ...]) -> Weight:
        stored, needs = stats[-1].name, frozenset[Need]({SAMPLED})

        def value(context: Context, view: str) -> Tensor:
            return context.steps.stored[stored].to(context.student_logp_N.dtype)

        return Weight(name, value, needs, stats=stats)

    def _read(self, stat: Stat) -> Quantity:
        def value(context: Context, view: str) -> Tensor:
            return context.steps.stored[stat.name].to(context.student_logp_N.dtype)

        return Quantity(stat.name, value, frozenset({SAMPLED}), stats=(stat,))
