"""One signal out of those of several teachers. Axis letters: see `retort.core`; T teachers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from retort.core.needs import NeedKind, require_finite
from retort.core.signals.base import SignalRows, TeacherSignal, same_length, take_rows
from retort.core.signals.by_ids import Candidates, Sampled, TopK
from retort.core.signals.dense import Dense, as_compute
from retort.core.signals.gaussian import Gaussian
from retort.errors import SignalError


def joined(
    signals: Sequence[TeacherSignal], teacher_N: Tensor, index_N: Tensor, source: str = "teachers"
) -> TeacherSignal:
    """One signal whose every step is a step of one of several signals, unchanged.

    Whole distributions stay functions that give a few steps at a time; Gaussians keep their means. Hidden states are
    dropped: those of two models mean nothing beside one another.

    Args:
        signals: Signals of one kind, over the same ids.
        teacher_N: The signal that each step is of, int64, on the CPU.
        index_N: The step's place in that signal, int64, on the CPU.
        source: Name for messages.

    Returns:
        The signal; its `counts` are empty.

    Raises:
        SignalError: The signals are of several kinds.
    """
    device = signals[0].tokens_N.device
    before_T = torch.tensor([0, *(signal.steps for signal in signals[:-1])]).cumsum(0)
    flat_N = (before_T[teacher_N] + index_N).to(device)

    def column(of: Callable[[Any], Tensor]) -> Tensor:
        return torch.cat([of(signal).to(device) for signal in signals])[flat_N]

    about: dict[str, Any] = {"tokens_N": column(lambda own: own.tokens_N), "source": source}
    if any(signal.valid_N is not None for signal in signals):
        about["valid_N"] = column(
            lambda own: torch.ones_like(own.tokens_N).bool() if own.valid_N is None else own.valid_N
        )
    if all(isinstance(signal, Dense) for signal in signals):
        return _joined_dense(
            [s for s in signals if isinstance(s, Dense)], teacher_N.to(device), index_N.to(device), about
        )
    if all(isinstance(signal, Sampled) for signal in signals):
        return Sampled(logp_N=column(lambda own: own.logp_N), **about)
    if all(isinstance(signal, Gaussian) for signal in signals):
        return Gaussian(
            mean_ND=column(lambda own: own.mean_ND),
            std_N=column(lambda own: own.std_N),
            decided_ND=column(lambda own: own.decided_ND),
            **about,
        )
    if all(isinstance(signal, TopK) for signal in signals):
        return _joined_lists([s for s in signals if isinstance(s, TopK)], column, about)
    if all(isinstance(signal, Candidates) for signal in signals):
        tops = [top for signal in signals if isinstance(signal, Candidates) and (top := _said(signal)) is not None]
        spoken = all(signal.sampled_logp_N is not None for signal in signals if isinstance(signal, Candidates))
        return Candidates(
            ids_NK=column(lambda own: own.ids_NK),
            logp_NK=column(lambda own: own.logp_NK),
            sampled_logp_N=column(lambda own: own.sampled_logp_N) if spoken else None,
            top=_joined_lists(tops, lambda of: column(lambda own: of(own.top)), about)
            if len(tops) == len(signals)
            else None,
            **about,
        )
    kinds = ", ".join(sorted({type(signal).__name__ for signal in signals}))
    raise SignalError(f"{source}: the signals of several teachers must be of one kind, not of several ({kinds})")


def _joined_dense(parts: Sequence[Dense], teacher_N: Tensor, index_N: Tensor, about: Mapping[str, Any]) -> Dense:
    width = min(part.width for part in parts)

    def logits(index_C: Tensor | slice) -> Tensor:
        teacher_C, own_C = teacher_N[index_C], index_N[index_C]
        steps: list[int] = torch.bincount(teacher_C, minlength=len(parts)).tolist()  # pyright: ignore
        there = [number for number, count in enumerate(steps) if count]
        if len(there) <= 1:  # also to the bit what that teacher says alone
            return parts[there[0] if there else 0].logits(own_C)[:, :width]
        found: Tensor | None = None
        for number in there:
            mine_C = teacher_C == number
            own = as_compute(parts[number].logits(own_C[mine_C])[:, :width])
            found = own.new_empty(len(teacher_C), width) if found is None else found
            found[mine_C] = own.to(found.device)
        assert found is not None
        return found

    return Dense(logits=logits, width=width, temperature=parts[0].temperature, **about)


def _said(signal: Candidates) -> TopK | None:
    """What a signal about given ids says besides; None where that is nothing, so that all teachers' have one form."""
    top = signal.top
    return None if top is None or not (top.ids_NK.shape[1] or top.entropy_N is not None) else top


