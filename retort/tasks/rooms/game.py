"""The game Rooms: find a key, open a door of its colour, enter the goal. It needs the standard library alone.

    game = Rooms()
    print(game.reset("three 1", seed=7))
    observation, reward, done, info = game.step("go north")

A wrong move costs turns and leads to places that the shortest ways do not: a wrong key jams the lock, which then has to
be fixed; a trapdoor leads to a dark cellar, whose ladder has to be felt for before it can be climbed.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retort.tasks.rooms.layout import COLOURS, DIRECTIONS, Layout, Room, layout

__all__ = ["COMMANDS", "MOST_TURNS", "Rooms", "State", "after", "command", "plan"]

#: Most turns of an episode, by the rooms along each side.
MOST_TURNS: Mapping[int, int] = {3: 16, 4: 24}
_ASKED = "what ? go , take , open , fix , feel , climb"

#: Parameters of each command, with the words that they take.
COMMANDS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "go": {"direction": tuple(DIRECTIONS)},
    "take": {"colour": COLOURS},
    "open": {"direction": tuple(DIRECTIONS), "colour": COLOURS},
    "fix": {"direction": tuple(DIRECTIONS)},
    "feel": {},
    "climb": {},
}
_MEANING = {
    "go": "Go into the next room.",
    "take": "Take the key of a colour that lies here.",
    "open": "Open the door in a direction with a key that you hold. A wrong key jams the lock.",
    "fix": "Fix a jammed lock.",
    "feel": "Feel for a ladder in the dark.",
    "climb": "Climb the ladder.",
}


@dataclass(frozen=True)
class State:
    """Everything that moves.

    Attributes:
        room: Where the player is; None in the cellar.
        held: Colours of the keys that are held.
        opened: Colours of the doors that are open.
        jammed: Colours of the doors whose lock is jammed.
        felt: Whether the ladder of the cellar was found.
    """

    room: Room | None
    held: frozenset[str] = frozenset()
    opened: frozenset[str] = frozenset()
    jammed: frozenset[str] = frozenset()
    felt: bool = False


class Rooms:
    """The game as an environment: `reset`, then `step` until the episode is done."""

    def __init__(self) -> None:
        """Begins without a game; `reset` makes one."""
        self._layout: Layout | None = None
        self._state = State(None)
        self.turns = 0
        self.max_turns = max(MOST_TURNS.values())

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """The commands as functions in the form of chat templates, with JSON schemas of their parameters."""
        return tuple(_tool(name, parameters) for name, parameters in COMMANDS.items())

    def reset(self, task: str, seed: int) -> str:
        """Begins a game.

        Args:
            task: See `layout`: `three` or `four`, the rooms along each side, and anything behind it.
            seed: Any integer. Task and seed decide the layout.

        Returns:
            The first observation, which says where everything is but the walls.

        Raises:
            ValueError: The task begins with another word.
        """
        self._layout = layout(task, seed)
        self._state, self.turns, self.max_turns = State(self._layout.start), 0, MOST_TURNS[self._layout.size]
        keys = " . ".join(
            f"{colour} key {name(self._layout.keys[colour])} door {name(self._layout.doors[colour])}"
            for colour in COLOURS
        )
        trap, goal = name(self._layout.trap), name(self._layout.goal)
        return f"goal {goal} . {keys} . trap {trap} . {shown(self._layout, self._state)}"

    def step(self, text: str) -> tuple[str, float, bool, dict[str, Any]]:
        """Plays one turn. No text raises.

        Args:
            text: A command such as `open north red`, or a call as JSON: `{"name": ..., "arguments": {...}}`.

        Returns:
            The observation; the reward, 1 for the turn that enters the goal, else 0; whether the game is over; and
            `success` and `tool_errors` of this turn (1 for a text that is no command), and `truncated` where the
            turns are used up.

        Raises:
            RuntimeError: There was no `reset`, or the game is over.
        """
        rooms = self._layout
        if rooms is None or self.turns == self.max_turns or self._state.room == rooms.goal:
            raise RuntimeError("no game is open; call reset")
        self.turns += 1
        words = command(text)
        if words is None:
            event = _ASKED
        else:
            event, self._state = after(rooms, self._state, words)
        won = self._state.room == rooms.goal
        over = won or self.turns == self.max_turns
        observation = event if won else " . ".join(filter(None, (event, shown(rooms, self._state))))
        info = {"success": won, "tool_errors": int(words is None), "truncated": over and not won}
        return observation, float(won), over, info

    def expert(self) -> list[str]:
        """A shortest list of commands from here into the goal; empty when there."""
        return plan(*self.position)

    @property
    def position(self) -> tuple[Layout, State]:
        """The layout and the state of the game."""
        if self._layout is None:
            raise RuntimeError("no game is open; call reset")
        return self._layout, self._state


def name(room: Room) -> str:
    """A room's name: its column as a letter and its row as a number, `a1` in the north-western corner."""
    return f"{'abcd'[room[0]]}{room[1] + 1}"


def shown(rooms: Layout, state: State) -> str:
    """What the player sees and holds."""
    if state.room is None:
        return "cellar . ladder" if state.felt else "cellar . dark"
    ways = list(rooms.ways[state.room])
    parts = [f"at {name(state.room)}"]
    doors: list[str] = []
    for direction, _ in rooms.neighbours(state.room):
        colour = rooms.doors_at.get((state.room, direction))
        if colour is not None and colour in state.opened:
            ways.append(direction)
        elif colour is not None:
            doors.append(f"{direction} {'jammed' if colour in state.jammed else colour} door")
    parts += [f"ways {' '.join(ways)}"] if ways else []
    parts += doors
    parts += [f"here {colour} key" for colour in _lying(rooms, state)]
    parts += [f"hold {' '.join(colour for colour in COLOURS if colour in state.held)}"] if state.held else []
    return " . ".join(parts)


