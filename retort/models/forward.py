"""Passes of a `LanguageModel` over sequences: alone (the definition), padded, or packed. Axes: `retort.core`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from retort.core.sequences import TokenSequence

if TYPE_CHECKING:
    from retort.models.packing import Row
    from retort.models.vision import Placed


def alone(lm: Any, sequences: Sequence[TokenSequence]) -> Tensor:
    """Hidden states [N, D] of the decided tokens, every sequence alone and no longer than its last decision needs."""
    found: list[Tensor] = []
    for sequence in sequences:
        end = max(sequence.end - 1, 1)
        read = _read(sequence, end)
        with lm.compute():
            if lm.vision is None or not read.media:
                ids_1L = read.tokens_L[None].to(lm.device)
                hidden_LD = lm.model.base_model(input_ids=ids_1L, use_cache=False).last_hidden_state[0]
            else:
                with lm.offload.kept(), lm.vision.own_inputs(read) as inputs:
                    hidden_LD = lm.model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        found.append(hidden_LD[sequence.action_mask_L[1 : end + 1].to(lm.device)])
    return torch.cat(found)


def padded(lm: Any, sequences: Sequence[TokenSequence]) -> Tensor:
    """The same, in rows of equal length."""
    # Padding is on the right and attention is causal, so no padding is ever attended to by a real token.
    ids_RL = pad_sequence([own.tokens_L for own in sequences], batch_first=True).to(lm.device)
    mask_RL = pad_sequence([own.action_mask_L for own in sequences], batch_first=True).to(lm.device)
    placed, position = list[Any](), None
    if lm.vision is not None and any(own.media for own in sequences):
        from retort.models.vision import placed_in

        placed = placed_in(sequences)
        counted = [lm.vision.positions(own) for own in sequences]
        if counted[0] is not None:
            rows = [own.T for own in counted if own is not None]
            position = pad_sequence(rows, batch_first=True).permute(2, 0, 1)
    with lm.compute():
        hidden_RLD = _states(lm, ids_RL, placed, position)
    return hidden_RLD[:, :-1][mask_RL[:, 1:]]


def packed(lm: Any, sequences: Sequence[TokenSequence]) -> Tensor:
    """The same, end to end in one row."""
    from retort.models.packing import Row  # loads transformers
    from retort.models.packing import packed as given_to_layers

    row = Row.of(sequences, share=lm.shared_prefixes, device=lm.device)
    placed, position = list[Any](), row.position_T[None]
    if lm.vision is not None and any(own.media for own in sequences):
        placed, position = _in_row(lm, sequences, row)
    with lm.compute():
        hidden_1TD = _states(lm, row.tokens_T[None], placed, position, given_to_layers(row))
    return hidden_1TD[0].index_select(0, row.decided_N)


def _states(
    lm: Any,
    ids_RL: Tensor,
    placed: Sequence[Placed],
    position: Tensor | None,
    within: AbstractContextManager[None] | None = None,
) -> Tensor:
    """Hidden states [R, L, D] of rows with images; `within` surrounds the text model, but not the vision tower."""
    within = contextlib.nullcontext() if within is None else within
    more: dict[str, Any] = {"use_cache": False}
    if position is not None:
        more["position_ids"] = position.to(lm.device)
    if lm.vision is None or not placed:
        with within:
            return lm.model.base_model(input_ids=ids_RL, **more).last_hidden_state
    with lm.offload.present():
        features = lm.vision.features([own.media.payload for own in placed])
        with within:
            return lm.vision.joined(ids_RL, placed, features, **more).last_hidden_state


def _read(sequence: TokenSequence, end: int) -> TokenSequence:
    """The first tokens of a sequence; of an image that they cut in two, which nothing decided follows, only tokens."""
    whole = tuple(own for own in sequence.media if own.position + own.length <= end)
    return TokenSequence(sequence.tokens_L[:end], sequence.action_mask_L[:end], whole)


def _in_row(lm: Any, sequences: Sequence[TokenSequence], row: Row) -> tuple[list[Placed], Tensor]:
    """The images in a packed row, and the positions of its tokens, [1, T], or [axes, 1, T] where there are axes."""
    from retort.models.vision import Placed

    assert lm.vision is not None
    placed, positions = list[Placed](), list[Tensor]()
    wide = 0
    for own in row.laid:
        sequence = sequences[own.index]
        for media in sequence.media:
            if own.start <= media.position and media.position + media.length <= own.end:
                placed.append(Placed(0, wide + media.position - own.start, media))
        counted = lm.vision.positions(_read(sequence, own.end))
        if counted is not None:
            positions.append(counted[:, own.start :])
        wide += own.end - own.start
    return placed, torch.cat(positions, dim=1)[:, None] if positions else row.position_T[None]
