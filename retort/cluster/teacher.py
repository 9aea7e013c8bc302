"""Servers as actors, which Ray places, and starts again when they end; a frozen teacher is one: `retort serve`."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
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


class Server:
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

    def begin(self, serve: Callable[[Callable[[int], None]], None], at: str) -> Serving:
        """Serves from now on, in a thread, unless it does so already.

        Args:
            serve: Serves until the process ends; it calls what it is given with the port, once requests are answered.
            at: Where it is to listen, for a message.
        """
        if self._port:
            return Serving(self._port)
        changed, problems = threading.Event(), list[str]()

        def listening(own: int) -> None:
            self._port = own
            changed.set()

        def work() -> None:
            try:
                serve(listening)
            except RetortError as error:
                problems.append(str(error))
            except SystemExit:  # uvicorn's, where it cannot listen
                problems.append(f"cannot listen at {at}; its log: {self._log}")
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}; its log: {self._log}")
            changed.set()

        threading.Thread(target=work, daemon=True, name="serve").start()
        changed.wait()
        return Serving(self._port, True, problems[0] if problems else None)


class Served(Server):
    """What `retort serve` serves."""

    def serve(self, given: str, words: Sequence[str], host: str, port: int, key: str) -> Serving:
        """Serves it from now on, unless it does so already.

        Args:
            given: As the argument of `retort serve`, as is `words`.
            words: Settings as `key=value`.
            host: Address to listen at.
            port: Port to listen at; 0: any that is free.
            key: Bearer token of its clients.
        """
        os.environ[KEY_VARIABLE] = key

        def serves(listening: Callable[[int], None]) -> None:
            from retort.serve.command import serve

            serve(given, words, host=host, port=port, say=lambda text: print(text, flush=True), listening=listening)

        return self.begin(serves, f"{host}:{port}")


class Teacher(Served):
    """The server of a frozen teacher; its process has this name."""


class EnvironmentServer(Served):
    """The server of the environment of the rollouts; its process has this name."""
