"""The protocol of estimators, which turn a disagreement into a gradient. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from retort.core.context import Context
from retort.core.needs import Need
from retort.core.parts import Part


class Estimator(Protocol):
    """Differentiates a term's disagreement. Implementations are frozen values."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts that it evaluates."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """Its needs of the teacher."""
        ...

    @property
    def stored(self) -> Mapping[str, Part]:
        """Parts, by name, whose values must be taken before the first update on a batch."""
        ...

    @property
    def uses_old_logp(self) -> bool:
        """Whether it compares the student with itself before the first update on a batch."""
        ...

    @property
    def reads_hidden(self) -> bool:
        """Whether it reads `Context.student_hidden_ND` and the signals' hidden states, and no logits."""
        ...

    def token_loss(self, context: Context, view: str, term: str, weight_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns value, differentiable in the student, and weight of each step, [N] each; no weight counts as 1."""
        ...

    def shown(self, context: Context, view: str, term: str) -> dict[str, Tensor]:
        """Further numbers of each token for the record, [N] each, by name."""
        ...
