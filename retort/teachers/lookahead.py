"""A look one token ahead: a teacher reads each of the student's candidates, and says how sure it is then.

Axis letters: see `retort.core`; B branches, which are a step and a candidate each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retort.align.pair import Alignment
from retort.core.per_token import in_blocks
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense
from retort.errors import SignalError


def branch(sequence: TokenSequence, step: int, candidate: int) -> TokenSequence:
    """Everything before a decision, the candidate in its place, and one token more, whose scores are looked for.

    Only these two are decisions, so that all branches of a step begin with one prompt, which a model computes once.
    """
    return sequence.before(step).read().then([candidate, candidate], decided=True)


def look_ahead(
    sequences: Sequence[TokenSequence],
    ids_NK: Tensor,
    chosen_N: Tensor,
    states: Callable[[Sequence[TokenSequence]], Tensor],
    dense: Callable[[Tensor, Tensor], Dense],
    longest: int,
) -> Tensor:
    """The largest probability after each of some candidates, [N, K], on the CPU; NaN where nothing was looked at.

    Args:
        sequences: What the teacher reads, in its own ids, with N decisions in all.
        ids_NK: The candidates at every step, in the teacher's ids; below 0 where it has none.
        chosen_N: The steps to look at, bool.
        states: Gives the teacher's hidden states at the decisions of sequences, end to end.
        dense: (tokens [B], hidden states [B, D]) -> the whole distribution there.
        longest: Tokens of the longest sequence that the teacher reads; longer branches are left out.
    """
    steps = [(own, step) for own in sequences for step in range(own.steps)]
    places, branches = list[tuple[int, int]](), list[TokenSequence]()
    for place in chosen_N.nonzero().flatten().tolist():  # pyright: ignore[reportUnknownVariableType]
        own, step = steps[int(place)]
        for column, candidate in enumerate(ids_NK[int(place)].tolist()):  # pyright: ignore
            made = branch(own, step, int(candidate)) if candidate >= 0 else None
            if made is not None and len(made) - 1 <= longest:
                places.append((int(place), column))
                branches.append(made)
    if not branches:
        return torch.full(ids_NK.shape, math.nan)
    hidden_BD = states(branches)[1::2]  # each branch has two decisions, of which the first is the candidate itself
    signal = dense(torch.zeros(len(branches), dtype=torch.long), hidden_BD)
    sure_B = torch.cat([rows.topk(1)[1].exp().squeeze(-1).cpu() for rows in in_blocks(signal, signal.width)])
    found_NK, index = torch.full(ids_NK.shape, math.nan, dtype=sure_B.dtype), torch.tensor(places)
    found_NK[index[:, 0], index[:, 1]] = sure_B.clamp_max(1.0)
    return found_NK


def their_ids(alignment: Alignment, ids_NK: Tensor) -> Tensor:
    """A teacher's ids for the student's, [N, K]; -1 where it has none."""
    unique, place_NK = ids_NK.unique(return_inverse=True)  # pyright: ignore

    def read(ids: list[int]) -> list[int]:
        return alignment.read(TokenSequence.of(ids[:1]).then(ids, decided=True)).ids[1:]

    every: list[int] = unique.tolist()
    try:
        found = read(every) if every else []
    except SignalError:
        found = [_or_none(read, own) for own in every]
    return torch.tensor(found, dtype=torch.long)[place_NK]


def _or_none(read: Callable[[list[int]], list[int]], own: int) -> int:
    try:
        return read([own])[0]
    except SignalError:
        return -1
