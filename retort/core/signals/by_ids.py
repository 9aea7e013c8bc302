"""Signals about a few ids of each step. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retort.core.needs import NeedKind, require_finite
from retort.core.signals.base import ROUNDING, SignalRows, TeacherSignal, check_logps, refuse, same_length, take_rows
from retort.errors import SignalError


class _SampledRows(SignalRows):
    def __init__(self, source: str, logp_N: Tensor) -> None:
        self.source = source
        self._logp_N = logp_N

    @property
    def sampled_logp_N(self) -> Tensor:
        return self._logp_N


@dataclass(frozen=True, eq=False)
class Sampled(TeacherSignal):
    """Only the log-prob of the sampled token, [N], nats; NaN or more than 0 is refused (`SignalError`)."""

    logp_N: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "logp_N", self.logp_N.detach())
        same_length(self, "logp_N", self.logp_N)
        check_logps(self, "log-prob of a sampled token", self.logp_N)

    @property
    def offers(self) -> frozenset[NeedKind]:
        return frozenset({"sampled"})

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> SignalRows:
        return _SampledRows(self.source, self.logp_N[index_C])

    def select(self, index_N: Tensor) -> Sampled:
        tokens_N, logp_N = take_rows(self.tokens_N, index_N), take_rows(self.logp_N, index_N)
        return Sampled(tokens_N, self.source, logp_N, valid_N=self._valid(index_N))


class _ListedRows(SignalRows):
    """The numbers of the ids of a list.

    Attributes:
        ids_CK: Ids of each step.
        logp_CK: Their log-probs under the whole distribution, nats.
        whole: Whether the list holds all ids.
    """

    def __init__(self, source: str, ids_CK: Tensor, logp_CK: Tensor, whole: bool) -> None:
        self.source, self.ids_CK, self.logp_CK, self.whole = source, ids_CK, logp_CK, whole

    def _first(self, values_CK: Tensor, k: int, what: str) -> Tensor:
        """The first `k` columns; fewer only where the list holds all ids."""
        kept = values_CK.shape[1]
        if k > kept and not self.whole:
            raise self._missing(f"{what} (it kept {kept})")
        return values_CK[:, :k]

    def _known(self, values: Tensor | None, what: str) -> Tensor:
        if values is None:
            raise self._missing(what)
        return values

    def logp_at(self, ids_NK: Tensor) -> Tensor:
        """Log-probs of ids in the list.

        Raises:
            SignalError: An id that is not in the list.
        """
        if not self.ids_CK.shape[1]:
            raise self._missing("top-k")
        first = slice(0, ids_NK.shape[1])
        if torch.equal(ids_NK, self.ids_CK[:, first]):  # the ids that were requested
            return self.logp_CK[:, first]
        same_NKK = ids_NK[:, :, None] == self.ids_CK[:, None, :]
        lacking_NK = ~same_NKK.any(-1)
        if bool(lacking_NK.any()):
            row, column = (int(column) for column in lacking_NK.nonzero()[0])
            kept = self.ids_CK.shape[1]
            raise self._missing(f"log-prob of id {int(ids_NK[row, column])} (it kept {kept} others)")
        return self.logp_CK.gather(-1, same_NKK.to(torch.uint8).argmax(-1))

    def logp_outside(self, ids_NK: Tensor, inside_NK: Tensor) -> Tensor:
        """The probability that the listed ids leave of 1, at least one rounding error, unless all ids are listed."""
        logp_NK = self.logp_at(ids_NK)
        if self.whole:
            meant_NKK = (self.ids_CK[:, :, None] == ids_NK[:, None, :]) & inside_NK[:, None, :]
            return self.logp_CK.masked_fill(meant_NKK.any(-1), -math.inf).logsumexp(-1)
        left_N = 1.0 - logp_NK.double().exp().mul(inside_NK).sum(-1)
        return left_N.clamp_min(torch.finfo(logp_NK.dtype).eps).log().to(logp_NK.dtype)


class _TopKRows(_ListedRows):
    def __init__(self, signal: TopK, index_C: Tensor | slice) -> None:
        super().__init__(signal.source, signal.ids_NK[index_C], signal.logp_NK[index_C], signal.whole)
        self._sampled_N = None if signal.sampled_logp_N is None else signal.sampled_logp_N[index_C]
        self._entropy_N = None if signal.entropy_N is None else signal.entropy_N[index_C]
        self._exact = signal.entropy_exact

    @property
    def sampled_logp_N(self) -> Tensor:
        return self._known(self._sampled_N, "log-prob of the sampled token")

    @property
    def entropy_N(self) -> Tensor:
        return self._known(self._entropy_N if self._exact else None, "entropy" if self._exact else "exact entropy")

    @property
    def entropy_bound_N(self) -> Tensor:
        return self._known(self._entropy_N, "entropy")

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        return self._first(self.ids_CK, k, f"top-{k}"), self._first(self.logp_CK, k, f"top-{k}")


@dataclass(frozen=True, eq=False)
class TopK(TeacherSignal):
    """The teacher's most likely ids, most likely first, and other requested quantities.

    A `SignalError` refuses log-probs that are NaN or above 0, or that add up to more than 1, and ids that are not in
    order of their log-probs, negative, or twice at one step.

    Attributes:
        ids_NK: Ids, int64.
        logp_NK: Log-probs under the whole distribution (not renormalised), nats.
        sampled_logp_N: Log-prob of the sampled token, nats, if requested.
        entropy_N: Entropy of the whole distribution, nats, if requested.
        entropy_exact: False if the entropy is only a lower bound computed from the top-k and one tail bucket. Then it
            meets the need `entropy_bound`, and is read as `entropy_bound_N` only.
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
            check_logps(self, "log-prob of a sampled token", self.sampled_logp_N)
        if self.entropy_N is not None:
            require_finite("entropy", self.entropy_N, self.source)
        _check_list(self, self.ids_NK, self.logp_NK, "top-k")
        _check_order(self)

    @property
    def offers(self) -> frozenset[NeedKind]:
        kinds: set[NeedKind] = {"topk"} if self.ids_NK.shape[1] else set()
        if self.sampled_logp_N is not None:
            kinds.add("sampled")
        if self.entropy_N is not None:
            kinds.add("entropy" if self.entropy_exact else "entropy_bound")
        return frozenset(kinds)

    def lists(self, width: int) -> Mapping[NeedKind, tuple[Tensor, bool]]:
        return {"topk": (self.ids_NK, self.whole)}

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> SignalRows:
        return _TopKRows(self, index_C)

    def select(self, index_N: Tensor) -> TopK:
        return TopK(
            take_rows(self.tokens_N, index_N),
            self.source,
            take_rows(self.ids_NK, index_N),
            take_rows(self.logp_NK, index_N),
            None if self.sampled_logp_N is None else take_rows(self.sampled_logp_N, index_N),
            None if self.entropy_N is None else take_rows(self.entropy_N, index_N),
            self.entropy_exact,
            self.whole,
            valid_N=self._valid(index_N),
        )


