"""Keys and values of a batch while it is generated.

Axis letters: see `retort.core`; B is rows, H heads, P tokens that are kept of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from retort.models.lm import LanguageModel

#: Free tokens that a cache has behind the prompt at first.
_ROOM = 64


class RoomyLayer(DynamicLayer):
    """A layer of transformers' dynamic cache with free room, so that a token does not copy all before it.

    The room is doubled when it is full, up to the length of the longest completion: most completions are shorter.
    """

    def __init__(self, most: int) -> None:
        """Begins empty; `most` is the largest number of tokens."""
        super().__init__()
        self.most = most
        self.length = 0
        self._keys = self._values = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys, self._values = key_states[:, :, :0], value_states[:, :, :0]
        start, end = self.length, self.length + key_states.shape[2]
        if end > self._keys.shape[2]:
            room = min(self.most, max(2 * start, end + _ROOM))
            self._keys, self._values = self._moved(self._keys, room), self._moved(self._values, room)
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self.length = end
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:
            return  # this layer shares another's keys
        room = self._keys.shape[2]
        self._keys, self._values = self._moved(self._keys, room, beam_idx), self._moved(self._values, room, beam_idx)
        self._show()

    def row(self, index: int, start: int, end: int) -> tuple[Tensor, Tensor] | None:
        """Copies of the keys and values [H, P, D] of one row between two columns; None where the layer has none."""
        if not self.is_initialized:
            return None
        keys, values = (states[index, :, start:end].clone() for states in (self._keys, self._values))
        return keys, values

    def fill(self, rows: Sequence[tuple[Tensor, Tensor] | None], counts: Sequence[int], width: int, room: int) -> None:
        """Fills an empty layer with the first tokens of every row, so that they end in one column.

        Args:
            rows: Keys and values of each row, [H, P, D]; None where there are none.
            counts: Number of tokens that are taken of each row, at most P.
            width: Columns to fill, at least the largest of the counts.
            room: Columns that will be needed soon.
        """
        given = next((states for states in rows if states is not None), None)
        if given is None:
            return
        self.lazy_initialization(given[0][None], given[1][None])
        filled = [
            _aligned([None if own is None else own[which] for own in rows], counts, width, min(self.most, room + _ROOM))
            for which in (0, 1)
        ]
        self._keys, self._values = filled
        self.length = width
        self._show()

    def release(self) -> None:
        """Frees the keys and values of a batch that is done."""
        self._keys = self._values = self.keys = self.values = torch.empty(0)

    def _moved(self, states: Tensor, room: int, rows_B: Tensor | None = None) -> Tensor:
        """A copy of the filled part, or of some of its rows, with room behind it."""
        rows = len(states) if rows_B is None else len(rows_B)
        moved = states.new_empty(rows, states.shape[1], room, states.shape[3])
        filled = states[:, :, : self.length]
        moved[:, :, : self.length] = filled if rows_B is None else filled[rows_B]
        return moved

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]
        return self.keys, self.values


def roomy_cache(lm: LanguageModel, room: int) -> DynamicCache:
    """A cache of transformers for this model, with room in the layers that keep every token."""
    cache = DynamicCache(config=lm.model.config)
    # Other layers (sliding windows, states of linear attention) do not grow with the completion.
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keeps_every_token(lm: LanguageModel) -> bool:
    """Whether the keys and values of some tokens are all that the model keeps of them, and stay as they are.

    They are not where a layer keeps a window or a state of all tokens so far, which is not known at earlier tokens, and
    not where the model computes earlier tokens otherwise when more follow, or when others are computed with them.
    """
    layers = roomy_cache(lm, 1).layers
    all_kept = bool(layers) and all(isinstance(layer, RoomyLayer) for layer in layers)
    return all_kept and lm.together_up_to is None and lm.rereads_from is None


def _aligned(rows: Sequence[Tensor | None], counts: Sequence[int], width: int, room: int) -> Tensor:
    """States [B, H, room, D] of rows that end in column `width`, with zeros before, which masks multiply."""
    given = next(states for states in rows if states is not None)
    found = given.new_empty(len(rows), given.shape[0], room, given.shape[2])
    for row, states, count in zip(found, rows, counts, strict=True):
        row[:, : width - count] = 0
        if states is not None and count:
            row[:, width - count : width] = states[:, :count]
    return found
