"""Text environments of Gymnasium: `--data gymnasium:ID`, with Gymnasium's own ids (`module:ID` imports a module first).

An environment fits if its observations are texts or it can be rendered as text (`ansi`), and if its actions are texts
or a list (`Discrete`).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

from retort.envs.actions import action_of, numbered, numbered_rows, tool
from retort.errors import UserError

__all__ = ["Gymnasium", "rows"]

#: What the actions of environments that come with Gymnasium mean, which these do not say themselves.
MEANINGS = {
    "FrozenLakeEnv": ("left", "down", "right", "up"),
    "CliffWalkingEnv": ("up", "right", "down", "left"),
    "TaxiEnv": ("south", "north", "east", "west", "pick up", "drop off"),
}
#: Colours of the terminal by their codes, but for white and black.
COLOURS = {31: "red", 32: "green", 33: "yellow", 34: "blue", 35: "magenta", 36: "cyan"}
_ESCAPE = re.compile(r"\x1b\[([0-9;]*)m")


def rows(name: str, first: int) -> Iterator[dict[str, str]]:
    """Yields the rows of an environment, see `numbered_rows`.

    Args:
        name: Its id.
        first: Number of the first row, the seed of its game.

    Raises:
        UserError: There is no such environment, or it is none of text.
    """
    _made(name).close()
    return numbered_rows(name, first)


class Gymnasium:
    """An environment of Gymnasium as a text environment."""

    def __init__(self) -> None:
        """Begins without a game; `reset` makes one."""
        self._game: Any = None
        self._actions: dict[str, Any] | None = None
        self.max_turns: int | None = None

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """The action as a function, in the form of chat templates."""
        return (tool("Do one thing in the environment.", tuple(self._actions or ())),)

    def reset(self, task: str, seed: int) -> str:
        """Begins a game.

        Args:
            task: An id and a number, `FrozenLake-v1 17`.
            seed: The seed of the game where the task has no number.

        Raises:
            UserError: There is no such environment, or it is none of text.
        """
        name, number = numbered(task, seed)
        self._game = _made(name)
        self._actions = _actions(self._game, name)
        self.max_turns = None if self._game.spec is None else self._game.spec.max_episode_steps
        found, _ = self._game.reset(seed=number)
        return "\n".join(filter(None, (self._listed, self._seen(found))))

    def step(self, text: str) -> tuple[str, float, bool, dict[str, Any]]:
        """Plays one turn; a text that is no action costs the turn, and the environment does not see it."""
        action = self._action(text)
        if action is None:
            return f"no such action\n{self._listed}".strip(), 0.0, False, {"tool_errors": 1}
        found, reward, done, late, info = self._game.step(action)
        success = info.get("success", info.get("is_success", done and reward > 0))
        own = {"success": bool(success), "tool_errors": 0, "truncated": bool(late)}
        return self._seen(found), float(reward), bool(done or late), own

    def expert(self) -> list[str]:
        """What the environment's own method `expert` says; empty where it has none."""
        expert = getattr(self._game.unwrapped, "expert", None)
        return [] if expert is None else list(expert())

    def close(self) -> None:
        """Closes the environment."""
        if self._game is not None:
            self._game.close()

    @property
    def _listed(self) -> str:
        return "" if self._actions is None else f"actions: {', '.join(self._actions)}"

    def _action(self, text: str) -> Any:
        if self._actions is not None:
            return self._actions.get(action_of(text))
        return text if self._game.action_space.contains(text) else None

    def _seen(self, found: Any) -> str:
        return found if isinstance(found, str) else _bare(str(self._game.render())).strip("\n")


def _made(name: str) -> Any:
    gymnasium = importlib.import_module("gymnasium")
    try:
        known = gymnasium.make(name, disable_env_checker=True)
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(f"gymnasium makes no environment '{name[:100]}': {type(error).__name__}: {words}") from None
    if isinstance(known.observation_space, gymnasium.spaces.Text):
        return known
    modes = known.unwrapped.metadata.get("render_modes", [])
    known.close()
    if "ansi" not in modes:
        raise UserError(
            f"gymnasium's '{name}': its observations are no text, and it cannot be rendered as one; wrap it with an "
            "observation space `Text`, or let it render 'ansi'"
        )
    return gymnasium.make(name, render_mode="ansi", disable_env_checker=True)


def _actions(game: Any, name: str) -> dict[str, Any] | None:
    """The actions by their words; None where any text may be one."""
    spaces = importlib.import_module("gymnasium.spaces")
    space = game.action_space
    if isinstance(space, spaces.Text):
        return None
    if not isinstance(space, spaces.Discrete):
        raise UserError(f"gymnasium's '{name}': its actions are neither texts nor a list, but {type(space).__name__}")
    first, count = int(space.start), int(space.n)
    own = getattr(game.unwrapped, "get_action_meanings", None)
    words = MEANINGS.get(type(game.unwrapped).__name__) if own is None else [str(word).lower() for word in own()]
    if words is None or len(set(words)) != count:
        words = [str(first + number) for number in range(count)]
    return {word: first + number for number, word in enumerate(words)}


def _bare(text: str) -> str:
    """A rendered text with colours in words: `(blue R)`; what stands on a coloured ground is put in square brackets."""
    parts, closing, at = list[str](), "", 0
    for found in _ESCAPE.finditer(text):
        parts += [text[at : found.start()], closing]
        at, closing = found.end(), ""
        codes = [int(code) for code in found[1].split(";") if code]
        ground = any(40 < code <= 47 for code in codes)
        colour = next((COLOURS[code] for code in codes if code in COLOURS), None)
        if ground or colour is not None:
            parts.append("[" if ground else f"({colour} ")
            closing = "]" if ground else ")"
    return "".join([*parts, text[at:], closing])
