"""Texts that models write before a teacher scores: who wrote what about which rollout. Axis letters: `retort.core`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Passage:
    """One text of one author.

    Attributes:
        of: Name of the kind of text, such as `debate`; see `retort.teachers.drafts.Draft`.
        author: Place of the author among those of that kind, from 0.
        model: Name of the model that wrote it.
        round: The round, from 0.
        text: What it wrote, as it is: hostile to whoever reads it next.
        completed: Whether it ended by itself, and not at the longest length.
        confidence: How sure its author says to be, 0 to 100; None where it says nothing, or is not asked.
        sequence: The sequence of the rollout that it is about; None for all of them.
        authors: Number of authors of that kind, those who wrote nothing included.
    """

    of: str
    author: int
    model: str
    round: int
    text: str
    completed: bool = True
    confidence: float | None = None
    sequence: int | None = None
    authors: int = 1


def confidence_SK(passages: Sequence[Passage], sequences: int) -> Tensor:
    """What each of K authors says last about each sequence of a rollout, 0 to 100, [S, K], float64; NaN for nothing.

    Texts of a kind in which nobody says how sure it is do not count.
    """
    kinds = {own.of for own in passages if own.confidence is not None}
    said = [own for own in passages if own.of in kinds]
    count = max((max(own.authors, 1 + own.author) for own in said), default=0)
    found_SK = torch.full((sequences, count), math.nan, dtype=torch.float64)
    for own in sorted(said, key=lambda passage: passage.round):
        about = slice(None) if own.sequence is None else own.sequence
        found_SK[about, own.author] = math.nan if own.confidence is None else own.confidence
    return found_SK


def confidence_NK(rollouts: Sequence[tuple[Sequence[Passage], Sequence[int]]]) -> Tensor | None:
    """The same at every step of some rollouts, [N, K]; None where nobody said anything.

    Args:
        rollouts: Of each rollout what was written about it, and the number of steps of each of its sequences.
    """
    if not any(own.confidence is not None for passages, _ in rollouts for own in passages):
        return None
    tables = [confidence_SK(passages, len(steps)) for passages, steps in rollouts]
    wide = max(table.shape[1] for table in tables)
    full = [torch.nn.functional.pad(table, (0, wide - table.shape[1]), value=math.nan) for table in tables]
    repeats = [torch.tensor(steps, dtype=torch.long) for _, steps in rollouts]
    return torch.cat([table.repeat_interleave(own, dim=0) for table, own in zip(full, repeats, strict=True)])
