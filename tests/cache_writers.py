"""What other processes do to a cache of scores in tests of its store; see `forked.started`."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import torch

from retort.cache.store import Store


def write(folder: Path, letter: str, count: int, size: int, line: Connection) -> None:
    """Puts entries named by a letter until it is killed, or `count` of them; says each number that is done."""
    store = Store(folder, 10**9)
    for number in range(count):
        keys = [f"{letter}{number}.{place}" for place in range(4)] + [f"both{number}"]
        store.put("m", {key: {"logp": torch.full((size,), float(number))} for key in keys})
        line.send(number)


def open_new(folder: Path, count: int, line: Connection) -> None:
    """Opens new caches at the moment at which another process opens them: waits for a word before each."""
    for number in range(count):
        line.send(number)
        line.recv()
        assert Store(folder / str(number), 10**9).size == 0
