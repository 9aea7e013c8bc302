"""A taskset of verifiers for the tests: one sum, with a tool."""

from __future__ import annotations

import verifiers.v1 as vf
from retort_sums import Data, ToolTask


class ToolSums(vf.Taskset[ToolTask, vf.TasksetConfig]):
    """One sum."""

    def load(self) -> list[ToolTask]:
        """The task."""
        return [ToolTask(Data(prompt="what is 3 + 4?", answer=7))]


__all__ = ["ToolSums"]
