"""Verifiers of the user's own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from support import group_of

import retort
from retort import config as configuration
from retort.cli import main
from retort.core.rollouts import Group, Message, Prompt
from retort.errors import UserError
from retort.rewards import ByText, GivesFeedback, GivesParts, grader_for, verifier_for
from retort.rewards.user import (
    FunctionVerifier,
    ObjectGrader,
    imported,
    is_user_defined,
    name_of,
    user_grader,
    user_verifier,
)
from retort.train.source.source import Source

PROMPT = Prompt("row-1", (Message("user", "1 + 1 ="),), answer="2")


def length_in_tens(prompt: Prompt, completion: str) -> float:
    return min(1.0, len(completion) / 10)


class Closest:
    """Right are the completions to a prompt that no other is closer to its answer than; keeps the groups it saw."""

    def __init__(self) -> None:
        self.seen: list[Group] = []

    def grade(self, group: Group) -> list[retort.Grade | None]:
        self.seen.append(group)
        far = [abs(len(rollout.text) - len(str(rollout.prompt.answer))) for rollout in group]
        return [retort.Grade(float(own == min(far)), {"far": own}, f"{own} too long or short") for own in far]


class Says:
    """Answers what it was made with."""

    def __init__(self, said: Any) -> None:
        self.said = said

    def grade(self, group: Group) -> Any:
        return self.said(group) if callable(self.said) else self.said


class Judge:
    def grade(self, prompt: Prompt, completion: str) -> float:
        return 1.0

    __call__ = grade


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of the user's in the current folder."""
    (tmp_path / "my_rewards.py").write_text(
        "import retort\n"
        "GOLD = '2'\n"
        "def right(prompt, completion):\n"
        "    good = completion.split() == prompt.answer.split()\n"
        "    return retort.Grade(float(good), {'letters': len(completion)}, None if good else 'no')\n"
        "class Strict:\n"
        "    @staticmethod\n"
        "    def grade(prompt, completion):\n"
        "        return completion == prompt.answer\n"
        "class Longest:\n"
        "    def grade(self, group):\n"
        "        most = max(len(rollout.text) for rollout in group)\n"
        "        return [len(rollout.text) == most for rollout in group]\n"
        "longest = Longest()\n"
    )
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "ends_rewards.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "lacks_rewards.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("my_rewards", "lacks_rewards"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        (1, 1.0),
        (0.25, 0.25),
        (True, 1.0),
        (numpy.float32(0.5), 0.5),
        (torch.tensor(1.0), 1.0),
        (retort.Grade(0.5), 0.5),
    ],
)
def test_whatever_is_a_number_is_a_reward(said: Any, reward: float) -> None:
    assert FunctionVerifier(lambda prompt, text: said, "mine")(PROMPT, "2") == reward


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (None, "its reward is None"),
        ("1", "its reward is '1'"),
        (float("nan"), "its reward is nan"),
        (float("inf"), "its reward is inf"),
        (1.5, "its reward is 1.5; return a number from 0"),
        (-1, "its reward is -1"),
        (10**400, "its reward is 1000"),
        (torch.ones(2), "its reward is tensor"),
        ((1.0, "well done"), "its reward is"),
        (retort.Grade(2.0), "its reward is 2.0"),
        (retort.Grade(1.0, {"style": "good"}), "its part 'style' is 'good'; a part is a finite number"),
        (retort.Grade(1.0, [1.0]), "its parts are"),  # type: ignore[arg-type]
        (retort.Grade(1.0, feedback=3), "its feedback is 3"),  # type: ignore[arg-type]
    ],
)
def test_whatever_is_no_reward_is_one_line_that_names_verifier_and_row(said: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=f"verifier 'mine', row 'row-1': {complaint}") as caught:
        FunctionVerifier(lambda prompt, text: said, "mine")(PROMPT, "2")
    assert "\n" not in str(caught.value)


def test_what_a_verifier_raises_names_the_row_and_the_completion() -> None:
    def breaks(prompt: Prompt, completion: str) -> float:
        return float(completion)

    with pytest.raises(
        UserError, match="row 'row-1': it raised ValueError: could not convert.* on the completion 'a"
    ) as e:
        FunctionVerifier(breaks, "mine")(PROMPT, "a\x1b[2J\n" * 400)
    assert "\n" not in str(e.value)
    assert "\x1b" not in str(e.value)
    assert len(str(e.value)) < 700
    assert isinstance(e.value.__cause__, ValueError)


def test_a_verifier_is_asked_once_about_a_completion_and_its_parts_and_feedback_are_of_one_verdict() -> None:
    asked: list[str] = []

    def grade(prompt: Prompt, completion: str) -> retort.Grade:
        asked.append(completion)
        return retort.Grade(0.0, {"asked": len(asked)}, f"asked {len(asked)} times")

    made = user_verifier(grade, "mine", PROMPT)
    assert asked == [""]
    assert isinstance(made, GivesFeedback)
    assert isinstance(made, GivesParts)
    verdict = retort.Grade(0.0, {"asked": 2.0}, "asked 2 times")
    assert ByText(made).grade(group_of(PROMPT, ["1", "1"])) == [verdict, verdict]
    assert (made.parts(PROMPT, "1"), made.feedback(PROMPT, "1")) == ({"asked": 2}, "asked 2 times")
    assert asked == ["", "1"]


