"""What an actor says to the driver of a run, and the driver's wish that it stop."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from typing import Any


class Mailbox:
    """An actor of its own: an actor that trains answers nobody meanwhile."""

    def __init__(self) -> None:
        self._events: list[tuple[str, tuple[Any, ...]]] = []
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._heard: dict[str, float] = {}

    async def post(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Takes an event: a method of an observer, and what it is called with."""
        self._events.append((name, arguments))

    async def collect(self) -> list[tuple[str, tuple[Any, ...]]]:
        """All events since the last call, in their order."""
        found, self._events = self._events, []
        return found

    async def beat(self, name: str) -> None:
        """Takes a sign of life of the actor of that name."""
        self._heard[name] = time.monotonic()

    async def forget(self, name: str) -> None:
        """Waits no longer for signs of life of an actor, until one comes."""
        self._heard.pop(name, None)

    async def silent(self) -> dict[str, float]:
        """Seconds since the last sign of life of each actor that gave one."""
        now = time.monotonic()
        return {name: now - heard for name, heard in self._heard.items()}

    async def signal(self, number: int) -> None:
        """Takes a signal for the first rank."""
        self._signals.put_nowait(number)

    async def next_signal(self) -> int:
        """The next signal, once there is one."""
        return await self._signals.get()


def beating(mailbox: Any, name: str, longest: float) -> None:
    """Has a thread of this process give signs of life from now on.

    Where nobody takes them for as long as the driver would wait for one, the driver or the link to it is gone. Then
    this process ends: another may have its work by now.

    Args:
        mailbox: The handle of a `Mailbox`.
        name: Of the actor.
        longest: Seconds after which one that is silent counts as hung.
    """
    import ray  # pyright: ignore[reportMissingImports]

    def work() -> None:
        taken = time.monotonic()
        while True:
            try:
                ray.get(mailbox.beat.remote(name), timeout=longest)
                taken = time.monotonic()
            except ray.exceptions.ActorDiedError:
                break
            except ray.exceptions.RayError:
                if time.monotonic() - taken >= longest:
                    break
            time.sleep(min(5.0, longest / 8))
        print("nobody takes signs of life: the driver ended, or the link to it is cut", flush=True)
        os._exit(1)

    threading.Thread(target=work, daemon=True, name="beat").start()


class Relay:
    """An observer, in an actor, whose calls are made in the driver; also of the lines that end a run."""

    def __init__(self, mailbox: Any) -> None:
        """Takes the handle of a `Mailbox`."""
        self._mailbox = mailbox

    def arrived(self) -> None:
        """Waits until all that was said has reached the mailbox, whose calls from one actor keep their order."""
        import ray  # pyright: ignore[reportMissingImports]

        ray.get(self._mailbox.post.remote("close", ()))

    def _post(self, name: str, *arguments: Any) -> None:
        self._mailbox.post.remote(name, arguments)

    def summary(self, lines: Mapping[str, str], notes: list[str]) -> None:
        """See `Observer`, as for all methods."""
        self._post("summary", dict(lines), list(notes))

    def phase(self, text: str, done: int, total: int) -> None:
        self._post("phase", text, done, total)

    def step(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        self._post("step", step, steps, dict(metrics))

    def note(self, text: str) -> None:
        self._post("note", text)

    def table(self, results: Mapping[str, Any]) -> None:
        self._post("table", dict(results))

    def working(self, text: str) -> None:
        """Receives what takes a while."""
        self._post("working", text)

    def close(self) -> None:
        """Ends the display."""
        self._post("close")

    def show(self, text: str) -> None:
        """Passes on the lines that end a run."""
        self._post("show", text)
