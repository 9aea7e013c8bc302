"""All tokens of a rollout and their action mask, as one value. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Media:
    """An image, a sound or a video in a sequence.

    Attributes:
        digest: Digest of its content: two with the same digest are the same.
        position: Index in L of the first of the tokens that stand for it.
        length: Number of these neighbouring tokens.
        payload: The content: of an image, a `retort.core.images.PromptImage`. It is never saved.
    """

    digest: str
    position: int
    length: int = 1
    payload: Any = field(default=None, compare=False, repr=False)

    def moved(self, by: int) -> Media:
        """The same, `by` tokens further on."""
        return replace(self, position=self.position + by)


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens, their action mask, and the media among them.

    A conversation of several turns is one sequence: prompt, completion, reply of the environment, completion. Nobody
    splits it into prompt and completion: to put another prompt in front call `with_prefix`, to shorten it call `cut`.

    Attributes:
        tokens_L: Ids of all tokens in order, int64.
        action_mask_L: True where the token was decided (by the student, a teacher or the data), bool.
        media: The media that placeholder tokens stand for, in order of position.

    Raises:
        ValueError: Tensors of different lengths, or a first token that is decided.

    Example:
        >>> from retort.core.sequences import TokenSequence
        >>> asked = TokenSequence.of([5, 6]).then([7, 8], decided=True).then([9]).then([10], decided=True)
        >>> asked.with_prefix(TokenSequence.of([1])).tokens_L.tolist()
        [1, 7, 8, 9, 10]
        >>> asked.cut(2).tokens_L.tolist()
        [5, 6, 7, 8]
    """

    tokens_L: Tensor
    action_mask_L: Tensor
    media: tuple[Media, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens_L.shape != self.action_mask_L.shape or self.tokens_L.ndim != 1:
            shapes = f"tokens_L {tuple(self.tokens_L.shape)} and action_mask_L {tuple(self.action_mask_L.shape)}"
            raise ValueError(f"{shapes} differ")
        if bool(self.action_mask_L[:1].any()):
            raise ValueError("the first token of a sequence has no context to be decided from; it cannot be an action")

    @staticmethod
    def of(ids: Sequence[int], media: tuple[Media, ...] = ()) -> TokenSequence:
        """A context: tokens of which none is decided."""
        tokens_L = torch.tensor(ids, dtype=torch.long)
        return TokenSequence(tokens_L, torch.zeros(len(tokens_L), dtype=torch.bool), media)

    def __len__(self) -> int:
        """L, the number of tokens."""
        return len(self.tokens_L)

    @property
    def ids(self) -> list[int]:
        """Ids of all tokens, in order."""
        return self.tokens_L.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    @cached_property
    def steps(self) -> int:
        """Number of decisions, A."""
        return int(self.action_mask_L.sum())

    @cached_property
    def start(self) -> int:
        """Index of the first decision; L where there is none."""
        decided = self.action_mask_L.nonzero()
        return int(decided[0]) if len(decided) else len(self)

    @property
    def end(self) -> int:
        """Index behind the last decision; 0 where there is none."""
        decided = self.action_mask_L.nonzero()
        return int(decided[-1]) + 1 if len(decided) else 0

    @property
    def prefix(self) -> TokenSequence:
        """The tokens before the first decision."""
        return self.part(0, self.start)

    @property
    def continuation(self) -> TokenSequence:
        """The tokens from the first decision on, the environment's replies included; no valid sequence by itself."""
        return self.part(self.start, len(self))

    @property
    def actions_A(self) -> Tensor:
        """Ids of the decided tokens, [A]."""
        return self.tokens_L[self.action_mask_L]

    @property
    def key(self) -> tuple[bytes, tuple[tuple[str, int], ...]]:
        """The identity of a sequence to a model: its tokens, and its media with their positions."""
        return self.tokens_L.numpy().tobytes(), tuple((own.digest, own.position) for own in self.media)

    @property
    def prefix_key(self) -> tuple[bytes, tuple[tuple[str, int], ...]]:
        """The identity of the prefix, which sequences with the same one may compute once; see `key`."""
        return self.prefix.key

    def then(self, ids: Sequence[int], *, decided: bool = False, media: tuple[Media, ...] = ()) -> TokenSequence:
        """The sequence followed by tokens: an action, or tokens that are only read.

        Args:
            ids: Ids that follow.
            decided: Whether they are decisions.
            media: Media among them; positions count from the first of `ids`.
        """
        more_L = torch.tensor(ids, dtype=torch.long)
        mask_L = torch.full((len(more_L),), decided)
        return TokenSequence(
            torch.cat([self.tokens_L, more_L]),
            torch.cat([self.action_mask_L, mask_L]),
            (*self.media, *(own.moved(len(self)) for own in media)),
        )

    def with_prefix(self, prefix: TokenSequence) -> TokenSequence:
        """The same decisions, and all that was read between them, after another context."""
        by = len(prefix) - self.start
        later = tuple(own.moved(by) for own in self.media if own.position >= self.start)
        return TokenSequence(
            torch.cat([prefix.tokens_L, self.tokens_L[self.start :]]),
            torch.cat([prefix.action_mask_L, self.action_mask_L[self.start :]]),
            (*prefix.media, *later),
        )

    def cut(self, steps: int) -> TokenSequence:
        """The sequence up to its first `steps` decisions, without the tokens after the last of them.

        A sequence with no more decisions than that stays as it is.
        """
        if self.steps <= steps:
            return self
        last = self.action_mask_L.nonzero()[steps - 1] if steps else self.start - 1
        return self.part(0, int(last) + 1)

    def before(self, step: int) -> TokenSequence:
        """The context of a decision: everything before it, the environment's last reply included.

        Args:
            step: Index of the decision, from 0, below `steps`.
        """
        return self.part(0, int(self.action_mask_L.nonzero()[step]))

    def read(self) -> TokenSequence:
        """The same tokens, none of them decided: a context to continue."""
        return replace(self, action_mask_L=torch.zeros_like(self.action_mask_L))

    def pieces(self) -> list[TokenSequence]:
        """Runs of neighbours that are all decided, or all read, in order; a decided run is not a valid sequence."""
        changes = (self.action_mask_L[1:] != self.action_mask_L[:-1]).nonzero().flatten() + 1
        bounds = [0, *(int(position) for position in changes), len(self)]
        return [self.part(start, end) for start, end in pairwise(bounds) if end > start]

    def mapped(self, swap: Mapping[int, int]) -> TokenSequence:
        """The sequence with some decided ids replaced by others."""
        if not swap:
            return self
        tokens_L = self.tokens_L.clone()
        for here, there in swap.items():
            tokens_L[(self.tokens_L == here) & self.action_mask_L] = there
        return replace(self, tokens_L=tokens_L)

    def part(self, start: int, end: int) -> TokenSequence:
        """Neighbouring tokens, with the media among them.

        Raises:
            ValueError: It would cut the tokens of an image in two.
        """
        within = [own for own in self.media if own.position < end and own.position + own.length > start]
        if any(own.position < start or own.position + own.length > end for own in within):
            raise ValueError(f"tokens {start} to {end} cut the tokens of an image in two")
        media = tuple(own.moved(-start) for own in within)
        found = object.__new__(TokenSequence)  # a continuation begins with a decision, which no whole sequence does
        for name, value in (
            ("tokens_L", self.tokens_L[start:end]),
            ("action_mask_L", self.action_mask_L[start:end]),
            ("media", media),
        ):
            object.__setattr__(found, name, value)
        return found
