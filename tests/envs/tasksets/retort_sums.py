"""A taskset of verifiers for the tests: sums, with a tool that adds or without."""

from __future__ import annotations

import verifiers.v1 as vf


class Data(vf.TaskData):
    """A sum and its answer."""

    answer: int = 0


class SumsTask(vf.Task[Data, vf.State, vf.TaskConfig]):
    """The reward is 1 for the answer, and 0.25 more for each call of the tool."""

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        """Whether the last turn is the answer."""
        if self.data.name == "broken":
            raise RuntimeError("no rubric today")
        return float(trace.last_reply == str(self.data.answer))

    @vf.reward(weight=0.25)
    async def calls(self, trace: vf.Trace) -> float:
        """Number of replies of the tool."""
        return float(sum(own.message.role == "tool" and own.message.content == "7" for own in trace.nodes))


class Adder(vf.Toolset[vf.ToolsetConfig]):
    """The tool."""

    TOOL_PREFIX = None

    @vf.tool
    def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)


class ToolTask(SumsTask):
    """A sum with the tool."""

    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        """The servers of tools."""
        return [Adder(vf.ToolsetConfig())]


class SumsConfig(vf.TasksetConfig):
    """Settings of the taskset."""

    count: int = 3
    split: str = "train"


class Sums(vf.Taskset[SumsTask, SumsConfig]):
    """Sums: `a + 4` with a from 3 on, or from 103 on in the test split."""

    def load(self) -> list[SumsTask]:
        """The tasks."""
        first = 3 if self.config.split == "train" else 103
        return [
            SumsTask(Data(prompt=f"what is {a} + 4?", system_prompt="Be brief.", answer=a + 4, name=name))
            for a, name in zip(range(first, first + self.config.count), ["one", "broken", "three"], strict=False)
        ]


__all__ = ["Sums"]

if __name__ == "__main__":
    Adder.run()
