"""One table of decision steps and one clock: all data of a batch other than the models' outputs.

A new fact about a step is one column of `Steps`; a new fact about the moment is one field of `Clock`. Axis letters: see
`retort.core`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from retort.core.schedules import ScalarOrSchedule, at

#: The id in the table of a step that decides a latent and no token; no vocabulary has it.
NO_TOKEN = -1


@dataclass(frozen=True)
class Clock:
    """The progress of a run, at which every schedule is evaluated.

    Attributes:
        step: Batches done in the run; random streams are keyed by it.
        end: Batches after which the current method is done; None where that is not known.
        begun: Batches done before the current method took over (a cold start runs another one first).
        controller_outputs: Numbers of the method's controllers, by `<controller>.<number>`.
        seed: The run's seed, for random draws.
        longest: The longest completion allowed, tokens; None where that is not known.
    """

    step: int = 0
    end: int | None = None
    begun: int = 0
    controller_outputs: Mapping[str, float] = field(default_factory=lambda: {})
    seed: int = 0
    longest: int | None = None

    @property
    def done(self) -> int:
        """Batches that the current method has done, which its schedules count."""
        return self.step - self.begun

    @property
    def total(self) -> int | None:
        """Batches of the current method in all, where known."""
        return None if self.end is None else self.end - self.begun

    def at(self, scalar: ScalarOrSchedule) -> float:
        """The value of a number or schedule now."""
        return at(scalar, self.done, self.total, self.controller_outputs)


@dataclass(frozen=True, eq=False)
class Steps:
    """The N decision steps of some rollouts, end to end, without padding: an immutable table of [N] columns.

    Attributes:
        tokens_N: Id of the token that was decided, int64; `NO_TOKEN` where a step decides the next latent.
        rollout_N: Index of the rollout, int64; a rollout's steps come in order.
        position_N: Index of the step within its rollout, int64.
        turn_N: Index of the turn, int64; None where turns are not known.
        group_N: Index of the group (one visit to one prompt), int64; None where groups are not known.
        reward_N: Reward of the step's rollout, float64; None unless all rollouts were graded.
        engine_logp_N: The rollout engine's log-prob of the token, nats; NaN where it gave none; None without an engine.
        sentence_N: Index of the sentence within its rollout; None where no text is known.
        confidence_NK: How sure each of K teachers says to be of its answer to the prompt, 0 to 100, [N, K], float64;
            NaN where it says nothing; None where none does.
        stored: Values of the whole batch taken before its first update (`old_logp`, baselines, statistics), [N] each,
            detached, by name.
    """

    tokens_N: Tensor
    rollout_N: Tensor
    position_N: Tensor
    turn_N: Tensor | None = None
    group_N: Tensor | None = None
    reward_N: Tensor | None = None
    engine_logp_N: Tensor | None = None
    sentence_N: Tensor | None = None
    confidence_NK: Tensor | None = None
    stored: Mapping[str, Tensor] = field(default_factory=lambda: {})

    @staticmethod
    def of(
        tokens_N: Tensor,
        rollout_N: Tensor | None = None,
        *,
        turn_N: Tensor | None = None,
        group_N: Tensor | None = None,
        reward_N: Tensor | None = None,
        engine_logp_N: Tensor | None = None,
        stored: Mapping[str, Tensor] | None = None,
    ) -> Steps:
        """Builds the table from tokens and the other known columns; without `rollout_N` all are of one rollout."""
        rollout_N = torch.zeros_like(tokens_N) if rollout_N is None else rollout_N
        position_N = _positions(rollout_N)
        return Steps(tokens_N, rollout_N, position_N, turn_N, group_N, reward_N, engine_logp_N, stored=stored or {})

    def __len__(self) -> int:
        """N, the number of steps."""
        return len(self.tokens_N)

    def select(self, index_N: Tensor | slice) -> Steps:
        """Some of the steps, in the order given."""
        return self._each(lambda column_N: column_N[index_N])

    def to(self, device: torch.device) -> Steps:
        """The same on a device."""
        return self._each(lambda column_N: column_N.to(device))

    def with_stored(self, more: Mapping[str, Tensor]) -> Steps:
        """The same with more stored values, [N] each."""
        return replace(self, stored={**self.stored, **more})

    def rollouts(self) -> Rollouts:
        """The table by rollout; a rollout without a step is left out."""
        number_N = _numbered(self.rollout_N)
        steps_R = torch.bincount(number_N)
        order_N = torch.arange(len(number_N), device=number_N.device)
        first_R = torch.full_like(steps_R, len(number_N)).scatter_reduce_(0, number_N, order_N, "amin")
        return Rollouts(
            number_N,
            steps_R,
            None if self.reward_N is None else self.reward_N[first_R],
            None if self.group_N is None else _numbered(self.group_N[first_R]),
        )

    def turns(self) -> Turns:
        """The table by turn, in order within each rollout; where no turns are known, a rollout is one turn."""
        rollout_N = _numbered(self.rollout_N)
        turn_N = torch.zeros_like(rollout_N) if self.turn_N is None else self.turn_N
        most = int(turn_N.max()) + 1 if len(turn_N) else 1
        number_N = _numbered(rollout_N * most + turn_N)
        steps_K = torch.bincount(number_N)
        return Turns(number_N, steps_K, rollout_N.new_zeros(len(steps_K)).index_copy_(0, number_N, rollout_N))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Steps:
        columns: dict[str, Tensor | None] = {name: getattr(self, name) for name in _COLUMNS}
        changed = {name: None if column_N is None else change(column_N) for name, column_N in columns.items()}
        stored = {name: change(values_N) for name, values_N in self.stored.items()}
        return Steps(**changed, stored=stored)  # pyright: ignore[reportArgumentType]


_COLUMNS = tuple(one.name for one in fields(Steps) if one.name != "stored")


@dataclass(frozen=True, eq=False)
class Rollouts:
    """The rollouts of a batch that have a step.

    Attributes:
        number_N: Number of each step's rollout, counted from 0 without gaps: an index into the other tensors.
        steps_R: Number of steps of each rollout.
        reward_R: Reward of each rollout, float64; None where nothing was graded.
        group_R: Index of each rollout's group, from 0 without gaps; None where groups are not known.
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
        """A quantile of each rollout's steps, [R], interpolated linearly between the two nearest."""
        order = torch.argsort(values_N)
        order = order[torch.argsort(self.number_N[order], stable=True)]
        rank_R = share * (self.steps_R - 1).double()
        low_R = rank_R.floor().long()
        first_R = self.steps_R.cumsum(0) - self.steps_R
        low, high = (values_N[order[first_R + at_R]] for at_R in (low_R, torch.minimum(low_R + 1, self.steps_R - 1)))
        return torch.lerp(low, high, (rank_R - low_R).to(low.dtype))


