"""The order of prompts: the data shuffled anew in every epoch, or by difficulty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from retort.core.random_streams import generator, permutation, uniforms
from retort.core.rollouts import Prompt
from retort.core.steps import Clock
from retort.rollout.plan import EasyToHard


@dataclass(frozen=True)
class Visit:
    """A prompt, and the number of earlier epochs."""

    prompt: Prompt
    epoch: int


def visits(prompts: Sequence[Prompt], *, seed: int, step: int, count: int) -> list[Visit]:
    """The prompts of a step: the data, shuffled anew in every epoch, cut into batches of `count`."""
    return visits_from(prompts, seed=seed, start=step * count, count=count)


def visits_from(prompts: Sequence[Prompt], *, seed: int, start: int, count: int) -> list[Visit]:
    """So many prompts of the same order, behind the first `start` of it."""
    return _through(prompts, lambda epoch: permutation(seed, "data", epoch, count=len(prompts)), start, count)


def easy_to_hard(
    prompts: Sequence[Prompt],
    difficulty: Mapping[str, float],
    order: EasyToHard,
    *,
    seed: int,
    clock: Clock,
    count: int,
) -> list[Visit]:
    """The prompts of a step by difficulty, in [0, 1] by the prompt's id; see `EasyToHard`."""
    hard = [difficulty[prompt.id] for prompt in prompts]
    if order.kind == "sorted":

        def ranked(epoch: int) -> list[int]:
            draw = generator(seed, "difficulty", "noise", epoch)
            noisy = torch.tensor(hard, dtype=torch.float64)
            noisy = noisy + order.noise * torch.randn(len(hard), generator=draw, dtype=torch.float64)
            # The order is shuffled first, so that equally hard prompts do not come in the order of the file.
            shuffled = permutation(seed, "data", epoch, count=len(hard))
            return sorted(shuffled, key=lambda index: float(noisy[index]))

        return _through(prompts, ranked, clock.done * count, count)
    if order.kind == "balanced":
        uniform_stream = uniforms(seed, "data", "balanced", clock.step, count=len(hard))
        # Drawing without replacement by odds w is taking the largest u^(1/w).
        keys = uniform_stream ** (1.0 / torch.tensor(order.odds(hard), dtype=torch.float64))
        indices: list[int] = torch.argsort(keys, descending=True, stable=True)[:count].tolist()
        return [Visit(prompts[index], clock.step) for index in indices]
    limit = max(order.gate(clock.done, clock.total or 1), sorted(hard)[min(count, len(hard)) - 1])
    open_ = [index for index, value in enumerate(hard) if value <= limit]
    chosen = permutation(seed, "data", "gated", clock.step, count=len(open_))[:count]
    return [Visit(prompts[open_[index]], clock.step) for index in chosen]


def _through(prompts: Sequence[Prompt], order: Callable[[int], Sequence[int]], start: int, count: int) -> list[Visit]:
    indices = [divmod(start + offset, len(prompts)) for offset in range(count)]
    orders = {epoch: order(epoch) for epoch in {epoch for epoch, _ in indices}}
    return [Visit(prompts[orders[epoch][index]], epoch) for epoch, index in indices]
