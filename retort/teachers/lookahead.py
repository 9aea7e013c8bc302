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
from retort.models.branches import Fork

#: (sequences, the forks of each) -> the hidden state after each candidate, [B, D].
States = Callable[[Sequence[TokenSequence], Sequence[Sequence[Fork]]], Tensor]


def look_ahead(
    sequences: Sequence[TokenSequence],
    ids_NK: Tensor,
    chosen_N: Tensor,
    states: States,
    dense: Callable[[Tensor, Tensor], Dense],
    longest: int,
) -> Tensor:
    """The largest probability after each of some candidates, [N, K], on the CPU; NaN where nothing was looked at.

    Args:
        sequences: What the teacher reads, in its own ids, with N decisions in all.
        ids_NK: The candidates at every step, in the teacher's ids; below 0 where it has none.
        chosen_N: The steps to look at, bool.
        states: Reads the branches.
        dense: (tokens [B], hidden states [B, D]) -> the whole distribution there.
        longest: Tokens of the longest sequence that the teacher reads; longer branches are left out.
    """
    looked_NK = chosen_N[:, None] & (ids_NK >= 0)
    forks: list[list[Fork]] = []
    place = 0
    for own in sequences:
        there: list[Fork] = []
        for at in _decisions(own):
            if at >= longest:
                looked_NK[place] = False
            elif bool(looked_NK[place].any()):
                there.append(Fork(at, tuple(ids_NK[place][looked_NK[place]].tolist())))
            place += 1
        forks.append(there)
    hidden_BD = states(sequences, forks)
    found_NK = torch.full(ids_NK.shape, math.nan, dtype=torch.float64)
    if len(hidden_BD):
        signal = dense(torch.zeros(len(hidden_BD), dtype=torch.long), hidden_BD)
        sure_B = torch.cat([rows.topk(1)[1].exp().squeeze(-1).cpu() for rows in in_blocks(signal, signal.width)])
        found_NK[looked_NK] = sure_B.double().clamp_max(1.0)
    return found_NK


def _decisions(sequence: TokenSequence) -> list[int]:
    """The places in L of what was decided."""
    return sequence.action_mask_L.nonzero().flatten().tolist()  # pyright: ignore


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
