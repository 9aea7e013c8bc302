"""Runs of ropd against a judge by rules on a server that works, fails, dies, or answers something else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chatting import ChatServer
from ruled import SUMS, in_thread

from retort import config as configuration
from retort.cli.trust import measure
from retort.errors import BudgetSpentError, UnreachableError, UserError
from retort.serve.rules import Rules
from retort.train import runner

#: Settings of a run on given models and data, with a judge at an address, or nobody.
Settings = Callable[..., Any]


def judging(rules: Rules = SUMS) -> AbstractContextManager[str]:
    return in_thread(rules, "rules:sums")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with judging() as found:
        yield found


@pytest.fixture(scope="module")
def settings(model_folder: Callable[..., Path], prompts_file: Path) -> Settings:
    """Two steps of four prompts each; unanswered requests are given up at once."""
    student = str(model_folder(seed=1))

    def made(url: str | None, *, method: dict[str, Any] | None = None, **more: Any) -> Any:
        sections: dict[str, Any] = {
            "student": student,
            "data": str(prompts_file),
            "task": "exact",
            "method": {"name": "ropd", "samples": 4, "references": 2, **(method or {})},
            "steps": 2,
            "rollout": {"prompts": 4, "max_new_tokens": 6, "max_prompt_tokens": 32},
            "optimizer": {"learning_rate": 1e-2, "updates": 2},
            "eval": {"problems": 0},
            "precision": "fp32",
            "device": "cpu",
            "checks": "skip",
            "judge": {} if url is None else {"model": url, "patience": 0.0, "attempts": 1},
        }
        return configuration.resolve(configuration.merge(sections, more))

    return made


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(settings: Settings, url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose judge always answered."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runner.start(settings(url), folder).go()
    return folder


def test_a_run_needs_no_teacher_and_says_what_the_judge_found(whole: Path) -> None:
    rows = metrics(whole)
    assert len(rows) == 2
    for row in rows:
        assert row["judge/fallback"] == 0 and row["judge/criteria"] == 4 and row["judge/teacher_score"] > 0.8
        assert 0 < row["judge/score"] == row["reward"] < 1
        assert row["judge/references"] == 1, "both are the sum"
        assert row["reward/verified"] <= row["reward"]
        assert row.get("judge/auc", 1.0) == 1.0, "a rubric by rules never prefers a wrong completion"
        assert {"judge/passed/task", "judge/passed/quality", "judge/passed/reasoning"} <= row.keys()
    purposes = {json.loads(line)["purpose"] for line in (whole / "judge.jsonl").read_text().splitlines()}
    assert purposes == {"reference", "rubric", "verdicts"}
    before = json.loads((whole / "config.json").read_text())
    assert before["teacher"] is None and before["method"]["max_fallback_rate"] == 0.4


def test_the_record_alone_gives_the_same_weights(settings: Settings, whole: Path, tmp_path: Path) -> None:
    runner.start(settings(None, judge={"replay": str(whole)}), tmp_path / "run").go()
    assert weights(tmp_path / "run") == weights(whole)


def failing(share: Callable[[str], bool]) -> Rules:
    """Rules that cannot decide about some problems: the server refuses these requests."""
    return replace(SUMS, problem=lambda text: None if share(text) else SUMS.problem(text))


def test_a_group_without_verdicts_teaches_nothing_and_is_counted(
    settings: Settings, whole: Path, tmp_path: Path
) -> None:
    lost = json.loads((whole / "judge.jsonl").read_text().splitlines()[0])["messages"][0]["content"]
    with judging(failing(lambda text: text == lost)) as found:
        runner.start(settings(found), tmp_path / "run").go()
    row, *_ = metrics(tmp_path / "run")
    assert row["judge/fallback"] == 0.25
    assert row["reward"] == pytest.approx(0.75 * row["judge/score"]), "none of its completions counts"
    assert weights(tmp_path / "run") != weights(whole)


def test_a_judge_that_mostly_fails_ends_the_run_in_a_line(settings: Settings, tmp_path: Path) -> None:
    with judging(failing(lambda text: True)) as found:
        run = runner.start(settings(found), tmp_path / "run")
        with pytest.raises(UnreachableError) as caught:
            run.go()
    said = str(caught.value)
    assert re.match(
        "the judge gave no usable verdict for 4 of 4 groups, more than method.max_fallback_rate = 0.4", said
    )
    assert "\n" not in said and "everything is saved at step 0 of 2" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics(tmp_path / "run")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    """A process that answers every question, by JSON of another schema."""
    found = ChatServer(tmp_path_factory.mktemp("chat"))
    yield found
    found.end()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("-", "form: criteria: Field required"), ("french", "form"), ("cut", "cut"), ("empty", "empty"), ("500", "http")],
)
def test_nonsense_is_never_a_reward(
    settings: Settings, server: ChatServer, fault: str, reason: str, tmp_path: Path
) -> None:
    """The teacher's answers come, two for each of four prompts; whoever should draw a rubric says something else."""
    server.fails(*["-"] * 8, *[fault] * 20)
    run = runner.start(settings(server.url), tmp_path / "run")
    with pytest.raises(UnreachableError, match=f"for 4 of 4 groups.*; the last: {reason}"):
        run.go()


