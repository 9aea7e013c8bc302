"""What ranks share, as an actor: `retort serve` in a process that Ray places, and starts again when it ends."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retort.cluster.log import redirect
from retort.cluster.mailbox import beating
from retort.cluster.rank import Where, where
from retort.errors import RetortError
from retort.wire import KEY_VARIABLE


@dataclass(frozen=True)
class Serving:
    """A server that answers.

    Attributes:
        port: Where it listens.
        began: Whether it has begun only now.
        problem: Why it does not answer, on one line.
    """

    port: int = 0
    began: bool = False
    problem: str | None = None


class Served:
    """An actor. Its process may be killed at any moment: Ray makes it anew, and the driver has it serve again."""

    def __init__(self, name: str, folder: str, mailbox: Any, hangs: float) -> None:
        """Gives signs of life from now on, also while it loads what it serves.

        Args:
            name: As of a `Rank`.
            folder: As of a `Rank`.
            mailbox: The handle of a `Mailbox`.
            hangs: As of a `Rank`.
        """
        self._log = str(redirect(name))
        beating(mailbox, name, hangs)
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._port = 0

    def where(self) -> Where:
        """Where it is."""
        return where(self._log)

    def serve(self, given: str, words: Sequence[str], host: str, port: int, key: str) -> Serving:
        """Serves something from now on, unless it does so already.

        Args:
            given: As the argument of `retort serve`, as is `words`.
            words: Settings as `key=value`.
            host: Address to listen at.
            port: Port to listen at; 0: any that is free.
            key: Bearer token of its clients.
        """
        if self._port:
            return Serving(self._port)
        os.environ[KEY_VARIABLE] = key
        changed, problems = threading.Event(), list[str]()

        def listening(own: int) -> None:
            self._port = own
            changed.set()

        def work() -> None:
            from retort.serve.command import serve

            try:
                serve(given, words, host=host, port=port, say=lambda text: print(text, flush=True), listening=listening)
            except RetortError as error:
                problems.append(str(error))
            except SystemExit:  # uvicorn's, where it cannot listen
                problems.append(f"cannot listen at {host}:{port}; its log: {self._log}")
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}; its log: {self._log}")
            changed.set()

        threading.Thread(target=work, daemon=True, name="serve").start()
        changed.wait()
        return Serving(self._port, True, problems[0] if problems else None)


class Teacher(Served):
    """A frozen teacher. Its name is that of its process."""


class EnvironmentServer(Served):
    """The environment of the rollouts, as `Teacher`."""
