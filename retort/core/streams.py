"""Named random streams, keyed and not advanced: drawing from one never moves another, and nothing needs rewinding.

A draw depends only on the seed, the stream's name and the key (say, the prompt and the member), never on how many
draws came before or in which order. So a resumed run continues exactly, and evaluating in the middle of a run changes
nothing.
"""

# pyright: basic
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Stream = Literal[
    "data",
    "rollouts",
    "evaluation",
    "precision",
    "mixture",
    "holdout",
    "record",
    "teacher",
    "replay",
    "difficulty",
    "probe",
    "controllers",
    "views",
    "adapter",
    "balance",
]


def key(seed: int, stream: Stream, *parts: str | int) -> int:
    """A 63-bit number for a draw."""
    text = "\x1f".join([str(seed), stream, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: Stream, *parts: str | int) -> torch.Generator:
    """A CPU generator for the draws of one key."""
    return torch.Generator().manual_seed(key(seed, stream, *parts))


def uniforms(seed: int, stream: Stream, *parts: str | int, count: int) -> Tensor:
    """`count` numbers in [0, 1), float64."""
    return torch.rand(count, generator=generator(seed, stream, *parts), dtype=torch.float64)


@dataclass(frozen=True, init=False)
class Chance:
    """The numbers of an episode: of its first turn under the key alone, of later ones under the key and the turn.

    Attributes:
        seed: Of the run.
        stream: Its name.
        parts: The key: say, the prompt and the member.
    """

    seed: int
    stream: Stream
    parts: tuple[str | int, ...]

    def __init__(self, seed: int, stream: Stream, *parts: str | int) -> None:
        """Draws nothing yet."""
        for name, value in (("seed", seed), ("stream", stream), ("parts", parts)):
            object.__setattr__(self, name, value)

    def uniforms(self, turn: int, *, count: int) -> Tensor:
        """`count` numbers in [0, 1), float64; more of them begin with fewer of them."""
        return uniforms(self.seed, self.stream, *self.parts, *(("turn", turn) if turn else ()), count=count)


def permutation(seed: int, stream: Stream, *parts: str | int, count: int) -> list[int]:
    """A shuffled range."""
    return torch.randperm(count, generator=generator(seed, stream, *parts)).tolist()
