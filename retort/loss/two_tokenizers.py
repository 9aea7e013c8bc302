"""A caller's batch of two models with two tokenizers, as a signal of spans. Axis letters: see `retort.core`.

M counts the teacher's tokens as N counts the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from retort.align.prefixes import Prefixes
from retort.align.spans import Mode, units
from retort.core.distribution import Distribution
from retort.core.reduce import constant
from retort.core.signals import Spans, TeacherTokens, as_compute, unit_columns
from retort.errors import UserError
from retort.method import Method


@dataclass(frozen=True, eq=False)
class TwoTokenizations:
    """Completions in the student's tokens and in the teacher's, as `cross_token_losses` takes them; see there.

    Attributes:
        tokens: Ids of either side, [N] and [M].
        pieces: The bytes of each of these tokens.
        rollouts: Rollout of each token.
        shared: The student's and the teacher's ids that are the same bytes, [S] each.
        stops: Ids that end a completion, the student's and the teacher's; None where not given.
        segmentation: The mode of `retort.align.spans.units`.
        vocabularies: The bytes of each id of either side; None where not given.
    """

    tokens: tuple[Tensor, Tensor]
    pieces: tuple[Sequence[bytes], Sequence[bytes]]
    rollouts: tuple[Tensor, Tensor]
    shared: tuple[Tensor, Tensor]
    stops: tuple[Tensor, Tensor] | None
    segmentation: Mode
    vocabularies: tuple[Sequence[bytes], Sequence[bytes]] | None = None

    @staticmethod
    def of(
        tokens: tuple[Tensor, Tensor],
        pieces: tuple[Sequence[bytes], Sequence[bytes]],
        rollouts: tuple[Tensor | None, Tensor | None],
        shared: Sequence[tuple[int, int]],
        stops: tuple[Sequence[int], Sequence[int]] | None,
        segmentation: Mode,
        vocabularies: tuple[Sequence[bytes], Sequence[bytes]] | None = None,
    ) -> TwoTokenizations:
        """Builds it, and checks that all is about the same tokens.

        Raises:
            UserError: Shapes that do not fit, or rollouts given for one side only.
        """
        if (rollouts[0] is None) != (rollouts[1] is None):
            raise UserError("give student_rollouts and teacher_rollouts, or neither")
        for side, ids, bytes_, numbers in zip(("student", "teacher"), tokens, pieces, rollouts, strict=True):
            if ids.ndim != 1 or ids.is_floating_point():
                raise UserError(f"{side}_tokens must be integers in one dimension, not {tuple(ids.shape)} {ids.dtype}")
            if len(bytes_) != len(ids):
                raise UserError(f"{side}_pieces has {len(bytes_)} pieces for {len(ids)} tokens; give one per token")
            if numbers is not None and numbers.shape != ids.shape:
                raise UserError(f"{side}_rollouts must be {tuple(ids.shape)}, not {tuple(numbers.shape)}")
        numbers = tuple(torch.zeros_like(ids) if r is None else r for ids, r in zip(tokens, rollouts, strict=True))
        device = tokens[0].device
        pairs = torch.tensor([[int(one) for one in pair] for pair in shared], dtype=torch.long, device=device)
        own_S, their_S = pairs.reshape(-1, 2).unbind(1)
        ends = None if stops is None else (_ids(stops[0], device), _ids(stops[1], device))
        both = numbers[0], numbers[1]
        return TwoTokenizations(tokens, pieces, both, (own_S, their_S), ends, segmentation, vocabularies)

    def spans(self, teacher_logits: Tensor, temperature: float, vocab: int) -> Spans:
        """The teacher's signal, from its logits [M, V_T].

        Args:
            teacher_logits: The logits.
            temperature: Their divisor.
            vocab: V_S, the number of ids that the student has.

        Raises:
            UserError: Logits that do not fit, or bytes of a rollout that differ between the two sides.
        """
        (own_N, their_M), (own_S, their_S) = self.tokens, self.shared
        if teacher_logits.ndim != 2 or len(teacher_logits) != len(their_M):
            shape = tuple(teacher_logits.shape)
            raise UserError(f"teacher_logits must have one row per teacher token ({len(their_M)}), not {shape}")
        width = teacher_logits.shape[1]
        for name, ids in (("teacher_tokens", their_M), ("shared", their_S)):
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < width:
                raise UserError(f"{name} hold ids outside the teacher's vocabulary of {width}")
        whole_MV = as_compute(teacher_logits.detach()) / temperature
        taken_M = Distribution(whole_MV).logp_at(their_M[:, None]).squeeze(-1)
        raw_M = whole_MV.gather(-1, their_M[:, None]).squeeze(-1)
        columns, from_N = unit_columns(self.units(), own_N, their_M, taken_M, (own_S, their_S), teacher_raw_M=raw_M)
        prefixes = cache(lambda: self.prefixes((vocab, width)))
        return Spans(
            own_N,
            "teacher",
            lambda rows: whole_MV[from_N[rows]],
            width,
            shared=(own_S, their_S),
            stops=self.stops,
            place_N=from_N,
            theirs=TeacherTokens(their_M, taken_M, lambda index: whole_MV[index], width, prefixes=prefixes),
            **columns,  # pyright: ignore[reportArgumentType]
        )

    def prefixes(self, widths: tuple[int, int]) -> Prefixes:
        """What the teacher's tokens mean in the student's.

        Args:
            widths: V_S and V_T.

        Raises:
            UserError: The bytes of all ids are needed and not given, or are not as many as the ids.
        """
        if self.vocabularies is None:
            if len(self.shared[1]) < widths[1]:
                raise UserError(
                    "this method reads the bytes of every token: give vocabularies=(the student's, the teacher's), the "
                    "bytes of each id, b'' for control tokens"
                )
            # All of the teacher's ids are the student's, so only the written tokens are ever spelt.
            ours, theirs = ([b""] * width for width in widths)
            for known, ids, spelt in zip((ours, theirs), self.tokens, self.pieces, strict=True):
                for token, piece in zip(ids.tolist(), spelt, strict=True):
                    known[token] = piece
            return Prefixes(ours, theirs, self.shared, self.stops, whole=False)
        for side, known, width in zip(("student", "teacher"), self.vocabularies, widths, strict=True):
            if len(known) != width:
                raise UserError(f"vocabularies have the bytes of {len(known)} {side}'s ids, of which there are {width}")
        return Prefixes(*self.vocabularies, self.shared, self.stops)

    def units(self) -> list[tuple[slice, slice]]:
        """The units of all rollouts, as slices of all tokens of either side."""
        found: list[tuple[slice, slice]] = []
        ours, theirs = (_runs(numbers) for numbers in self.rollouts)
        for rollout, own in ours.items():
            other = theirs.get(rollout)
            if other is None:
                continue
            for a, b in units(self.pieces[0][own], self.pieces[1][other], self.segmentation):
                found.append((_moved(a, own.start), _moved(b, other.start)))
        return found

    def divided(self, method: Method) -> Method:
        """The method with every term divided by the mean of both sides' token counts."""
        mean = (len(self.tokens[0]) + len(self.tokens[1])) / 2
        terms = tuple(replace(term, denominator=constant(max(mean, 1.0))) for term in method.terms)
        return replace(method, terms=terms)


def _ids(given: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([int(one) for one in given], dtype=torch.long, device=device)


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _runs(numbers: Tensor) -> dict[int, slice]:
    """The tokens of each rollout, in order of their appearance.

    Raises:
        UserError: The tokens of a rollout are not neighbours.
    """
    found: dict[int, slice] = {}
    last: int | None = None
    for index, rollout in enumerate(numbers.tolist()):
        if rollout == last:
            found[rollout] = slice(found[rollout].start, index + 1)
        elif rollout in found:
            raise UserError(f"the tokens of rollout {rollout} are not neighbours; give one rollout after the other")
        else:
            found[rollout] = slice(index, index + 1)
        last = rollout
    return found
