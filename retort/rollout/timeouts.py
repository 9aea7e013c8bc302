"""A record of the episodes that a deadline ended, from which a resumed run ends them again at the same turn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from retort.core.random_streams import UniformStream
from retort.core.sequences import TokenSequence

__all__ = ["Timeouts"]

_Key = tuple[int, str, int, str]


def _nowhere(row: Mapping[str, Any]) -> None:
    """Keeps nothing: what is recorded is known to this process alone."""


@dataclass(eq=False)
class Timeouts:
    """Episodes that a deadline ended.

    Whether a reply is late depends on the clock, so the seed of a run does not tell it. What was late once is late
    again: for the same episode, at the same turn of it, after the same tokens, in the same step of the run. A course
    that is another one meanwhile has other tokens, so nothing of the record applies to it.

    Attributes:
        step: Returns the number of steps that the run has done.
        keep: Takes a row of the record, which is on the disk when it returns.
    """

    step: Callable[[], int] = lambda: 0
    keep: Callable[[Mapping[str, Any]], None] = _nowhere
    _known: dict[_Key, str] = field(default_factory=lambda: {})

    def open(
        self, rows: Iterable[Mapping[str, Any]], keep: Callable[[Mapping[str, Any]], None], step: Callable[[], int]
    ) -> None:
        """Goes on with a record.

        Args:
            rows: Its rows so far.
            keep: See the attributes.
            step: See the attributes.
        """
        self.keep, self.step = keep, step
        self._known = {(row["step"], row["episode"], row["turn"], row["tokens"]): row["words"] for row in rows}

    def words(self, stream: UniformStream, turn: int, before: TokenSequence) -> str | None:
        """What was said of a turn of an episode that is in the record; None for one that is not.

        Args:
            stream: The episode's random numbers, whose key is its name.
            turn: Number of the turn, from 1; 0 for the beginning of the episode.
            before: All tokens up to the end of the turn.
        """
        return self._known.get(self._key(stream, turn, before)) if self._known else None

    def add(self, stream: UniformStream, turn: int, before: TokenSequence, *, words: str) -> None:
        """Adds a turn of an episode; the arguments are those of `words`, and what is said of it."""
        found = self._key(stream, turn, before)
        self._known[found] = words
        self.keep({**dict(zip(("step", "episode", "turn", "tokens"), found, strict=True)), "words": words})

    def _key(self, stream: UniformStream, turn: int, before: TokenSequence) -> _Key:
        ids = before.tokens_L.numpy().tobytes()
        name = json.dumps([stream.stream, *stream.parts], ensure_ascii=False)
        return self.step(), name, turn, hashlib.blake2b(ids, digest_size=8).hexdigest()
