"""Confidence of a teacher relative to the least confident step of a batch. Axis letters: see `retort.core`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import ENTROPY
from retort.core.parts import Quantity, Stat, Weight
from retort.core.steps import Steps
from retort.errors import UserError
from retort.quantities.entropy import teacher_entropy

Scale = Literal["raw", "smoothed"]


def lowest_ahead(values_N: Tensor, rollout_N: Tensor, window: int) -> Tensor:
    """The least of each step's value and those of the `window` steps after it in the same rollout, [N].

    Args:
        values_N: Numbers, [N].
        rollout_N: Index of the rollout of each step; a rollout's steps come in order.
        window: Number of steps to look ahead; the end of the rollout cuts it short.
    """
    order = torch.argsort(rollout_N, stable=True)
    values, number = values_N[order], rollout_N[order]
    least = values.clone()
    for ahead in range(1, min(window, len(values) - 1) + 1):
        same = number[ahead:] == number[:-ahead]
        least[:-ahead] = torch.where(same, torch.minimum(least[:-ahead], values[ahead:]), least[:-ahead])
    return torch.empty_like(values_N).index_copy_(0, order, least)


class Confidence:
    r"""The gate :math:`\omega_t = \mathrm{clip}(1 - \gamma \hat H_t, c, 1)`, with :math:`\hat H` of a whole batch.

    :math:`\hat H_t` is the teacher's entropy over the batch's largest, or over one nat if that is more. With a window,
    the least entropy of the step and of those that follow replaces the step's own, so that uncertainty that is soon
    resolved does not count. EGRSD and CL-EGRSD, arXiv 2605.13255.
    """

    def __init__(
        self, coef: float, *, floor: float = 0.1, window: int = 0, scale: Scale = "raw", name: str = "confidence"
    ) -> None:
        """Builds the gate.

        Args:
            coef: gamma, at least 0.
            floor: c, in [0, 1].
            window: Number of steps to look ahead.
            scale: The values whose maximum divides: the entropies, or the least ones ahead.
            name: Name of the stored values: `<name>`, the normalised entropy, and `<name>.ahead`, the least one ahead.

        Raises:
            UserError: A number is outside of its range.
        """
        if coef < 0:
            raise UserError(f"confidence: coef must not be negative, but is {coef:g}")
        if not 0.0 <= floor <= 1.0:
            raise UserError(f"confidence: floor must lie in [0, 1], not {floor:g}")
        if window < 0:
            raise UserError(f"confidence: window must not be negative, but is {window}")

        def scaled(entropy_N: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
            if not len(entropy_N):
                return entropy_N, entropy_N
            ahead_N = lowest_ahead(entropy_N, steps.rollout_N.to(entropy_N.device), window)
            largest = (ahead_N if scale == "smoothed" else entropy_N).max().clamp_min(1.0)
            return entropy_N / largest, ahead_N / largest

        self.coef, self.floor, self.name = coef, floor, name
        self.stats = (
            Stat(name, teacher_entropy(), lambda entropy_N, steps, _: scaled(entropy_N, steps)[0]),
            Stat(f"{name}.ahead", teacher_entropy(), lambda entropy_N, steps, _: scaled(entropy_N, steps)[1]),
        )

    def _gate(self, context: Context, stored: str) -> Tensor:
        normal_N = context.steps.stored[stored].to(context.student_logp_N.dtype)
        return (1.0 - self.coef * normal_N).clamp(self.floor, 1.0)

    def weight(self) -> Weight:
        """The gate, at each step."""

        def value(context: Context, view: str) -> Tensor:
            return self._gate(context, f"{self.name}.ahead")

        return Weight(f"confidence({self.coef:g})", value, frozenset({ENTROPY}), stats=self.stats)

    def restored(self) -> Quantity:
        """The part of a step's weight that is due to the window: 0 where there is none."""

        def value(context: Context, view: str) -> Tensor:
            return self._gate(context, f"{self.name}.ahead") - self._gate(context, self.name)

        return Quantity(f"{self.name}.restored", value, frozenset({ENTROPY}), stats=self.stats)
