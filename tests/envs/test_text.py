"""Environments of one's own, `reset` and `step`: what the adapter makes of good and of bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted import ScriptedEngine
from support import make_tokenizer

from retort import config as configuration
from retort import registry as methods
from retort.align.chat import render
from retort.cli import main
from retort.core.random_streams import UniformStream
from retort.core.rollouts import Message, Prompt, Status
from retort.core.sequences import TokenSequence
from retort.envs import registry
from retort.envs.base import Reply
from retort.envs.text import MEASURES, MOST_TURNS, TextEpisodes
from retort.errors import UserError
from retort.rewards.base import graded
from retort.rewards.environment import ByEnvironment
from retort.rollout.engines.base import Request, Sampling
from retort.rollout.episodes import EpisodeSetup, Task, run_episodes
from retort.train.source.source import Source

ROW = Prompt("row 1", (Message("system", "so"), Message("user", "add 3")))


class Counting:
    """Says how many turns there were; done at a `7`; anything but a number is an invalid call."""

    max_turns = 3
    tools = ({"type": "function", "function": {"name": "say", "parameters": {}}},)

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.turns = 0
        self.closed = 0

    def reset(self, task: str, seed: int) -> Any:
        self.begun.append((task, seed))
        return "the answer is"

    def step(self, text: str) -> Any:
        self.turns += 1
        right = text == "7"
        return f"add {self.turns}", 0.5, right, {"success": right, "tool_errors": int(not text.isdigit())}

    def close(self) -> None:
        self.closed += 1


def begun(make: Callable[[], Any], members: int = 1, **settings: Any) -> list[Any]:
    return list(TextEpisodes(make, "mine", **settings).begin_group(ROW, range(members)))


def changed(**methods: Callable[..., Any]) -> type[Counting]:
    return type("Changed", (Counting,), methods)


def raises(*_: object) -> Any:
    raise LookupError("no\nsuch level")


def test_the_first_observation_replaces_the_task_and_replies_are_messages() -> None:
    (episode,) = begun(Counting)
    assert episode.prompt.messages == (Message("system", "so"), Message("user", "the answer is"))
    assert (episode.prompt.id, episode.prompt.tools) == ("row 1", ())
    assert episode.reply("5") == Reply((Message("user", "add 1"),), False, 0.5, measures=measured(0, 0))
    last = episode.reply("7")
    assert (last.over, last.status, last.reward, last.measures) == (True, Status.COMPLETED, 0.5, measured(1, 0))
    episode.close()
    assert episode.game.closed == 1


def measured(success: float, tool_errors: float) -> dict[str, float]:
    return dict(zip(MEASURES, (success, tool_errors), strict=True))


def test_samples_of_a_row_begin_alike_and_rows_do_not() -> None:
    games = [episode.game for episode in begun(Counting, 3)]
    assert games[0].begun == games[1].begun == games[2].begun == [("so\nadd 3", games[0].begun[0][1])]
    (other,) = TextEpisodes(Counting, "mine").begin_group(Prompt("row 2", ROW.messages), [0])
    assert other.game.begun[0][1] != games[0].begun[0][1]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("most", "turns"), [(3, 3), (None, MOST_TURNS)])
def test_an_episode_that_never_ends_is_truncated(most: int | None, turns: int) -> None:
    (episode,) = begun(changed(max_turns=most))
    replies = [episode.reply("5") for _ in range(turns)]
    assert [reply.over for reply in replies] == [False] * (turns - 1) + [True]
    assert replies[-1].status == Status.TRUNCATED


def test_an_environment_may_say_itself_that_something_ran_out() -> None:
    (episode,) = begun(changed(step=lambda self, text: ("so", 0.0, True, {"truncated": True, "success": False})))
    assert episode.reply("5").status == Status.TRUNCATED


@pytest.mark.parametrize("method", ["reset", "step"])
def test_an_environment_that_raises_ends_its_episode_with_its_words(method: str) -> None:
    (episode,) = begun(changed(**{method: raises}))
    reply = episode.reply("5")
    assert (reply.over, reply.status, reply.reward) == (True, Status.ERROR, None)
    assert reply.feedback.startswith("mine: ")
    assert reply.feedback.endswith(f"{method} raised LookupError: no such level")
    episode.close()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda self, text: (b"so", 0.0, False, {}), "turn 1: step gave an observation that is no text but b'so'"),
        (lambda self, text: ("so", "1", False, {}), "turn 1: step gave the reward '1'; give a finite number"),
        (lambda self, text: ("so", float("nan"), False, {}), "gave the reward nan; give a finite number"),
        (lambda self, text: ("so", 0.0, False), "return observation, reward, done and a mapping"),
        (lambda self, text: ("so", 0.0, False, False, {}), "return observation, reward, done and a mapping"),
        (lambda self, text: None, "step returned None; return observation, reward, done and a mapping"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(step: Callable[..., Any], message: str) -> None:
    (episode,) = begun(changed(step=step))
    with pytest.raises(UserError) as raised:
        episode.reply("5")
    assert message in str(raised.value)
    assert "environment mine, row 'row 1'" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_first_observation_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="environment mine, row 'row 1': reset gave an observation that is no text but"):
        begun(changed(reset=lambda self, task, seed: {"text": "so"}))


def test_tools_are_offered_where_they_are_asked_for() -> None:
    assert begun(Counting, tools=True)[0].prompt.tools == Counting.tools
    with pytest.raises(UserError, match=r"rollout.tools: the environment mine has no tools to offer"):
        begun(changed(tools=()), tools=True)
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=True)
    with pytest.raises(UserError, match="leaves out .*tool"):  # a template that cannot show them
        render(begun(Counting, tools=True)[0].prompt, tokenizer)


# --- what episodes make of it ---


def play(
    make: Callable[[], Any], turns: list[str], members: int = 1, tokens: int = 20, setup: EpisodeSetup | None = None
) -> list[Any]:
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=True)
    stop = tokenizer.eos_token_id

    def says(request: Request) -> list[int]:
        turn = request.context.tokens_L.tolist().count(stop) - 2
        written = tokenizer.encode(turns[min(turn // 2, len(turns) - 1)], add_special_tokens=False)
        return [*written, stop, *[stop] * 40]

    engine = ScriptedEngine(tokenizer, stop, torch.zeros(len(tokenizer)), context=128, says=says)
    context = TokenSequence.of(render(ROW, tokenizer))
    tasks = [Task(ROW, context, member, UniformStream(0, "rollouts", member)) for member in range(members)]
    setup = setup or EpisodeSetup(TextEpisodes(make, "mine"), measures=MEASURES)
    return run_episodes(engine, tasks, Sampling(tokens), setup=setup)


def test_what_is_measured_of_the_turns_is_summed_over_the_episode() -> None:
    (rollout,) = play(Counting, ["so", "5", "7"])
    assert rollout.measures == {"success": 1.0, "tool_errors": 1.0, "turns": 3.0}
    assert (rollout.reward, rollout.status) == (1.5, Status.COMPLETED)


def test_an_episode_that_was_cut_off_in_its_first_turn_counts_as_no_success() -> None:
    (rollout,) = play(Counting, ["so so so so"], tokens=3)
    assert rollout.measures == {"success": 0.0, "tool_errors": 0.0, "turns": 1.0}
    assert (rollout.reward, rollout.status) == (None, Status.TRUNCATED)
    (graded_one,) = graded(ByEnvironment("mine"), [rollout])
    assert graded_one.reward == 0.0


def test_an_episode_that_could_not_begin_is_an_error_however_its_turn_ended() -> None:
    for turn, tokens in (("5", 20), ("so so so so", 3)):
        (rollout,) = play(changed(reset=raises), [turn], tokens=tokens)
        assert (rollout.status, rollout.reward) == (Status.ERROR, None)
        assert rollout.feedback == "mine: reset raised LookupError: no such level"


def test_one_broken_episode_leaves_the_others_as_they_are() -> None:
    made = iter([Counting, changed(step=raises), Counting])
    rollouts = play(lambda: next(made)(), ["5", "7"], members=3)
    assert [rollout.status for rollout in rollouts] == [Status.COMPLETED, Status.ERROR, Status.COMPLETED]
    assert rollouts[1].feedback == "mine: turn 1: step raised LookupError: no such level"
    assert [own.reward for own in graded(ByEnvironment("mine"), rollouts)] == [1.0, 0.0, 1.0]


def test_a_method_that_needs_rewards_is_refused_where_the_environment_gives_none() -> None:
    """Rewards that nobody gave must not count as failures."""

    class Unrewarded:
        def begin_group(self, prompt: Prompt, members: Any) -> list[Any]:
            reply = Reply(over=True)
            return [SimpleNamespace(prompt=prompt, reply=lambda _: reply, close=lambda: None) for _ in members]

    rollouts = play(Counting, ["5"], setup=EpisodeSetup(Unrewarded()))
    assert (rollouts[0].status, rollouts[0].reward) == (Status.COMPLETED, None)
    source: Any = SimpleNamespace(grader=ByEnvironment("mine"))
    with pytest.raises(UserError, match="'mine', row 'row 1': it gave a completion no grade, and method 'sod' learns"):
        Source._graded(source, methods.load("sod"), rollouts)
    assert Source._graded(source, methods.load("opd"), rollouts)[0].reward is None


# --- by name ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("room", "there is no environment 'room', and it is no module:name; did you mean 'rooms'?"),
        ("nowhere_at_all:Game", "rollout.env = nowhere_at_all:Game: importing it raised ModuleNotFoundError"),
        ("math:Game", "rollout.env = math:Game: importing it raised AttributeError"),
        ("math:pi", "rollout.env = math:pi: that is a float; name a class with reset and step"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        registry.load(name)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    other = registry.Known("A game.", "retort.tasks.rooms:Rooms", package="nowhere_at_all", extra="games")
    monkeypatch.setattr(registry, "ENVIRONMENTS", {"game": other})
    with pytest.raises(UserError, match=r"needs the package 'nowhere_at_all'; install it with pip install 'retort-"):
        registry.load("game")


def test_the_command_lists_environments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["envs", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(registry.ENVIRONMENTS)
    assert next(row for row in rows if row["name"] == "rooms")["extra"] is None
    assert main(["envs"]) == 0
    assert "rooms\n    Rooms, the built-in text game" in capsys.readouterr().out


def test_settings_name_an_environment_or_take_the_datas_own() -> None:
    assert configuration.resolve({"data": "rooms"}).environment == "rooms"
    assert configuration.resolve({"data": "x.jsonl"}).environment is None
    assert configuration.resolve({"rollout": {"env": "mine:Game"}}).environment == "mine:Game"
    with pytest.raises(UserError, match=r"rollout.env.*there is no environment 'roms'.*did you mean 'rooms'"):
        configuration.resolve({"rollout": {"env": "roms"}})


# --- runs ---

GAME = """
class Game:
    max_turns = 3

    def reset(self, task, seed):
        self.task, self.turns = task, 0
        if BROKEN:
            raise ValueError("lost the game")
        return "the answer is"

    def step(self, text):
        self.turns += 1
        return "add 3", float(self.turns == 2), self.turns == 2, {"success": self.turns == 2}
