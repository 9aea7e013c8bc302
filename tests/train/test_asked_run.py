"""Runs that ask a model behind a real server: on record, within a budget, through its death, and again from the record.

The rewards of these runs are what the server answers, so weights are the same only where its answers were.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chatting import MODEL, ChatServer

from retort import config as configuration
from retort.chat import ChatRequest, Failure, Question, Unusable
from retort.chat.asking import Asking
from retort.chat.fence import between
from retort.cli.commands import main
from retort.core.rollouts import Group, Message, Prompt
from retort.errors import BudgetSpentError, UserError
from retort.rewards.base import Grade, Grader
from retort.train import runner
from retort.train.runner import Run

KEY = "sk-very-secret-0123456789"


def digest(text: str) -> str:
    try:
        return json.loads(text)["digest"]
    except ValueError:
        raise Unusable("it is no JSON") from None


class ByAnswers(Grader):
    """A grader whose reward is a number that the asked model gives; a group with a failure gets none but zeros."""

    def __init__(self, asker: Asking) -> None:
        self.asker = asker

    @property
    def name(self) -> str:
        return "answers"

    def can_grade(self, prompt: Prompt) -> bool:
        return True

    def grade(self, group: Group) -> list[Grade | None]:
        texts = [between(f"{own.prompt.text} {own.text}") for own in group]
        requests = [ChatRequest("grade", (Message("user", text),), 32) for text in texts]
        found = self.asker.ask([Question(request, digest) for request in requests])
        failed = any(isinstance(own, Failure) for own in found)
        return [Grade(0.0 if failed or isinstance(own, Failure) else int(own[:4], 16) / 2**16) for own in found]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    made = ChatServer(tmp_path_factory.mktemp("server"))
    yield made
    made.end()


@pytest.fixture(scope="module")
def base(server: ChatServer, model_folder: Callable[..., Path], prompts_file: Path) -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETORT_JUDGE_KEY", KEY)
        yield settings_of(server, model_folder, prompts_file)


def settings_of(server: ChatServer, model_folder: Callable[..., Path], prompts_file: Path) -> dict[str, Any]:
    return {
        "student": str(model_folder(seed=1)),
        "data": str(prompts_file),
        "task": "exact",
        "method": {"name": "ropd", "samples": 4},
        "precision": "fp32",
        "device": "cpu",
        "checks": "skip",
        "steps": 3,
        "rollout": {"prompts": 2, "max_new_tokens": 4},
        "optimizer": {"learning_rate": 1e-2},
        "eval": {"problems": 0},
        "checkpoint": {"every": 1},
        "judge": {"model": server.url, "patience": 0.0, "requests": 2},
    }


@pytest.fixture(scope="module")
def whole(base: dict[str, Any], server: ChatServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    server.fails()
    run = started(base, tmp_path_factory.mktemp("run") / "whole").go()
    (run.folder / "asked").write_text(str(len(server.asked)))
    return run


@pytest.fixture
def settings(base: dict[str, Any], server: ChatServer, whole: Run) -> dict[str, Any]:
    server.fails()
    return base


def asking(run: Run) -> Run:
    """A run whose rewards are those of the model that it asks."""
    assert run.prepared.asker is not None
    run.source.rubric_grader = ByAnswers(run.prepared.asker)
    return run


def started(settings: dict[str, Any], out: Path, **judge: Any) -> Run:
    return asking(runner.start(configuration.resolve(settings, {"judge": judge}), out))


def same(one: Run, other: Run) -> bool:
    pairs = zip(one.student.model.parameters(), other.student.model.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def exchanges(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "judge.jsonl").read_text().splitlines()]
    return [row for row in rows if "messages" in row]


def test_every_exchange_is_on_record_and_the_key_is_nowhere(
    whole: Run, server: ChatServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = exchanges(whole.folder)
    assert len(rows) == int((whole.folder / "asked").read_text())
    assert {row["step"] for row in rows} == {1, 2, 3}
    assert all(row["text"] and row["prompt_tokens"] == 7 for row in rows)
    assert sum(row["judge/calls"] for row in whole.metrics) == len(rows)
    server.fails(*["key"] * 4, "401", "-")
    with pytest.raises(UserError, match="RETORT_JUDGE_KEY"):
        started(settings, tmp_path / "refused").go()
    files = [file for folder in (tmp_path, whole.folder) for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def test_a_run_from_the_record_alone_has_the_same_weights(
    whole: Run, server: ChatServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    again = started(settings, tmp_path / "again", model=None, patience=120.0, requests=4, replay=str(whole.folder)).go()
    assert same(whole, again)
    assert server.asked == []
    third = started(settings, tmp_path / "third", replay=str(again.folder / "judge.jsonl")).go()
    assert same(whole, third), "the record of a run from a record is whole"
    with pytest.raises(UserError, match=r"judge.replay holds no answer.*everything is saved at step"):
        started({**settings, "seed": 5}, tmp_path / "other", replay=str(whole.folder)).go()


def test_a_run_that_ends_anywhere_goes_on_and_pays_once(
    whole: Run, server: ChatServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(BudgetSpentError, match=r"judge.budget_calls = 11.*--resume"):
        started(settings, tmp_path / "ended", budget_calls=11).go()
    assert len(server.asked) == 11
    with (tmp_path / "ended" / "judge.jsonl").open("a") as file:
        file.write('{"step": 2, "key": "half a li')  # the writer was killed
    with pytest.raises(BudgetSpentError, match="11 calls"):
        asking(runner.resume(tmp_path / "ended")).go()
    run = asking(runner.resume(tmp_path / "ended", changed={"judge.budget_calls": 100})).go()
    assert same(whole, run)
    assert len(server.asked) == len(exchanges(whole.folder))
    assert json.loads((run.folder / "config.json").read_text())["judge"]["budget_calls"] == 100


def test_a_server_that_dies_and_comes_back(server: ChatServer, settings: dict[str, Any], tmp_path: Path) -> None:
    server.fails(*["-"] * 9, "kill")
    run = started(settings, tmp_path / "dead").go()
    server.process.wait(timeout=60)
    rows = exchanges(run.folder)
    assert next(row["reason"] for row in rows if "reason" in row) == "unreachable"
    assert len([row for row in rows if row["calls"] == 0]) > 0, "after some failures nobody is asked"
    assert run.metrics[2]["judge/unusable"] == 8
    assert same(run, started(settings, tmp_path / "again", replay=str(run.folder)).go()), "failures are on record, too"
    server.start(server.port)
    server.fails()
    assert started(settings, tmp_path / "back").go().metrics[2]["judge/unusable"] == 0


def test_a_damaged_record_or_another_model_is_one_line(
    whole: Run, server: ChatServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(whole.folder, tmp_path / "whole")
    file = tmp_path / "whole" / "judge.jsonl"
    good = file.read_bytes()
    file.write_bytes(good.replace(b'"text"', b'"test"', 1))
    with pytest.raises(UserError, match="exchange 1 is not one"):
        started(settings, tmp_path / "a", replay=str(file))
    file.write_bytes(good + b"{}{\n" + good)
    with pytest.raises(UserError, match="is damaged"):
        started(settings, tmp_path / "a", replay=str(file))
    file.write_bytes(b"")
    with pytest.raises(UserError, match="no answers"):
        started(settings, tmp_path / "a", replay=str(file))
    with pytest.raises(UserError, match="no such file"):
        started(settings, tmp_path / "a", replay=str(tmp_path / "gone"))
    file.write_bytes(good)
    server.fails(models="other-judge")
    with pytest.raises(UserError, match="another model"):
        asking(runner.resume(tmp_path / "whole", steps=4)).go()
    assert file.read_bytes() == good


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ({"model": "http://127.0.0.1:9", "budget_calls": 0}, "judge.budget_calls: a budget of 0 allows nothing"),
        ({"model": "http://127.0.0.1:9", "budget_money": 3.0}, "judge.budget_money needs judge.price_prompt"),
        ({"budget_tokens": 5}, "judge.budget_tokens does nothing without a model"),
        ({"model": "somewhere", "timeout": 3.0}, "judge.timeout is for a model at an address"),
        ({"model": "student"}, "a model that learns cannot be asked"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], tmp_path: Path, judge: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        runner.start(configuration.resolve({**settings, "judge": judge}), tmp_path / "run")


def test_a_model_that_does_not_exist_ends_the_command(
    settings: dict[str, Any], server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["student", "data", "task", "checks", "device"]
    arguments = ["train", "--judge", server.url, "judge.name=gone", "--out", str(tmp_path / "run"), "--method", "ropd"]
    assert main([*arguments, *(f"{name}={settings[name]}" for name in words)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("retort: ")]
    assert f"'gone', and it has ['{MODEL}']" in line
    assert not (tmp_path / "run").exists()
    assert main(["train", "--resume", str(tmp_path), "judge.model=x"]) == 2
    assert "--resume keeps the settings" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["a folder", "a model of the run"])
def test_a_model_of_this_process_is_asked(
    settings: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path, named: str
) -> None:
    folder = str(model_folder(seed=3, chat=True))
    more: dict[str, Any] = {"judge": {"model": folder}}
    if named != "a folder":
        more = {"judge": {"model": "critic"}, "models": {"critic": {"path": folder}}}
    run = asking(runner.start(configuration.resolve({**settings, **more, "steps": 1}), tmp_path / "run")).go()
    rows = exchanges(run.folder)
    assert rows
    assert all(row["completion_tokens"] > 0 for row in rows)
    assert len({row["model"] for row in rows}) == 1
    replayed = started(
        {**settings, "steps": 1}, tmp_path / "again", model=None, patience=120.0, requests=4, replay=str(run.folder)
    )
    assert same(run, replayed.go())


def test_settings_of_a_model_that_only_judges_count(
    settings: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = str(model_folder(seed=3, chat=True))

    def asker(**more: Any) -> Any:
        judge = {"judge": {"model": "critic"}, "models": {"critic": {"path": folder, **more}}}
        return runner.start(configuration.resolve({**settings, **judge}), tmp_path / "run").prepared.asker

    judge = asker(offload="disk").model
    lm = judge.engine.lm
    assert lm.offload.storage == "disk"
    reads = lm.offload.reads
    (said,) = judge.chat([ChatRequest("trial", (Message("user", "What is 1 + 2?"),), max_tokens=4)])
    assert said.completion_tokens > 1
    assert lm.offload.reads == reads + 1, "once for the whole answer"
    assert not lm.offload.here
    with pytest.raises(UserError, match="critic .*: offload = cpu changes nothing in a run on a CPU"):
        asker(offload="cpu")
    with pytest.raises(UserError, match="critic .*: offload = disk is for whole weights, and bits rounds these"):
        asker(bits=8, offload="disk")
