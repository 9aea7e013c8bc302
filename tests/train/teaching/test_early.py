"""Teachers behind a server score a batch when it is written; what is learnt is the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from following import SETTINGS, following
from served import in_thread

from retort import config as configuration
from retort.errors import UnreachableError
from retort.models.load import load_model
from retort.train import runner
from retort.train.teaching.early import Answers, EarlyTeachers
from retort.train.teaching.teachers import Teachers

pytestmark = pytest.mark.usefixtures("models_kept")
init = EarlyTeachers.__init__


@pytest.fixture(scope="module")
def url(model_folder: Callable[..., Path]) -> Iterator[str]:
    folder = model_folder(seed=2, hidden_size=24, padded_to=64)
    lm = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    with in_thread(lm) as found:
        yield found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The thread of each question to the teachers, and how many groups it is about."""
    found, score = list[tuple[str, int]](), Teachers.score

    def noted(self: Teachers, method: Any, groups: Any, *more: Any) -> Any:
        found.append((threading.current_thread().name, len(groups)))
        return score(self, method, groups, *more)

    monkeypatch.setattr(Teachers, "score", noted)
    return found


def settings_of(tiny_run: dict[str, Any], teacher: str, method: dict[str, Any]) -> dict[str, Any]:
    own = {"teacher": teacher, "method": method, "eval": {"problems": 0}, "steps": 3}
    return configuration.merge(tiny_run, {**own, "rollout": {**SETTINGS, "staleness": 1}})


def go(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    with following():
        runner.start(configuration.resolve(settings), folder).go()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "idle/", "tokens_per_second")
    return [{name: value for name, value in row.items() if not name.startswith(clock)} for row in rows]


METHODS = pytest.mark.parametrize("method", [{"name": "gkd"}, {"name": "opd"}], ids=["whole distribution", "sampled"])


@METHODS
def test_a_teacher_behind_a_server_is_asked_about_each_group_when_it_is_written(
    tiny_run: dict[str, Any],
    tmp_path: Path,
    url: str,
    asked: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, Any],
) -> None:
    """What is learnt depends neither on when it is asked nor on the order in which groups are written."""
    settings = settings_of(tiny_run, url, method)
    early = go(settings, tmp_path / "early")
    assert {thread.rpartition("_")[0] for thread, _ in asked} == {"retort-teachers"}
    assert [groups for _, groups in asked] == [1] * 3 * 4
    monkeypatch.setattr(Answers, "hear", lambda self, group: None)
    assert go(settings, tmp_path / "late") == early
    monkeypatch.setattr(EarlyTeachers, "__init__", lambda self, teachers, requests: init(self, teachers, 0))
    asked.clear()
    together = go(settings, tmp_path / "together")
    assert asked == [("retort-writer", 4)] * 3
    for one, other in zip(early, together, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_a_group_is_asked_about_while_others_are_written(
    tiny_run: dict[str, Any], tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, asked, waited = Teachers.score, threading.Semaphore(0), list[bool]()

    def noted(*arguments: Any) -> Any:
        asked.release()
        return score(*arguments)

    def between(place: int) -> None:
        """The last of the four visits waits until the other three are asked about, beside what went before."""
        if place == 0:
            waited.append(all(asked.acquire(timeout=60) for _ in range(4 if waited else 3)))

    monkeypatch.setattr(Teachers, "score", noted)
    with following():
        run: Any = runner.start(configuration.resolve(settings_of(tiny_run, url, {"name": "opd"})), tmp_path / "run")
        run.prepared.other_engine.between = between
        run.go()
    assert waited == [True] * 3


def test_a_teacher_in_this_process_is_asked_when_the_student_is_at_rest(
    tiny_run: dict[str, Any], tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    go(settings_of(tiny_run, tiny_run["teacher"], {"name": "gkd"}), tmp_path / "run")
    assert asked == [("MainThread", 4)] * 3


def test_a_teacher_that_has_to_know_the_students_ids_is_asked_when_they_are_known(
    tiny_run: dict[str, Any], tmp_path: Path, url: str, asked: list[tuple[str, int]]
) -> None:
    go(settings_of(tiny_run, url, {"name": "lgr", "top_k": 4}), tmp_path / "run")
    assert [own for own in asked if own[0] == "MainThread"] == [("MainThread", 4)] * 3
    assert len(asked) == 3 + 3 * 4


def test_a_teacher_that_is_gone_is_said_at_the_step_that_needs_it(
    tiny_run: dict[str, Any], tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, settings = Teachers.score, settings_of(tiny_run, url, {"name": "gkd"})
    whole = go(settings, tmp_path / "whole")
    calls = list[int]()

    def gone(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 * 4 + 1:
            raise UnreachableError("the teacher is gone")
        return score(*arguments)

    monkeypatch.setattr(Teachers, "score", gone)
    with pytest.raises(UnreachableError, match="the teacher is gone; everything is saved at step 2 of 3, go on with"):
        go(settings, tmp_path / "cut")
    with following():
        runner.resume(tmp_path / "cut").go()
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
