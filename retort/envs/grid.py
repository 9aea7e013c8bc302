"""MiniGrid and BabyAI in words: `--data minigrid:BabyAI-GoToLocal-v0`. The expert is BabyAI's own bot."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any

from retort.envs.actions import action_of, numbered, numbered_rows, tool
from retort.errors import UserError, did_you_mean

__all__ = ["ACTIONS", "MiniGrid", "rows", "seen"]

#: The actions in words, by their names in MiniGrid.
ACTIONS = {
    "left": "turn left",
    "right": "turn right",
    "forward": "go forward",
    "pickup": "pick up",
    "drop": "drop",
    "toggle": "toggle",
    "done": "done",
}
_BY_WORDS = {words: name for name, words in ACTIONS.items()}
_NOTHING = ("unseen", "empty", "floor", "wall")


def rows(level: str, first: int) -> Iterator[dict[str, str]]:
    """Yields the rows of a level, see `numbered_rows`.

    Args:
        level: The id of an environment of MiniGrid.
        first: Number of the first row, the seed of its game.

    Raises:
        UserError: There is no such level.
    """
    _known(level)
    return numbered_rows(level, first)


class MiniGrid:
    """The game as a text environment; it sees what the agent sees."""

    tools = (tool("Do one thing in the grid.", tuple(ACTIONS.values())),)

    def __init__(self) -> None:
        """Begins without a game; `reset` makes one."""
        self._game: Any = None
        self.max_turns = 0

    def reset(self, task: str, seed: int) -> str:
        """Begins a game.

        Args:
            task: A level and a number, `BabyAI-GoToLocal-v0 17`.
            seed: The seed of the game where the task has no number.

        Raises:
            UserError: There is no such level.
        """
        level, number = numbered(task, seed)
        self._game = _known(level).make(level, disable_env_checker=True).unwrapped
        found, _ = self._game.reset(seed=number)
        self.max_turns = int(self._game.max_steps)
        return f"mission: {found['mission']}\nactions: {', '.join(ACTIONS.values())}\n{self._seen(found)}"

    def step(self, text: str) -> tuple[str, float, bool, dict[str, Any]]:
        """Plays one turn; a text that is no action waits a turn. The reward is MiniGrid's: less for a longer way."""
        name = _BY_WORDS.get(action_of(text))
        actions = self._game.actions
        found, reward, done, late, _ = self._game.step(actions.done if name is None else actions[name])
        info = {"success": bool(done and reward > 0), "tool_errors": int(name is None), "truncated": bool(late)}
        asked = f"no such action; there are: {', '.join(ACTIONS.values())}\n" if name is None else ""
        return f"{asked}{self._seen(found)}", float(reward), bool(done or late), info

    def expert(self) -> list[str]:
        """What BabyAI's bot would do from here; empty where it knows no way, and in levels that are not BabyAI's."""
        if not hasattr(self._game, "instrs"):
            return []
        module = importlib.import_module("minigrid.utils.baby_ai_bot")
        game, way, action = copy.deepcopy(self._game), list[str](), None
        try:
            bot = module.BabyAIBot(game)
            while True:
                action = bot.replan(action)
                _, reward, done, late, _ = game.step(action)
                way.append(ACTIONS[game.actions(action).name])
                if done or late:
                    return way if reward > 0 else []
        except Exception:  # the bot asserts what it takes for granted
            return []

    def close(self) -> None:
        """Releases the game."""
        if self._game is not None:
            self._game.close()

    def _seen(self, found: Any) -> str:
        held = self._game.carrying
        return seen(found["image"], None if held is None else f"{held.color} {held.type}")


def seen(image: Any, held: str | None) -> str:
    """A view in words: what lies where, nearest first, and how far the way ahead is free.

    Args:
        image: MiniGrid's view [W, H, 3] (columns from left to right, rows from far to near; kind, colour, state). The
            agent stands in the middle of the nearest row and looks away from it.
        held: What the agent carries.
    """
    constants = importlib.import_module("minigrid.core.constants")
    kinds, colours, states = (
        {number: name for name, number in table.items()}
        for table in (constants.OBJECT_TO_IDX, constants.COLOR_TO_IDX, constants.STATE_TO_IDX)
    )
    width, height = image.shape[:2]
    middle, things = width // 2, list[tuple[int, int, str]]()
    for column in range(width):
        for row in range(height):
            kind, colour, state = (int(number) for number in image[column, row])
            ahead, aside = height - 1 - row, column - middle
            if kinds[kind] in _NOTHING or (ahead, aside) == (0, 0):
                continue
            looks = f"{states[state]} {colours[colour]}" if kinds[kind] == "door" else colours[colour]
            things.append((ahead + abs(aside), aside, f"{looks} {kinds[kind]} {_place(ahead, aside)}"))
    free = 0
    while free + 1 < height and kinds[int(image[middle, height - 2 - free, 0])] in ("empty", "floor"):
        free += 1
    lines = [words for _, _, words in sorted(things)]
    lines += [f"free ahead: {free}"] + ([f"you hold a {held}"] if held else [])
    return "\n".join(lines)


def _place(ahead: int, aside: int) -> str:
    parts = [f"{ahead} ahead"] if ahead else []
    parts += [f"{abs(aside)} {'left' if aside < 0 else 'right'}"] if aside else []
    return " ".join(parts)


def _known(level: str) -> Any:
    gymnasium = importlib.import_module("gymnasium")
    importlib.import_module("minigrid")  # registers its levels
    own = [name for name, spec in gymnasium.registry.items() if str(spec.entry_point).startswith("minigrid.")]
    if level not in own:
        raise UserError(f"minigrid has no level '{level[:100]}'; {did_you_mean(level, own)}")
    return gymnasium
