"""Environments of other packages: what of them is Retort's, and, marked `envs`, the packages themselves."""

from __future__ import annotations

import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

import pytest

from retort import config as configuration
from retort.core.rollouts import Message, Prompt, Status
from retort.data import load_prompts
from retort.envs import actions, reasoning, registry
from retort.envs.base import FailedEpisode, Reply
from retort.envs.behind import BehindExpert
from retort.envs.gym import Gymnasium
from retort.errors import UserError


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (" Go  North\n", "go north"),
        ("<think>go south</think> go north", "go north"),
        ("I do <action>go</action>, no, <action>take key</action>", "take key"),
        ('<tool_call>{"name": "act", "arguments": {"action": "go north"}}</tool_call>', "go north"),
        ('{"name": "act", "parameters": {"action": "Go"}}', "go"),
        ('{"name": "say", "arguments": {"action": "go"}}', '{"name": "say", "arguments": {"action": "go"}}'),
        ('{"name": "act", "arguments": 5}', '{"name": "act", "arguments": 5}'),
        ('{"' + '[{"a":' * 20, ('{"' + '[{"a":' * 20).lower()),
        ("a" * 10_000, "a" * (actions.MOST_ACTION + 1)),
        ("", ""),
    ],
)
def test_what_the_action_of_a_turn_is(text: str, action: str) -> None:
    assert actions.action_of(text) == action


