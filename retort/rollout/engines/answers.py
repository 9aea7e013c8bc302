"""Completions in an answer of a server that draws with our random numbers. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from retort.align.stops import StopTokens
from retort.core.rollouts import Status
from retort.rollout.engines.base import Completion


def completions(
    found: Mapping[str, Tensor], rooms: Sequence[int], *, vocab: int, stops: StopTokens, version: int
) -> list[Completion]:
    """The completions in some tensors: `ids_T` end to end, `logp_T`, and `lengths_S`.

    Args:
        found: The tensors.
        rooms: The longest completion of each request, tokens.
        vocab: Only ids below this are tokens.
        stops: Tokens that end a completion.
        version: Of the weights that wrote them.

    Raises:
        ValueError: They are no completions of such requests.
    """
    try:
        lengths: list[int] = found["lengths_S"].tolist()
        ids, logps = found["ids_T"].long().split(lengths), found["logp_T"].float().split(lengths)
    except (KeyError, RuntimeError, TypeError):
        raise ValueError("no completions") from None
    usable = len(lengths) == len(rooms) and all(0 < own <= room for own, room in zip(lengths, rooms, strict=False))
    if not usable or bool(((found["ids_T"] < 0) | (found["ids_T"] >= vocab)).any()):
        raise ValueError("no completions")
    if not bool(found["logp_T"].isfinite().all()):
        raise ValueError("no log-probs")
    ends = torch.tensor(sorted(stops.ids))
    return [
        Completion(
            own.tolist(),
            logp_A,
            Status.COMPLETED if bool(torch.isin(own[-1], ends)) else Status.TRUNCATED,
            version,
        )
        for own, logp_A in zip(ids, logps, strict=True)
    ]
