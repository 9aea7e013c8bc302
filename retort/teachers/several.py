"""What every combination of teachers has in common. Axis letters: see `retort.core`; T teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from retort.core.chunked import block_rows
from retort.core.needs import DENSE, DISAGREEMENT, Capability, NeedKind, shared
from retort.core.rollouts import Group
from retort.core.signals import Dense, Differing, TeacherSignal, disagreement
from retort.errors import SignalError, UserError
from retort.teachers.base import ScoreRequest, Teacher
from retort.teachers.local import reduced


class SeveralTeachers:
    """Several teachers of one student, as one teacher. A subclass says in `combined` how they are put together.

    They share the student's ids. Where all give whole distributions, so do they together; hidden states they have none.

    Attributes:
        teachers: The teachers by name.
        weights: The weight of each, with sum 1.
        name: Name for messages.
    """

    #: In words, for the name.
    how = "together"
    #: What can be said of them together where one gives no whole distribution, if each says it.
    listed: tuple[NeedKind, ...] = ("sampled", "topk", "logp_at", "entropy", "temperature")

    def __init__(self, teachers: Mapping[str, Teacher], weights: Sequence[float] | None = None) -> None:
        """Puts them together.

        Args:
            teachers: The teachers by name, at least one.
            weights: A weight for each, at least 0; divided by their sum. None: all alike.

        Raises:
            UserError: A weight is missing or no number of at least 0, or all are 0; or a teacher scores latents, and
                they are not put together step by step.
        """
        of_latents = [name for name, own in teachers.items() if "gaussian" in own.capabilities]
        if of_latents and "gaussian" not in self.listed:
            raise UserError(
                f"teachers.combine: {of_latents[0]} scores denoising steps, and of several Gaussians together there is "
                "no Gaussian; use combine = route, by which each prompt has one teacher"
            )
        given = [1.0] * len(teachers) if weights is None else [float(weight) for weight in weights]
        if len(given) != len(teachers) or not all(0 <= weight < math.inf for weight in given) or not sum(given):
            raise UserError(
                f"teachers.weights = {given}: give {len(teachers)} numbers of at least 0, not all 0, one for each of "
                f"{', '.join(teachers)}"
            )
        self.teachers = dict(teachers)
        self.weights = [weight / sum(given) for weight in given]
        self.name = f"{' and '.join(teachers)}, {self.how}"

    @property
    def capabilities(self) -> frozenset[Capability]:
        """See `Teacher`."""
        each = [teacher.capabilities for teacher in self.teachers.values()]
        if all("dense" in own for own in each):
            return frozenset({"dense", "disagreement"})
        return shared(each, self.listed)

    def of(self, teachers: Mapping[str, Teacher]) -> Self:
        """Others under the same names, put together in the same way."""
        made = copy(self)
        made.teachers = {name: teachers[name] for name in self.teachers}
        return made

    def score(self, groups: Sequence[Group], request: ScoreRequest) -> TeacherSignal:
        """See `Teacher`. Where their disagreement is asked for, every teacher scores every rollout."""
        asked = replace(request, needs=request.needs - {DISAGREEMENT})
        if DISAGREEMENT not in request.needs:
            return self.combined(groups, asked)
        signals = {name: self.whole(name, groups, request) for name in self.teachers}
        rows = block_rows(
            max(signal.width for signal in signals.values()), signals[next(iter(signals))].tokens_N.device
        )
        alike = [1.0 / len(signals)] * len(signals)
        far_N, _ = disagreement(list(signals.values()), alike, rows)
        found = self.combined(groups, asked, signals)
        return Differing.beside(found, far_N.to(found.tokens_N.device))

    def combined(
        self, groups: Sequence[Group], request: ScoreRequest, known: Mapping[str, Dense] | None = None
    ) -> TeacherSignal:
        """What they say together.

        Args:
            groups: As in `score`.
            request: As in `score`, without the need for their disagreement.
            known: The whole distribution of each, where they were asked already.
        """
        raise NotImplementedError

    def whole(self, name: str, groups: Sequence[Group], request: ScoreRequest) -> Dense:
        """The whole distribution of one teacher.

        Raises:
            SignalError: It gave another signal.
        """
        asked = replace(request, needs=frozenset({DENSE}), student_ids_NK=None)
        found = self.teachers[name].score(groups, asked)
        if not isinstance(found, Dense):
            raise SignalError(f"{name}: was asked for its whole distribution, and gave {type(found).__name__}")
        return found


def as_asked(signal: TeacherSignal, request: ScoreRequest) -> TeacherSignal:
    """A whole distribution as it was asked for: itself, or what is needed of it."""
    if request.whole or not isinstance(signal, Dense):
        return signal
    return reduced(signal, request.needs, request.student_ids_NK)


def spoken(names: Sequence[str], fractions_NT: Tensor, valid_N: Tensor | None) -> dict[str, float]:
    """Counts of the steps at which each teacher spoke, see `TeacherSignal.counts`.

    Args:
        names: The teachers.
        fractions_NT: The share of each in a step.
        valid_N: The steps that count; None: all.
    """
    counted_NT = fractions_NT if valid_N is None else fractions_NT[valid_N.to(fractions_NT.device)]
    return {f"spoke/{name}": total for name, total in zip(names, counted_NT.double().sum(0).tolist(), strict=True)}


def one_of(teacher_N: Tensor, teachers: int) -> Tensor:
    """Shares [N, T] where a single teacher speaks at each step."""
    return torch.nn.functional.one_hot(teacher_N, teachers).float()
