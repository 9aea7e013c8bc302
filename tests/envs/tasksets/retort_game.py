"""A taskset of verifiers for the tests whose environment speaks for the user: guess a number."""

from __future__ import annotations

import verifiers.v1 as vf


class GameTask(vf.Task[vf.TaskData]):
    """A game; its environment rewards it."""


class GameConfig(vf.EnvConfig):
    """One player."""

    player: vf.AgentConfig = vf.AgentConfig()


class Game(vf.Env[GameConfig]):
    """Says higher or lower until the number is found, four times at most."""

    async def run(self, task: GameTask, agents: vf.Agents) -> None:
        """Plays one episode."""
        wanted, found = 20 + (task.data.idx or 0), 0.0
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            for _ in range(4):
                guess = int(segment.last_reply) if segment.last_reply.isdigit() else -1
                if segment.terminated or guess == wanted:
                    found = float(guess == wanted)
                    break
                segment = await interaction.turn("higher" if guess < wanted else "lower")
        interaction.trace.record_reward("found", found, 1.0)


class Games(vf.Taskset[GameTask, vf.TasksetConfig]):
    """Two games."""

    def load(self) -> list[GameTask]:
        """The tasks."""
        return [GameTask(vf.TaskData(prompt="guess a number")) for _ in range(2)]


__all__ = ["Game", "Games"]
