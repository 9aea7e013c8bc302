"""What a teacher said about each step of a pack. Axis letters: see `retort.types`.

A signal detaches what it is given, checks that it speaks of the same tokens as the rollouts, and refuses NaN:
alignment is an invariant here, not a slice somewhere. `rows` cuts out a chunk, on which a term may ask for anything
that the signal can answer; asking for more is an error that names what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from retort.distribution import WHOLE, Distribution, Shard
from retort.errors import SignalError
from retort.types import NeedKind, require_finite

#: By how much a log-prob may be above 0, or a sum of probabilities above 1: what bf16 makes of 0 and 1.
ROUNDING = 0.01


class SignalRows:
    """A teacher's answer for the C steps of one chunk. The base class answers nothing."""

    #: Name of the teacher or view, for messages.
    source: str = "teacher"
    #: Width of the distribution, where there is one.
    vocab: int | None = None

    def _missing(self, what: str) -> SignalError:
        return SignalError(f"{self.source}: its signal ({type(self).__name__}) has no {what}")

    @property
    def sampled_logp_N(self) -> Tensor:
        """Log-prob of the token that was written, nats."""
        raise self._missing("log-prob of the written token")

    @property
    def entropy_N(self) -> Tensor:
        """Entropy of the whole distribution, nats."""
        raise self._missing("entropy")

    @property
    def distribution(self) -> Distribution:
        """The whole distribution."""
        raise self._missing("full distribution")

    @property
    def logp_NV(self) -> Tensor:
        """Log-probs of the whole vocabulary, nats."""
        return self.distribution.logp_CV

    def logp_at(self, ids_NK: Tensor) -> Tensor:
        """Log-probs [C, K] of ids that somebody else chose, nats."""
        return self.distribution.logp_at(ids_NK)

    def logp_outside(self, ids_NK: Tensor, inside_NK: Tensor) -> Tensor:
        """Log [C] of the probability of all ids but those of `ids_NK` that `inside_NK` marks, nats."""
        return self.distribution.logp_outside(ids_NK, inside_NK)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The `k` most likely ids [C, K] and their log-probs under the whole distribution, nats."""
        raise self._missing("top-k")

    @property
    def hidden_ND(self) -> Tensor:
        """The teacher's last hidden states."""
        raise self._missing("hidden states")


@dataclass(frozen=True, eq=False)
class TeacherSignal:
    """Base of all signals: N steps, the tokens they are about, and who says it.

    Attributes:
        tokens_N: Ids that were scored.
        source: Who says it, for messages.
        valid_N: False at the steps of rollouts that the view had no context for: what is said there means nothing, and
            terms against the view leave these steps out. None: all are valid.
        counts: What happened to the view's prompts, summed over rollouts: `no_context`, `cut`, `prompt_tokens`.
    """

    tokens_N: Tensor
    source: str = "teacher"
    valid_N: Tensor | None = field(default=None, kw_only=True)
    counts: Mapping[str, float] = field(default_factory=lambda: {}, kw_only=True)

    @property
    def steps(self) -> int:
        """N."""
        return len(self.tokens_N)

    @property
    def offers(self) -> frozenset[NeedKind]:
        """The kinds of `Need` this signal can answer."""
        raise NotImplementedError

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> SignalRows:
        """The answer for some of the steps.

        Args:
            index_C: Which steps.
            vocab: Width that student and teacher share; ids from there on are no tokens and get no probability.
        """
        raise NotImplementedError

    def held(self, index_C: slice, vocab: int | None = None) -> TeacherSignal:
        """The signal about a run of steps, with all that costs a matrix product computed at once.

        Its `rows` of smaller runs then cost no product each.
        """
        return self.select(torch.arange(*index_C.indices(self.steps), device=self.tokens_N.device))

    def select(self, index_N: Tensor) -> TeacherSignal:
        """The signal about some of the steps only, in the order given."""
        raise NotImplementedError

    def hidden_states(self) -> Tensor:
        """The last hidden states at all its steps, [N, D].

        Raises:
            SignalError: It has none.
        """
        raise SignalError(f"{self.source}: its signal ({type(self).__name__}) has no hidden states")

    def hidden_rows(self) -> SignalRows:
        """The answer for all steps of estimators that compare hidden states and read nothing else."""
        return _HiddenRows(self)

    def _valid(self, index: Tensor | slice) -> Tensor | None:
        return None if self.valid_N is None else self.valid_N[index]

    def check_tokens(self, tokens_N: Tensor) -> None:
        """Raises `SignalError` unless the signal is about exactly these tokens."""
        if self.tokens_N.shape != tokens_N.shape:
            raise SignalError(f"{self.source}: scored {len(self.tokens_N)} tokens, the rollouts have {len(tokens_N)}")
        wrong = (self.tokens_N.to(tokens_N.device) != tokens_N).nonzero()
        if len(wrong):
            step = int(wrong[0])
            raise SignalError(
                f"{self.source}: misaligned at step {step}: it scored id {int(self.tokens_N[step])}, "
                f"the rollout has id {int(tokens_N[step])}"
            )


