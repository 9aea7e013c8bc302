"""Environments behind servers: what goes over the wire, what is refused, and a server that is killed."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from served import Played, answering

from retort import config as configuration
from retort.align.calls import Call, Malformed
from retort.cli import main
from retort.core.images import PLACEHOLDER, PromptImage
from retort.core.rollouts import Message, Prompt, Status
from retort.envs import registry, wired
from retort.envs.base import FailedEpisode, Reply
from retort.envs.elsewhere import REPLAYED, Elsewhere
from retort.errors import UnreachableError, UserError
from retort.serve import rules
from retort.serve.environment import Episodes, application
from retort.train import runner
from retort.train.models.models import source_of
from retort.wire import Client

ROW = Prompt("row 1", (Message("system", "so"), Message("user", "add 3")), answer="7", privileged={"hint": "four"})
SEEN = Message("user", PLACEHOLDER, images=(PromptImage("0" * 64, b"", (1, 1)),))
_NUMBER = {"type": "object", "properties": {"by": {"type": "number"}}, "required": ["by"]}


class Counting:
    """Adds numbers by calls of a tool, and repeats what it hears."""

    tools = ({"type": "function", "function": {"name": "add", "parameters": _NUMBER}},)

    def reset(self, task: str, seed: int) -> str:
        self.total = 0.0
        return f"{task} {seed}: the sum is 0"

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        self.total += arguments["by"]
        return f"{list(arguments)} {self.total}", 0.25, self.total == 3, {"success": True}

    def step(self, text: str) -> Any:
        return f"{text!r} is no call", 0.0, False, {"tool_errors": 1}

    def expert(self) -> list[str]:
        return [f'{{"name": "add", "parameters": {{"by": {3 - self.total}}}}}']


class Beginless:
    def reset(self, task: str, seed: int) -> str:
        raise OSError("no board")


@dataclass
class Talk:
    """An episode whose reply is a function's."""

    prompt: Prompt
    work: Callable[[], Reply]
    closed: int = 0

    def reply(self, text: str) -> Reply:
        return self.work()

    def close(self) -> None:
        self.closed += 1


class Talks:
    """An environment of episodes, not of text."""

    def __init__(self, work: Callable[[], Reply], change: Callable[[Prompt], Prompt] = lambda prompt: prompt) -> None:
        self.work, self.change = work, change
        self.begun: list[Talk] = []

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Talk]:
        found = [Talk(self.change(prompt), self.work) for _ in members]
        self.begun += found
        return found


RAISES = Talks(lambda: Reply(over=bool(1 / 0)))
SHOWS = Talks(lambda: Reply((SEEN,)))
BEGINS_WITH_IMAGE = Talks(lambda: Reply(over=True), lambda prompt: replace(prompt, messages=(SEEN,)))
ECHO = Talks(lambda: Reply((Message("user", "half of \ud83d", {"name": "echo"}),), measures={"nan": float("nan")}))
ONCE = Talks(lambda: Reply(over=True, reward=0.5))


def here(name: str) -> str:
    return f"{__name__}:{name}"


@contextlib.contextmanager
def played(name: str, *, key: str = "", **settings: Any) -> Iterator[tuple[str, Episodes]]:
    """The address of a server in a thread, and its episodes."""
    episodes = Episodes(here(name), **settings)
    with answering(application(episodes, key=key)) as url:
        yield url, episodes


def there(url: str, **settings: Any) -> Elsewhere:
    return Elsewhere.at([Client(url, patience=5, timeout=20)], **settings)


# --- what goes over the wire ---


def test_calls_and_replies_arrive_as_they_are() -> None:
    turns: list[tuple[str, list[Call | Malformed]]] = [
        ("three", []),
        ("a call", [Call("add", {"by": float("nan")}), Malformed("no JSON", "add")]),
        (
            "another",
            [Call("add", {"by": "\ud83d"}), Call("\ud83d", {}), Call("add", {"by": 10**30, "\ud83d": [1]}, "id1")],
        ),
    ]
    local = registry.load(here("Counting"), tools=True).begin_group(ROW, [0])[0]
    with played("Counting") as (url, episodes):
        served = there(url, tools=True).begin_group(ROW, [0])[0]
        assert served.prompt == local.prompt
        assert served.prompt.tools and served.prompt.privileged == ROW.privileged
        assert served.expert() == local.expert()  # type: ignore[attr-defined]
        for text, calls in turns:
            one, other = (own.called(text, calls) for own in (served, local))  # type: ignore[attr-defined]
            shown = [message.content.replace("\ud83d", "\\ud83d") for message in other.messages]
            assert [message.content for message in one.messages] == shown
            for name in ("over", "reward", "status", "measures", "feedback"):
                assert repr(getattr(one, name)) == repr(getattr(other, name))  # NaN is no number that equals itself
        assert len(episodes) == 1
        served.close()
        assert not len(episodes)