class _CandidateRows(_ListedRows):
    def __init__(self, signal: Candidates, index_C: Tensor | slice, vocab: int | None) -> None:
        ids_CK, logp_CK = signal.ids_NK[index_C], signal.logp_NK[index_C]
        self._requested_CK = ids_CK
        self._sampled_N = None if signal.sampled_logp_N is None else signal.sampled_logp_N[index_C]
        self._top = SignalRows() if signal.top is None else signal.top.rows(index_C, vocab)
        self._top.source = signal.source
        whole = vocab is not None and ids_CK.shape[1] >= vocab
        if signal.top is not None and not whole:
            ids_CK = torch.cat([ids_CK, signal.top.ids_NK[index_C]], 1)
            logp_CK = torch.cat([logp_CK, signal.top.logp_NK[index_C]], 1)
        super().__init__(signal.source, ids_CK, logp_CK, whole)

    @property
    def sampled_logp_N(self) -> Tensor:
        return self._top.sampled_logp_N if self._sampled_N is None else self._sampled_N

    @property
    def entropy_N(self) -> Tensor:
        return self._top.entropy_N

    @property
    def entropy_bound_N(self) -> Tensor:
        return self._top.entropy_bound_N

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        return self._top.topk(k)

    def candidates(self, k: int) -> Tensor:
        return self._first(self._requested_CK, k, f"log-probs of the student's top-{k}")