class _HiddenRows(SignalRows):
    def __init__(self, signal: TeacherSignal) -> None:
        self.source = signal.source
        self._signal = signal

    @property
    def hidden_ND(self) -> Tensor:
        return self._signal.hidden_states()


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
        _same_length(self, "logp_N", self.logp_N)
        _check_logps(self, "log-prob of a written token", self.logp_N)

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
                _same_length(self, name, values)
        _check_logps(self, "top-k log-prob", self.logp_NK)
        if self.sampled_logp_N is not None:
            _check_logps(self, "log-prob of a written token", self.sampled_logp_N)
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


def entropy_lower_bound(logp_NK: Tensor) -> Tensor:
    """Entropy, nats, of top-k log-probs [N, K] plus one bucket for the rest: never above the true entropy."""
    tail_N = (1.0 - logp_NK.exp().sum(-1)).clamp_min(0.0)
    return -torch.xlogy(logp_NK.exp(), logp_NK.exp()).sum(-1) - torch.xlogy(tail_N, tail_N)


class DistributionRows(SignalRows):
    """Everything that follows from logits [C, V], each computed once and only when asked for."""

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


def entropy(logp_NV: Tensor) -> Tensor:
    """Entropy in nats, [N], of log-probs [N, V]; an impossible id (-inf) contributes nothing."""
    return -(logp_NV.exp() * logp_NV.clamp_min(torch.finfo(logp_NV.dtype).min)).sum(-1)


@dataclass(frozen=True, eq=False)
class Dense(TeacherSignal):
    """The whole distribution, as a function from steps to logits [C, V]; never held as [N, V] by us.

    Attributes:
        logits: Index of steps -> logits [C, V], any float dtype; computed without gradient.
        width: V, the teacher's own width.
        temperature: What the logits are divided by.
        shard: Which ids the logits are about, where a rank holds only some.
        hidden: Index of steps -> last hidden states [C, D], without gradient; None where there are none to be had.
    """

    logits: Callable[[Tensor | slice], Tensor] = lambda _: torch.empty(0, 0)
    width: int = 0
    temperature: float = 1.0
    shard: Shard = WHOLE
    hidden: Callable[[Tensor | slice], Tensor] | None = None

    @staticmethod
    def of(
        logits_NV: Tensor,
        tokens_N: Tensor,
        *,
        source: str = "teacher",
        temperature: float = 1.0,
        hidden_ND: Tensor | None = None,
    ) -> Dense:
        """From a plain tensor [N, V], and last hidden states where something is to be compared with them."""
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

    def held(self, index_C: slice, vocab: int | None = None) -> Dense:
        with torch.no_grad():
            logits_CV = self.logits(index_C)[:, : vocab or self.width]

        def logits(rows: Tensor | slice) -> Tensor:
            return logits_CV[rows]

        return replace(self, tokens_N=self.tokens_N[index_C], logits=logits, hidden=None, valid_N=self._valid(index_C))

    def select(self, index_N: Tensor) -> Dense:
        def logits(rows: Tensor | slice) -> Tensor:
            return self.logits(index_N[rows])

        def hidden(rows: Tensor | slice) -> Tensor:
            assert self.hidden is not None
            return self.hidden(index_N[rows])

        return replace(
            self,
            tokens_N=self.tokens_N[index_N],
            logits=logits,
            hidden=None if self.hidden is None else hidden,
            valid_N=self._valid(index_N),
        )


def as_compute(values: Tensor) -> Tensor:
    """Softmaxes and sums are done in fp32, or in float64 where that is what came in."""
    return values if values.dtype == torch.float64 else values.float()


def _check_logps(signal: TeacherSignal, name: str, logp: Tensor) -> None:
    """Refuses what is no log-prob; -inf is one."""
    require_finite(name, logp, signal.source, allow_minus_inf=True)
    _refuse(signal, logp > ROUNDING, f"{name} is above 0, which no log-prob is")


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
    _refuse(signal, ids_NK < 0, "a top-k id is negative")
    unordered_NK = logp_NK[:, 1:] > logp_NK[:, :-1]
    _refuse(signal, unordered_NK, "top-k log-probs are not in order, most likely first; sort them with their ids")
    # Fillers get numbers of their own, below all ids.
    fillers_K = -1 - torch.arange(ids_NK.shape[1], device=ids_NK.device)
    sorted_NK = torch.where(logp_NK > -math.inf, ids_NK, fillers_K).sort(-1).values
    _refuse(signal, sorted_NK[:, 1:] == sorted_NK[:, :-1], "top-k names an id twice")
    _refuse(signal, logp_NK.double().exp().sum(-1) > 1.0 + ROUNDING, "top-k probabilities add up to more than 1")


def _refuse(signal: TeacherSignal, bad: Tensor, what: str) -> None:
    """Raises at the first step that is bad, [N] or [N, K], and about which the signal says something."""
    bad_N = bad if bad.ndim == 1 else bad.any(-1)
    if signal.valid_N is not None:
        bad_N = bad_N & signal.valid_N.to(bad_N.device)
    if bool(bad_N.any()):
        step = int(bad_N.nonzero()[0])
        raise SignalError(f"{signal.source}: {what} (step {step} of the batch); stopping before it is learnt")


def _same_length(signal: TeacherSignal, name: str, values: Tensor) -> None:
    if len(values) != signal.steps:
        raise SignalError(f"{signal.source}: {name} has {len(values)} steps, the rollouts have {signal.steps}")
