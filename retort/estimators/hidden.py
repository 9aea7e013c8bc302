"""Estimator that differentiates the distance of hidden states to the teacher's. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import HIDDEN, Need
from retort.core.parts import Part
from retort.core.signals import as_compute
from retort.errors import SignalError

#: (the student's states [N, D], live, the teacher's [N, D]) -> [N].
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MatchHidden:
    """Compares last hidden states at the same steps; `match_hidden` makes it.

    It reads no logits, so the loss core has no part in it: it is evaluated by plain autograd on the [N, D] tensors of a
    micro-batch.
    """

    distance: Distance
    part: Part = field(default_factory=lambda: Part("hidden_states", _outside, frozenset({HIDDEN})))

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts that it evaluates."""
        return (self.part,)

    @property
    def needs(self) -> frozenset[Need]:
        """Its needs of the teacher."""
        return self.part.needs

    @property
    def stored(self) -> Mapping[str, Part]:
        """Values that must be taken before the first update on a batch: none."""
        return {}

    @property
    def uses_old_logp(self) -> bool:
        """False: it differentiates the live student only."""
        return False

    @property
    def reads_hidden(self) -> bool:
        """True: it reads nothing else."""
        return True

    def token_loss(self, context: Context, view: str, term: str, weight_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the distance at each step, [N], differentiable in the student's states, and a weight of 1.

        Raises:
            SignalError: The states have different widths; only models of one family can be compared.
        """
        rows = context.signal(view)
        assert context.student_hidden_ND is not None
        student_ND, teacher_ND = as_compute(context.student_hidden_ND), as_compute(rows.hidden_ND).detach()
        if teacher_ND.shape != student_ND.shape:
            raise SignalError(
                f"term '{term}' compares hidden states of width {student_ND.shape[-1]} (the student's) and "
                f"{teacher_ND.shape[-1]} ({rows.source}); it needs a teacher of the student's width, such as itself"
            )
        value_N = self.distance(student_ND, teacher_ND)
        return value_N, torch.ones_like(value_N.detach())

    def shown(self, context: Context, view: str, term: str) -> dict[str, Tensor]:
        """Further numbers of each token for the record: none, since its value says it all."""
        return {}


def _outside(context: Context, view: str) -> Tensor:
    raise SignalError("hidden states are compared outside of the loss core; they cannot be watched or weighed by")


def mean_square(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """The mean over the hidden dimensions of the squared difference, [N]."""
    return (student_ND - teacher_ND).square().mean(-1)


def match_hidden(distance: Distance = mean_square) -> MatchHidden:
    """The estimator that differentiates a distance of last hidden states (after the final norm, before the head).

    It costs one tensor [n, D] in fp32 for the steps of a micro-batch, and its gradient. The teacher's states [N, D] of
    the whole batch are kept, as for a whole distribution. A term with it has no weight.

    Args:
        distance: Distance per step, from states in fp32 or float64.
    """
    return MatchHidden(distance)
