"""One signal out of those of one teacher about the parts of a batch. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from retort.core.signals.base import TeacherSignal
from retort.core.signals.dense import Dense, Factors
from retort.core.signals.several import Differing, joined


def end_to_end(signals: Sequence[TeacherSignal]) -> TeacherSignal:
    """One signal about the steps of several signals of one teacher, one behind another.

    Of a whole distribution that is the product of states and a head, the states are put together, and the products are
    those of a signal about all steps, to the bit. Hidden states are kept.

    Args:
        signals: At least one; all of one kind, over the same ids, with the same weights behind them.

    Returns:
        The signal; its `counts` are the sums of theirs.

    Raises:
        SignalError: The signals are of several kinds, or of one that cannot be cut (`Spans`, `Ahead`).
    """
    if len(signals) == 1:
        return signals[0]
    counts: dict[str, float] = {}
    for name, count in (counted for signal in signals for counted in signal.counts.items()):
        counts[name] = counts.get(name, 0.0) + count
    differing = [signal for signal in signals if isinstance(signal, Differing)]
    if len(differing) == len(signals):
        of = end_to_end([signal.of for signal in differing])
        disagreement_N = torch.cat([signal.disagreement_N.to(of.tokens_N.device) for signal in differing])
        return replace(Differing.beside(of, disagreement_N), counts=counts)
    steps = torch.tensor([signal.steps for signal in signals])
    part_N = torch.repeat_interleave(torch.arange(len(signals)), steps)
    index_N = torch.cat([torch.arange(signal.steps) for signal in signals])
    found = joined(signals, part_N, index_N, signals[0].source)
    if isinstance(found, Dense):
        found = _with_states(found, [signal for signal in signals if isinstance(signal, Dense)])
    return replace(found, counts=counts)


def _with_states(found: Dense, parts: Sequence[Dense]) -> Dense:
    """The distribution with the states of all parts, and with products of these where they are known."""
    hidden = [part.hidden for part in parts if part.hidden is not None]
    if len(hidden) == len(parts):
        found = replace(found, hidden=_rows(hidden, parts))
    factors = [part.factors for part in parts if part.factors is not None]
    if len(factors) < len(parts):
        return found
    states, whole = _rows([factor.states for factor in factors], parts), factors[0].whole
    found = replace(found, factors=Factors(states, factors[0].logits, whole))
    if whole is None:
        return found

    def logits(index_C: Tensor | slice) -> Tensor:
        return whole(states(index_C))

    return replace(found, logits=logits)


def _rows(
    of: Sequence[Callable[[Tensor | slice], Tensor]], parts: Sequence[Dense]
) -> Callable[[Tensor | slice], Tensor]:
    """What gives some rows of all parts; they are put together when one is first read."""

    @cache
    def all_NS() -> Tensor:
        return torch.cat([own(slice(0, part.steps)) for own, part in zip(of, parts, strict=True)])

    return lambda index_C: all_NS()[index_C]