def test_a_prompt_that_stays_is_the_same_object_and_what_is_no_number_is_sent() -> None:
    with played("ECHO") as (url, _):
        episode = there(url).begin_group(ROW, [0])[0]
        assert episode.prompt is ROW
        assert getattr(episode, "called", None) is None and getattr(episode, "expert", None) is None
        reply = episode.reply("so")
        assert reply.messages == (Message("user", "half of \\ud83d", {"name": "echo"}),)
        assert str(reply.measures["nan"]) == "nan"


def test_an_episode_that_cannot_begin_is_a_failed_one() -> None:
    with played("Beginless") as (url, episodes):
        (episode,) = there(url).begin_group(ROW, [0])
        assert isinstance(episode, FailedEpisode)
        assert "no board" in episode.words
        assert not len(episodes)


def test_groups_are_shared_out_by_their_prompt() -> None:
    with played("ONCE") as (one, first), played("ONCE") as (two, second):
        games = registry.load(f"{one}, {two}")
        rows = [replace(ROW, id=f"row {number}") for number in range(12)]
        for row in [*rows, *rows]:
            games.begin_group(row, [0, 1])
        assert len(first) + len(second) == 48
        assert len(first) and len(second)
        for own in (first, second):
            assert len(own) % 4 == 0, "both groups of a prompt are at the same server"


# --- what is done once, and what is dropped ---


@pytest.fixture
def http() -> Iterator[tuple[httpx2.Client, Episodes]]:
    bearer = {"Authorization": "Bearer sesame-4711"}
    with (
        played("Counting", key="sesame-4711", most_open=3) as (url, episodes),
        httpx2.Client(base_url=url, headers=bearer) as client,
    ):
        yield client, episodes


def begin(members: Sequence[int], group: str = "g", **changed: Any) -> dict[str, Any]:
    asked = {"environment": here("Counting"), "tools": False, "group": group, "members": list(members)}
    return {**asked, "prompt": wired.SentPrompt.of(ROW).model_dump(), **changed}


def test_a_turn_is_played_once_however_often_it_is_asked_for(http: tuple[httpx2.Client, Episodes]) -> None:
    client, episodes = http
    for _ in range(2):
        assert client.post(wired.BEGIN, json=begin([0, 1])).status_code == 200
    assert len(episodes) == 2
    turn = {
        "group": "g",
        "index": 1,
        "turn": 1,
        "text": "so",
        "calls": [wired.SentCall.of(Call("add", {"by": 1})).model_dump()],
    }
    said = [client.post(wired.REPLY, json=turn).json() for _ in range(3)]
    assert said[0]["messages"][0]["content"] == "['by'] 1.0"
    assert said == [said[0]] * 3
    for changed in ({"text": "other"}, {"turn": 3}):
        assert client.post(wired.REPLY, json={**turn, **changed}).status_code == 409
    assert client.post(wired.REPLY, json={**turn, "turn": 2}).json()["messages"][0]["content"] == "['by'] 2.0"
    for _ in range(2):
        assert client.post(wired.CLOSE, json=turn).status_code == 200
    assert client.post(wired.REPLY, json=turn).status_code == wired.GONE
    assert client.post(wired.BEGIN, json=begin([0], environment="rooms")).status_code == 409


