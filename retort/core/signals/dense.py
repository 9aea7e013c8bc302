"""The dense signal: the whole distribution of each step. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from retort.core.distribution import WHOLE, Distribution, Shard, as_compute
from retort.core.needs import NeedKind, require_finite
from retort.core.signals.base import SignalRows, TeacherSignal, take_rows
from retort.core.signals.units import Units


def entropy(logp_NV: Tensor) -> Tensor:
    """Entropy in nats, [N], of log-probs [N, V]; an impossible id (-inf) contributes nothing."""
    return -(logp_NV.exp() * logp_NV.clamp_min(torch.finfo(logp_NV.dtype).min)).sum(-1)


class DistributionRows(SignalRows):
    """All quantities that follow from logits [C, V], each computed once and on demand."""

    def __init__(self, logits_NV: Tensor, tokens_N: Tensor, source: str, shard: Shard = WHOLE) -> None:
        self.source = source
        self.vocab = logits_NV.shape[-1]
        self._tokens_N = tokens_N
        self._distribution = Distribution(logits_NV, shard)
        # The normaliser is NaN or infinite exactly when a logit is NaN or +inf, or when all are -inf.
        require_finite("a logit (or the sum of all)", self._distribution.normaliser_C, source)

    @property
    def distribution(self) -> Distribution:
        return self._distribution

    @cached_property
    def sampled_logp_N(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._distribution.logp_at(self._tokens_N[:, None]).squeeze(-1)

    @cached_property
    def entropy_N(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._distribution.entropy()

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        return self._distribution.topk(k)

    @cached_property
    def units(self) -> Units:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Units.single(self._distribution, self.sampled_logp_N, self.source)


@dataclass(frozen=True, eq=False)
class Factors:
    """What the logits are the product of, where ranks share the ids out: each needs the states, and some of the rows.

    Attributes:
        states: Index of steps -> states [C, S], without gradient.
        logits: States [C, S] and a slice of ids -> logits [C, ids].
        whole: States [C, S] -> logits [C, V], to the bit those of the signal; None where that is not known.
    """

    states: Callable[[Tensor | slice], Tensor]
    logits: Callable[[Tensor, slice], Tensor]
    whole: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Dense(TeacherSignal):
    """The whole distribution, as a function from steps to logits [C, V]; it is never held as [N, V].

    Attributes:
        logits: Index of steps -> logits [C, V], any float dtype; computed without gradient.
        width: V, the teacher's own width.
        temperature: The divisor of the logits.
        shard: The ids that the logits are about, where a rank holds only some.
        hidden: Index of steps -> last hidden states [C, D], without gradient; None if there are none.
        factors: Of which the logits are the product; None where they are not known.
    """

    logits: Callable[[Tensor | slice], Tensor] = lambda _: torch.empty(0, 0)
    width: int = 0
    temperature: float = 1.0
    shard: Shard = WHOLE
    hidden: Callable[[Tensor | slice], Tensor] | None = None
    factors: Factors | None = None

    @staticmethod
    def of(
        logits_NV: Tensor,
        tokens_N: Tensor,
        *,
        source: str = "teacher",
        temperature: float = 1.0,
        hidden_ND: Tensor | None = None,
    ) -> Dense:
        """Builds the signal from a plain tensor [N, V], and last hidden states for terms that compare them."""
        kept_NV, kept_ND = logits_NV.detach(), None if hidden_ND is None else hidden_ND.detach()
        return Dense(
            tokens_N,
            source,
            lambda index_C: kept_NV[index_C],
            kept_NV.shape[-1],
            temperature,
            hidden=None if kept_ND is None else lambda index_C: kept_ND[index_C],
        )

    @property
    def offers(self) -> frozenset[NeedKind]:
        return frozenset({"dense"} if self.hidden is None else {"dense", "hidden"})

    def hidden_states(self) -> Tensor:
        return super().hidden_states() if self.hidden is None else self.hidden(slice(0, self.steps))

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> DistributionRows:
        with torch.no_grad():
            logits_CV = as_compute(self.logits(index_C)[:, : vocab or self.width])
            if self.temperature != 1.0:
                logits_CV = logits_CV / self.temperature
            return DistributionRows(logits_CV, self.tokens_N[index_C], self.source, self.shard)

    def precomputed(self, index_C: slice, vocab: int | None = None) -> Dense:
        with torch.no_grad():
            logits_CV = self.logits(index_C)[:, : vocab or self.width]

        def logits(rows: Tensor | slice) -> Tensor:
            return logits_CV[rows]

        valid_C = self._valid(index_C)
        return replace(self, tokens_N=self.tokens_N[index_C], logits=logits, hidden=None, factors=None, valid_N=valid_C)

    def select(self, index_N: Tensor) -> Dense:
        def logits(rows: Tensor | slice) -> Tensor:
            return self.logits(index_N[rows])

        def hidden(rows: Tensor | slice) -> Tensor:
            assert self.hidden is not None
            return self.hidden(index_N[rows])

        def states(rows: Tensor | slice) -> Tensor:
            assert self.factors is not None
            return self.factors.states(index_N[rows])

        return replace(
            self,
            tokens_N=take_rows(self.tokens_N, index_N),
            logits=logits,
            hidden=None if self.hidden is None else hidden,
            factors=None if self.factors is None else replace(self.factors, states=states),
            valid_N=self._valid(index_N),
        )
