"""The game Rooms: it needs no model, and no text or seed breaks it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.tasks.rooms import Rooms, rows
from retort.tasks.rooms.episodes import games, played, seed_of
from retort.tasks.rooms.game import COMMANDS, State, command, plan
from retort.tasks.rooms.layout import COLOURS, Layout, layout

SEEDS = range(1000)
RECORDED = (
    "goal b2 . red key a1 door b3 . blue key c3 door a2 . trap b1 . at c1 . ways south west",
    "goal a1 . red key a3 door b1 . blue key c2 door a2 . trap a4 . at b2 . ways north south west",
)


@pytest.mark.parametrize("size", ["three", "four"])
def test_the_expert_wins_every_game(size: str) -> None:
    game = Rooms()
    for seed in SEEDS if size == "three" else SEEDS[:100]:
        game.reset(f"{size} {seed}", seed)
        ways = game.expert()
        results = [game.step(words) for words in ways]
        assert [done for _, _, done, _ in results] == [False] * (len(ways) - 1) + [True]
        assert [reward for _, reward, _, _ in results] == [0.0] * (len(ways) - 1) + [1.0]
        assert results[-1][3] == {"success": True, "tool_errors": 0, "truncated": False}
        assert all(not info["success"] and not info["tool_errors"] for _, _, _, info in results[:-1])
        assert 4 <= len(ways) < game.max_turns
        assert game.expert() == []


def without(rooms: Layout, colour: str) -> Layout:
    return replace(rooms, keys={other: room for other, room in rooms.keys.items() if other != colour})


def test_several_ways_lead_to_the_goal() -> None:
    several = 0
    for seed in SEEDS[:60]:
        rooms = layout("three", seed)
        for colour in COLOURS:  # either key alone
            assert f"take {colour}" not in plan(without(rooms, colour), State(rooms.start))
        found = {tuple(plan(rooms, State(rooms.start), random.Random(draw))) for draw in range(8)}
        assert len({len(words) for words in found}) == 1, "one of them is not a shortest"
        several += len(found) > 1
    assert several > 10


def test_a_game_repeats_from_task_and_seed() -> None:
    def told(task: str, seed: int) -> list[object]:
        game, rng = Rooms(), random.Random(3)
        found: list[object] = [game.reset(task, seed)]
        over = False
        while not over:
            name = rng.choice(sorted(COMMANDS))
            found.append(game.step(" ".join([name, *(rng.choice(words) for words in COMMANDS[name].values())])))
            over = found[-1][2]  # type: ignore[index]
        return found

    assert all(told("three 5", seed) == told("three 5", seed) for seed in SEEDS[:50])
    assert told("three 5", 1)[0] != told("three 6", 1)[0] != told("three 6", 2)[0]


def test_a_layout_is_the_same_on_every_machine() -> None:
    """Recorded once: models were trained on these."""
    game = Rooms()
    assert game.reset("three 1", 7) == RECORDED[0]
    assert game.reset("four 1", 7) == RECORDED[1]


@given(st.one_of(st.text(), st.sampled_from([f"{name} north red" for name in COMMANDS])), st.integers())
@settings(max_examples=100, deadline=None)
def test_no_text_raises(text: str, seed: int) -> None:
    game = Rooms()
    game.reset("three", seed)
    observation, reward, done, info = game.step(text)
    assert observation and reward == 0.0 and not done
    assert info["tool_errors"] == (command(text) is None)


def calls() -> Iterator[tuple[str, list[str] | None]]:
    go = {"name": "go", "arguments": {"direction": "north"}}
    yield json.dumps(go), ["go", "north"]
    yield f"<tool_call>\n{json.dumps(go)}\n</tool_call>", ["go", "north"]
    yield json.dumps({"name": "open", "arguments": {"colour": "Red", "direction": "east"}}), ["open", "east", "red"]
    yield json.dumps({"name": "feel"}), ["feel"]
    yield json.dumps({**go, "arguments": {"direction": "up"}}), None
    yield json.dumps({**go, "arguments": {"direction": ["north"]}}), None
    yield json.dumps({**go, "arguments": "north"}), None
    yield json.dumps({**go, "name": ["go"]}), None
    yield json.dumps({"name": "go", "arguments": {}}), None
    yield "{" * 100_000, None
    yield '{"name": "go", "arguments": ' + "[" * 100_000, None
    yield "{1: 2}", None
    yield " GO  north ", ["go", "north"]
    yield "go", None
    yield "go north now", None
    yield "", None


@pytest.mark.parametrize(("text", "words"), list(calls()), ids=lambda value: str(value)[:30])
def test_commands_are_words_or_calls(text: str, words: list[str] | None) -> None:
    assert command(text) == words


def test_an_unknown_command_gets_words_back_and_is_counted() -> None:
    game = Rooms()
    seen = game.reset("three", 1)
    observation, reward, done, info = game.step("dance")
    assert observation.startswith("what ? go , take , open")
    assert observation.endswith(seen[seen.index("at ") :])
    assert (reward, done, info["tool_errors"]) == (0.0, False, 1)


def test_turns_run_out() -> None:
    for size, most in (("three", 16), ("four", 24)):
        game = Rooms()
        game.reset(size, 1)
        results = [game.step("climb") for _ in range(most)]
        assert [done for _, _, done, _ in results] == [False] * (most - 1) + [True]
        assert results[-1][3] == {"success": False, "tool_errors": 0, "truncated": True}
        with pytest.raises(RuntimeError, match="call reset"):
            game.step("climb")


def test_a_wrong_key_jams_the_lock_until_it_is_fixed() -> None:
    game = Rooms()
    game.reset("three", 4)
    rooms, _ = game.position
    # To the red door with the blue key.
    for words in plan(replace(rooms, goal=rooms.doors["red"], doors={}, walls=rooms.walls), State(rooms.start)):
        game.step(words)
    game._state = replace(game._state, held=frozenset(COLOURS))
    direction = next(way for way, room in rooms.neighbours(rooms.doors["red"]) if room == rooms.goal)
    told = [game.step(f"{words}")[0].split(" . ")[0] for words in (
        f"fix {direction}", f"go {direction}", f"open {direction} blue", f"open {direction} red", f"fix {direction}",
        f"open {direction} red", f"open {direction} red", f"go {direction}",
    )]  # fmt: skip
    assert told == ["fine", "closed", "jammed", "jammed", "fixed", "opened", "no door", "goal"]


def test_the_trapdoor_leads_to_a_cellar_with_a_ladder_back_to_the_start() -> None:
    fell = 0
    for seed in SEEDS[:40]:
        game = Rooms()
        game.reset("three", seed)
        rooms, state = game.position
        ways = [way for way, room in rooms.ways[state.room].items() if room == rooms.trap]  # type: ignore[arg-type]
        if not ways:
            continue
        fell += 1
        assert game.expert()[0] != f"go {ways[0]}"
        asked = (f"go {ways[0]}", "go north", "climb", "feel", "climb")
        told = [game.step(words)[0] for words in asked]
        assert told[:4] == ["fell . cellar . dark", *["nothing . cellar . dark"] * 2, "found . cellar . ladder"]
        assert game.position[1] == state
    assert fell > 5


def test_tools_are_schemas_of_the_commands() -> None:
    found = {tool["function"]["name"]: tool["function"]["parameters"] for tool in Rooms().tools}
    assert set(found) == set(COMMANDS)
    assert found["open"]["required"] == ["direction", "colour"]
    assert found["open"]["properties"]["colour"] == {"type": "string", "enum": ["red", "blue"]}
    json.dumps(Rooms().tools)


def test_observations_are_short() -> None:
    longest = max(
        len(turn.observation.split()) for game in islice(games("train"), 60) for turn in played(*game, random.Random(1))
    )
    assert longest <= 40


@pytest.mark.parametrize("task", ["", "five", "7", "threefold"])
def test_an_unknown_task_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match="a task of Rooms begins with three or four"):
        Rooms().reset(task, 1)


def test_splits_share_no_layout() -> None:
    def layouts(split: str) -> set[str]:
        return {Rooms().reset(row["prompt"], seed_of(row["id"])) for row in rows(split, 300)}  # type: ignore[arg-type]

    train, held_out = layouts("train"), layouts("held_out")
    assert not train & held_out
    assert len(train) > 295
    assert rows("held_out", 5) == rows("held_out", 9)[:5]


def test_the_expert_goes_on_after_its_mistakes() -> None:
    whole = [played(*game, random.Random(1), mistakes=0.3) for game in islice(games("train"), 40)]
    wrong = sum(not turn.experts for turns in whole for turn in turns)
    assert 0.1 < wrong / sum(map(len, whole)) < 0.4
    for (row, task), turns in zip(games("train"), whole, strict=False):
        game = Rooms()
        assert game.reset(task, seed_of(row)) == turns[0].observation
        for turn, then in pairwise(turns):
            before = len(game.expert())
            assert game.step(turn.command)[0] == then.observation
            assert not turn.experts or len(game.expert()) == before - 1
