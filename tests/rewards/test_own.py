"""Verifiers of the user's own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support import group_of

import retort
from retort import config as configuration
from retort.cli import main
from retort.errors import UserError
from retort.rewards import ByText, GivesFeedback, GivesParts, verifier_for
from retort.rewards.own import OwnVerifier, imported, is_own, name_of, own_verifier
from retort.types import Message, Prompt

PROMPT = Prompt("row-1", (Message("user", "1 + 1 ="),), answer="2")


def length_in_tens(prompt: Prompt, completion: str) -> float:
    return min(1.0, len(completion) / 10)


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
    assert OwnVerifier(lambda prompt, text: said, "mine")(PROMPT, "2") == reward


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
        OwnVerifier(lambda prompt, text: said, "mine")(PROMPT, "2")
    assert "\n" not in str(caught.value)


def test_what_a_verifier_raises_names_the_row_and_the_completion() -> None:
    def breaks(prompt: Prompt, completion: str) -> float:
        return float(completion)

    with pytest.raises(
        UserError, match="row 'row-1': it raised ValueError: could not convert.* on the completion 'a"
    ) as e:
        OwnVerifier(breaks, "mine")(PROMPT, "a\x1b[2J\n" * 400)
    assert "\n" not in str(e.value)
    assert "\x1b" not in str(e.value)
    assert len(str(e.value)) < 700
    assert isinstance(e.value.__cause__, ValueError)


def test_a_verifier_is_asked_once_about_a_completion_and_its_parts_and_feedback_are_of_one_verdict() -> None:
    asked: list[str] = []

    def grade(prompt: Prompt, completion: str) -> retort.Grade:
        asked.append(completion)
        return retort.Grade(0.0, {"asked": len(asked)}, f"asked {len(asked)} times")

    made = own_verifier(grade, "mine", PROMPT)
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
    made = OwnVerifier(lambda prompt, text: bool(asked.append(prompt)), "mine")
    others = [replace(PROMPT, **{name: value}) for name, value in kinds.items()]
    for prompt in (PROMPT, *others, replace(PROMPT), *others):
        made(prompt, "2")
    assert asked == [PROMPT, *others]


@pytest.mark.parametrize("ends", [lambda: sys.exit(), lambda: sys.exit(3), lambda: sys.exit("enough")])
def test_a_verifier_that_exits_is_one_that_raised(ends: Any) -> None:
    with pytest.raises(UserError, match="row 'row-1': it raised SystemExit"):
        OwnVerifier(lambda prompt, text: ends(), "mine")(PROMPT, "2")


def test_a_verifier_without_feedback_is_none_that_gives_it_and_grades_rows_without_answers() -> None:
    made = own_verifier(length_in_tens, "mine", PROMPT)
    assert not isinstance(made, GivesFeedback)
    assert ByText(made).can_grade(Prompt("2", PROMPT.messages))
    assert not ByText(made).explains
    with pytest.raises(UserError, match="it raised TypeError: .*positional argument"):
        own_verifier(lambda completion: 1.0, "mine", PROMPT)  # type: ignore[arg-type, misc]


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
        assert is_own(name_of(grade))
    with pytest.raises(UserError, match="give a function of a prompt and a completion"):
        name_of(3)  # type: ignore[arg-type]


def test_a_function_is_found_in_the_current_folder(module: Path) -> None:
    assert verifier_for("my_rewards:right", [PROMPT])(PROMPT, "2") == 1.0  # type: ignore[misc]
    assert verifier_for("my_rewards:Strict.grade", [PROMPT])(PROMPT, "3") == 0.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ("my_reward:right", "there is no module 'my_reward' here; start retort in the folder"),
        ("my_rewards.sub:right", "there is no module 'my_rewards.sub' here"),
        ("my_rewards:rihgt", "'my_rewards' .*my_rewards.py. has no 'rihgt'; did you mean 'right'?"),
        ("my_rewards:GOLD", "that is a str; name a function"),
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
