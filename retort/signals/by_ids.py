"""Signals about a few ids of each step. Axis letters: see `retort.types`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retort.errors import SignalError
from retort.signals.base import ROUNDING, SignalRows, TeacherSignal, check_logps, refuse, same_length
from retort.types import NeedKind, require_finite


class _SampledRows(SignalRows):
    def __init__(self, source: str, logp_N: Tensor) -> None:
        self.source = source
        self._logp_N = logp_N

    @property
    def sampled_logp_N(self) -> Tensor:
        return self._logp_N


@dataclass(frozen=True, eq=False)
class Sampled(TeacherSignal):
    """Only the log-prob of the token that was written, [N], nats; NaN or more than 0 is refused (`SignalError`)."""

    logp_N: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "logp_N", self.logp_N.detach())
        same_length(self, "logp_N", self.logp_N)
        check_logps(self, "log-prob of a written token", self.logp_N)

    @property
    def offers(self) -> frozenset[NeedKind]:
        return frozenset({"sampled"})

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> SignalRows:
        return _SampledRows(self.source, self.logp_N[index_C])

    def select(self, index_N: Tensor) -> Sampled:
        return Sampled(self.tokens_N[index_N], self.source, self.logp_N[index_N], valid_N=self._valid(index_N))


class _TopKRows(SignalRows):
    def __init__(self, signal: TopK, index_C: Tensor | slice) -> None:
        self.source = signal.source
        self._signal = signal
        self._index_C = index_C

    def _cut(self, values: Tensor | None, what: str) -> Tensor:
        if values is None:
            raise self._missing(what)
        return values[self._index_C]

    @property
    def sampled_logp_N(self) -> Tensor:
        return self._cut(self._signal.sampled_logp_N, "log-prob of the written token")

    @property
    def entropy_N(self) -> Tensor:
        return self._cut(self._signal.entropy_N, "entropy")

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        kept = self._signal.ids_NK.shape[1]
        if k > kept and not self._signal.whole:
            raise self._missing(f"top-{k} (it kept {kept})")
        return self._signal.ids_NK[self._index_C, :k], self._signal.logp_NK[self._index_C, :k]

    def logp_at(self, ids_NK: Tensor) -> Tensor:
        """Log-probs of ids that it kept.

        Raises:
            SignalError: An id that it did not keep, of which it says nothing.
        """
        kept_NK = self._cut(self._signal.ids_NK if self._signal.ids_NK.shape[1] else None, "top-k")
        same_NKK = ids_NK[:, :, None] == kept_NK[:, None, :]
        lacking_NK = ~same_NKK.any(-1)
        if bool(lacking_NK.any()):
            row, column = (int(place) for place in lacking_NK.nonzero()[0])
            raise self._missing(f"log-prob of id {int(ids_NK[row, column])} (it kept {kept_NK.shape[1]} others)")
        return self._signal.logp_NK[self._index_C].gather(-1, same_NKK.to(torch.uint8).argmax(-1))

    def logp_outside(self, ids_NK: Tensor, inside_NK: Tensor) -> Tensor:
        """Of ids that it kept, each once: what they leave of 1, at least one rounding error, since it has no more."""
        logp_NK = self.logp_at(ids_NK)
        left_N = 1.0 - logp_NK.double().exp().mul(inside_NK).sum(-1)
        return left_N.clamp_min(torch.finfo(logp_NK.dtype).eps).log().to(logp_NK.dtype)


@dataclass(frozen=True, eq=False)
class TopK(TeacherSignal):
    """The teacher's most likely ids, most likely first, and what else was asked for.

    Refused with a `SignalError`: log-probs that are NaN or above 0, or that add up to more than 1; ids that are not in
    order of their log-probs, negative, or twice at one step.

    Attributes:
        ids_NK: int64.
        logp_NK: Log-probs under the whole distribution (not renormalised), nats.
        sampled_logp_N: Log-prob of the written token, nats, where asked for.
        entropy_N: Of the whole distribution, nats, where asked for.
        entropy_exact: False if the entropy is only a lower bound computed from the top-k and one tail bucket.
        whole: True if K is the whole vocabulary.
    """

    ids_NK: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    logp_NK: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    sampled_logp_N: Tensor | None = None
    entropy_N: Tensor | None = None
    entropy_exact: bool = True
    whole: bool = False

    def __post_init__(self) -> None:
        for name in ("ids_NK", "logp_NK", "sampled_logp_N", "entropy_N"):
            values: Tensor | None = self.__dict__[name]
            if values is not None:
                object.__setattr__(self, name, values.detach())
                same_length(self, name, values)
        check_logps(self, "top-k log-prob", self.logp_NK)
        if self.sampled_logp_N is not None:
            check_logps(self, "log-prob of a written token", self.sampled_logp_N)
        if self.entropy_N is not None:
            require_finite("entropy", self.entropy_N, self.source)
        _check_top_k(self)

    @property
    def offers(self) -> frozenset[NeedKind]:
        kinds: set[NeedKind] = {"topk"} if self.ids_NK.shape[1] else set()
        if self.sampled_logp_N is not None:
            kinds.add("sampled")
        if self.entropy_N is not None:
            kinds.add("entropy")
        return frozenset(kinds)

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> SignalRows:
        return _TopKRows(self, index_C)

    def select(self, index_N: Tensor) -> TopK:
        return TopK(
            self.tokens_N[index_N],
            self.source,
            self.ids_NK[index_N],
            self.logp_NK[index_N],
            None if self.sampled_logp_N is None else self.sampled_logp_N[index_N],
            None if self.entropy_N is None else self.entropy_N[index_N],
            self.entropy_exact,
            self.whole,
            valid_N=self._valid(index_N),
        )


def _check_top_k(signal: TopK) -> None:
    """Refuses ids that are not the k most likely ones in order, each once; what it says of no context is not looked at.

    Of ids with a log-prob of -inf, which fill up a short list, only the place counts.
    """
    ids_NK, logp_NK = signal.ids_NK, signal.logp_NK
    if ids_NK.shape != logp_NK.shape or ids_NK.ndim != 2:
        raise SignalError(
            f"{signal.source}: top-k ids {tuple(ids_NK.shape)} and log-probs {tuple(logp_NK.shape)} must be [N, K] both"
        )
    if not ids_NK.numel():
        return
    refuse(signal, ids_NK < 0, "a top-k id is negative")
    unordered_NK = logp_NK[:, 1:] > logp_NK[:, :-1]
    refuse(signal, unordered_NK, "top-k log-probs are not in order, most likely first; sort them with their ids")
    # Fillers get numbers of their own, below all ids.
    fillers_K = -1 - torch.arange(ids_NK.shape[1], device=ids_NK.device)
    sorted_NK = torch.where(logp_NK > -math.inf, ids_NK, fillers_K).sort(-1).values
    refuse(signal, sorted_NK[:, 1:] == sorted_NK[:, :-1], "top-k names an id twice")
    refuse(signal, logp_NK.double().exp().sum(-1) > 1.0 + ROUNDING, "top-k probabilities add up to more than 1")


def entropy_lower_bound(logp_NK: Tensor) -> Tensor:
    """Entropy, nats, of top-k log-probs [N, K] plus one bucket for the rest: never above the true entropy."""
    tail_N = (1.0 - logp_NK.exp().sum(-1)).clamp_min(0.0)
    return -torch.xlogy(logp_NK.exp(), logp_NK.exp()).sum(-1) - torch.xlogy(tail_N, tail_N)
