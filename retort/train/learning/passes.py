"""Passes of the student over a batch of rollouts, in micro-batches. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from retort.core.definition import Values
from retort.core.per_token import Core, per_token
from retort.core.rollouts import Pack
from retort.core.signals import TeacherSignal
from retort.core.steps import Clock, Steps
from retort.method import Method, Watch
from retort.models.lm import LanguageModel


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of rollouts with its signals and statistics.

    Attributes:
        method: The method that is applied to it.
        pack: The packed rollouts.
        steps: The table of their steps, with the stored statistics.
        signals: The teachers' signals by view.
        clock: The position in the run.
        watches: Curves that are computed from it.
    """

    method: Method
    pack: Pack
    steps: Steps
    signals: Mapping[str, TeacherSignal]
    clock: Clock
    watches: tuple[Watch, ...] = ()

    @cached_property
    def valid(self) -> dict[str, Tensor | None]:
        """`TeacherSignal.valid_N` of each view, bool [N], fetched once to the CPU, where a batch is kept."""
        return {name: None if s.valid_N is None else s.valid_N.cpu() for name, s in self.signals.items()}


@dataclass(frozen=True, eq=False)
class Passes:
    """Forward passes of the student over rollouts.

    Attributes:
        lm: The student.
        vocab: Number of ids that it shares with all teachers.
        batch_tokens: Tokens per forward pass.
    """

    lm: LanguageModel
    vocab: int
    batch_tokens: int

    def micro_batches(self, pack: Pack, rollouts: Sequence[int]) -> list[list[int]]:
        """Splits rollouts, by their index in the pack, into what fits one forward pass."""
        batches = self.lm.batches([pack.rollouts[i].sequence for i in rollouts], self.batch_tokens)
        return [[rollouts[i] for i in batch] for batch in batches]

    def hidden(self, pack: Pack, rollouts: Sequence[int]) -> Tensor:
        """The student's hidden states at the steps of some rollouts, [N, D]."""
        return self.lm.hidden([pack.rollouts[i].sequence for i in rollouts])

    def core(self, batch: Batch, index_N: Tensor, values: Values) -> Core:
        """The loss core for some steps of a batch."""
        device = self.lm.device
        signals = {name: signal.select(index_N.to(device)) for name, signal in batch.signals.items()}
        steps = batch.steps.select(index_N).to(device)
        return Core(values, steps, batch.clock, signals, self.lm.head(), self.vocab, batch.method.temperature)

    @torch.no_grad()
    def evaluate(self, batch: Batch, values: Values) -> dict[str, Tensor]:
        """A function of the context at every step of a batch, without gradient: named values, [N] each."""
        found: dict[str, Tensor] = {}
        for chosen in self.micro_batches(batch.pack, range(len(batch.pack.rollouts))):
            hidden_ND = self.hidden(batch.pack, chosen)
            with self.lm.compute():
                core = self.core(batch, batch.pack.steps_of(chosen), values)
                fill(found, batch.pack, chosen, per_token(core, hidden_ND))
        return found

    @torch.no_grad()
    def top_ids(self, method: Method, pack: Pack, k: int) -> Tensor:
        """The student's `k` most likely ids at every step: int64 [N, K] on the CPU, most likely first.

        For teachers that cannot hand over a whole distribution. Exact, as the student is now and at the temperature of
        the loss; fewer than `k` where student and teachers share fewer. Costs a forward pass.
        """
        bare = Batch(method, pack, pack.steps, {}, Clock())
        ids_NK = torch.zeros(len(pack), min(k, self.vocab), dtype=torch.long)
        for chosen in self.micro_batches(pack, range(len(pack.rollouts))):
            hidden_ND = self.hidden(pack, chosen)
            index_N = pack.steps_of(chosen)
            with self.lm.compute():
                core = self.core(bare, index_N, lambda context: {"ids": context.student.topk(k)[0]})
                ids_NK[index_N] = per_token(core, hidden_ND)["ids"].cpu()
        return ids_NK

    def evaluator(self, batch: Batch) -> Evaluator:
        """A `retort.loss.scoring.Evaluate` of this batch, with other stored values or another clock."""
        return Evaluator(self, batch)


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates functions of the context on the rollouts of a batch."""

    passes: Passes
    batch: Batch

    def __call__(self, values: Values, steps: Steps, clock: Clock) -> Mapping[str, Tensor]:
        """Named values, [N] each, in the order of `steps`."""
        return self.passes.evaluate(replace(self.batch, steps=steps, clock=clock), values)


def fill(found: dict[str, Tensor], pack: Pack, rollouts: Sequence[int], values: Mapping[str, Tensor]) -> None:
    """Copies the values of some rollouts to their steps."""
    index_N = pack.steps_of(rollouts)
    if not values:
        return
    # One transfer waits for a GPU once.
    together_KN = torch.stack([values_N.detach().float() for values_N in values.values()]).cpu()
    for name, values_N in zip(values, together_KN, strict=True):
        found.setdefault(name, torch.full((len(pack),), math.nan))[index_N] = values_N
