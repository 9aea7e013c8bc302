"""The party that learns: the student, its optimizer, score pass and updates. It knows no teacher and no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retort.align.sentences import sentences_of
from retort.config.sections import OptimizerSection
from retort.core.needs import can_meet
from retort.core.parts import Part
from retort.core.rollouts import Group, Pack
from retort.core.signals import TeacherSignal
from retort.core.steps import Clock, Steps
from retort.loss import scoring
from retort.method import Method
from retort.models.lm import LanguageModel
from retort.models.sharding import of_one_kind
from retort.ranks import Share
from retort.train.learning.passes import Batch, Passes
from retort.train.learning.spread_head import rounds
from retort.train.learning.update import Rounds, Update, learn
from retort.train.storage import checkpoint
from retort.train.storage.metrics import Means, Stopwatch


@dataclass(eq=False)
class Learner:
    """The student and its optimizer.

    Attributes:
        passes: The student, and how it reads rollouts.
        settings: The settings of optimizer and updates.
        moved: Called after every optimizer step with their number in the run, for weights that follow the student's.
        variance_every: Batches from one measurement of the gradient's variance to the next; 0 for none.
        rounds: The passes with gradient over a batch.
        updates: Number of optimizer steps done.
        begun: Number of optimizer steps done when the current method took over.
    """

    passes: Passes
    settings: OptimizerSection
    moved: Callable[[int], None] | None = None
    variance_every: int = 0
    rounds: Rounds = rounds
    updates: int = 0
    begun: int = 0

    def __post_init__(self) -> None:
        self.optimizer: torch.optim.Optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        return torch.optim.AdamW(
            [{"params": own} for own in of_one_kind(list(self.lm.trainable().values()))],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=True,  # A fused step passes over the weights once, not a dozen times: a fifth of the time on a CPU.
        )

    def spread(self, say: Callable[[str], None]) -> None:
        """Spreads the student and its optimizer over the ranks; in a single process it does nothing.

        Args:
            say: Shows the user what the ranks decide later.

        Raises:
            UserError: The student's family cannot be spread.
        """
        if self.passes.world.size > 1 and not self.lm.sharding.on:
            self.passes.head.say = say
            self.lm.spread(self.passes.world)
            self.optimizer = self._optimizer()  # the one before has made no step yet

    @property
    def lm(self) -> LanguageModel:
        """The student."""
        return self.passes.lm

    @property
    def vocab(self) -> int:
        """Ids that the student shares with all teachers."""
        return self.passes.vocab

    def batch(
        self, method: Method, groups: Sequence[Group], signals: Mapping[str, TeacherSignal], clock: Clock
    ) -> Batch:
        """Packs rollouts with their signals; arguments as in `score`."""
        pack = Pack.of([rollout for group in groups for rollout in group])
        return Batch(method, pack, pack.steps, signals, clock, share=Share.of(groups, self.passes.world))

    def score(
        self, method: Method, groups: Sequence[Group], signals: Mapping[str, TeacherSignal], clock: Clock
    ) -> Batch:
        """The score pass before the first update: computes old log-probs, baselines, statistics and weights.

        Args:
            method: The method that is applied.
            groups: The rollouts by group.
            signals: The teachers' signals by view; of several ranks, those about this rank's share.
            clock: The position in the run.
        """
        bare = self.batch(method, groups, signals, clock)
        watches = tuple(
            watch
            for watch in method.watched(clock.step)
            if all(can_meet(signals[view].offers, need) for view in method.views for need in watch.needs_of(view))
        )
        bare = replace(bare, steps=self._with_sentences(method, bare.pack), watches=watches)
        several = self.settings.updates * self.settings.epochs > 1 and method.uses_old_logp
        evaluate = self.passes.evaluator(bare)
        return replace(bare, steps=scoring.scored(method, bare.steps, clock, bare.valid, evaluate, several=several))

    def learn(self, batch: Batch, factor: Callable[[int], float], watch: Stopwatch) -> tuple[Means, dict[str, Tensor]]:
        """All optimizer steps on a scored batch.

        Args:
            batch: The result of `score`.
            factor: Maps an optimizer step to a factor on the learning rate.
            watch: Collects the times.

        Returns:
            The means to log, and the per-step values of the first pass over the batch, [N] each.
        """
        update = Update(
            self.passes, self.settings, self.optimizer, factor, self.variance_every, self.moved, self.rounds
        )
        self.updates, means, values = learn(update, batch, self.updates, watch)
        return means, values

    def top_ids(self, method: Method, groups: Sequence[Group], k: int) -> Tensor:
        """See `Passes.top_ids`."""
        return self.passes.top_ids(method, Pack.of([rollout for group in groups for rollout in group]), k)

    def entropies(self, method: Method, groups: Sequence[Group]) -> Tensor:
        """See `Passes.entropies`."""
        return self.passes.entropies(method, Pack.of([rollout for group in groups for rollout in group]))

    def evaluator(self, batch: Batch) -> scoring.Evaluate:
        """Evaluates functions of the context on a batch, with the student as it is now."""
        return self.passes.evaluator(batch)

    def averages(self, batch: Batch, parts: Mapping[str, Part], view: str) -> dict[str, float]:
        """Means of parts over all steps of a batch, with the student as it is now. Costs a forward pass."""
        evaluate = self.evaluator(batch)
        return scoring.averages(parts, view, batch.steps, batch.clock, batch.valid, evaluate)

    def begin(self) -> None:
        """Begins another method: each has an optimizer and a learning rate of its own."""
        self.optimizer.state.clear()
        self.begun = self.updates

    def tensors(self) -> tuple[Mapping[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """State for a checkpoint: weights, optimizer tensors, plain values."""
        counts = {"updates": self.updates, "begun": self.begun}
        return self.lm.trainable(), checkpoint.optimizer_tensors(self.optimizer), counts

    @torch.no_grad()
    def restore(self, found: checkpoint.Found) -> None:
        """Restores the student, spread or not, and its optimizer from a checkpoint.

        Raises:
            UserError: The checkpoint cannot be read, or holds the optimizer of another model.
        """
        found.fill("weights", self.lm.trainable())
        checkpoint.restore_optimizer(self.optimizer, found)
        self.updates, self.begun = int(found.state["updates"]), int(found.state["begun"])

    def _with_sentences(self, method: Method, pack: Pack) -> Steps:
        """The steps of a pack, with the sentences of their text if a statistic asks for them."""
        if not any(stat.sentences for stat, _ in method.stats.values()):
            return pack.steps
        found = [sentences_of(rollout, self.lm.tokenizer) for rollout in pack.rollouts]
        return replace(pack.steps, sentence_N=torch.tensor([sentence for own in found for sentence in own]))
