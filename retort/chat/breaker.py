"""A circuit breaker: a server that failed several times in a row is not asked again for a while."""

from __future__ import annotations

import threading

__all__ = ["IN_A_ROW", "Breaker"]

#: Failures in a row after which a server is asked no more.
IN_A_ROW = 5


class Breaker:
    """Counts failures of one server in a row. Its methods may be called from several threads.

    It opens after so many: then nothing is asked for the rest of a batch. The next batch begins with one question
    alone, and goes on as usual if that is answered.

    Example:
        >>> from retort.chat.breaker import Breaker
        >>> breaker = Breaker(2)
        >>> breaker.note(False), breaker.note(False), breaker.open
        (None, None, True)
    """

    def __init__(self, in_a_row: int = IN_A_ROW) -> None:
        """Begins closed."""
        self.in_a_row = in_a_row
        self._failures, self._lock = 0, threading.Lock()

    @property
    def open(self) -> bool:
        """Whether nothing is to be asked now."""
        return self._failures >= self.in_a_row

    @property
    def suspicious(self) -> bool:
        """Whether the last question was not answered."""
        return self._failures > 0

    def note(self, answered: bool) -> None:
        """Counts an answer, or a failure."""
        with self._lock:
            self._failures = 0 if answered else self._failures + 1

    def half_open(self) -> None:
        """Lets one question through; if that fails, it is open again."""
        with self._lock:
            self._failures = min(self._failures, self.in_a_row - 1)
