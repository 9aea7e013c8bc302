"""The small pure functions that a method is composed of, each with what it asks of a teacher.

A part is evaluated on one chunk of steps at a time: `part.value(context, view)` returns one number per step, [N].
The subclasses are slots, not behaviour: they keep a weight from being passed where a divergence belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from retort.context import Context
from retort.types import Need


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the steps of a whole batch stand.

    Attributes:
        rollout_N: Index of the rollout of each step; a rollout's steps come in order.
        sentence_N: Index of the sentence within its rollout; None where no text is known.
        found: What was stored by the statistics before, [N] each, by name.
        reward_N: Reward of each step's rollout, float64; None where nothing was graded.
        group_N: Index of the group (one visit to one prompt) of each step's rollout; None where no groups are known.
        longest: The longest answer that was allowed, tokens; None where that is not known.
        readings: Numbers of the method's controllers, by `<controller>.<number>`.
        seed: Of the run, for what is drawn.
        step: Batches done before this one, which a draw is keyed by.
    """

    rollout_N: Tensor
    sentence_N: Tensor | None = None
    found: Mapping[str, Tensor] = field(default_factory=lambda: {})
    reward_N: Tensor | None = None
    group_N: Tensor | None = None
    longest: int | None = None
    readings: Mapping[str, float] = field(default_factory=lambda: {})
    seed: int = 0
    step: int = 0

    def select(self, index_N: Tensor) -> Layout:
        """The layout of some of the steps."""
        cut: Callable[[Tensor | None], Tensor | None] = lambda values: None if values is None else values[index_N]  # noqa: E731
        return replace(
            self,
            rollout_N=self.rollout_N[index_N],
            sentence_N=cut(self.sentence_N),
            found={name: values_N[index_N] for name, values_N in self.found.items()},
            reward_N=cut(self.reward_N),
            group_N=cut(self.group_N),
        )

    def rollouts(self) -> Rollouts:
        """The same by rollout; one without a step is not there."""
        number_N = _numbered(self.rollout_N)
        steps_R = torch.bincount(number_N)
        place_N = torch.arange(len(number_N), device=number_N.device)
        first_R = torch.full_like(steps_R, len(number_N)).scatter_reduce_(0, number_N, place_N, "amin")
        return Rollouts(
            number_N,
            steps_R,
            None if self.reward_N is None else self.reward_N[first_R],
            None if self.group_N is None else _numbered(self.group_N[first_R]),
        )

    def place_N(self) -> Tensor:
        """Index of each step within its rollout, from 0."""
        order = torch.argsort(self.rollout_N, stable=True)
        steps_R = self.rollouts().steps_R
        starts_R = steps_R.cumsum(0) - steps_R
        place_N = torch.empty_like(self.rollout_N)
        count_N = torch.arange(len(order), device=order.device)
        place_N[order] = count_N - torch.repeat_interleave(starts_R, steps_R)
        return place_N


@dataclass(frozen=True, eq=False)
class Rollouts:
    """The rollouts of a batch that have a step.

    Attributes:
        number_N: Of each step's rollout, counted from 0 without gaps: an index into the other tensors.
        steps_R: How many each has.
        reward_R: Of each, float64; None where nothing was graded.
        group_R: Index of each one's group, from 0 without gaps; None where no groups are known.
    """

    number_N: Tensor
    steps_R: Tensor
    reward_R: Tensor | None
    group_R: Tensor | None

    def mean(self, values_N: Tensor) -> Tensor:
        """Means over each rollout's steps, [R]."""
        return self.sum(values_N) / self.steps_R

    def sum(self, values_N: Tensor) -> Tensor:
        """Sums over each rollout's steps, [R]."""
        return values_N.new_zeros(len(self.steps_R)).index_add_(0, self.number_N, values_N)

    def quantile(self, values_N: Tensor, share: float) -> Tensor:
        """A quantile of each rollout's steps, between the two nearest in proportion, [R]."""
        order = torch.argsort(values_N)
        order = order[torch.argsort(self.number_N[order], stable=True)]
        place_R = share * (self.steps_R - 1).double()
        low_R = place_R.floor().long()
        first_R = self.steps_R.cumsum(0) - self.steps_R
        low, high = (values_N[order[first_R + at_R]] for at_R in (low_R, torch.minimum(low_R + 1, self.steps_R - 1)))
        return torch.lerp(low, high, (place_R - low_R).to(low.dtype))


def quantile(values_N: Tensor, share: float) -> Tensor:
    """A quantile of any number of values, at least one, between the two nearest in proportion, a scalar.

    `torch.quantile` refuses more than 16 million, which a large batch has.
    """
    everything = torch.zeros(len(values_N), dtype=torch.long, device=values_N.device)
    return Layout(everything).rollouts().quantile(values_N, share)[0]


def _numbered(values: Tensor) -> Tensor:
    """The same partition, by numbers from 0 without gaps."""
    return torch.unique(values, return_inverse=True)[1]  # pyright: ignore


@dataclass(frozen=True)
class Stat:
    """A number per step that depends on more than the step: taken over the whole batch before the first update on it.

    Whoever uses it reads `context.stored[name]`, and names it in its `stats`.

    Attributes:
        name: Under which it is stored; two of one name must be the same.
        part: What is evaluated at each step first; None where only places, rewards or groups matter.
        finish: (its values at all steps, where they stand) -> [N]. Steps of rollouts that a view had no context for are
            not among them, if the part asks that view anything; what is stored for them is 0. Without a part, the
            values are zeros.
        sentences: Whether it wants to know the sentences.
        rewards: Whether it cannot do without rewards.
        groups: Whether it compares the rollouts of one prompt.
    """

    name: str
    part: Part | None
    finish: Callable[[Tensor, Layout], Tensor]
    sentences: bool = False
    rewards: bool = False
    groups: bool = False


@dataclass(frozen=True)
class Part:
    """A function of the context that gives one number per step.

    Attributes:
        name: Readable name, with its settings.
        value: (context, view) -> [N].
        needs: What it asks of the view's teacher.
        also: What it asks of other views, by name.
        stats: What it reads of the whole batch.
        uses_old_logp: Whether it compares the student with itself before the first update on a batch; a term's
            estimator and weight are asked.
    """

    name: str
    value: Callable[[Context, str], Tensor]
    needs: frozenset[Need] = frozenset()
    also: Mapping[str, frozenset[Need]] = field(default_factory=lambda: {})
    stats: tuple[Stat, ...] = ()
    uses_old_logp: bool = field(default=False, kw_only=True)

    def asks(self, view: str, against: str) -> frozenset[Need]:
        """What it asks of a view when it is used against another (or the same) one."""
        own = self.needs if view == against else frozenset[Need]()
        read = (stat.part.asks(view, against) for stat in self.stats if stat.part is not None)
        return own.union(self.also.get(view, frozenset[Need]()), *read)


@dataclass(frozen=True)
class Divergence(Part):
    """Disagreement of student and teacher at each step, nats; differentiable in the student.

    Attributes:
        not_pathwise: Why back-propagating it is wrong, for divergences where it is.
    """

    not_pathwise: str | None = None


@dataclass(frozen=True)
class Advantage(Part):
    """How much better than expected the written token was, nats; always used detached."""


@dataclass(frozen=True)
class Baseline(Part):
    """A value, nats, that does not depend on the token written: subtracting it from an advantage adds no bias."""


@dataclass(frozen=True)
class Quantity(Part):
    """Something to gate on or to watch."""


@dataclass(frozen=True)
class Weight(Part):
    """How much each step counts in a term; detached by the framework."""
