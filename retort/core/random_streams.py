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
    "environment",
    "chat",
    "passages",
    "acceptance",
]


def key(seed: int, stream: Stream, *parts: str | int) -> int:
    """A 63-bit number for a draw, from seed, stream and key."""
    text = "\x1f".join([str(seed), stream, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: Stream, *parts: str | int) -> torch.Generator:
    """A CPU generator for the draws of one key."""
    return torch.Generator().manual_seed(key(seed, stream, *parts))


def uniforms(seed: int, stream: Stream, *parts: str | int, count: int) -> Tensor:
    """`count` uniform random numbers in [0, 1), float64."""
    return torch.rand(count, generator=generator(seed, stream, *parts), dtype=torch.float64)


@dataclass(frozen=True, init=False)
class UniformStream:
    """The uniform random numbers of an episode: of its first turn under the key, of later ones under key and turn.

    Attributes:
        seed: The run's seed.
        stream: Name of the stream.
        parts: The key: say, the prompt and the member.
    """

    seed: int
    stream: Stream
    parts: tuple[str | int, ...]

    def __init__(self, seed: int, stream: Stream, *parts: str | int) -> None:
        """Stores the key; it draws nothing yet."""
        for name, value in (("seed", seed), ("stream", stream), ("parts", parts)):
            object.__setattr__(self, name, value)

    def uniforms(self, turn: int, *, count: int) -> Tensor:
        """`count` uniform random numbers in [0, 1), float64; a longer draw begins with the shorter one."""
        return uniforms(self.seed, self.stream, *self.parts, *(("turn", turn) if turn else ()), count=count)


def permutation(seed: int, stream: Stream, *parts: str | int, count: int) -> list[int]:
    """A random permutation of `range(count)`."""
    return torch.randperm(count, generator=generator(seed, stream, *parts)).tolist()