def test_a_task_is_a_kind_and_a_seed() -> None:
    assert actions.numbered("simple 17", 5) == ("simple", 17)
    assert actions.numbered("simple", 5) == ("simple", 5)
    assert actions.numbered(" simple ²", 5) == ("simple ²", 5)
    rows = actions.numbered_rows("simple", 1_000_000)
    assert [next(rows)["prompt"], next(rows)["id"]] == ["simple 1000000", "simple-1000001"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment `game` that makes rows."""
    module = ModuleType("game_of_tests")
    module.rows = actions.numbered_rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "game_of_tests", module)
    known = registry.Known("A game.", "retort.tasks.rooms:Rooms", rows="game_of_tests:rows", example="small")
    missing = registry.Known("Missing.", "x:y", package="nowhere_at_all", extra="games", rows="x:rows", example="x")
    monkeypatch.setattr(
        registry, "ENVIRONMENTS", {"game": known, "missing": missing, "rooms": registry.ENVIRONMENTS["rooms"]}
    )


def test_an_environment_makes_its_data(made: None) -> None:
    prompts = load_prompts("game:small", limit=3)
    assert [(prompt.id, prompt.text) for prompt in prompts] == [(f"small-{n}", f"small {n}") for n in range(3)]
    assert load_prompts("game:small", split="test", limit=1)[0].id == "small-1000000"
    assert len(load_prompts("game:small")) == registry.ROWS
    assert configuration.resolve({"data": "game:small"}).environment == "game"
    assert configuration.resolve({"data": "rooms:three"}).environment is None
    assert configuration.resolve({"data": "owner/game:small"}).environment is None


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("game", "train", "data 'game': name what the environment shall make, as in 'game:small'"),
        ("game:", "train", "data 'game:': name what the environment shall make, as in 'game:small'"),
        ("game:small", "dev", "game:small: has no split 'dev'; it has train and test"),
        (
            "missing:x",
            "train",
            "needs the package 'nowhere_at_all'; install it with pip install 'retort-distill[games]'",
        ),
        ("rooms", "train", "no such file: rooms"),
    ],
)
def test_data_that_no_environment_makes_are_refused(made: None, source: str, split: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_prompts(source, split=split)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


# --- with the packages ---


def needed(name: str) -> None:
    if not registry.ENVIRONMENTS[name].installed:
        pytest.skip(f"needs the package {registry.ENVIRONMENTS[name].package}; `make envs` installs it")


def begun(name: str, kind: str, number: int = 0) -> Any:
    prompts = load_prompts(f"{name}:{kind}", limit=number + 1)
    episode = registry.load(name).begin_group(prompts[number], [0])[0]
    assert not isinstance(episode, FailedEpisode), episode.words
    return episode


def played(episode: Any, texts: list[str]) -> list[Reply]:
    replies: list[Reply] = []
    for text in texts:
        replies.append(episode.reply(text))
        if replies[-1].over:
            break
    episode.close()
    return replies


GAMES = {
    "textworld": ["simple", "coin_collector-3", "treasure_hunter-3", "cooking-1", "custom-3"],
    "minigrid": ["BabyAI-GoToLocal-v0", "BabyAI-PickupLoc-v0", "BabyAI-UnlockLocal-v0"],
}
EXPERTS = [(name, kind) for name, kinds in GAMES.items() for kind in kinds]


@pytest.mark.envs
@pytest.mark.parametrize(("name", "kind"), EXPERTS)
def test_the_expert_wins_and_is_replayed(name: str, kind: str) -> None:
    needed(name)
    episode = begun(name, kind)
    way = episode.expert()
    assert way
    *between, last = played(episode, way)
    assert (last.over, last.status, last.measures["success"]) == (True, Status.COMPLETED, 1.0)
    assert (last.reward or 0) > 0
    assert not any(reply.over or reply.measures["success"] or reply.measures["tool_errors"] for reply in between)
    (prompt,) = load_prompts(f"{name}:{kind}", limit=1)
    (behind,) = BehindExpert(registry.load(name), 1).begin_group(prompt, [0])
    assert [message.content for message in behind.prompt.messages if message.role == "assistant"] == way[:-1]
    assert played(behind, way[-1:])[0].measures["success"] == 1.0


@pytest.mark.envs
@pytest.mark.parametrize(
    ("name", "kind"),
    [("textworld", "coin_collector-3"), ("minigrid", "BabyAI-GoToLocal-v0"), ("gymnasium", "FrozenLake-v1")],
)
def test_rows_have_different_games_and_a_row_the_same_one(name: str, kind: str) -> None:
    needed(name)
    first = [begun(name, kind, number) for number in (0, 0, 2)]
    texts = [episode.prompt.text for episode in first]
    assert texts[0] == texts[1]
    if name != "gymnasium":  # whose lake is always the same
        assert texts[0] != texts[2]
    for episode in first:
        episode.close()


@pytest.mark.envs
@pytest.mark.parametrize(
    ("name", "kind"),
    [("textworld", "coin_collector-3"), ("minigrid", "BabyAI-GoToLocal-v0"), ("gymnasium", "FrozenLake-v1")],
)
@pytest.mark.parametrize("text", ["", "save", "go north. save", "go north then save", "\x00\ud800", "x" * 100_000])
def test_what_is_no_action_costs_the_turn(name: str, kind: str, text: str) -> None:
    needed(name)
    (reply,) = played(begun(name, kind), [text])
    assert (reply.over, reply.reward, reply.measures) == (False, 0.0, {"success": 0.0, "tool_errors": 1.0})


@pytest.mark.envs
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("textworld:simpel", "textworld has no kind of game 'simpel'; did you mean 'simple'?"),
        ("textworld:cooking-9", "cooking has levels 1 to 3, as in 'cooking-3'"),
        ("textworld:simple-2", "simple has no levels"),
        ("minigrid:BabyAI-GoToLocal-v9", "did you mean 'BabyAI-GoToLocal-v0'?"),
        ("gymnasium:CartPole-v1", "its observations are no text, and it cannot be rendered as one"),
        ("gymnasium:Nowhere-v1", "gymnasium makes no environment 'Nowhere-v1'"),
        ("reasoning_gym:countdwn", "reasoning_gym has no generator 'countdwn'; did you mean 'countdown'?"),
        ("reasoning_gym:composite", "reasoning_gym's generator 'composite' makes no row 0+0: "),
        ("reasoning_gym:game_of_life_halting", "takes even the answer 'zzz' for right"),
    ],
)
def test_what_a_package_does_not_have_is_refused_in_one_line(source: str, message: str) -> None:
    needed(source.partition(":")[0])
    with pytest.raises(UserError) as raised:
        load_prompts(source, limit=1)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.envs
def test_a_view_of_the_grid_in_words() -> None:
    needed("minigrid")
    import numpy as np
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX

    from retort.envs.grid import seen

    view = np.zeros((7, 7, 3), dtype=int)
    view[3, :6, 0] = OBJECT_TO_IDX["empty"]
    view[1, 4] = OBJECT_TO_IDX["door"], COLOR_TO_IDX["red"], STATE_TO_IDX["locked"]
    view[3, 3] = OBJECT_TO_IDX["ball"], COLOR_TO_IDX["blue"], 0
    view[5, 6] = OBJECT_TO_IDX["key"], COLOR_TO_IDX["grey"], 0
    view[0, 0, 0] = OBJECT_TO_IDX["wall"]
    assert seen(view, "green box") == (
        "grey key 2 right\nblue ball 3 ahead\nlocked red door 2 ahead 2 left\nfree ahead: 2\nyou hold a green box"
    )


@pytest.mark.envs
def test_gymnasium_with_texts_and_with_lists() -> None:
    needed("gymnasium")
    import gymnasium

    class Echo(gymnasium.Env[str, str]):
        observation_space = gymnasium.spaces.Text(100)
        action_space = gymnasium.spaces.Text(5, min_length=1)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
            return f"seed {seed}", {}

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            return action, 0.5, action == "end", False, {"success": action == "end"}

    gymnasium.register("Echo-v0", entry_point=lambda **_: Echo())
    try:
        game = Gymnasium()
        assert game.reset("Echo-v0 17", 5) == "seed 17"
        assert game.step("Go") == ("Go", 0.5, False, {"success": False, "tool_errors": 0, "truncated": False})
        assert game.step("too long")[3] == {"tool_errors": 1}
        assert game.step("end")[2:] == (True, {"success": True, "tool_errors": 0, "truncated": False})
    finally:
        del gymnasium.registry["Echo-v0"]
    taxi = Gymnasium()
    seen = taxi.reset("Taxi-v4 3", 0)
    assert seen.startswith("actions: south, north, east, west, pick up, drop off\n+---------+")
    assert "(blue " in seen
    assert "(magenta " in seen
    assert "\x1b" not in seen
    assert taxi.step("north")[3]["tool_errors"] == 0


# --- reasoning-gym ---


def problem(name: str, number: int = 0) -> tuple[Prompt, Any]:
    needed("reasoning_gym")
    prompt = load_prompts(f"reasoning_gym:{name}", limit=number + 1)[number]
    return prompt, registry.load("reasoning_gym").begin_group(prompt, [0])[0]


@pytest.mark.envs
def test_a_problem_is_graded_by_its_own_grader() -> None:
    prompt, episode = problem("basic_arithmetic", 1)
    assert prompt.id == "basic_arithmetic-0+1"
    assert prompt.answer is not None
    for text in (prompt.answer, f"<think>1</think> <answer>7</answer> so <answer> {prompt.answer} </answer>"):
        assert episode.reply(text) == Reply(over=True, reward=1.0, measures={"success": 1.0, "tool_errors": 0.0})
    wrong = episode.reply("none")
    assert wrong.reward is not None
    assert wrong.reward < 1
    assert wrong.measures["success"] == 0.0


#: Generators whose problems have no answer beside them, only a grader.
WITHOUT_ANSWERS = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
#: Generators that `rows` refuses, see above.
REFUSED = {"composite", "game_of_life_halting"}


@pytest.mark.envs
def test_all_generators_make_rows_and_grade_their_own_answers_as_right() -> None:
    needed("reasoning_gym")
    names = reasoning._worker().ask({"name": "", "first": 0, "index": 0})["unknown"]
    assert len(names) == 106
    without: set[str] = set()
    for name in sorted({*names} - REFUSED):
        row = next(reasoning.rows(name, 0))
        (episode,) = reasoning.ReasoningGym().begin_group(Prompt(row["id"], (Message("user", row["prompt"]),)), [0])
        if "answer" in row:
            assert episode.reply(f"<answer>{row['answer']}</answer>").reward == 1.0, name
        else:
            without.add(name)
        assert (episode.reply("zzz").reward or 0.0) < 1, name
    assert without == WITHOUT_ANSWERS


@pytest.mark.envs
@pytest.mark.parametrize(
    "text", ["9**9**9**9", "__import__('time').sleep(600)", "__import__('os')._exit(3)", "(" * 9000]
)
def test_an_answer_that_is_code_neither_hangs_nor_ends_the_run(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Countdown's grader evaluates the answer."""
    monkeypatch.setattr(reasoning, "CLOCK", 5.0)
    monkeypatch.setattr(reasoning, "_worker", lru_cache(reasoning._Worker))
    _, episode = problem("countdown")
    reply = episode.reply(text)
    assert (reply.over, reply.status, reply.measures["success"]) == (True, Status.COMPLETED, 0.0)
    assert 0 <= (reply.reward or 0) < 1


@pytest.mark.envs
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "mine"}, "row 'mine' is none of reasoning_gym's"),
        ({"messages": (Message("user", "what is 2 + 2?"),)}, "makes another problem of this id"),
        ({"id": "nothing-0+1"}, "makes another problem of this id"),
    ],
)
def test_a_row_of_another_kind_is_an_error_and_no_wrong_answer(change: dict[str, Any], words: str) -> None:
    from dataclasses import replace

    prompt, _ = problem("basic_arithmetic")
    (episode,) = registry.load("reasoning_gym").begin_group(replace(prompt, **change), [0])
    reply = episode.reply("4")
    assert (reply.over, reply.status, reply.reward) == (True, Status.ERROR, None)
    assert words in reply.feedback
