"""The plain definition of what the loss core computes. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.distribution import WHOLE, Distribution
from retort.core.head import Head
from retort.core.signals import TeacherSignal, as_compute
from retort.core.steps import Clock, Steps

Values = Callable[[Context], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Core:
    """A function of `Context` with all of its inputs except the hidden states.

    Attributes:
        values: Function from a block's context to named numbers per step, [C] each.
        steps: The table of the steps.
        clock: The progress of the run.
        signals: The teachers' signals, by view; each must be about exactly these tokens.
        head: The student's head; None if the inputs are the logits [N, V] themselves.
        vocab: Number of ids that student and teachers share; all others get no probability. On a rank that holds only
            some of the ids, how many of its own are shared.
        temperature: The divisor of the student's logits.
    """

    values: Values
    steps: Steps
    clock: Clock
    signals: Mapping[str, TeacherSignal]
    head: Head | None
    vocab: int
    temperature: float = 1.0

    @property
    def count(self) -> int:
        """N, the number of steps."""
        return len(self.steps)

    @property
    def widest(self) -> int:
        """Columns per step of the widest logits, the student's or a teacher's with other ids."""
        return max(self.vocab, *(signal.block_width for signal in self.signals.values()), 0)

    def evaluate(
        self, product_CV: Tensor, steps: Steps, signals: Mapping[str, TeacherSignal], rows: slice
    ) -> dict[str, Tensor]:
        """Returns the values of some steps from the student's product [C, V], differentiable in it."""
        policy = self.policy(product_CV)
        views = {name: signal.rows(rows, self.vocab) for name, signal in signals.items()}
        return self.values(Context(policy, views, steps.select(rows), self.clock))

    def policy(self, product_CV: Tensor) -> Distribution:
        """The student's policy at some steps, from its product [C, V] with the head. Only here are logits made."""
        logits_CV = product_CV if self.head is None else self.head.shape(product_CV)
        if self.temperature != 1.0:
            logits_CV = as_compute(logits_CV) / self.temperature  # not in bf16: the teacher's are divided in fp32, too
        return Distribution(as_compute(logits_CV), WHOLE if self.head is None else self.head.shard)

    def dense(self, hidden_ND: Tensor) -> dict[str, Tensor]:
        """Evaluates all steps at once, by plain autograd. This is the definition."""
        product_NV = hidden_ND[:, : self.vocab] if self.head is None else self._product(hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):  # products may be in bf16, a softmax may not
            return self.evaluate(product_NV, self.steps, self.signals, slice(0, self.count))

    def _product(self, hidden_ND: Tensor) -> Tensor:
        assert self.head is not None
        return replace(self.head, scale=1.0, soft_cap=None).logits(hidden_ND, self.vocab)