def test_a_budget_ends_the_run_which_goes_on_with_a_higher_one(
    settings: Settings, whole: Path, url: str, tmp_path: Path
) -> None:
    run = runner.start(settings(url, judge={"budget_calls": 20}), tmp_path / "run")
    with pytest.raises(BudgetSpentError, match="saved at step 1 of 2"):
        run.go()
    runner.resume(tmp_path / "run", changed={"judge.budget_calls": 100}).go()
    assert weights(tmp_path / "run") == weights(whole)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_rate_is_a_setting(settings: Settings, rate: float, tmp_path: Path) -> None:
    with judging(failing(lambda text: text[0] in "246")) as found:
        run = runner.start(settings(found, method={"max_fallback_rate": rate}), tmp_path / "run")
        if rate == 0:
            with pytest.raises(UnreachableError, match="max_fallback_rate = 0 allows"):
                run.go()
        else:
            run.go()
            assert sum(row["judge/fallback"] for row in metrics(tmp_path / "run")) > 0


def test_nobody_is_named(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method 'ropd' learns from a rubric.*--judge"):
        runner.start(settings(None), tmp_path / "run")


def test_a_run_is_measured_without_its_judge(settings: Settings, tmp_path: Path) -> None:
    """`retort trust` forces tokens of the base model; the judge, which is gone, has nothing to do with it."""
    with judging() as found:
        given = settings(found, method={"kl_coef": 0.1}, steps=1, rollout={"prompts": 1}, optimizer={"updates": 1})
        runner.start(given, tmp_path / "run").go()
    with pytest.raises(UnreachableError):
        runner.load(tmp_path / "run")
    results = measure(tmp_path / "run", view="base", problems=1, places=1, candidates=1, draws=10)
    assert results["view"] == "base" and results["step"] == 1


@pytest.mark.parametrize("judge", ["model", "replay"])
def test_a_judge_whom_nobody_asks(settings: Settings, url: str, tmp_path: Path, judge: str) -> None:
    given = {"model": url} if judge == "model" else {"model": None, "replay": str(tmp_path)}
    config = settings(url, judge=given).model_copy(update={"method": {"name": "rlsd"}})
    with pytest.raises(UserError, match=f"judge.{judge} = .* is given, but method 'rlsd' asks no judge; leave it out"):
        runner.start(config, tmp_path / "run")


def test_in_an_environment_it_is_refused(settings: Settings, url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in the environment 'rooms' there are turns"):
        runner.start(settings(url, data="rooms", student="rooms:student"), tmp_path / "run")


def test_a_file_of_references_of_another_teacher_is_refused(settings: Settings, url: str, tmp_path: Path) -> None:
    file = tmp_path / "references.jsonl"
    file.write_text('{"format": "retort.references.v1", "teacher": "0123", "name": "gpt at https://api.example.com"}\n')
    with pytest.raises(
        UserError, match=r"\(gpt at https://api.example.com\) than the one .*\(rules:sums at http://127"
    ):
        runner.start(settings(url, judge={"references": str(file)}), tmp_path / "run")


@pytest.mark.slow
def test_a_judge_that_is_killed_ends_the_run_which_goes_on_to_the_same_weights(
    settings: Settings, tmp_path: Path
) -> None:
    """On Countdown, with a judge as a user starts it."""
    countdown: dict[str, Any] = {"student": "countdown:student", "data": "countdown", "task": None}

    def served(port: int) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-u", "-m", "retort", "serve", "rules:countdown", "--port", str(port)]
        process = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, int(re.search(r":(\d+);", process.stdout.readline())[1])  # type: ignore[index]

    def killed(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()

    process, port = served(0)

    class Killer:
        def on_step(self, run: Any, row: Any) -> None:
            killed(process)

    folder = tmp_path / "run"
    asked = settings(f"http://127.0.0.1:{port}", **countdown)
    runner.start(asked, tmp_path / "whole").go()
    run = runner.start(asked, folder)
    run.callbacks = [Killer()]
    with pytest.raises(UnreachableError, match="for 4 of 4 groups.*unreachable.*saved at step 1 of 2"):
        run.go()
    process, _ = served(port)
    try:
        runner.resume(folder).go()
    finally:
        killed(process)
    assert weights(folder) == weights(tmp_path / "whole")


def test_a_judge_that_was_mended_is_asked_once_more(settings: Settings, whole: Path, tmp_path: Path) -> None:
    """Its useless answers are in the record, from which the run would have failed again for ever."""
    broken = [True]
    rules = replace(SUMS, answer=lambda total, seed: "" if broken[0] else str(total))
    with judging(rules) as found:
        run = runner.start(settings(found), tmp_path / "run")
        with pytest.raises(UnreachableError, match="the last: empty.*saved at step 0 of 2"):
            run.go()
        broken[0] = False
        runner.resume(tmp_path / "run").go()
        assert weights(tmp_path / "run") == weights(whole)
        again = runner.start(settings(None, judge={"replay": str(tmp_path / "run")}), tmp_path / "again")
        again.go()
    assert weights(tmp_path / "again") == weights(whole)
