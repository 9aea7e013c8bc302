"""Signals that end a run from outside."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

#: Signals that ask a run to end; Windows knows no hang-up.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interruptions:
    """SIGINT, SIGTERM and SIGHUP end the run after the step at hand, with a checkpoint; another ends it at once.

    Args:
        on_request: Called at once with the kind of request ("interrupted"), so that it can be acknowledged.
    """

    def __init__(self, on_request: Callable[[str], None] = lambda by: None) -> None:
        self.by: str | None = None
        self._on_request = on_request
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # Under nohup a hang-up is ignored.
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.by is not None:
            raise KeyboardInterrupt
        self.by = "interrupted" if number == signal.SIGINT else "terminated"
        # Python forbids writing to a stream that is being written to, and the signal may have come in the middle of it.
        with contextlib.suppress(RuntimeError):
            self._on_request(self.by)