def command(text: str) -> list[str] | None:
    """The words of a command, from plain words or from a call as JSON; None if the text is no command."""
    words = _call(text) if "{" in text else text.lower().split()
    if not words or words[0] not in COMMANDS:
        return None
    parameters = COMMANDS[words[0]]
    fits = len(words) == len(parameters) + 1 and all(
        word in allowed for word, allowed in zip(words[1:], parameters.values(), strict=True)
    )
    return words if fits else None


def after(rooms: Layout, state: State, words: Sequence[str]) -> tuple[str, State]:
    """What a command does: the event in words, if it needs any, and the state after it.

    What cannot be done costs the turn and nothing else.
    """
    if words[0] in ("feel", "climb") or state.room is None:
        return _in_cellar(rooms, state, words[0])
    if words[0] == "go":
        return _gone(rooms, state, words[1])
    if words[0] == "take":
        if words[1] not in _lying(rooms, state):
            return "no key", state
        return "taken", replace(state, held=state.held | {words[1]})
    colour = rooms.doors_at.get((state.room, words[1]))
    if colour is None or colour in state.opened:
        return "no door", state
    if words[0] == "fix":
        return ("fixed", replace(state, jammed=state.jammed - {colour})) if colour in state.jammed else ("fine", state)
    if words[2] not in state.held:
        return "no key", state
    if colour in state.jammed:
        return "jammed", state
    if words[2] != colour:
        return "jammed", replace(state, jammed=state.jammed | {colour})
    return "opened", replace(state, opened=state.opened | {colour})


def plan(rooms: Layout, state: State, rng: random.Random | None = None) -> list[str]:
    """A shortest list of commands from a state into the goal, by breadth-first search; empty in it.

    Args:
        rooms: The layout.
        state: Where to begin.
        rng: Chooses among several shortest lists; without it, the same one every time.
    """
    found: dict[State, tuple[State, str] | None] = {state: None}
    edge = deque([state])
    while edge:
        here = edge.popleft()
        if here.room == rooms.goal:
            return _back(found, here)
        moves = list(_moves(rooms, here))
        if rng is not None:
            rng.shuffle(moves)
        for words, then in moves:
            if then not in found:
                found[then] = here, words
                edge.append(then)
    raise AssertionError("a layout without a way to its goal")


def _tool(name: str, parameters: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    properties = {key: {"type": "string", "enum": list(words)} for key, words in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": _MEANING[name], "parameters": schema}}


def _call(text: str) -> list[str] | None:
    """The words of a call such as `{"name": "go", "arguments": {"direction": "north"}}`, with tags around it or not."""
    try:
        call, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    except (ValueError, RecursionError):
        return None
    called, given = call.get("name"), call.get("arguments", {})
    if not isinstance(called, str) or called not in COMMANDS or not isinstance(given, dict):
        return None
    if set(given) != set(COMMANDS[called]):
        return None
    return [called, *(str(given[key]).lower() for key in COMMANDS[called])]


def _lying(rooms: Layout, state: State) -> list[str]:
    """Colours of the keys that lie in the player's room."""
    return [colour for colour, room in rooms.keys.items() if room == state.room and colour not in state.held]


def _gone(rooms: Layout, state: State, direction: str) -> tuple[str, State]:
    assert state.room is not None
    colour = rooms.doors_at.get((state.room, direction))
    if colour is not None:
        return ("goal", replace(state, room=rooms.goal)) if colour in state.opened else ("closed", state)
    room = rooms.ways[state.room].get(direction)
    if room is None:
        return "wall", state
    if room == rooms.trap:
        return "fell", replace(state, room=None, felt=False)
    return "", replace(state, room=room)


def _in_cellar(rooms: Layout, state: State, word: str) -> tuple[str, State]:
    """What a command does in the cellar, where only feeling and climbing help; elsewhere these do nothing."""
    if state.room is not None:
        return "nothing", state
    if word == "feel":
        return "found", replace(state, felt=True)
    if word == "climb" and state.felt:
        return "", replace(state, room=rooms.start, felt=False)
    return "nothing", state


def _moves(rooms: Layout, state: State) -> Iterator[tuple[str, State]]:
    """The commands that may help, with the state after each."""
    for words in _sensible(rooms, state):
        yield words, after(rooms, state, words.split())[1]


def _sensible(rooms: Layout, state: State) -> Iterator[str]:
    if state.room is None:
        yield "climb" if state.felt else "feel"
        return
    yield from (f"go {direction}" for direction in rooms.ways[state.room])
    for (room, direction), colour in rooms.doors_at.items():
        if room != state.room:
            continue
        if colour in state.opened:
            yield f"go {direction}"
        elif colour in state.jammed:
            yield f"fix {direction}"
        elif colour in state.held:
            yield f"open {direction} {colour}"
    yield from (f"take {colour}" for colour in _lying(rooms, state))


def _back(found: Mapping[State, tuple[State, str] | None], state: State) -> list[str]:
    words: list[str] = []
    while (step := found[state]) is not None:
        state = step[0]
        words.append(step[1])
    return words[::-1]
