"""Two workers that each hold half of a batch take every statistic, denominator and group as one worker does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.random_streams import generator
from retort.core.signals import Dense
from retort.core.steps import ALONE, Clock, Ranks, Steps
from retort.loss.scoring import observe, scored
from retort.loss.terms import batch_scales, counted
from retort.method import Method
from retort.registry import load, names

VOCAB, WIDTH = 23, 4
#: Rollouts by steps; the first worker holds two groups (four rollouts), the second one group of three.
LENGTHS = (5, 3, 9, 4, 6, 2, 7)
GROUPS = (0, 0, 1, 1, 2, 2, 2)
REWARDS = (1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0)
HALF = sum(LENGTHS[:4])


class Pair(Ranks):
    """Two workers in two threads of one process."""

    def __init__(self, rank: int, board: list[Any], gate: threading.Barrier) -> None:
        self.rank, self.board, self.gate = rank, board, gate

    def gather(self, steps: Steps) -> tuple[Steps, slice]:
        self.board[self.rank] = steps
        self.gate.wait(timeout=60)
        parts: list[Steps] = list(self.board)
        self.gate.wait(timeout=60)
        start = sum(len(part) for part in parts[: self.rank])
        return Steps.joined(parts), slice(start, start + len(steps))


def together(work: Callable[[Ranks, slice], Any], cut: int = HALF) -> list[Any]:
    """What two workers found, each on its part."""
    board: list[Any] = [None, None]
    found: list[Any] = [None, None]
    gate = threading.Barrier(2)

    def run(rank: int, own: slice) -> None:
        try:
            found[rank] = work(Pair(rank, board, gate), own)
        except BaseException as error:
            found[rank] = error
            gate.abort()

    halves = (slice(0, cut), slice(cut, sum(LENGTHS)))
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(halves)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


class World:
    """A batch, and the method's view of any part of it."""

    def __init__(self, method: Method) -> None:
        draw = torch.Generator().manual_seed(0)
        count = sum(LENGTHS)
        rollout_N = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
        self.method, self.clock = method, Clock(3, 12, longest=12, seed=5, controller_outputs=_readings(method))
        self.logits_NV = torch.randn(count, VOCAB, generator=draw, dtype=torch.float64)
        self.steps = Steps.of(
            torch.randint(VOCAB, (count,), generator=draw),
            rollout_N,
            group_N=torch.tensor(GROUPS)[rollout_N],
            reward_N=torch.tensor(REWARDS, dtype=torch.float64)[rollout_N],
            engine_logp_N=-torch.rand(count, generator=draw, dtype=torch.float64),
        )
        valid_N = rollout_N != 1  # one rollout of the first worker has no context for any view
        self.teachers = {
            view: (torch.randn(count, VOCAB, generator=draw, dtype=torch.float64), valid_N) for view in method.views
        }

    def of(self, own: slice) -> tuple[Steps, dict[str, Tensor | None]]:
        """A worker's part: rollouts and groups count from 0, and a view that is valid everywhere has no `valid_N`."""
        steps = self.steps.select(own)
        if not len(steps):
            return Steps.of(steps.tokens_N), dict.fromkeys(self.teachers)
        assert steps.group_N is not None
        mine = Steps(
            steps.tokens_N,
            steps.rollout_N - steps.rollout_N[0],
            steps.position_N,
            steps.turn_N,
            steps.group_N - steps.group_N[0],
            steps.reward_N,
            steps.engine_logp_N,
        )
        valid = {view: valid_N[own] for view, (_, valid_N) in self.teachers.items()}
        return mine, {view: None if bool(valid_N.all()) else valid_N for view, valid_N in valid.items()}

    def evaluate(self, own: slice) -> Any:
        def evaluate(values: Any, steps: Steps, clock: Clock) -> dict[str, Tensor]:
            if not len(steps):
                return {}  # as of a pack without rollouts: there is no chunk to evaluate
            signals = {
                view: Dense.of(logits_NV[own], steps.tokens_N).rows(slice(None))
                for view, (logits_NV, _) in self.teachers.items()
            }
            context = Context(Distribution(self.logits_NV[own]), signals, steps, clock)
            return {name: value_N.detach() for name, value_N in values(context).items()}

        return evaluate

    def work(self, ranks: Ranks, own: slice) -> tuple[Steps, dict[str, Tensor], list[Any]]:
        """Stored values, shares of every term, and what every controller is shown."""
        steps, valid = self.of(own)
        evaluate = self.evaluate(own)
        found = scored(self.method, steps, self.clock, valid, evaluate, several=True, ranks=ranks)
        scale_N = batch_scales(self.method, found, counted(self.method, valid, len(found)), ranks)
        seen = [observe(one, found, self.clock, valid, evaluate, ranks) for one in self.method.controllers]
        return found, scale_N, seen


def _readings(method: Method) -> dict[str, float]:
    states = ((one, one.init(generator(0, "controllers", one.name))) for one in method.controllers)
    return {f"{one.name}.{number}": x for one, state in states for number, x in one.numbers(state).items()}


@pytest.mark.parametrize("cut", [HALF, 0, sum(LENGTHS)])
@pytest.mark.parametrize("name", names())
def test_two_workers_are_one(name: str, cut: int) -> None:
    """Also where one of them has not a single step."""
    world = World(load(name))
    alone, all_scales, seen = world.work(ALONE, slice(0, sum(LENGTHS)))
    halves = together(world.work, cut)
    for stored in alone.stored:
        both_N = torch.cat([steps.stored[stored] for steps, _, _ in halves if len(steps)])
        torch.testing.assert_close(both_N, alone.stored[stored], msg=f"{name}: {stored}", equal_nan=True)
    for term, scale_N in all_scales.items():
        torch.testing.assert_close(
            torch.cat([loss_scales[term] for _, loss_scales, _ in halves if len(loss_scales[term])]), scale_N
        )
    for _, _, own in halves:
        for mine, whole in zip(own, seen, strict=True):
            assert mine.before == pytest.approx(whole.before)
            for column in ("reward_R", "length_R"):
                assert torch.equal(getattr(mine, column), getattr(whole, column))


def test_a_worker_by_itself_would_be_wrong() -> None:
    """The batch is one on which a half's own numbers are other numbers."""
    for name in ("dasd", "dopd", "listopd", "sead", "unisd"):
        world = World(load(name))
        alone, scale_N, _ = world.work(ALONE, slice(0, sum(LENGTHS)))
        half, own_N, _ = world.work(ALONE, slice(0, HALF))
        assert any(not torch.equal(half.stored[stored], alone.stored[stored][:HALF]) for stored in half.stored), name
        assert any(not torch.equal(own_N[term], scale_N[:HALF]) for term, scale_N in scale_N.items()), name


def test_what_only_some_workers_have() -> None:
    """Rewards of a part are not those of the batch; what is stored of a part may not be lost in silence."""
    tokens_N = torch.tensor([1, 2])
    graded = Steps.of(tokens_N, reward_N=torch.ones(2, dtype=torch.float64))
    bare, nothing = Steps.of(tokens_N), Steps.of(tokens_N[:0])
    assert Steps.joined([graded, bare]).reward_N is None
    assert Steps.joined([nothing, graded, nothing]).reward_N is not None
    assert not len(Steps.joined([nothing, nothing]))
    for parts in ([graded.with_stored({"seen": tokens_N}), bare], [graded, bare.with_stored({"seen": tokens_N})]):
        with pytest.raises(ValueError, match="'seen' is stored by some workers only"):
            Steps.joined(parts)