@dataclass(frozen=True, eq=False)
class Turns:
    """The turns of a batch that have a step, rollout by rollout and in order.

    Attributes:
        number_N: Number of each step's turn, counted from 0 without gaps over all rollouts: an index into the others.
        steps_K: Number of steps of each turn.
        rollout_K: Number of each turn's rollout, as in `Rollouts`.
    """

    number_N: Tensor
    steps_K: Tensor
    rollout_K: Tensor

    def mean(self, values_N: Tensor) -> Tensor:
        """Means over each turn's steps, [K]."""
        return values_N.new_zeros(len(self.steps_K)).index_add_(0, self.number_N, values_N) / self.steps_K

    def first(self, values_K: Tensor) -> Tensor:
        """The number of each turn's rollout's first turn, [K]."""
        return values_K[torch.searchsorted(self.rollout_K, self.rollout_K)]

    def range(self, values_K: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest number of each turn's rollout, [K] both."""
        rollouts = int(self.rollout_K.max()) + 1 if len(self.rollout_K) else 0
        start_R = values_K.new_zeros(rollouts)
        low_R, high_R = (
            start_R.scatter_reduce(0, self.rollout_K, values_K, how, include_self=False) for how in ("amin", "amax")
        )
        return low_R[self.rollout_K], high_R[self.rollout_K]


def quantile(values_N: Tensor, share: float) -> Tensor:
    """A quantile of at least one value, interpolated linearly between the two nearest, a scalar.

    `torch.quantile` refuses more than 16 million values, which a large batch has.
    """
    everything = torch.zeros(len(values_N), dtype=torch.long, device=values_N.device)
    return Rollouts(everything, torch.bincount(everything), None, None).quantile(values_N, share)[0]


def _numbered(values: Tensor) -> Tensor:
    """Renumbers the values from 0 without gaps; the partition stays the same."""
    return torch.unique(values, return_inverse=True)[1]  # pyright: ignore


def _positions(rollout_N: Tensor) -> Tensor:
    """Index of each step within its rollout, from 0."""
    order = torch.argsort(rollout_N, stable=True)
    steps_R = torch.bincount(_numbered(rollout_N)) if len(rollout_N) else rollout_N
    starts_R = steps_R.cumsum(0) - steps_R
    position_N = torch.empty_like(rollout_N)
    count_N = torch.arange(len(order), device=order.device)
    position_N[order] = count_N - torch.repeat_interleave(starts_R, steps_R)
    return position_N
