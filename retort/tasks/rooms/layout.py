"""Layouts of the game Rooms: where walls, doors, keys, the trapdoor and the goal are. Deterministic from task and seed.

Rooms form a square grid. The goal has two doors, a red and a blue one, and walls elsewhere; the key of either wins.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

COLOURS: tuple[str, ...] = ("red", "blue")
DIRECTIONS: Mapping[str, tuple[int, int]] = {"north": (0, -1), "east": (1, 0), "south": (0, 1), "west": (-1, 0)}
#: Rooms along each side of the grid, by the first word of a task.
SIZES: Mapping[str, int] = {"three": 3, "four": 4}

#: A room: column and row, counted from the north-western corner.
Room = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """One game before its first move.

    Attributes:
        size: Rooms along each side.
        start: The room that the player begins in, and that the cellar's ladder leads to.
        goal: The room to get into.
        trap: The room whose floor gives way: whoever enters falls into the cellar.
        keys: The room in which each key lies, by colour.
        doors: The room next to the goal from which each door leads into it, by colour.
        walls: Pairs of neighbouring rooms without a way between them.
    """

    size: int
    start: Room
    goal: Room
    trap: Room
    keys: Mapping[str, Room]
    doors: Mapping[str, Room]
    walls: frozenset[frozenset[Room]]

    def neighbours(self, room: Room) -> Iterator[tuple[str, Room]]:
        """The rooms beside a room, with their directions, walls or not."""
        for direction, (right, down) in DIRECTIONS.items():
            other = room[0] + right, room[1] + down
            if 0 <= other[0] < self.size and 0 <= other[1] < self.size:
                yield direction, other

    @cached_property
    def ways(self) -> dict[Room, dict[str, Room]]:
        """For each room the rooms that can be entered from it, by direction; doors are not among them."""
        rooms = [(column, row) for row in range(self.size) for column in range(self.size)]
        return {
            room: {way: other for way, other in self.neighbours(room) if frozenset((room, other)) not in self.walls}
            for room in rooms
        }

    @cached_property
    def doors_at(self) -> dict[tuple[Room, str], str]:
        """Colours of the doors, by the room and the direction."""
        return {
            (room, way): colour
            for colour, room in self.doors.items()
            for way, other in self.neighbours(room)
            if other == self.goal
        }


def layout(task: str, seed: int) -> Layout:
    """The layout of a task and a seed; the same on every machine.

    Args:
        task: A word that says how large the grid is, and anything behind it, such as `three 17`.
        seed: Any integer.

    Raises:
        ValueError: The task begins with another word.
    """
    size = task.split()[:1]
    if not size or size[0] not in SIZES:
        raise ValueError(f"a task of Rooms begins with {' or '.join(SIZES)}, such as 'three 17', not '{task[:40]}'")
    rng = random.Random(f"rooms/{task}/{seed}")
    while True:
        found = _drawn(SIZES[size[0]], rng)
        if found is not None:
            return found


def _drawn(size: int, rng: random.Random) -> Layout | None:
    """A random layout; None where the draw has no way that avoids the trapdoor."""
    rooms = _shuffled([(column, row) for row in range(size) for column in range(size)], rng)
    goal, trap = rooms[0], rooms[1]
    empty = Layout(size, goal, goal, trap, {}, {}, frozenset())
    beside = _shuffled([other for _, other in empty.neighbours(goal)], rng)
    doors, walled = dict(zip(COLOURS, beside, strict=False)), beside[2:]
    if trap in doors.values():
        return None
    walls = {frozenset((goal, other)) for other in (*doors.values(), *walled)}
    inside = [room for room in rooms if room not in (goal, trap)]
    if not _connected(inside, empty, walls):
        return None
    pairs = {frozenset((room, other)) for room in inside for _, other in empty.neighbours(room) if other in inside}
    for pair in _shuffled(sorted(pairs, key=sorted), rng)[:size]:  # as many walls as the grid has rooms on a side
        if _connected(inside, empty, {*walls, pair}):
            walls.add(pair)
    start, *places = _shuffled(inside, rng)
    return Layout(size, start, goal, trap, dict(zip(COLOURS, places, strict=False)), doors, frozenset(walls))


def _connected(rooms: list[Room], grid: Layout, walls: set[frozenset[Room]]) -> bool:
    """Whether all of some rooms can be reached from one another without leaving them."""
    reached, edge = {rooms[0]}, [rooms[0]]
    while edge:
        room = edge.pop()
        for _, other in grid.neighbours(room):
            if other in rooms and other not in reached and frozenset((room, other)) not in walls:
                reached.add(other)
                edge.append(other)
    return len(reached) == len(rooms)


def _shuffled(items: list, rng: random.Random) -> list:
    """The items in random order, by `random.random` alone, which is the same in all versions of Python."""
    return [item for _, _, item in sorted((rng.random(), index, item) for index, item in enumerate(items))]
