"""The score pass of a run, by forward passes of its student. Axis letters: see `retort.types`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from retort import scoring
from retort.align.sentences import sentences
from retort.context import Context
from retort.method import Watch
from retort.models.core import Core, per_token
from retort.models.definition import Values
from retort.parts import Part
from retort.signals import TeacherSignal
from retort.steps import Clock, Steps
from retort.teachers.base import answers
from retort.teachers.view import View
from retort.train.setup import Setup
from retort.types import Need, Pack, can_meet, in_groups


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of rollouts with all that was said about it.

    Attributes:
        pack: The rollouts.
        steps: The table of their steps, with what is stored of the batch.
        signals: The teachers' answers by view.
        watches: Curves that can be drawn of it.
        clock: When.
    """

    pack: Pack
    steps: Steps
    signals: Mapping[str, TeacherSignal]
    watches: tuple[Watch, ...]
    clock: Clock

    @property
    def valid(self) -> dict[str, Tensor | None]:
        """Of each view, see `TeacherSignal.valid_N`; on the CPU, where a batch is kept."""
        return {name: None if s.valid_N is None else s.valid_N.cpu() for name, s in self.signals.items()}


def score(setup: Setup, pack: Pack, signals: Mapping[str, TeacherSignal], clock: Clock) -> Batch:
    """What must be known before the first update, if the method needs any: old log-probs, baselines, weights."""
    method, optimizer = setup.method, setup.config.optimizer
    watches = tuple(
        watch
        for watch in method.watch
        if clock.step % watch.every == 0
        and all(can_meet(signals[view].offers, need) for view in method.views for need in watch.asks(view))
    )
    bare = Batch(pack, _with_sentences(setup, pack), signals, watches, clock)
    several = optimizer.updates * optimizer.epochs > 1 and method.uses_old_logp
    steps = scoring.scored(method, bare.steps, clock, bare.valid, evaluator(setup, bare), several=several)
    return replace(bare, steps=steps)


def student_ids(setup: Setup, pack: Pack, k: int) -> Tensor:
    """The student's `k` most likely ids at every step, by place in N: int64 [N, K] on the CPU, most likely first.

    For teachers that cannot hand over a whole distribution. Exact, as the student is now and at the temperature of the
    loss; fewer than `k` where student and teachers share fewer. Costs a forward pass.
    """
    bare = Batch(pack, pack.steps, {}, (), Clock())
    ids_NK = torch.zeros(len(pack), min(k, setup.vocab), dtype=torch.long)
    with torch.no_grad():
        for chosen in micro_batches(setup, pack, range(len(pack.rollouts))):
            hidden_ND = hidden_of(setup, pack, chosen)
            index_N = pack.steps_of(chosen)
            with setup.student.compute():
                core = core_of(setup, bare, index_N, lambda context: {"ids": context.student.topk(k)[0]})
                ids_NK[index_N] = per_token(core, hidden_ND)["ids"].cpu()
    return ids_NK


def ask_teachers(
    setup: Setup,
    pack: Pack,
    needs: Callable[[str], frozenset[Need]],
    views: Mapping[str, View] | None = None,
) -> dict[str, TeacherSignal]:
    """What the teachers say about a pack.

    Args:
        setup: Of the run.
        pack: Rollouts, those of a visit to a prompt being neighbours.
        needs: What to ask of a view's teacher.
        views: Who is asked; all of the method's by default.
    """
    return answers(
        setup.teachers,
        setup.method.views if views is None else views,
        in_groups(pack.rollouts),
        needs,
        setup.method.temperature,
        partial(student_ids, setup, pack),
    )


def averages(setup: Setup, batch: Batch, parts: Mapping[str, Part], view: str) -> dict[str, float]:
    """Means of parts over all steps of a batch, with the student as it is now. Costs a forward pass."""
    return scoring.averages(parts, view, batch.steps, batch.clock, batch.valid, evaluator(setup, batch))


def evaluator(setup: Setup, batch: Batch) -> scoring.Evaluate:
    """Evaluates functions of the context on the rollouts of a batch."""

    @torch.no_grad()
    def evaluate(values: Values, steps: Steps, clock: Clock) -> dict[str, Tensor]:
        now, found = replace(batch, steps=steps, clock=clock), dict[str, Tensor]()
        for chosen in micro_batches(setup, batch.pack, range(len(batch.pack.rollouts))):
            hidden_ND = hidden_of(setup, batch.pack, chosen)
            with setup.student.compute():
                core = core_of(setup, now, batch.pack.steps_of(chosen), values)
                fill(found, batch.pack, chosen, per_token(core, hidden_ND))
        return found

    return evaluate


def _with_sentences(setup: Setup, pack: Pack) -> Steps:
    """The steps of a pack, with the sentences of their text if a statistic asks for them."""
    if not any(stat.sentences for stat, _ in setup.method.stats.values()):
        return pack.steps
    found = [sentences(rollout.action_ids, setup.student.tokenizer) for rollout in pack.rollouts]
    return replace(pack.steps, sentence_N=torch.tensor([sentence for own in found for sentence in own]))


def fill(found: dict[str, Tensor], pack: Pack, rollouts: Sequence[int], values: Mapping[str, Tensor]) -> None:
    """Files the values of some rollouts under their place in N."""
    index_N = pack.steps_of(rollouts)
    if not values:
        return
    together_KN = torch.stack([values_N.detach().float() for values_N in values.values()]).cpu()  # one wait for a GPU
    for name, values_N in zip(values, together_KN, strict=True):
        found.setdefault(name, torch.full((len(pack),), math.nan))[index_N] = values_N


def hidden_of(setup: Setup, pack: Pack, rollouts: Sequence[int]) -> Tensor:
    """The student's hidden states at the steps of some rollouts."""
    return setup.student.hidden([pack.rollouts[i].sequence for i in rollouts])


def core_of(setup: Setup, batch: Batch, index_N: Tensor, values: Callable[[Context], dict[str, Tensor]]) -> Core:
    """The loss core for some steps."""
    device = setup.student.device
    signals = {name: signal.select(index_N.to(device)) for name, signal in batch.signals.items()}
    steps = batch.steps.select(index_N).to(device)
    return Core(values, steps, batch.clock, signals, setup.student.head(), setup.vocab, setup.method.temperature)


def micro_batches(setup: Setup, pack: Pack, rollouts: Sequence[int]) -> list[list[int]]:
    """Rollouts, cut into what fits one forward pass."""
    batches = setup.student.batches([pack.rollouts[i].sequence for i in rollouts], setup.config.optimizer.batch_tokens)
    return [[rollouts[i] for i in batch] for batch in batches]
