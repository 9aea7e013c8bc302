"""The rows of Rooms, and games that its expert plays, with and without mistakes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Literal

from retort.core.random_streams import key
from retort.tasks.rooms.game import COMMANDS, Rooms, State, plan
from retort.tasks.rooms.layout import COLOURS, Layout

__all__ = ["Turn", "games", "played", "rows", "seed_of"]

Split = Literal["train", "held_out"]
#: Rows of each split where no count is given.
ROWS = {"train": 4000, "held_out": 400}
_HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Turn:
    """One turn of a game: what was seen, what was done, and whether the expert did it."""

    observation: str
    command: str
    experts: bool


def seed_of(row: str) -> int:
    """The seed of a row's game, from the row's id; `retort.envs` gives every environment this one."""
    return key(0, "environment", row)


def games(split: Split, size: str = "three") -> Iterator[tuple[str, str]]:
    """Endless ids and tasks of a split. No layout is in both: the first observation decides where it belongs."""
    game, number = Rooms(), 0
    while True:
        row, task = f"rooms-{size}-{number}", f"{size} {number}"
        seen = blake2b(game.reset(task, seed_of(row)).encode(), digest_size=4).digest()
        if (int.from_bytes(seen, "big") % _HELD_OUT_EVERY == 0) == (split == "held_out"):
            yield row, task
        number += 1


def rows(split: Split, count: int | None = None, *, size: str = "three") -> list[dict[str, str]]:
    """Data rows of a split: `id`, and as `prompt` the task, which `Rooms.reset` takes.

    Args:
        split: `train` or `held_out`.
        count: Number of rows; None: `ROWS`.
        size: Rooms along each side, as a word.

    Raises:
        ValueError: The split is unknown.
    """
    if split not in ROWS:
        raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
    chosen = islice(games(split, size), ROWS[split] if count is None else count)
    return [{"id": row, "prompt": task} for row, task in chosen]


def played(
    row: str, task: str, rng: random.Random, mistakes: float = 0.0, *, once_lost: float | None = None
) -> list[Turn]:
    """A game by the expert, who is made to err at times and goes on from wherever that leads.

    Args:
        row: Id of the row.
        task: Its task.
        rng: Chooses among several shortest ways, and the mistakes.
        mistakes: Chance of a mistake at every turn.
        once_lost: The chance from the first mistake on; None: the same.
    """
    game, turns, ahead = Rooms(), list[Turn](), list[str]()
    observation, over = game.reset(task, seed_of(row)), False
    while not over:
        if not ahead:
            ahead = plan(*game.position, rng)
        wrong = rng.random() < mistakes
        if wrong and once_lost is not None:
            mistakes = once_lost
        command = _mistake(*game.position, rng) if wrong else ahead[0]
        before = game.position[1]
        turns.append(Turn(observation, command, not wrong))
        observation, _, over, _ = game.step(command)
        ahead = ahead[1:] if not wrong else ahead if game.position[1] == before else []
    return turns


def _mistake(rooms: Layout, state: State, rng: random.Random) -> str:
    """Half of the time one of the mistakes that lead astray, where one is at hand; else any command."""
    tempting = [f"go {way}" for way, room in rooms.ways.get(state.room or rooms.goal, {}).items() if room == rooms.trap]
    for (room, way), colour in rooms.doors_at.items():
        tempting += [f"open {way} {held}" for held in COLOURS if room == state.room and held in state.held - {colour}]
    if tempting and rng.random() < 0.5:
        return rng.choice(tempting)
    name = rng.choice(("go", "go", "go", "open", "open", "take", "fix", "feel", "climb"))
    return " ".join([name, *(rng.choice(tuple(words)) for words in COMMANDS[name].values())])