def test_requests_are_bounded_and_need_a_key(
    http: tuple[httpx2.Client, Episodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, episodes = http
    assert client.post(wired.BEGIN, json=begin([0, 1])).status_code == 200
    full = client.post(wired.BEGIN, json=begin([0, 1], "h"))
    assert (full.status_code, full.headers["Retry-After"]) == (429, "1")
    assert client.post(wired.BEGIN, json=begin([0], "h")).status_code == 200
    assert len(episodes) == 3
    monkeypatch.setattr(wired, "MOST_BYTES", 1000)
    assert (
        client.post(wired.REPLY, content=b"x" * 1001, headers={"Content-Type": "application/json"}).status_code == 413
    )
    for content in (b"", b"{}", b"[" * 500, b'{"group": "g", "index": -1}', b"\xff"):
        refused = client.post(wired.REPLY, content=content, headers={"Content-Type": "application/json"})
        assert refused.status_code == 400
        assert "\n" not in refused.json()["detail"]
    assert client.post(wired.CLOSE, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.get("/v1/models").json()["detail"].startswith("this server plays the environment")
    del client.headers["Authorization"]
    assert client.post(wired.ABOUT, json={"tools": False}).status_code == 401
    assert client.get("/health").json()["open"] == 3


def test_what_nobody_asks_for_is_dropped_and_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ONCE, "begun", [])
    with played("ONCE", idle=0.05) as (url, episodes):
        games = there(url)
        first, second = games.begin_group(ROW, [0, 1])
        while len(episodes):
            threading.Event().wait(0.01)
        assert [own.closed for own in ONCE.begun] == [1, 1]
        episodes.idle = 3600.0  # a slow machine would have it dropped once more
        assert first.reply("so") == Reply(over=True, reward=0.5)
        assert games.metrics() == {REPLAYED: 1.0}
        assert games.metrics() == {REPLAYED: 0.0}
        second.close()
    assert [own.closed for own in ONCE.begun] == [1, 1, 1], "a server that ends closes all"


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RAISES", r"it answers 400: the environment's reply raised ZeroDivisionError: division by zero"),
        ("SHOWS", r"row 'row 1': the reply to turn 1 holds an image"),
    ],
)
def test_a_reply_that_is_none_ends_the_run_in_one_line(name: str, words: str) -> None:
    with played(name) as (url, episodes):
        episode = there(url).begin_group(ROW, [0])[0]
        with pytest.raises(UserError, match=words) as refused:
            episode.reply("so")
        assert "\n" not in str(refused.value)
        assert not len(episodes)


def test_images_are_refused_on_the_way_there_and_back() -> None:
    with played("BEGINS_WITH_IMAGE") as (url, episodes):
        games = there(url)
        with pytest.raises(UserError, match="row 'row 1' holds an image"):
            games.begin_group(replace(ROW, messages=(SEEN,)), [0])
        with pytest.raises(UserError, match="it answers 400: row 'row 1' holds an image"):
            games.begin_group(ROW, [0])
        assert not len(episodes)


def test_what_is_no_server_of_an_environment_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollout.env: http://127.0.0.1:9: .*`retort serve env:NAME` starts one"):
        Elsewhere.at([Client("http://127.0.0.1:9", patience=0)])
    no_environment = "something answers there, but it plays no environment"
    judge = rules.application("rules:countdown", rules.rules_of("rules:countdown"))
    with answering(judge) as url, pytest.raises(UserError, match=f"rollout.env = {url}: {no_environment}"):
        there(url)
    with played("ONCE") as (one, _), played("Counting") as (two, _):
        with pytest.raises(UserError, match="plays .*Counting.* and .*ONCE.*; one run plays one environment"):
            registry.load(f"{one},{two}")
        config = configuration.resolve({"student": "countdown:student"}, with_recipe=False)
        with pytest.raises(UserError, match="it is neither `retort serve MODEL` nor a server of completions"):
            source_of(config.server, one, "teacher", student="countdown:student")
    newer = Episodes(here("ONCE"))
    newer.about = lambda asked: {"protocol": 7}  # type: ignore[method-assign]
    spoken = "speaks version '?7'? of Retort's protocol.*install the same version"
    with answering(application(newer)) as one, pytest.raises(UserError, match=spoken):
        there(one)
    for name in ("rooms,http://127.0.0.1:8000", "http://127.0.0.1:8000, my_module:Game"):
        with pytest.raises(UserError, match="stands beside the address http://127.0.0.1:8000"):
            configuration.resolve({"rollout": {"env": name}})


def test_what_cannot_be_served_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in (
        ("env:roms", "there is no environment 'roms'"),
        ("env:http://127.0.0.1:9", "is a server already"),
        ("env:nowhere_at_all:Game", "importing it raised ModuleNotFoundError"),
    ):
        assert main(["serve", name]) == 2
        assert words in capsys.readouterr().err
    assert main(["serve", "env:rooms", "precision=fp32"]) == 2
    assert "precision" in capsys.readouterr().err


def test_tools_that_there_are_not_and_another_environment_at_the_address() -> None:
    with played("Beginless") as (url, episodes):
        games = there(url)
        episodes.name = "another:Game"
        with pytest.raises(UserError, match="it answers 409: this server plays 'another:Game', and not"):
            games.begin_group(ROW, [0])