@dataclass(frozen=True, eq=False)
class Candidates(TeacherSignal):
    """Log-probs of ids that the student chose, and other requested quantities, from a teacher without a dense signal.

    A `SignalError` refuses log-probs that are NaN or above 0, or that add up to more than 1, ids that are negative or
    twice at one step, and a `top` about other tokens.

    Attributes:
        ids_NK: The requested ids, most likely first under the student when the batch was scored; int64.
        logp_NK: Log-probs under the teacher's whole distribution (not renormalised), nats; minus infinity if ruled out.
        sampled_logp_N: Log-prob of the sampled token, nats, if requested.
        top: The teacher's own most likely ids and its entropy, if requested.
    """

    ids_NK: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    logp_NK: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    sampled_logp_N: Tensor | None = None
    top: TopK | None = None

    def __post_init__(self) -> None:
        for name in ("ids_NK", "logp_NK", "sampled_logp_N"):
            values: Tensor | None = self.__dict__[name]
            if values is not None:
                object.__setattr__(self, name, values.detach())
                same_length(self, name, values)
        check_logps(self, "log-prob of a candidate", self.logp_NK)
        if self.sampled_logp_N is not None:
            check_logps(self, "log-prob of a sampled token", self.sampled_logp_N)
        _check_list(self, self.ids_NK, self.logp_NK, "candidate")
        if self.top is not None:
            self.top.check_tokens(self.tokens_N)

    @property
    def offers(self) -> frozenset[NeedKind]:
        kinds: set[NeedKind] = {"logp_at"} if self.sampled_logp_N is None else {"logp_at", "sampled"}
        return frozenset(kinds) if self.top is None else self.top.offers | kinds

    def lists(self, width: int) -> Mapping[NeedKind, tuple[Tensor, bool]]:
        own: dict[NeedKind, tuple[Tensor, bool]] = {"logp_at": (self.ids_NK, self.ids_NK.shape[1] >= width)}
        return own if self.top is None else {**own, **self.top.lists(width)}

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> SignalRows:
        return _CandidateRows(self, index_C, vocab)

    def select(self, index_N: Tensor) -> Candidates:
        return Candidates(
            take_rows(self.tokens_N, index_N),
            self.source,
            take_rows(self.ids_NK, index_N),
            take_rows(self.logp_NK, index_N),
            None if self.sampled_logp_N is None else take_rows(self.sampled_logp_N, index_N),
            None if self.top is None else self.top.select(index_N),
            valid_N=self._valid(index_N),
        )

    def check_ids(self, ids_NK: Tensor) -> None:
        """Raises `SignalError` unless it is about exactly these ids, in this order."""
        if self.ids_NK.shape != ids_NK.shape:
            expected, given = tuple(ids_NK.shape), tuple(self.ids_NK.shape)
            raise SignalError(f"{self.source}: was asked for ids {expected}, and gave {given}")
        wrong = (self.ids_NK.to(ids_NK.device) != ids_NK).nonzero()
        if len(wrong):
            step, column = (int(index) for index in wrong[0])
            raise SignalError(
                f"{self.source}: misaligned at step {step}: it was asked for id {int(ids_NK[step, column])}, "
                f"and gave id {int(self.ids_NK[step, column])}"
            )


def _check_list(signal: TeacherSignal, ids_NK: Tensor, logp_NK: Tensor, name: str) -> None:
    """Refuses anything but a list of distinct ids with log-probs; steps without a context are not checked.

    Ids with a log-prob of -inf fill up a short list; only their position counts.
    """
    if ids_NK.shape != logp_NK.shape or ids_NK.ndim != 2:
        shapes = f"ids {tuple(ids_NK.shape)} and log-probs {tuple(logp_NK.shape)}"
        raise SignalError(f"{signal.source}: {name} {shapes} must be [N, K] both")
    if not ids_NK.numel():
        return
    refuse(signal, ids_NK < 0, f"a {name} id is negative")
    # Fillers get distinct numbers below all ids.
    fillers_K = -1 - torch.arange(ids_NK.shape[1], device=ids_NK.device)
    sorted_NK = torch.where(logp_NK > -math.inf, ids_NK, fillers_K).sort(-1).values
    refuse(signal, sorted_NK[:, 1:] == sorted_NK[:, :-1], f"{name} names an id twice")
    refuse(signal, logp_NK.double().exp().sum(-1) > 1.0 + ROUNDING, f"{name} probabilities add up to more than 1")


def _check_order(signal: TopK) -> None:
    """Refuses ids that are not the most likely ones in order."""
    unordered_NK = signal.logp_NK[:, 1:] > signal.logp_NK[:, :-1]
    refuse(signal, unordered_NK, "top-k log-probs are not in order, most likely first; sort them with their ids")


def entropy_lower_bound(logp_NK: Tensor) -> Tensor:
    """Entropy, nats, of top-k log-probs [N, K] plus one bucket for the rest: never above the true entropy."""
    tail_N = (1.0 - logp_NK.exp().sum(-1)).clamp_min(0.0)
    return -torch.xlogy(logp_NK.exp(), logp_NK.exp()).sum(-1) - torch.xlogy(tail_N, tail_N)
