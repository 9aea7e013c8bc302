"""Generated games of TextWorld: `--data textworld:simple`. The expert is TextWorld's own plan, `policy_commands`.

A game is compiled when its first episode begins, which takes seconds, and kept until the process ends.
"""

from __future__ import annotations

import atexit
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from retort.envs.actions import MOST_ACTION, action_of, numbered, numbered_rows, tool
from retort.errors import UserError, did_you_mean

__all__ = ["KINDS", "TextWorld", "rows"]

#: Kinds of games: the arguments of TextWorld's command `tw-make`; `{level}` is a number behind the kind's name.
KINDS = {
    "simple": "tw-simple --rewards balanced --goal detailed",
    "coin_collector": "tw-coin_collector --level {level}",
    "treasure_hunter": "tw-treasure_hunter --level {level}",
    "cooking": "tw-cooking --recipe {level} --take {level} --open --cook --cut --drop --go 6",
    "custom": "custom --world-size {level} --nb-objects 10 --quest-length {level}",
}
#: Highest level of each kind that has levels, and the one that is taken where none is named.
LEVELS = {"coin_collector": 300, "treasure_hunter": 30, "cooking": 3, "custom": 10}
LEVEL = {"coin_collector": 5, "treasure_hunter": 5, "cooking": 1, "custom": 5}
#: Turns of an episode, beside twice as many as the expert takes.
SPARE_TURNS = 10
#: Seconds that the compilation of a game may take on the clock.
COMPILE_SECONDS = 300
_WORDS = re.compile(r"[a-z0-9' -]+")
#: Behind a text: the prompt with the score, or what the interpreter asks when the game is over.
_PROMPT = re.compile(r"\n>.*\Z|\n\s*Would you like to RESTART.*\Z", re.DOTALL)


def rows(kind: str, first: int) -> Iterator[dict[str, str]]:
    """Yields the rows of a kind of game, see `numbered_rows`.

    Args:
        kind: One of `KINDS`, with a level or without: `coin_collector-5`.
        first: Number of the first row, the seed of its game.

    Raises:
        UserError: There is no such kind, or no such level.
    """
    _arguments(kind)
    return numbered_rows(kind, first)


class TextWorld:
    """The game as a text environment."""

    tools = (tool("Give the game a command."),)

    def __init__(self) -> None:
        """Begins without a game; `reset` makes one."""
        self._game: Any = None
        self._state: Any = None
        self._begun = False
        self.max_turns = 0

    def reset(self, task: str, seed: int) -> str:
        """Begins a game.

        Args:
            task: A kind and a number, `coin_collector-5 17`.
            seed: The seed of the game where the task has no number.

        Returns:
            What is to be done, which verbs there are, and where the player is.

        Raises:
            UserError: There is no such kind, or the game cannot be made.
        """
        textworld = importlib.import_module("textworld")
        wanted = dict.fromkeys(("objective", "description", "verbs", "won", "policy_commands"), True)
        infos = textworld.EnvInfos(**wanted, extras=["walkthrough"])
        with warnings.catch_warnings():  # that its interpreter does not know these games beforehand
            warnings.filterwarnings("ignore", "Game .* is not fully supported")
            self._game = textworld.start(_made(*numbered(task, seed)), infos)
            self._state = self._game.reset()
        self._begun = False
        self.max_turns = 2 * len(self.expert()) + SPARE_TURNS
        verbs = ", ".join(sorted(self._state["verbs"]))
        return (
            f"{_tidy(self._state['objective'])}\n\ncommands begin with: {verbs}\n\n{_tidy(self._state['description'])}"
        )

    def step(self, text: str) -> tuple[str, float, bool, dict[str, Any]]:
        """Plays one turn. The reward is 1 for the turn that wins.

        A text that begins with none of the game's verbs, or is more than one command, costs the turn and does not reach
        the game, whose interpreter also obeys commands such as `save`.
        """
        command = action_of(text)
        words = command.split()
        fits = len(command) <= MOST_ACTION and _WORDS.fullmatch(command) and "then" not in words
        if not fits or words[0] not in self._state["verbs"]:
            verbs = ", ".join(sorted(self._state["verbs"]))
            return f"that is no command; commands begin with: {verbs}", 0.0, False, {"tool_errors": 1}
        self._begun = True
        self._state, _, done = self._game.step(command)
        won = bool(self._state["won"])
        return _tidy(self._state["feedback"]), float(won), bool(done), {"success": won, "tool_errors": 0}

    def expert(self) -> list[str]:
        """TextWorld's plan from here, or the walkthrough of a game at its beginning; empty where it has neither."""
        walkthrough = None if self._begun else self._state["extra.walkthrough"]
        return list(self._state["policy_commands"] or walkthrough or [])

    def close(self) -> None:
        """Ends the game."""
        if self._game is not None:
            self._game.close()


def _tidy(text: str | None) -> str:
    """A text of the game without the prompt and the score behind it, and without blank lines in a row."""
    text = _PROMPT.sub("", f"{text or ''}".strip())
    return re.sub(r"\n\s*\n\s*", "\n", text).strip()


def _arguments(kind: str) -> list[str]:
    """The arguments of `tw-make` for a kind of game."""
    name, dash, level = kind.partition("-")
    if name not in KINDS:
        raise UserError(f"textworld has no kind of game '{name[:100]}'; {did_you_mean(name, KINDS)}")
    most = LEVELS.get(name, 0)
    if dash and not (level.isascii() and level.isdigit() and 1 <= int(level) <= most):
        levels = f"levels 1 to {most}, as in '{name}-{most}'" if most else "no levels"
        raise UserError(f"textworld:{kind[:100]}: {name} has {levels}")
    return KINDS[name].format(level=int(level) if dash else LEVEL.get(name, 0)).split()


@lru_cache
def _folder() -> Path:
    """Where games are kept; it goes with the process."""
    folder = tempfile.mkdtemp(prefix="retort-textworld-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _made(kind: str, number: int) -> str:
    """The file of a game, compiled by a process whose sets of words are in the same order every time."""
    file = _folder() / f"{kind}-{number}.z8"
    make = Path(sys.executable).with_name("tw-make")
    command = [sys.executable, str(make), *_arguments(kind), "--seed", str(number), "--output", str(file), "--silent"]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"textworld:{kind}: game {number} was not compiled within {COMPILE_SECONDS} seconds") from None
    if done.returncode or not file.is_file():
        words = (done.stderr.strip().splitlines() or ["it wrote no game"])[-1][:300]
        raise UserError(f"textworld:{kind}: tw-make could not make game {number}: {words}")
    return str(file)
