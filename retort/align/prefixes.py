"""What the teacher's tokens mean in the student's, by their first bytes: a property of two vocabularies.

Axis letters: V_S and V_T the ids of student and teacher, I some of the teacher's ids.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from retort.core.signals import PlaceInUnit
from retort.errors import UserError

__all__ = ["Prefixes"]

#: Prefixes whose teacher tokens are remembered; one that is a single blank of a large vocabulary has 2 MB.
_REMEMBERED = 4096


class Prefixes:
    """The student's longest token that each of the teacher's begins with, at a boundary and inside of a token.

    The teacher's probability of a token is that of its bytes. The student would write the longest of its tokens that
    those bytes begin with, so this is the token that is given the probability. Of two tokens of the student's with the
    same bytes the lower id stands for both. It takes a second for a vocabulary of 262,000 tokens, and some tens of MB.

    Attributes:
        student: The bytes of each of the student's ids, V_S; empty for those that spell no text.
        teacher: The bytes of each of the teacher's ids, V_T.
        residual: V_S, which stands for: none of the student's tokens.
    """

    def __init__(
        self,
        student: Sequence[bytes],
        teacher: Sequence[bytes],
        shared: tuple[Tensor, Tensor],
        stops: tuple[Tensor, Tensor] | None = None,
        *,
        whole: bool = True,
    ) -> None:
        """Takes what is known of both vocabularies.

        Args:
            student: The bytes of each of the student's ids.
            teacher: The bytes of each of the teacher's ids.
            shared: Pairs of ids that mean the same, [S] each. They go before what the bytes say.
            stops: Ids that end a completion, the student's and the teacher's. Every stop of the teacher's that is not
                in a pair means that of the student's which is in a pair of stops.
            whole: Whether the bytes of all ids are given; else only of some, which is enough at boundaries where every
                id of the teacher's is shared.
        """
        self._whole = whole
        self.student, self.teacher = student, teacher
        self.residual = len(student)
        self._own: dict[bytes, int] = {}
        for token in range(len(student) - 1, -1, -1):
            if student[token]:
                self._own[student[token]] = token
        self._longest = max(map(len, self._own), default=0)
        self._shared, self._stops = shared, stops
        self._inside: dict[bytes, tuple[Tensor, Tensor]] = {}

    @property
    def root_V(self) -> Tensor:
        """The student's id that each of the teacher's gives its probability to at a boundary, int64 [V_T]."""
        return self._root_V

    @cached_property
    def _root_V(self) -> Tensor:
        root_V = torch.tensor([self._longest_in(piece) for piece in self.teacher], dtype=torch.long)
        own_S, their_S = (ids.cpu() for ids in self._shared)
        root_V[their_S] = own_S
        if self._stops is not None:
            own_E, their_E = (ids.cpu() for ids in self._stops)
            pairs = torch.isin(own_S, own_E) & torch.isin(their_S, their_E)
            alone_E = their_E[~torch.isin(their_E, their_S)]
            root_V[alone_E] = int(own_S[pairs][0]) if bool(pairs.any()) else self.residual
        return root_V

    def inside(self, prefix: bytes) -> tuple[Tensor, Tensor]:
        """The teacher's tokens that begin with some bytes that are already written, and what the rest of each means.

        Args:
            prefix: The bytes, at least one.

        Returns:
            The teacher's ids and the student's id for each (`residual`: none, or nothing is left of it), int64 [I].

        Raises:
            UserError: The bytes of some ids are not known.
        """
        if not self._whole:
            raise UserError(
                "a token of the student's begins inside of one of the teacher's, so the bytes of every token are read: "
                "give vocabularies=(the student's, the teacher's)"
            )
        if prefix not in self._inside:
            if len(self._inside) >= _REMEMBERED:
                self._inside.clear()
            pieces, ids = self._sorted
            first = bisect_left(pieces, prefix)
            # No byte is above 0xFF, so all that begin with the prefix are below this.
            last = bisect_right(pieces, prefix + b"\xff" * (self._longest_teacher + 1))
            found = ids[first:last]
            meant = [self._longest_in(piece[len(prefix) :]) for piece in pieces[first:last]]
            self._inside[prefix] = (torch.tensor(found, dtype=torch.long), torch.tensor(meant, dtype=torch.long))
        return self._inside[prefix]

    def meaning(self, prefix: bytes, token: int) -> int:
        """The student's id for what is left of a token of the teacher's behind some bytes, or `residual`."""
        return self._longest_in(self.teacher[token][len(prefix) :]) if prefix else int(self.root_V[token])

    def is_whitespace(self, token: int) -> bool:
        """Whether a token of the student's is whitespace only."""
        return self.student[token].isspace()

    def places(self, own: Sequence[int], theirs: Sequence[int]) -> list[PlaceInUnit | None]:
        """Where the teacher stands at each of the student's tokens of a unit; None: it cannot be compared there.

        That is so at a token that spells nothing, at one that ends inside of a later token of the teacher's, and at all
        tokens of a unit whose two sides are not the same bytes, because a tokenizer normalises.

        Args:
            own: The student's ids.
            theirs: The teacher's ids.
        """
        ours, others = [self.student[token] for token in own], [self.teacher[token] for token in theirs]
        text = b"".join(ours)
        if text != b"".join(others):
            return [None] * len(own)
        ends, their_ends = (list(accumulate(map(len, side))) for side in (ours, others))
        found: list[PlaceInUnit | None] = []
        for piece, end in zip(ours, ends, strict=True):
            begin = end - len(piece)
            at = bisect_right(their_ends, begin)  # the first that ends behind the beginning
            if not piece or (end > their_ends[at] and end < len(text)):
                found.append(None)
            else:
                found.append(PlaceInUnit(at, text[their_ends[at] - len(others[at]) : begin], end > their_ends[at]))
        return found

    def _longest_in(self, text: bytes) -> int:
        for length in range(min(len(text), self._longest), 0, -1):
            token = self._own.get(text[:length])
            if token is not None:
                return token
        return self.residual

    @cached_property
    def _sorted(self) -> tuple[list[bytes], list[int]]:
        order = sorted((piece, token) for token, piece in enumerate(self.teacher) if piece)
        return [piece for piece, _ in order], [token for _, token in order]

    @cached_property
    def _longest_teacher(self) -> int:
        return max(map(len, self.teacher), default=0)
