"""Games that servers in processes of their own play: they are imported there by their names."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from retort.envs.base import SingleTurn
from retort.tasks.rooms import Rooms


class AnyRooms(Rooms):
    """Rooms, also with a task that is not its own."""

    def reset(self, task: str, seed: int) -> str:
        return super().reset("three 1", seed)


#: The environment of single-turn prompts, as an object.
ONCE = SingleTurn()


class Fatal:
    """Says how many turns there were, for three turns; the first of its processes that comes to a turn `fatal` ends.

    Which turn that is, and how often a process may still end, is in files of the folder that `FATAL` names.
    """

    max_turns = 3

    def __init__(self) -> None:
        self.folder, self.turns = Path(os.environ["FATAL"]), 0

    def reset(self, task: str, seed: int) -> str:
        return self._said("the answer is")

    def step(self, text: str) -> Any:
        self.turns += 1
        self._perhaps(self.turns)
        right = text.startswith("7")
        return self._said(f"add {self.turns}"), float(right), right, {"success": right}

    def _perhaps(self, turn: int) -> None:
        left = [path for path in sorted(self.folder.glob("fatal-*")) if int(path.read_text()) == turn]
        if left:
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def _said(self, text: str) -> str:
        """The text, or another one in processes that were told so when they had started."""
        return f"{text} so" if (self.folder / "otherwise").exists() else text
