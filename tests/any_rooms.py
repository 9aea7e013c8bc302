"""Games that servers in processes of their own play: they are imported there by their names."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from retort.tasks.rooms import Rooms


class AnyRooms(Rooms):
    """Rooms, also with a task that is not its own."""

    def reset(self, task: str, seed: int) -> str:
        return super().reset("three 1", seed)


class Fatal:
    """Says how many turns there were, until three or a `7`. Its process may end in the middle of a turn, by signal 9.

    In the folder that `FATAL` names, each file `fatal-*` holds the number of a turn that a process ends in, once; and
    with a file `otherwise` all is said in other words.
    """

    max_turns = 3

    def __init__(self) -> None:
        self.folder, self.turns = Path(os.environ["FATAL"]), 0

    def reset(self, task: str, seed: int) -> str:
        return self._said("the answer is")

    def step(self, text: str) -> Any:
        self.turns += 1
        for path in sorted(self.folder.glob("fatal-*")):
            if int(path.read_text()) == self.turns:
                path.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        right = text.startswith("7")
        return self._said(f"add {self.turns}"), float(len(text)), right, {"success": right}

    def _said(self, text: str) -> str:
        return f"{text} so" if (self.folder / "otherwise").exists() else text