"""


def settings_of(tmp_path: Path, model_folder: Callable[..., Path], tiny_run: dict[str, Any], name: str) -> list[str]:
    student = model_folder(seed=1, eos="<|im_end|>", chat=True)
    teacher = model_folder(seed=2, hidden_size=24, padded_to=64, eos="<|im_end|>", chat=True)
    flat = {key: value for key, value in tiny_run.items() if not isinstance(value, dict) and key != "task"}
    words = [f"{key}={value}" for key, value in flat.items() if key not in ("student", "teacher", "steps")]
    more = ["rollout.prompts=12", "rollout.max_new_tokens=40", "eval.problems=4", "eval.samples=2", "method.name=opd"]
    models = ["--student", str(student), "--teacher", str(teacher), "--steps", "1", "--out", str(tmp_path / "run")]
    return ["train", *models, *words, *more, "optimizer.batch_tokens=64", f"rollout.env={name}"]


def test_a_run_in_an_environment_of_ones_own(
    tmp_path: Path, model_folder: Callable[..., Path], tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_game.py").write_text(GAME.replace("BROKEN", '"4" in task'))
    assert main(settings_of(tmp_path, model_folder, tiny_run, "my_game:Game")) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "success" in row]
    assert len(steps) == 1
    assert (steps[0]["tool_errors"], steps[0]["reward"]) == (0, steps[0]["success"])
    assert 1 <= steps[0]["turns"] <= 2
    assert 0 < steps[0]["episode_errors"] < 12
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    for name in ("rollouts.jsonl", "answers.jsonl"):
        recorded = [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        several = [row for row in recorded if "turns" in row]
        assert several, f"no episode of {name} came to its second turn"
        for row in several:
            assert (len(row["turns"]), row["turns"][0], row["turns"][-1]) == (len(row["tokens"]), 0, 1)
            assert row["outcomes"][0]["messages"] == [["user", "add 3"]]
    for who in ("student before", "student after"):
        assert results["profile"][who]["by_turn"]["from"] == [1, 2]
    table = results["rows"]
    assert {row["who"] for row in table} == {"student before", "student after", "teacher"}
    assert all(row["success"]["value"] == row["avg@2"]["value"] for row in table)


def test_a_run_whose_every_episode_fails_stops_and_says_why(
    tmp_path: Path,
    model_folder: Callable[..., Path],
    tiny_run: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_broken_game.py").write_text(GAME.replace("BROKEN", "True"))
    words = [*settings_of(tmp_path, model_folder, tiny_run, "my_broken_game:Game"), "eval.problems=0", "checks=skip"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "every episode ended in an error of its environment" in said
    assert "my_broken_game:Game: reset raised ValueError: lost the game" in said


def test_completions_that_nobody_played_are_refused(
    tmp_path: Path, model_folder: Callable[..., Path], tiny_run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*settings_of(tmp_path, model_folder, tiny_run, "rooms"), "cold_start.steps=1"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "in the environment 'rooms' only the student plays; set cold_start.steps=0" in said