def _joined_lists(parts: Sequence[TopK], column: Callable[[Callable[[Any], Tensor]], Tensor], about: Any) -> TopK:
    kept = min(part.ids_NK.shape[1] for part in parts)
    return TopK(
        ids_NK=column(lambda own: own.ids_NK[:, :kept]),
        logp_NK=column(lambda own: own.logp_NK[:, :kept]),
        sampled_logp_N=column(lambda own: own.sampled_logp_N)
        if all(part.sampled_logp_N is not None for part in parts)
        else None,
        entropy_N=column(lambda own: own.entropy_N) if all(part.entropy_N is not None for part in parts) else None,
        entropy_exact=all(part.entropy_exact for part in parts),
        whole=all(part.whole and part.ids_NK.shape[1] == kept for part in parts),
        **about,
    )


@dataclass(frozen=True, eq=False)
class Differing(TeacherSignal):
    """A signal of several teachers together, and how far they differ at each of its steps.

    Attributes:
        of: The signal, with all else that is known.
        disagreement_N: How far they differ, nats; a number that is not finite is refused (`SignalError`).
    """

    of: TeacherSignal = field(default_factory=lambda: TeacherSignal(torch.empty(0)))
    disagreement_N: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "disagreement_N", self.disagreement_N.detach())
        same_length(self, "disagreement_N", self.disagreement_N)
        require_finite("disagreement of teachers", self.disagreement_N, self.source)

    @staticmethod
    def beside(of: TeacherSignal, disagreement_N: Tensor) -> Differing:
        """The signal with the disagreement beside it."""
        return Differing(of.tokens_N, of.source, of, disagreement_N, valid_N=of.valid_N, counts=of.counts)

    @property
    def offers(self) -> frozenset[NeedKind]:
        also: frozenset[NeedKind] = frozenset({"disagreement"})
        return self.of.offers | also

    @property
    def begins_N(self) -> Tensor | None:
        return self.of.begins_N

    @property
    def block_width(self) -> int:
        return self.of.block_width

    def lists(self, width: int) -> Mapping[NeedKind, tuple[Tensor, bool]]:
        return self.of.lists(width)

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> SignalRows:
        found = self.of.rows(index_C, vocab)
        found.differ_N = take_rows(self.disagreement_N, index_C)
        return found

    def precomputed(self, index_C: slice, vocab: int | None = None) -> Differing:
        return Differing.beside(self.of.precomputed(index_C, vocab), self.disagreement_N[index_C])

    def select(self, index_N: Tensor) -> Differing:
        return Differing.beside(self.of.select(index_N), take_rows(self.disagreement_N, index_N))

    def hidden_states(self) -> Tensor:
        return self.of.hidden_states()

    def check_ids(self, ids_NK: Tensor) -> None:
        self.of.check_ids(ids_NK)


def arithmetic(signals: Sequence[Dense], weights: Sequence[float]) -> Dense:
    r"""The arithmetic mixture :math:`\sum_i w_i p_i` of whole distributions, nats; a few steps at a time.

    Each teacher's distribution is at its own temperature; the mixture's logits are its log-probs.

    Args:
        signals: Whole distributions over the same ids, at the same steps.
        weights: w, all positive, with sum 1.
    """
    width = min(signal.width for signal in signals)

    def logits(index_C: Tensor | slice) -> Tensor:
        found: Tensor | None = None
        for signal, weight in zip(signals, weights, strict=True):
            own_CV = signal.rows(index_C, width).logp_NV + math.log(weight)
            found = own_CV if found is None else torch.logaddexp(found, own_CV.to(found.device))
        assert found is not None
        return found

    return replace(signals[0], logits=logits, width=width, temperature=1.0, hidden=None, factors=None)


