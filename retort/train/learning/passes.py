"""Passes of the student over a batch of rollouts, in micro-batches. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.definition import Values
from retort.core.per_token import Core, per_token
from retort.core.rollouts import Pack
from retort.core.signals import TeacherSignal
from retort.core.steps import Clock, Steps
from retort.method import Method, Watch
from retort.models.lm import LanguageModel
from retort.ranks import WHOLE_BATCH, Share, World, here


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
        share: Which of its groups this rank computes; its signals are about these alone.
    """

    method: Method
    pack: Pack
    steps: Steps
    signals: Mapping[str, TeacherSignal]
    clock: Clock
    watches: tuple[Watch, ...] = ()
    share: Share = WHOLE_BATCH

    @cached_property
    def valid(self) -> dict[str, Tensor | None]:
        """`TeacherSignal.valid_N` of each view, bool [N], fetched once to the CPU, where a batch is kept."""
        own = {name: None if s.valid_N is None else s.valid_N.cpu() for name, s in self.signals.items()}
        return self.share.valid(own)


@dataclass(eq=False)
class HeadUse:
    """How several ranks divide the student's head in the loss, see `retort.train.learning.spread_head`.

    Attributes:
        setting: `ranks.head`.
        decided: Whether each computes on its slice, by the method and the names of its curves.
        say: Shows the user what was decided.
        noted: What was shown.
    """

    setting: Literal["auto", "gathered", "vocabulary"] = "gathered"
    decided: dict[tuple[int | str, ...], bool] = field(default_factory=lambda: {})
    say: Callable[[str], None] = lambda text: None
    noted: set[str] = field(default_factory=lambda: set[str]())

    def note(self, text: str) -> None:
        """Shows what was decided, once."""
        if text not in self.noted:
            self.noted.add(text)
            self.say(text)


@dataclass(frozen=True, eq=False)
class Passes:
    """Forward passes of the student over rollouts.

    Attributes:
        lm: The student.
        vocab: Number of ids that it shares with all teachers.
        batch_tokens: Tokens per forward pass.
        world: The ranks that learn together.
        head: How they divide the student's head.
    """

    lm: LanguageModel
    vocab: int
    batch_tokens: int
    world: World = field(default_factory=here)
    head: HeadUse = field(default_factory=HeadUse)

    def micro_batches(self, pack: Pack, rollouts: Sequence[int]) -> list[list[int]]:
        """Splits rollouts, by their index in the pack, into sequences (`Pack.sequences`) that fit one forward pass."""
        if not rollouts:
            return []
        places = pack.sequences_of(rollouts)
        batches = self.lm.batches([pack.sequences[i] for i in places], self.batch_tokens)
        return [[places[i] for i in batch] for batch in batches]

    def spare(self, passes: int) -> int:
        """How many more passes the busiest rank makes than this one, which makes so many; asked before the first."""
        return max(self.world.each(lambda: passes)) - passes

    def idle(self, passes: int) -> None:
        """Passes that add nothing, with which a rank keeps step: gradients are exchanged in every pass."""
        for _ in range(passes):
            self.lm.idle()

    def hidden(self, pack: Pack, sequences: Sequence[int]) -> Tensor:
        """The student's hidden states at the steps of some sequences of a pack, [N, D]."""
        return self.lm.hidden([pack.sequences[i] for i in sequences])

    def core(self, batch: Batch, index_N: Tensor, values: Values) -> Core:
        """The loss core for some steps of a batch."""
        device = self.lm.device
        signals = {name: signal.select(batch.share.local(index_N).to(device)) for name, signal in batch.signals.items()}
        steps = batch.steps.select(index_N).to(device)
        return Core(values, steps, batch.clock, signals, self.lm.head(), self.vocab, batch.method.temperature)

    @torch.no_grad()
    def evaluate(self, batch: Batch, values: Values) -> dict[str, Tensor]:
        """A function of the context at every step of a batch, without gradient: named values, [N] each."""
        found: dict[str, Tensor] = {}
        with self.lm.whole():
            for chosen in self.micro_batches(batch.pack, batch.share.own(range(len(batch.pack.rollouts)))):
                hidden_ND = self.hidden(batch.pack, chosen)
                with self.lm.compute():
                    core = self.core(batch, batch.pack.steps_in(chosen), values)
                    fill(found, batch.pack, chosen, per_token(core, hidden_ND))
        return batch.share.columns(found, len(batch.pack))

    def top_ids(self, method: Method, pack: Pack, k: int) -> Tensor:
        """The student's `k` most likely ids at every step: int64 [N, K] on the CPU, most likely first.

        For teachers that cannot hand over a whole distribution. Exact, as the student is now and at the temperature of
        the loss; fewer than `k` where student and teachers share fewer. Costs a forward pass. All ranks ask together,
        each about a pack of its own.
        """
        ids_NK = torch.zeros(len(pack), min(k, self.vocab), dtype=torch.long)
        self._told(method, pack, ids_NK, lambda context: context.student.topk(k)[0])
        return ids_NK

    def entropies(self, method: Method, pack: Pack) -> Tensor:
        """The student's entropy at every step, nats: [N] on the CPU. Otherwise as `top_ids`."""
        entropy_N = torch.zeros(len(pack))
        self._told(method, pack, entropy_N, lambda context: context.student.entropy())
        return entropy_N

    @torch.no_grad()
    def _told(self, method: Method, pack: Pack, into: Tensor, number: Callable[[Context], Tensor]) -> None:
        """Writes a number of the student's own at every step of a pack."""
        bare = Batch(method, pack, pack.steps, {}, Clock())
        with self.lm.whole():
            for chosen in self.micro_batches(pack, range(len(pack.rollouts))):
                hidden_ND = self.hidden(pack, chosen)
                index_N = pack.steps_in(chosen)
                with self.lm.compute():
                    core = self.core(bare, index_N, lambda context: {"told": number(context)})
                    into[index_N] = per_token(core, hidden_ND)["told"].cpu().to(into.dtype)

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


def fill(found: dict[str, Tensor], pack: Pack, sequences: Sequence[int], values: Mapping[str, Tensor]) -> None:
    """Copies the values of some sequences of a pack to their steps."""
    index_N = pack.steps_in(sequences)
    if not values:
        return
    # One transfer waits for a GPU once.
    together_KN = torch.stack([values_N.detach().float() for values_N in values.values()]).cpu()
    for name, values_N in zip(values, together_KN, strict=True):
        found.setdefault(name, torch.full((len(pack),), math.nan))[index_N] = values_N
