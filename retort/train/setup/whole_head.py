"""Refuses `ranks.head=vocabulary` before anything is loaded, where the method or a teacher needs all ids at once.

What needs them is found by evaluating the method's parts on a few made-up steps. Further obstacles, such as numbers
that come out otherwise on slices, can only be seen on the first batch (`retort.train.learning.spread_head`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from retort.config import Config
from retort.core.context import Context
from retort.core.distribution import WHOLE, Distribution, Shard
from retort.core.parts import Part
from retort.core.random_streams import generator
from retort.core.signals import Dense
from retort.core.steps import Clock, Steps
from retort.errors import RetortError, SignalError, UserError
from retort.method import Method
from retort.ranks import here

__all__ = ["needs_whole_head", "refuse_slices"]


class _Slice(Shard):
    """Some of the ids; here all of them, so that nothing is exchanged."""

    spread = True


class _Anything(dict[str, Tensor]):
    """Every statistic of the whole batch: zeros."""

    def __missing__(self, name: str) -> Tensor:
        return torch.zeros(4)


def refuse_slices(config: Config, reason: str | None) -> None:
    """Refuses that each rank keeps its slice of the head, if the settings ask for it and there is a reason.

    Raises:
        UserError: As said.
    """
    if reason is not None and config.ranks.head == "vocabulary" and here().size > 1:
        raise UserError(f"ranks.head=vocabulary: {reason}; set ranks.head=gathered")


def needs_whole_head(method: Method) -> str | None:
    """What a method or its curves compute of all ids at once, as a sentence; None if nothing is known to.

    Args:
        method: The method, with what comes before it.
    """
    for phase in [method] if method.before is None else [method.before[1], method]:
        for part, view in _parts(phase):
            if _evaluated(phase, part, view, WHOLE) is None:
                error = _evaluated(phase, part, view, _Slice())
                if isinstance(error, SignalError):
                    return f"method '{phase.name}' cannot be computed on slices ('{part.name}'): {error}"
    return None


def _parts(method: Method) -> Iterator[tuple[Part, str]]:
    terms = (term for term in method.terms if not term.estimator.reads_hidden)
    yield from ((part, term.against) for term in terms for part in term.parts)
    yield from ((watch.part, watch.against) for watch in method.watch)


def _evaluated(method: Method, part: Part, view: str, shard: Shard) -> RetortError | None:
    draw = torch.Generator().manual_seed(0)
    tokens_N, zeros_N = torch.arange(4), torch.zeros(4, dtype=torch.long)
    steps = Steps.of(
        tokens_N,
        zeros_N,
        turn_N=zeros_N,
        group_N=zeros_N,
        reward_N=torch.ones(4).double(),
        engine_logp_N=-torch.ones(4),
        stored=_Anything(any=torch.zeros(4)),
    )
    logits = {name: torch.randn(4, 6, generator=draw) for name in method.views}
    signals = {name: Dense.of(own_NV, tokens_N, source=name).rows(slice(None)) for name, own_NV in logits.items()}
    states = [(one, one.init(generator(0, "controllers", one.name))) for one in method.controllers]
    outputs = {f"{one.name}.{number}": x for one, state in states for number, x in one.numbers(state).items()}
    student = Distribution(torch.randn(4, 6, generator=draw), shard)
    try:
        part.at(Context(student, signals, steps, Clock(0, 1, controller_outputs=outputs)), view)
    except RetortError as error:
        return error
    return None
