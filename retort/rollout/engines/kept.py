"""Conversations between their turns: keys and values of what was read and generated so far.

A turn then costs the tokens that are new in it, not all that was said before. Keys and values are taken out of a batch
row by row, without padding, and put behind other padding in the next one, so it does not matter which conversations are
generated together. Axis letters: see `retort.core`; B is rows, H heads, P tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from retort.core.rollouts import Status
from retort.core.sequences import TokenSequence
from retort.rollout.engines.base import Completion, Request


@dataclass(eq=False)
class KeptRow:
    """Keys and values of the first tokens of a conversation, under some weights.

    Attributes:
        layers: Keys and values of each layer, [H, P, D] each; None where a layer has none of its own.
        tokens_L: The tokens, int64, on the CPU.
        weights: What stands for the weights that computed them.
    """

    layers: list[tuple[Tensor, Tensor] | None]
    tokens_L: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    weights: object = None

    def common(self, context: TokenSequence) -> int:
        """Number of first tokens that a context shares with it, all but the context's last one at most."""
        most = min(len(self.tokens_L), len(context) - 1)
        if not self.layers or context.media:
            return 0
        differs = (self.tokens_L[:most] != context.tokens_L[:most]).nonzero()
        return int(differs[0]) if len(differs) else most

    def release(self) -> None:
        """Frees it: it has nothing in common with any context any more."""
        self.layers = []


class Turns:
    """What a batch of conversations continues, and what is kept of it for their next turns.

    Attributes:
        before: What was kept of each row, released as it is read; None for a row that is read from its beginning.
        wanted: Whether each row is to be kept.
        found: The rows that were kept, by their indices; none of a row without a stop token.
    """

    def __init__(self, before: Sequence[KeptRow | None], wanted: Sequence[bool]) -> None:
        """Begins with nothing found."""
        self.before = list(before)
        self.wanted = list(wanted)
        self.found: dict[int, KeptRow] = {}
        self._width, self._lengths = 0, list[int]()

    def fill(self, cache: Any, contexts: Sequence[TokenSequence], asked: Sequence[int]) -> int:
        """Fills an empty cache with what was kept, and returns how many last tokens of all contexts are to be read.

        Rows of which more is kept read some of it again, in place of padding: no row has a gap in its middle.

        Args:
            cache: An empty cache of `roomy_cache`.
            contexts: The different contexts.
            asked: Index among these of each row's context.
        """
        width, lengths = max(map(len, contexts)), [len(context) for context in contexts]
        rows: list[KeptRow | None] = [None] * len(contexts)
        kept = [0] * len(contexts)
        for row, index in zip(self.before, asked, strict=True):
            count = 0 if row is None else row.common(contexts[index])
            if count > kept[index]:
                rows[index], kept[index] = row, count
        unread = max(length - count for length, count in zip(lengths, kept, strict=True))
        self._width, self._lengths = width, [lengths[index] for index in asked]
        if unread < width:
            counts = [max(0, length - unread) for length in lengths]
            for index, layer in enumerate(cache.layers):
                layer.fill([row and row.layers[index] for row in rows], counts, width - unread, width)
                for row in self.before:
                    if row is not None and row.layers:
                        row.layers[index] = None
        for row in self.before:
            if row is not None:
                row.release()
        return unread

    def kept(self, row: int, sequence: TokenSequence, weights: object = None) -> KeptRow | None:
        """What was kept of a row, whose context and completion this is; None if nothing was."""
        found = self.found.get(row)
        if found is not None:
            found.tokens_L, found.weights = sequence.tokens_L[:-1], weights
        return found

    def leave(self, cache: Any, row_B: Tensor, stop_BA: Tensor, stay_B: Tensor | None = None) -> None:
        """Keeps rows that leave a batch, layer by layer, so that no two copies of all of it are held at once.

        Args:
            cache: The cache of the batch.
            row_B: Index of each row of the cache among the contexts.
            stop_BA: Whether each token that was generated is a stop; a row with one leaves.
            stay_B: The places of the rows that stay; None: the batch is done.
        """
        last_B, done_B = stop_BA.int().argmax(1).tolist(), stop_BA.any(1).tolist()
        own = [place for place, row in enumerate(row_B.tolist()) if done_B[place] and self.wanted[row]]
        rows = [self.found.setdefault(int(row_B[place]), KeptRow([])) for place in own]
        # The stop token was generated, not read: what was kept ends before it.
        ends = [self._width + last_B[place] for place in own]
        starts = [self._width - self._lengths[int(row_B[place])] for place in own]
        for layer in cache.layers:
            for row, place, start, end in zip(rows, own, starts, ends, strict=True):
                row.layers.append(layer.row(place, start, end))
            if stay_B is not None:
                layer.reorder_cache(stay_B)
            else:
                layer.release()


class Conversations:
    """The conversations that an engine keeps, under the weights that it has now.

    Attributes:
        most: Number of conversations that are kept, at most, besides those that are generated.
    """

    def __init__(self, most: int) -> None:
        """Keeps nothing yet."""
        self.most = most
        self._weights = object()
        self._rows: WeakSet[KeptRow] = WeakSet()

    def forget(self) -> None:
        """Frees all that is kept, because the weights are others now."""
        self._weights = object()
        for row in list(self._rows):
            row.release()

    def take(self, request: Request) -> KeptRow | None:
        """Takes what was kept of a request's conversation; None where most of its context has to be read anew."""
        if request.turn_cache is None:
            return None
        row: KeptRow | None = request.turn_cache.state
        request.turn_cache.clear()
        if row is None or row.weights is not self._weights:
            return None
        return row if 2 * row.common(request.context) >= len(request.context) else None

    def turns(self, requests: Sequence[Request], before: Sequence[KeptRow | None]) -> Turns:
        """What some requests continue, and which of them are to be kept: as many as there is room for."""
        others = sum(bool(row.layers) for row in self._rows) - sum(row is not None for row in before)
        asked = [request.turn_cache is not None and not request.context.media for request in requests]
        return Turns(before, [one and sum(asked[:index]) < self.most - others for index, one in enumerate(asked)])

    def keep(self, turns: Turns, requests: Sequence[Request], completions: Sequence[Completion]) -> None:
        """Keeps the conversations in which the model's turn ended, for the requests that go on from them."""
        for index, (request, completion) in enumerate(zip(requests, completions, strict=True)):
            # Nothing follows a turn that was cut off.
            if request.turn_cache is None or completion.status != Status.COMPLETED:
                continue
            row = turns.kept(index, request.context.then(completion.ids), self._weights)
            if row is not None:
                request.turn_cache.state = row
                self._rows.add(row)