# --- a server that is killed ---


@pytest.fixture
def fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    """A process that plays `any_rooms.Fatal`, and is started again whenever it ends."""
    monkeypatch.setenv("FATAL", str(tmp_path))
    process, over = Played(tmp_path, "any_rooms:Fatal"), threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            if process.process.exitcode is not None:
                process.start(process.port)

    thread = threading.Thread(target=watch)
    thread.start()
    yield process
    over.set()
    thread.join()
    process.end()


def test_an_episode_goes_on_where_it_was_or_is_not_learnt_from(fatal: Played) -> None:
    games = there(fatal.url)
    local = registry.load("any_rooms:Fatal").begin_group(ROW, [0])[0]
    episode, other, third = games.begin_group(ROW, [0, 1, 2])
    for one in ("3", "add"):
        assert episode.reply(one) == local.reply(one)
        other.reply(one)
    (fatal.folder / "fatal-0").write_text("3")
    assert episode.reply("7") == local.reply("7")
    assert games.metrics() == {REPLAYED: 1.0}
    (fatal.folder / "otherwise").touch()
    reply = other.reply("7")
    assert (reply.over, reply.status, reply.reward) == (True, Status.ERROR, None)
    assert "this episode is another one there: it begins otherwise than before" in reply.feedback
    (fatal.folder / "otherwise").unlink()
    for number in range(3):
        (fatal.folder / f"fatal-{number}").write_text("1")
    reply = third.reply("3")
    assert (reply.over, reply.status) == (True, Status.ERROR)
    assert "its server ends there" in reply.feedback
    for one in (episode, other, third):
        one.close()


def settings_of(
    tmp_path: Path, model_folder: Callable[..., Path], tiny_run: dict[str, Any], env: str
) -> dict[str, Any]:
    student = model_folder(seed=1, eos="<|im_end|>", chat=True)
    teacher = model_folder(seed=2, hidden_size=24, padded_to=64, eos="<|im_end|>", chat=True)
    flat = {name: value for name, value in tiny_run.items() if not isinstance(value, dict) and name != "task"}
    return {
        **flat,
        "student": str(student),
        "teacher": str(teacher),
        "steps": 2,
        "checks": "skip",
        "method": {"name": "opd"},
        "rollout": {"prompts": 6, "max_new_tokens": 40, "env": env},
        "eval": {"problems": 0},
        "server": {"patience": 60},
    }


def metrics_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith("time/") and "per_second" not in name}
        for row in rows
    ]


def test_a_run_whose_server_is_killed_is_the_undisturbed_one_to_the_last_bit(
    fatal: Played, tmp_path: Path, model_folder: Callable[..., Path], tiny_run: dict[str, Any]
) -> None:
    settings = settings_of(tmp_path, model_folder, tiny_run, "any_rooms:Fatal")
    local = runner.start(configuration.resolve(settings), tmp_path / "local").go()
    for number, turn in enumerate((2, 1)):
        (tmp_path / f"fatal-{number}").write_text(str(turn))
    settings["rollout"]["env"] = fatal.url
    served = runner.start(configuration.resolve(settings), tmp_path / "served").go()
    assert not list(tmp_path.glob("fatal-*")), "no server was killed"
    one, two = metrics_of(local.folder), metrics_of(served.folder)
    replayed = [row.pop(REPLAYED) for row in two if REPLAYED in row]
    assert sum(replayed) > 2
    assert one == two
    weights = [(run.folder / "model" / "model.safetensors").read_bytes() for run in (local, served)]
    assert weights[0] == weights[1]


def test_a_server_that_stays_away_ends_the_run_saved(
    tmp_path: Path, model_folder: Callable[..., Path], tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATAL", str(tmp_path))
    process = Played(tmp_path, "any_rooms:Fatal")
    settings = settings_of(tmp_path, model_folder, tiny_run, process.url) | {"server": {"patience": 0.1}}
    run = runner.start(configuration.resolve(settings), tmp_path / "run")
    (tmp_path / "fatal-0").write_text("1")
    with pytest.raises(UnreachableError, match=r"everything is saved at step 0 of 2, go on with") as raised:
        run.go()
    assert "\n" not in str(raised.value)
    process.again()
    resumed = runner.resume(tmp_path / "run").go()
    assert resumed.step == 2
    process.end()
