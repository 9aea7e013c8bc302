"""Per-step losses of a method, and the scalar made of them. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


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