def listed(signals: Sequence[TeacherSignal], weights: Sequence[float], source: str) -> TeacherSignal:
    """The same of teachers that give log-probs of a few ids only: those of the mixture, as exact.

    Args:
        signals: `Sampled`, or `Candidates` about the same ids, at the same steps.
        weights: w, all positive, with sum 1.
        source: Name for messages.

    Raises:
        SignalError: The signals are of other kinds, or of several.
    """
    first = signals[0]

    def mixed(of: Callable[[Any], Tensor]) -> Tensor:
        own = [
            as_compute(of(signal)).to(first.tokens_N.device) + math.log(w)
            for signal, w in zip(signals, weights, strict=True)
        ]
        return torch.stack(own).logsumexp(0)

    about: dict[str, Any] = {"valid_N": all_valid(signals), "counts": first.counts}
    if all(isinstance(signal, Sampled) for signal in signals):
        return Sampled(first.tokens_N, source, mixed(lambda own: own.logp_N), **about)
    if isinstance(first, Candidates) and all(isinstance(signal, Candidates) for signal in signals):
        for signal in signals:
            signal.check_ids(first.ids_NK)
        spoken = all(signal.sampled_logp_N is not None for signal in signals if isinstance(signal, Candidates))
        sampled_N = mixed(lambda own: own.sampled_logp_N) if spoken else None
        return Candidates(first.tokens_N, source, first.ids_NK, mixed(lambda own: own.logp_NK), sampled_N, **about)
    kinds = ", ".join(sorted({type(signal).__name__ for signal in signals}))
    raise SignalError(f"{source}: nothing exact can be said of a mixture of these signals: {kinds}")


def all_valid(signals: Sequence[TeacherSignal]) -> Tensor | None:
    """The steps that are valid for every one of some signals, bool [N]; None: all."""
    found = [signal.valid_N for signal in signals if signal.valid_N is not None]
    return torch.stack([own.to(found[0].device) for own in found]).all(0) if found else None


@torch.no_grad()
def disagreement(signals: Sequence[Dense], weights: Sequence[float], rows: int) -> tuple[Tensor, Tensor]:
    r"""How far whole distributions differ, and the share of each in the tokens that were written.

    The generalised Jensen-Shannon divergence :math:`\sum_i w_i KL(p_i \| \sum_j w_j p_j)`: 0 where they are equal, at
    most the entropy of the weights (ln 2 for two alike).

    Args:
        signals: Whole distributions over the same ids, at the same steps.
        weights: w, all positive, with sum 1.
        rows: Steps that are computed at a time.

    Returns:
        The divergence [N], nats; and the probability [N, T] that teacher i wrote the token if the mixture did,
        :math:`w_i p_i(y) / \sum_j w_j p_j(y)`.
    """
    mixture = arithmetic(signals, weights)
    far: list[Tensor] = []
    shares: list[Tensor] = []
    for start in range(0, mixture.steps, rows):
        index = slice(start, start + rows)
        both_CV = mixture.rows(index)
        far_C = torch.zeros_like(both_CV.sampled_logp_N)
        own_CT: list[Tensor] = []
        for signal, weight in zip(signals, weights, strict=True):
            found = signal.rows(index, mixture.width)
            logp_CV = found.logp_NV.to(far_C.device)
            gap_CV = (logp_CV - both_CV.logp_NV).masked_fill(logp_CV == -torch.inf, 0.0)
            far_C += weight * (logp_CV.exp() * gap_CV).sum(-1)
            own_CT.append(found.sampled_logp_N.to(far_C.device) + math.log(weight))
        far.append(far_C.clamp_min(0.0))  # rounding
        shares.append(torch.stack(own_CT, -1).softmax(-1).nan_to_num(0.0))  # 0 of an impossible token
    if not far:
        return torch.zeros(0), torch.zeros(0, len(signals))
    return torch.cat(far), torch.cat(shares)
