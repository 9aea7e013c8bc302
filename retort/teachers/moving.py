"""Specifications of a self-teacher's weights, when they move. A run keeps the weights themselves.

One number, `update_rate`, means the same everywhere: the share of the current student that goes into the teacher. 0 is
the student before training, 1 the current student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retort.errors import UserError

Kind = Literal["frozen", "live", "ema", "hard_copy", "trust_region"]


@dataclass(frozen=True)
class Weights:
    """How a teacher's weights follow the student's. Made by the functions of this module; equal values share weights.

    Attributes:
        kind: Kind of movement.
        update_rate: Share of the live student, in [0, 1].
        every: Optimizer steps between two moves.
    """

    kind: Kind = "frozen"
    update_rate: float = 0.0
    every: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.update_rate <= 1.0:
            raise UserError(f"{self.kind}: update_rate must lie in [0, 1], not {self.update_rate}")
        if self.every < 1:
            raise UserError(f"{self.kind}: every must be at least 1 optimizer step, not {self.every}")

    @property
    def stateful(self) -> bool:
        """Whether a run has to keep weights of its own for it, and put them into its checkpoints."""
        return self.kind in ("ema", "hard_copy")

    @property
    def words(self) -> str:
        """A description for users."""
        now_and_then = "every optimizer step" if self.every == 1 else f"every {self.every} optimizer steps"
        return {
            "frozen": "as it was before training",
            "live": "as it is",
            "ema": f"an average that takes {self.update_rate:g} of it {now_and_then}",
            "hard_copy": f"copied {now_and_then}",
            "trust_region": f"its logits before training with {self.update_rate:g} of those as it is",
        }[self.kind]


def frozen() -> Weights:
    """The student before training."""
    return Weights()


def live() -> Weights:
    """The current student, without gradient."""
    return Weights("live", 1.0)


def ema(update_rate: float, every: int = 1) -> Weights:
    r"""An average that follows the student: :math:`\bar\theta \leftarrow (1 - u)\,\bar\theta + u\,\theta`.

    Args:
        update_rate: u; papers that give a decay give 1 - u.
        every: Optimizer steps between two moves.
    """
    return Weights("ema", update_rate, every)


def hard_copy(every: int) -> Weights:
    """The student when it was last copied.

    Args:
        every: Optimizer steps between two copies.
    """
    return Weights("hard_copy", 1.0, every)


def trust_region(update_rate: float) -> Weights:
    r"""An average of logits, not of weights: :math:`(1 - u)\,z_{frozen} + u\,z_{live}`.

    Args:
        update_rate: u, the share of the live student.
    """
    return Weights("trust_region", update_rate)
