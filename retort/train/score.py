"""The score pass: what must be known of a batch of rollouts before it is learnt from. Axes: see `retort.types`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retort.align.sentences import sentences
from retort.apply import (
    finish_stats,
    means,
    part_values,
    stat_values,
    stored_values,
)
from retort.context import Context
from retort.method import Watch
from retort.models.core import Core, Steps, per_token
from retort.parts import Layout, Part
from retort.signals import TeacherSignal
from retort.train.moment import Moment
from retort.train.setup import Setup
from retort.types import Pack, can_meet


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of rollouts with all that was said about it."""

    pack: Pack
    signals: Mapping[str, TeacherSignal]
    stored: Mapping[str, Tensor]
    watches: tuple[Watch, ...]
    moment: Moment

    @property
    def step(self) -> int:
        """Batches done in the run before this one."""
        return self.moment.step

    @property
    def valid(self) -> dict[str, Tensor | None]:
        """Of each view, see `TeacherSignal.valid_N`; on the CPU, where a batch is kept."""
        return {name: None if s.valid_N is None else s.valid_N.cpu() for name, s in self.signals.items()}


def score(setup: Setup, pack: Pack, signals: Mapping[str, TeacherSignal], moment: Moment) -> Batch:
    """What must be known before the first update, if the method needs any: old log-probs, baselines, weights."""
    method, optimizer = setup.method, setup.config.optimizer
    watches = tuple(
        watch
        for watch in method.watch
        if moment.step % watch.every == 0
        and all(can_meet(signals[view].offers, need) for view in method.views for need in watch.asks(view))
    )
    bare = Batch(pack, signals, {}, watches, moment)
    several = optimizer.updates * optimizer.epochs > 1 and method.uses_old_logp
    if method.stats:
        measured = any(stat.part is not None for stat, _ in method.stats.values())
        found = _evaluated(setup, bare, stat_values(method)) if measured else {}
        bare = replace(bare, stored=finish_stats(method, found, _layout(setup, bare), bare.valid))
    if not several and not method.weighs_batch:
        return bare
    found = _evaluated(setup, bare, stored_values(method, weights_only=not several))
    return replace(bare, stored={**bare.stored, **found})


def averages(setup: Setup, batch: Batch, parts: Mapping[str, Part], view: str) -> dict[str, float]:
    """Means of parts over all steps of a batch, with the student as it is now. Costs a forward pass."""
    found = _evaluated(setup, batch, part_values(parts, view))
    return means(found, batch.valid.get(view))


def _evaluated(setup: Setup, batch: Batch, values: Callable[[Context], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Values at every step of a batch, without gradient, by place in N."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for chosen in micro_batches(setup, batch.pack, range(len(batch.pack.rollouts))):
            hidden_ND = hidden_of(setup, batch.pack, chosen)
            with setup.student.compute():
                core = core_of(setup, batch, batch.pack.steps_of(chosen), values)
                fill(found, batch.pack, chosen, per_token(core, hidden_ND))
    return found


def _layout(setup: Setup, batch: Batch) -> Layout:
    """Where the steps of a batch stand, with the sentences of their text if a statistic asks for them."""
    pack, sentence_N = batch.pack, None
    if any(stat.sentences for stat, _ in setup.method.stats.values()):
        found = [sentences(rollout.action_ids, setup.student.tokenizer) for rollout in pack.rollouts]
        sentence_N = torch.tensor([sentence for own in found for sentence in own])
    graded = all(rollout.reward is not None for rollout in pack.rollouts)
    return Layout(
        pack.rollout_N,
        sentence_N,
        reward_N=pack.reward_R[pack.rollout_N] if graded else None,
        group_N=pack.group_R[pack.rollout_N],
        longest=setup.config.rollout.max_new_tokens,
        readings=batch.moment.readings,
        seed=setup.config.seed,
        step=batch.step,
    )


def fill(found: dict[str, Tensor], pack: Pack, rollouts: Sequence[int], values: Mapping[str, Tensor]) -> None:
    """Files the values of some rollouts under their place in N."""
    index_N = pack.steps_of(rollouts)
    if not values:
        return
    together_KN = torch.stack([values_N.detach().float() for values_N in values.values()]).cpu()  # one wait for a GPU
    for name, values_N in zip(values, together_KN, strict=True):
        found.setdefault(name, torch.full((pack.steps,), math.nan))[index_N] = values_N


def hidden_of(setup: Setup, pack: Pack, rollouts: Sequence[int]) -> Tensor:
    """The student's hidden states at the steps of some rollouts."""
    return setup.student.hidden([pack.rollouts[i].sequence for i in rollouts])


def core_of(setup: Setup, batch: Batch, index_N: Tensor, values: Callable[[Context], dict[str, Tensor]]) -> Core:
    """The loss core for some steps."""
    pack, device = batch.pack, setup.student.device
    steps = Steps(
        tokens_N=pack.tokens_N[index_N].to(device),
        stored={name: stored_N[index_N].to(device) for name, stored_N in batch.stored.items()},
        engine_logp_N=pack.engine_logp_N[index_N].to(device),
        rollout_N=pack.rollout_N[index_N].to(device),
        turn_N=pack.turn_N[index_N].to(device),
        position_N=pack.position_N[index_N].to(device),
        step=batch.moment.done,
        total_steps=batch.moment.total,
        readings=batch.moment.readings,
    )
    signals = {name: signal.select(index_N.to(device)) for name, signal in batch.signals.items()}
    return Core(values, steps, signals, setup.student.head(), setup.vocab, setup.method.temperature)


def micro_batches(setup: Setup, pack: Pack, rollouts: Sequence[int]) -> list[list[int]]:
    """Rollouts, cut into what fits one forward pass."""
    batches = setup.student.batches([pack.rollouts[i].sequence for i in rollouts], setup.config.optimizer.batch_tokens)
    return [[rollouts[i] for i in batch] for batch in batches]
