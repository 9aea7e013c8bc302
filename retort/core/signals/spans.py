"""The signal of a teacher with another tokenizer: scores of spans. Axis letters: see `retort.core`.

Steps are the student's tokens. A teacher that cuts the same bytes into other tokens has no number for each of them; it
has one for every unit (`retort.core.signals.units`). M counts the teacher's own tokens, F the units of some steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from retort.core.distribution import Distribution, as_compute
from retort.core.needs import NeedKind
from retort.core.signals.base import SignalRows, TeacherSignal, check_logps, same_length, take_rows
from retort.core.signals.theirs import TeacherTokens, runs
from retort.core.signals.units import Units
from retort.errors import SignalError

#: The most tokens of a unit, on either side, that training should keep; whoever aligns leaves out longer ones and
#: counts them. A block of the loss core holds whole units: 64 steps over 262,000 ids are 67 MB in fp32.
LONGEST_UNIT = 64

#: What a teacher with another tokenizer can give.
SPAN_KINDS: frozenset[NeedKind] = frozenset({"spans", "sampled"})

_COLUMNS = ("unit_N", "own_N", "theirs_N", "logp_N", "matched_N", "raw_N", "place_N")


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.long)


def _distinct(ids: Tensor) -> int:
    return len(torch.unique(ids))  # pyright: ignore


@dataclass(frozen=True, eq=False)
class Spans(TeacherSignal):
    """Scores of units of tokens, on the student's axis, from a teacher with another tokenizer.

    A `SignalError` refuses columns of another length, a unit whose steps are not neighbours or not all there, and a sum
    of log-probs that is NaN or above 0.

    Attributes:
        logits: Index of steps -> the teacher's logits [C, V_T] at the first teacher token of each step's unit, in the
            teacher's ids, any float dtype; computed without gradient, and only at steps inside of a unit.
        width: V_T, the number of ids that the teacher has.
        temperature: The divisor of the logits. `logp_N` is given at this temperature.
        unit_N: Index of each step's unit, int64, rising; -1 outside of all units. `valid_N` is False there.
        own_N: Tokens of the step's unit on the student's side, int64.
        theirs_N: Tokens on the teacher's side, int64.
        logp_N: The teacher's log-prob of its tokens of the unit, summed, nats: the same at every step of the unit.
        matched_N: True where the unit is one token on both sides, and the pair of ids is shared (`matched`).
        shared: The student's and the teacher's ids that are the same bytes, stops included, int64 [S] each; no id
            occurs twice on a side.
        raw_N: The teacher's logits of its tokens of the unit, divided by the temperature and summed; None where they
            are not known.
        stops: Ids that end a completion, the student's and the teacher's, int64; None where they are not known.
        place_N: Index of the first of the teacher's tokens of the step's unit in `theirs`, int64; None without that.
        theirs: The teacher's own tokens; None where they are not known.
        checked: Part of a signal that was checked, cut between units by the loss core: nothing is checked again.
    """

    logits: Callable[[Tensor | slice], Tensor] = lambda _: torch.empty(0, 0)
    width: int = 0
    temperature: float = 1.0
    unit_N: Tensor = field(default_factory=_none)
    own_N: Tensor = field(default_factory=_none)
    theirs_N: Tensor = field(default_factory=_none)
    logp_N: Tensor = field(default_factory=lambda: torch.empty(0))
    matched_N: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    shared: tuple[Tensor, Tensor] = field(default_factory=lambda: (_none(), _none()))
    raw_N: Tensor | None = None
    stops: tuple[Tensor, Tensor] | None = None
    place_N: Tensor | None = None
    theirs: TeacherTokens | None = None
    checked: bool = field(default=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.checked:
            return
        for name in _COLUMNS:
            values: Tensor | None = self.__dict__[name]
            if values is not None:
                object.__setattr__(self, name, values.detach())
                same_length(self, name, values)
        self.check_valid()
        inside_N = self.unit_N >= 0
        object.__setattr__(self, "valid_N", inside_N if self.valid_N is None else inside_N & self.valid_N)
        check_logps(self, "log-prob of a unit", self.logp_N)
        self._check_units()
        for side, ids_S in zip(("student", "teacher"), self.shared, strict=True):
            if len(ids_S) != len(self.shared[0]) or _distinct(ids_S) != len(ids_S):
                raise SignalError(f"{self.source}: shared ids must be pairs, each {side}'s id in one of them only")

    def _check_units(self) -> None:
        inside_N = self.unit_N >= 0
        first_N = self.first_N
        steps_F = torch.bincount((first_N.cumsum(0) - 1)[inside_N], minlength=int(first_N.sum()))
        if _distinct(self.unit_N[first_N]) != len(steps_F):
            raise SignalError(f"{self.source}: the steps of a unit are not neighbours")
        cut_F = steps_F != self.own_N[first_N]
        if bool(cut_F.any()):
            unit = int(cut_F.nonzero()[0])
            here, whole = int(steps_F[unit]), int(self.own_N[first_N][unit])
            raise SignalError(
                f"{self.source}: {here} of a unit's {whole} steps are here; a mask or selection must keep units whole"
            )
        if bool((self.matched_N & ((self.own_N != 1) | (self.theirs_N != 1) | ~inside_N)).any()):
            raise SignalError(f"{self.source}: only units of one token on both sides can be matched")

    @cached_property
    def first_N(self) -> Tensor:
        """The steps that begin a unit, bool [N]."""
        before_N = torch.cat([self.unit_N.new_full((1,), -1), self.unit_N[:-1]])
        return (self.unit_N >= 0) & (self.unit_N != before_N[: len(self.unit_N)])

    @property
    def begins_N(self) -> Tensor:
        return (self.first_N | (self.unit_N < 0)).cpu()

    @property
    def block_width(self) -> int:
        return self.width

    @property
    def offers(self) -> frozenset[NeedKind]:
        return SPAN_KINDS

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> SignalRows:
        return SpanRows(self, index_C)

    def precomputed(self, index_C: slice, vocab: int | None = None) -> Spans:
        """See the base class; the products are computed when they are first read, since not every term reads them."""
        begins_F = self.first_N[index_C].nonzero().squeeze(-1)
        row_C = self.first_N[index_C].cumsum(0) - 1
        held: list[Tensor] = []

        def logits(rows: Tensor | slice) -> Tensor:
            if not held:
                with torch.no_grad():
                    held.append(self.logits(begins_F + index_C.indices(self.steps)[0]))
            return held[0][row_C[rows]]

        taken = self._taken(lambda column_N: column_N[index_C], logits, self.tokens_N.device, checked=True)
        if taken.theirs is None or taken.place_N is None:
            return taken
        return replace(taken, theirs=taken.theirs.held(taken.place_N[taken.first_N], taken.theirs_N[taken.first_N]))

    def select(self, index_N: Tensor) -> Spans:
        def logits(rows: Tensor | slice) -> Tensor:
            return self.logits(index_N[rows])

        return self._taken(lambda column_N: take_rows(column_N, index_N), logits, index_N.device, checked=False)

    def _taken(
        self,
        take: Callable[[Tensor], Tensor],
        logits: Callable[[Tensor | slice], Tensor],
        device: torch.device,
        *,
        checked: bool,
    ) -> Spans:
        """The signal about some of the steps; their units are numbered from 0 in their new order."""
        columns: dict[str, Tensor | None] = {name: self.__dict__[name] for name in ("tokens_N", "valid_N", *_COLUMNS)}
        taken: dict[str, Any] = {
            name: None if column_N is None else take(column_N) for name, column_N in columns.items()
        }
        pairs = {
            name: None if pair is None else (pair[0].to(device), pair[1].to(device))
            for name, pair in (("shared", self.shared), ("stops", self.stops))
        }
        unit_N: Tensor = taken["unit_N"]
        moved_N = unit_N != torch.cat([unit_N.new_full((1,), -2), unit_N[:-1]])[: len(unit_N)]
        taken["unit_N"] = torch.where(unit_N < 0, -1, moved_N.cumsum(0))
        theirs = None if self.theirs is None else self.theirs.to(device)
        return replace(self, logits=logits, checked=checked, theirs=theirs, **taken, **pairs)


class SpanRows(SignalRows):
    """The rows of `Spans` for a block, which holds whole units."""

    by_unit = True

    def __init__(self, signal: Spans, index_C: Tensor | slice) -> None:
        """Takes the steps of a block."""
        self.source = signal.source
        self._signal, self._index_C = signal, index_C

    @property
    def sampled_logp_N(self) -> Tensor:
        """The teacher's log-prob of the whole unit, nats, at every step of it."""
        return self._signal.logp_N[self._index_C]

    @cached_property
    def units(self) -> Units:  # pyright: ignore[reportIncompatibleMethodOverride]
        signal, index_C = self._signal, self._index_C
        first_C, inside_C = signal.first_N[index_C], signal.unit_N[index_C] >= 0
        first_F = first_C.nonzero().squeeze(-1)
        own_F = signal.own_N[index_C][first_F]
        if int(own_F.sum()) != int(inside_C.sum()):
            raise SignalError(f"{self.source}: a block of steps cuts a unit of tokens, which must stay whole")
        raw_N, place_N = signal.raw_N, signal.place_N
        return Units(
            first_F,
            torch.where(inside_C, first_C.cumsum(0) - 1, -1),
            own_F,
            signal.theirs_N[index_C][first_F],
            self.sampled_logp_N[first_F],
            signal.matched_N[index_C][first_F],
            lambda: self._distribution(first_F),
            shared=signal.shared,
            raw_F=None if raw_N is None else raw_N[index_C][first_F],
            stops=signal.stops,
            place_F=None if place_N is None else place_N[index_C][first_F],
            theirs=signal.theirs,
            source=self.source,
        )

    @torch.no_grad()
    def _distribution(self, first_F: Tensor) -> Distribution:
        order_N = torch.arange(self._signal.steps, device=first_F.device)
        begins_F = order_N[self._index_C][first_F]
        logits_FV = as_compute(self._signal.logits(begins_F)[:, : self._signal.width])
        temperature = self._signal.temperature
        return Distribution(logits_FV if temperature == 1.0 else logits_FV / temperature)

    def over_unit(self, values_N: Tensor) -> Tensor:
        return self.units.everywhere(self.units.sum(values_N), values_N)

    def per_step(self, values_N: Tensor) -> Tensor:
        return values_N / self._signal.own_N[self._index_C].clamp_min(1)

    def first_only(self, values_N: Tensor) -> Tensor:
        later_N = (self._signal.unit_N[self._index_C] >= 0) & ~self._signal.first_N[self._index_C]
        return torch.where(later_N, torch.zeros_like(values_N), values_N)