def test_rows_that_differ_in_anything_have_verdicts_of_their_own() -> None:
    kinds = {
        "answer": "3",
        "response": "three",
        "privileged": {"hint": "count"},
        "clean": (Message("user", "1 + 1"),),
        "domain": "sums",
        "tools": ({"name": "sum"},),
        "plain": False,
        "messages": (Message("system", "1 + 1 ="),),
    }
    asked: list[Prompt] = []
    made = FunctionVerifier(lambda prompt, text: bool(asked.append(prompt)), "mine")
    others = [replace(PROMPT, **{name: value}) for name, value in kinds.items()]
    for prompt in (PROMPT, *others, replace(PROMPT), *others):
        made(prompt, "2")
    assert asked == [PROMPT, *others]


@pytest.mark.parametrize("ends", [lambda: sys.exit(), lambda: sys.exit(3), lambda: sys.exit("enough")])
def test_a_verifier_that_exits_is_one_that_raised(ends: Any) -> None:
    with pytest.raises(UserError, match="row 'row-1': it raised SystemExit"):
        FunctionVerifier(lambda prompt, text: ends(), "mine")(PROMPT, "2")


def test_a_verifier_without_feedback_is_none_that_gives_it_and_grades_rows_without_answers() -> None:
    made = user_verifier(length_in_tens, "mine", PROMPT)
    assert not isinstance(made, GivesFeedback)
    assert ByText(made).can_grade(Prompt("2", PROMPT.messages))
    assert not ByText(made).explains
    with pytest.raises(UserError, match="it raised TypeError: .*positional argument"):
        user_verifier(lambda completion: 1.0, "mine", PROMPT)  # type: ignore[arg-type, misc]


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ([1.0], "it gave 1 grades for 2 completions; give one for each"),
        ([], "it gave 0 grades for 2 completions"),
        (None, "it raised TypeError: 'NoneType' object is not iterable on 2 completions, first 'a'"),
        ([1.0, float("nan")], "its reward is nan; return a number from 0"),
        ([0.5, retort.Grade(0.5, {"style": "good"})], "its part 'style' is 'good'"),
        (lambda group: 1 / 0, "it raised ZeroDivisionError: division by zero on 2 completions"),
        (lambda group: sys.exit(3), "it raised SystemExit: 3 on 2 completions"),
    ],
)
def test_whatever_is_no_list_of_grades_is_one_line_that_names_verifier_and_row(said: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=f"verifier 'mine', row 'row-1': {complaint}") as caught:
        ObjectGrader(Says(said), "mine").grade(group_of(PROMPT, ["a", "b"]))
    assert "\n" not in str(caught.value)


def test_an_object_that_grades_groups_is_tried_on_two_empty_completions() -> None:
    closest = Closest()
    made = user_grader(closest, "closest", PROMPT)
    assert [[rollout.text for rollout in group] for group in closest.seen] == [["", ""]]
    assert made.explains and made.can_grade(replace(PROMPT, answer=None))
    said = made.grade(group_of(PROMPT, ["12", "3", "456"]))
    assert said[1] == retort.Grade(1.0, {"far": 0.0}, "0 too long or short")
    assert [grade and grade.reward for grade in said] == [0.0, 1.0, 0.0]
    silent = user_grader(Says(lambda group: [None, *[numpy.float32(0.5)] * (len(group) - 1)]), "silent", PROMPT)
    assert not silent.explains
    assert silent.grade(group_of(PROMPT, ["1", "2"])) == [None, retort.Grade(0.5)]
    with pytest.raises(UserError, match="verifier 'short', row 'row-1': it gave 1 grades for 2"):
        user_grader(Says([0.0]), "short", PROMPT)


def test_what_can_be_called_is_a_function_whatever_else_it_has() -> None:
    made = user_grader(Judge(), "judge", PROMPT)
    assert isinstance(made, ByText)
    assert made.grade(group_of(PROMPT, ["1"])) == [retort.Grade(1.0)]


def test_a_method_that_learns_from_rewards_needs_a_grade_for_every_completion() -> None:
    group = list(group_of(PROMPT, ["1", "2"]))
    method: Any = SimpleNamespace(name="rlsd", needs_rewards="advantage", grading=None)
    source: Any = SimpleNamespace(grader=ObjectGrader(Says([1.0, None]), "mine"))
    with pytest.raises(
        UserError, match="verifier 'mine', row 'row-1': it gave a completion no grade, and method 'rlsd'"
    ):
        Source._graded(source, method, group)
    method.needs_rewards = None
    assert [rollout.reward for rollout in Source._graded(source, method, group)] == [1.0, None]


