"""The teacher's own tokens behind a signal of spans. Axis letters: see `retort.core`; M, F, V_T as in `Spans`.

I counts any of the M tokens, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from retort.core.distribution import Distribution, as_compute


class PositionInUnit(NamedTuple):
    """Where the teacher stands at a token of the student's.

    Attributes:
        token: Which of the unit's teacher tokens is being written, from 0.
        prefix: The bytes of that token that are already written; none at its beginning.
        beyond: Whether the student's token goes beyond that token; it then ends where the unit does.
    """

    token: int
    prefix: bytes
    beyond: bool


class PrefixTable(Protocol):
    """What the teacher's tokens mean in the student's, by their bytes; `retort.align.prefixes` has it."""

    residual: int

    @property
    def root_V(self) -> Tensor:
        """The student's id that each of the teacher's gives its probability to at a boundary; `residual`: none."""
        ...

    def inside(self, prefix: bytes) -> tuple[Tensor, Tensor]:
        """The teacher's ids that begin with some bytes, and the student's id for what is left of each."""
        ...

    def meaning(self, prefix: bytes, token: int) -> int:
        """The student's id for what is left of one token of the teacher's."""
        ...

    def is_whitespace(self, token: int) -> bool:
        """Whether a token of the student's is whitespace only."""
        ...

    def positions(self, own: Sequence[int], theirs: Sequence[int]) -> list[PositionInUnit | None]:
        """Where the teacher stands at each of the student's tokens of a unit; None: it cannot be compared there."""
        ...


@dataclass(frozen=True, eq=False)
class TeacherTokens:
    """The teacher's tokens of a batch of completions, its log-probs of them, and its logits at each.

    Attributes:
        tokens_M: The teacher's ids, int64.
        logp_M: The teacher's log-prob of each, nats, at the temperature.
        logits: Index of tokens [I] -> the teacher's logits [I, V_T] at each, without gradient.
        width: V_T, the number of ids that the teacher has.
        temperature: The divisor of the logits.
        prefixes: Gives what the teacher's tokens mean in the student's, which takes a second at first; None where that
            is not known.
    """

    tokens_M: Tensor
    logp_M: Tensor
    logits: Callable[[Tensor], Tensor]
    width: int
    temperature: float = 1.0
    prefixes: Callable[[], PrefixTable] | None = None

    @torch.no_grad()
    def distribution(self, index_I: Tensor) -> Distribution:
        """The teacher's distributions at some of its tokens, [I, V_T]."""
        logits_IV = as_compute(self.logits(index_I)[:, : self.width])
        return Distribution(logits_IV if self.temperature == 1.0 else logits_IV / self.temperature)

    def total(self, start_F: Tensor, count_F: Tensor) -> Tensor:
        """Sums of the log-probs of runs of `count_F` tokens from `start_F` on, nats, [F]; a run may be empty."""
        index_I, run_I = runs(start_F, count_F)
        return self.logp_M.new_zeros(len(start_F)).index_add(0, run_I, self.logp_M[index_I])

    def held(self, start_F: Tensor, count_F: Tensor) -> TeacherTokens:
        """The same tokens, with the matrix products of some runs of them computed at once, when one is first read.

        The logits of other tokens cannot be read.
        """
        index_I = _distinct(runs(start_F, count_F)[0])
        found: list[Tensor] = []

        def logits(wanted_I: Tensor) -> Tensor:
            if not found:
                with torch.no_grad():
                    found.append(self.logits(index_I))
            return found[0][torch.searchsorted(index_I, wanted_I)]

        return replace(self, logits=logits)

    def to(self, device: torch.device) -> TeacherTokens:
        """The same on another device."""
        return replace(self, tokens_M=self.tokens_M.to(device), logp_M=self.logp_M.to(device))


def runs(start_F: Tensor, count_F: Tensor) -> tuple[Tensor, Tensor]:
    """All numbers of runs of `count_F` numbers from `start_F` on, and the run of each, [I] both."""
    run_I = torch.repeat_interleave(torch.arange(len(count_F), device=count_F.device), count_F)
    order_I = torch.arange(len(run_I), device=count_F.device)
    return order_I - (count_F.cumsum(0) - count_F - start_F)[run_I], run_I


def _distinct(index_I: Tensor) -> Tensor:
    return torch.unique(index_I)  # pyright: ignore