def matched(
    tokens_N: Tensor, teacher_ids_N: Tensor, own_N: Tensor, theirs_N: Tensor, shared: tuple[Tensor, Tensor]
) -> Tensor:
    """The steps whose unit is one token on both sides with a shared pair of ids, bool [N].

    Args:
        tokens_N: The student's ids.
        teacher_ids_N: The teacher's first id of each step's unit; -1 outside of all units.
        own_N: Tokens of the unit on the student's side.
        theirs_N: Tokens of the unit on the teacher's side.
        shared: The student's and the teacher's ids that are the same bytes, [S] each.
    """
    student_S, teacher_S = shared
    if not len(student_S):
        return torch.zeros_like(tokens_N, dtype=torch.bool)
    sorted_S, order_S = student_S.sort()
    place_N = torch.searchsorted(sorted_S, tokens_N).clamp_max(len(sorted_S) - 1)
    partner_N = torch.where(sorted_S[place_N] == tokens_N, teacher_S[order_S][place_N], -1)
    return (own_N == 1) & (theirs_N == 1) & (partner_N == teacher_ids_N) & (partner_N >= 0)


def unit_columns(
    units: Sequence[tuple[slice, slice]],
    tokens_N: Tensor,
    teacher_tokens_M: Tensor,
    teacher_logp_M: Tensor,
    shared: tuple[Tensor, Tensor],
    *,
    teacher_raw_M: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The columns of `Spans` from units, and the index of the teacher token at which each step's unit begins.

    Args:
        units: Slices over the student's N tokens and the teacher's M, in the student's order (`retort.align.spans`).
        tokens_N: The student's ids.
        teacher_tokens_M: The teacher's ids.
        teacher_logp_M: The teacher's log-prob of each of its tokens, nats.
        shared: The student's and the teacher's ids that are the same bytes, [S] each.
        teacher_raw_M: The teacher's logit of each of its tokens, if wanted.

    Returns:
        The columns by name, and [N] indices into M (0 outside of all units).
    """
    device = tokens_N.device
    # A unit that is empty on a side has no step, or nothing to be compared with.
    bounds = [[a.start, a.stop, b.start, b.stop] for a, b in units if a.start < a.stop and b.start < b.stop]
    bounds_F4 = torch.tensor(bounds, dtype=torch.long).reshape(-1, 4).to(device)

    def numbered(tokens: Tensor, start_F: Tensor, stop_F: Tensor) -> Tensor:
        place_I, unit_I = runs(start_F, stop_F - start_F)
        return torch.full_like(tokens, -1).index_copy(0, place_I, unit_I)

    start_F, stop_F, from_F, to_F = bounds_F4.unbind(1)
    unit_N, unit_M = numbered(tokens_N, start_F, stop_F), numbered(teacher_tokens_M, from_F, to_F)
    return columns_of(unit_N, unit_M, tokens_N, teacher_tokens_M, teacher_logp_M, shared, raw_M=teacher_raw_M)


def columns_of(
    unit_N: Tensor,
    unit_M: Tensor,
    tokens_N: Tensor,
    tokens_M: Tensor,
    logp_M: Tensor,
    shared: tuple[Tensor, Tensor],
    *,
    raw_M: Tensor | None = None,
    longest: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The same as `unit_columns`, from the unit of each token on either side.

    Args:
        unit_N: Unit of each of the student's tokens, int64, rising; -1 outside of all units.
        unit_M: Unit of each of the teacher's tokens. Each unit has tokens on both sides.
        tokens_N: The student's ids.
        tokens_M: The teacher's ids.
        logp_M: The teacher's log-prob of each of its tokens, nats.
        shared: The student's and the teacher's ids that are the same bytes, [S] each.
        raw_M: The teacher's logit of each of its tokens, if wanted.
        longest: Most tokens of a unit on either side; longer ones are left out. None: all are kept.
    """
    in_N, in_M = unit_N >= 0, unit_M >= 0
    count = int(unit_N.max()) + 1 if len(unit_N) else 0
    own_F, theirs_F = (
        torch.bincount(unit[inside], minlength=count) for unit, inside in ((unit_N, in_N), (unit_M, in_M))
    )
    begins_F = torch.full_like(own_F, len(unit_M)).scatter_reduce(0, unit_M[in_M], in_M.nonzero().squeeze(-1), "amin")
    if longest is not None:
        kept_F = (own_F <= longest) & (theirs_F <= longest)
        in_N = in_N.clone().masked_scatter(in_N, kept_F[unit_N[in_N]])
    here_I = unit_N[in_N]

    def spread(values_F: Tensor, otherwise: int = 0) -> Tensor:
        return values_F.new_full((len(unit_N),), otherwise).masked_scatter(in_N, values_F[here_I])

    def total(values_M: Tensor) -> Tensor:
        return spread(values_M.new_zeros(count).index_add(0, unit_M[in_M], values_M[in_M]))

    own_N, theirs_N = spread(own_F), spread(theirs_F)
    columns = {
        "unit_N": torch.where(in_N, unit_N, -1),
        "own_N": own_N,
        "theirs_N": theirs_N,
        "logp_N": total(logp_M),
        "matched_N": matched(tokens_N, spread(tokens_M[begins_F], -1), own_N, theirs_N, shared),
    }
    if raw_M is not None:
        columns["raw_N"] = total(raw_M)
    return columns, spread(begins_F)