def test_a_run_is_graded_by_an_object_that_compares_the_rollouts_to_a_prompt(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    settings = {name: value for name, value in tiny_run.items() if name not in ("task", "steps")}
    closest, method = Closest(), {"name": "opd", "samples": 3}
    run = retort.distill(settings=settings, method=method, steps=1, verifier=closest, out=tmp_path / "run", quiet=True)
    tried, *seen = closest.seen
    assert len(tried) == 2
    assert {len(group) for group in seen} == {2, 3}  # eval.samples, and the method's
    assert all(len({(rollout.prompt.id, rollout.visit) for rollout in group}) == 1 for group in seen)
    assert run.metrics[0]["reward"] > 0
    assert run.results["rows"][0]["reward/far"]["value"] >= 0
    assert run.results["task"] == "in memory: Closest"
    with pytest.raises(UserError, match="the verifier of this run was given as an object.*verifier=Closest"):
        retort.distill(resume=tmp_path / "run", steps=2, quiet=True)


def test_the_name_of_a_function_leads_to_it_or_says_that_it_does_not() -> None:
    assert name_of(length_in_tens) == f"{__name__}:length_in_tens"
    assert imported(name_of(length_in_tens)) is length_in_tens
    loose = lambda prompt, completion: 1.0  # noqa: E731
    for grade, name in [
        (loose, "test_the_name_of_a_function_leads_to_it_or_says_that_it_does_not.<locals>.<lambda>"),
        (Judge(), "Judge"),
        (Judge().grade, "Judge.grade"),
        (functools.partial(length_in_tens), "partial"),
    ]:
        assert name_of(grade) == f"in memory: {name}"
        assert is_user_defined(name_of(grade))
    with pytest.raises(UserError, match="give a function of a prompt and a completion"):
        name_of(3)  # type: ignore[arg-type]


def test_a_function_is_found_in_the_current_folder(module: Path) -> None:
    assert verifier_for("my_rewards:right", [PROMPT])(PROMPT, "2") == 1.0  # type: ignore[misc]
    assert verifier_for("my_rewards:Strict.grade", [PROMPT])(PROMPT, "3") == 0.0  # type: ignore[misc]
    for task, texts in [("my_rewards:right", ["2", "33"]), ("my_rewards:longest", ["22", "3"])]:
        found = grader_for(task, [PROMPT])
        assert found is not None and found.name == task
        assert [grade and grade.reward for grade in found.grade(group_of(PROMPT, texts))] == [1.0, 0.0]
    with pytest.raises(UserError, match="my_rewards:longest: that grades groups, not single completions"):
        verifier_for("my_rewards:longest", [PROMPT])


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ("my_reward:right", "there is no module 'my_reward' here; start retort in the folder"),
        ("my_rewards.sub:right", "there is no module 'my_rewards.sub' here"),
        ("my_rewards:rihgt", "'my_rewards' .*my_rewards.py. has no 'rihgt'; did you mean 'right'?"),
        ("my_rewards:GOLD", "that is a str; name a function .*, or an object with a method grade"),
        ("broken_rewards:right", "importing 'broken_rewards' raised ZeroDivisionError: division by zero"),
        ("ends_rewards:right", "importing 'ends_rewards' raised SystemExit: 3"),
        ("lacks_rewards:right", r"no module 'lacks_rewards' here \(it imports 'no_such_library'\)"),
        ("in memory: right", "the verifier 'right' was given as an object and cannot be imported"),
    ],
)
def test_a_function_that_cannot_be_had_is_one_line(module: Path, task: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        verifier_for(task, [PROMPT])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ("exat", "there is no task 'exat', and it is no module:function; did you mean 'exact'?"),
        ("rewards.py:right", "write it as rewards:right"),
        ("a b:c", "it is no module:function"),
        ("rewards:", "it is no module:function"),
    ],
)
def test_a_task_that_is_none_is_refused(task: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        configuration.resolve({"task": task})


def test_a_run_is_graded_by_a_function_that_its_settings_name(
    module: Path, tiny_run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sections = ("rollout", "optimizer", "eval")
    words = [
        f"{key}={value}" for key, value in tiny_run.items() if key not in (*sections, "checkpoint", "task", "steps")
    ]
    words += [f"{name}.{key}={value}" for name in sections for key, value in tiny_run[name].items()]
    assert main(["train", *words, "--steps", "1", "--out", "run", "task=my_rewards:right"]) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert "my_rewards:right" in printed
    run = retort.distill(resume="run", steps=2, quiet=True)
    assert [row["reward/letters"] > 0 for row in run.metrics] == [True, True]
    assert run.results["task"] == "my_rewards:right"
    assert run.results["rows"][0]["reward/letters"]["value"] > 0
    with pytest.raises(UserError, match="its verifier is my_rewards:right, not "):
        retort.distill(resume="run", steps=3, verifier=length_in_tens)
