"""Per-step losses of a method, and the scalar made of them. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


def times(factor: float | Tensor, value: Tensor) -> Tensor:
    """A product in which a factor of 0 wins: it is 0 even of an infinite value, and so is its gradient.

    What a coefficient or a weight of 0 switches off must not reach a loss, and 0 times infinity is NaN.

    Args:
        factor: A number, or numbers of the value's shape.
        value: Numbers, differentiable.
    """
    off = torch.full_like(value, factor == 0, dtype=torch.bool) if isinstance(factor, float | int) else factor == 0
    return torch.where(off, 0.0, value) * factor


@dataclass(frozen=True)
class TokenLoss:
    """One term's loss at each step: `value_N * weight_N * counted_N`, before any division.

    Attributes:
        value_N: Divergence or surrogate, nats; differentiable.
        weight_N: Detached weight >= 0 (a gate is 0 or 1).
        counted_N: Steps that take part, bool.
    """

    value_N: Tensor
    weight_N: Tensor
    counted_N: Tensor

    @property
    def value(self) -> Tensor:
        """Same as `value_N`."""
        return self.value_N

    @property
    def weight(self) -> Tensor:
        """Same as `weight_N`."""
        return self.weight_N

    @property
    def counted(self) -> Tensor:
        """Same as `counted_N`."""
        return self.counted_N


@dataclass(frozen=True)
class TokenLosses:
    """A method applied to one whole optimizer batch.

    Attributes:
        loss: Scalar, differentiable.
        terms: Per-step values of each term, by the term's name.
        state: State of the method's stateful parts, to pass to the next call.
    """

    loss: Tensor
    terms: Mapping[str, TokenLoss]
    state: Mapping[str, Tensor] = field(default_factory=lambda: {})
