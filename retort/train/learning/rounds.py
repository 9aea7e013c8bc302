"""The passes with gradient that ranks make together, and the loss of each. Axis letters: see `retort.core`.

A round is one forward and backward pass on every rank. In most runs a rank computes the loss of its own steps, by a
head that is whole. `retort.train.learning.spread_head` has the other kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.definition import Values
from retort.core.per_token import Core
from retort.core.signals import TeacherSignal
from retort.core.steps import Steps
from retort.loss.terms import recorded_values, term_values, watch_values
from retort.train.learning.passes import Batch, Passes


class Round:
    """One pass; this rank computes the loss of its own steps alone.

    Attributes:
        own: Sequences that this rank reads, by their place in the pack; none, where only other ranks have some left.
        own_N: Their steps.
        index_N: The steps whose loss this rank computes.
        chunk: Steps of a chunk of logits; None: as many as are best.
    """

    chunk: int | None = None

    def __init__(self, passes: Passes, batch: Batch, own: Sequence[int]) -> None:
        """Of some sequences of a batch."""
        self.passes, self.batch, self.own = passes, batch, own
        self.own_N = self.index_N = batch.pack.steps_in(own)

    def hidden(self) -> Tensor:
        """The student's hidden states at the rank's own steps, live."""
        return self.passes.hidden(self.batch.pack, self.own)

    def together(self, hidden_ND: Tensor) -> Tensor:
        """Of these, the hidden states at the steps whose loss is computed here, live."""
        return hidden_ND

    def core(self, values: Values) -> Core:
        """The loss core at these steps."""
        return self.passes.core(self.batch, self.index_N, values)

    def own_signals(self, core: Core) -> tuple[Mapping[str, TeacherSignal], Steps]:
        """The signals and the table at the rank's own steps, for terms that are computed there alone."""
        return core.signals, core.steps

    def cut(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of values at the steps whose loss is computed here, those at the rank's own."""
        return dict(values)

    def loss(self, computed: Tensor, own: Tensor) -> Tensor:
        """The rank's part of the loss: what it computed, or what its own steps come to."""
        return computed


def gathered(passes: Passes, batch: Batch, micros: Sequence[Sequence[int]]) -> Iterator[Round]:
    """A round for each micro-batch of this rank, and idle passes while others have more."""
    spare = passes.spare(len(micros))
    for micro in micros:
        yield Round(passes, batch, micro)
    passes.idle(spare)


def every_value(batch: Batch) -> Values:
    """All that is computed of a chunk: the terms, the curves, and the columns of the record."""
    parts = (
        term_values(batch.method),
        watch_values(batch.watches),
        recorded_values(batch.method, {view: signal.offers for view, signal in batch.signals.items()}),
    )

    def every(context: Context) -> dict[str, Tensor]:
        return {name: value_C for part in parts for name, value_C in part(context).items()}

    return every


def selected(batch: Batch, index_N: Tensor, device: torch.device) -> tuple[dict[str, TeacherSignal], Steps]:
    """The rank's own signals and the table at some of its steps, on a device."""
    local_N = batch.share.local(index_N).to(device)
    signals = {name: signal.select(local_N) for name, signal in batch.signals.items()}
    return signals, batch.steps.select(index_N).to(device)
