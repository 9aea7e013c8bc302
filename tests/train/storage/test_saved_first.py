"""What the user's own code raises ends a run that is saved, and the message says how to go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import retort
from retort import config as configuration
from retort.core.rollouts import Prompt
from retort.divergences import forward_kl
from retort.errors import RunError, UserError
from retort.estimators import pathwise
from retort.models.in_memory import InMemoryModel
from retort.rollout.plan import Replay, RolloutPlan
from retort.train.events.observe import Silent
from retort.train.given.given import CallerObjects, going_on
from retort.train.learning.control import Control
from retort.train.run import Run
from retort.train.source.cache import RolloutCache
from retort.train.source.partial import Waited
from retort.train.source.source import Source


class Fails:
    """Grades by length; call number `at` raises."""

    def __init__(self, at: int | None = None) -> None:
        self.calls, self.at = 0, at

    def __call__(self, prompt: Prompt, completion: str) -> float:
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("not today")
        return (len(completion) % 7) / 7


class Counts:
    def __init__(self, verifier: Fails) -> None:
        self.verifier, self.calls = verifier, list[int]()

    def on_step(self, run: Any, metrics: Any) -> None:
        self.calls.append(self.verifier.calls)


class Hears(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def mixed() -> retort.Method:
    """The student's answers are graded and kept for replay before the teacher's are graded."""
    plan = RolloutPlan(samples=2, on_policy_fraction=0.5, off_policy="teacher", replay=Replay(capacity=2, fresh=0.5))
    return retort.Method(name="mine", rollout=plan, terms=(retort.Term("pull", pathwise(forward_kl())),))


def numbers(run: Any) -> list[dict[str, Any]]:
    clock = ("time/", "tokens_per_second")
    return [{name: value for name, value in row.items() if not name.startswith(clock)} for row in run.metrics]


def test_a_verifier_that_fails_within_a_step_loses_no_step(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = {name: value for name, value in tiny_run.items() if name not in ("task", "steps")}
    settings |= {"eval": {"problems": 0}, "checkpoint": {"every": 0}}
    grade = Fails()
    counts = Counts(grade)
    shared: dict[str, Any] = {"settings": settings, "steps": 3, "quiet": True}
    whole = retort.distill(**shared, method=mixed(), verifier=grade, out=tmp_path / "whole", callbacks=[counts])
    assert counts.calls[1] < counts.calls[2]

    cut = tmp_path / "cut"
    with pytest.raises(UserError) as caught:
        retort.distill(**shared, method=mixed(), verifier=Fails(at=counts.calls[2]), out=cut)
    said = str(caught.value)
    assert "it raised ZeroDivisionError: not today on the completion" in said
    again = f"retort.distill(resume={str(cut)!r}, method=..., verifier=...), with the same objects"
    assert said.endswith(f"everything is saved at step 2 of 3, go on with: {again}")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["step-2"]

    hears = Hears()
    resumed = retort.distill(resume=cut, method=mixed(), verifier=Fails(), observer=hears)
    assert numbers(resumed) == numbers(whole)
    assert any("the verifier is called Fails" in note and "is not checked" in note for note in hears.said)


def test_what_a_step_put_on_the_shelf_before_it_failed_is_not_saved() -> None:
    saved: list[Any] = []
    control, source = Control([], 0), SimpleNamespace(cache=RolloutCache(), partial=Waited())
    source.mark = lambda: Source.mark(source)  # type: ignore[arg-type]
    control.states["dial"] = {"number": 1}  # type: ignore[dict-item]
    source.cache.visits.append("old")
    run: Any = SimpleNamespace(control=control, source=source, step=2, _go_on="so")
    run.prepared = SimpleNamespace(steps=3)
    run.save = lambda: saved.append((dict(run.control.states), list(run.source.cache.visits)))
    with pytest.raises(UserError, match="bad; everything is saved at step 2 of 3, go on with: so"), Run._safe(run):
        run.source.cache.visits.append("new")
        run.control.states["dial"] = {"number": 2}
        raise UserError("bad")
    assert saved == [({"dial": {"number": 1}}, ["old"])]
    with pytest.raises(RunError, match="^half learnt$"), Run._safe(run):
        raise RunError("half learnt")
    assert len(saved) == 1


def test_a_verifier_that_fails_while_judging_loses_no_step(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = {name: value for name, value in tiny_run.items() if name != "task"}
    settings |= {"eval": {**tiny_run["eval"], "every": 1, "teacher": False}, "checkpoint": {"every": 0}}

    class Late(Fails):
        def __call__(self, prompt: Prompt, completion: str) -> float:
            return super().__call__(prompt, completion) if prompt.id in held and self.at else 0.0

    grade, held = Late(), set[str]()

    class Armed:
        def on_eval(self, run: Any, scores: Any) -> None:
            held.update(prompt.id for prompt in run.prepared.held_out)
            grade.at = 1

    with pytest.raises(UserError, match=r"not today .*; everything is saved at step 1 of 4, go on with: retort.dist"):
        retort.distill(settings=settings, verifier=grade, callbacks=[Armed()], out=tmp_path / "run", quiet=True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "retort train --resume runs/a b"),
        ({"task": "my_rewards:right"}, "retort train --resume runs/a b"),
        ({"data": "in memory: 3 rows, 0", "eval": {"data": "in memory: 3 rows, 1"}}, "retort train --resume runs/a b"),
        ({"student": "in memory: student"}, "retort.distill(resume='runs/a b', student=(model, tokenizer))"),
        ({"task": "in memory: <lambda>"}, "retort.distill(resume='runs/a b', verifier=...)"),
        (
            {"teacher": "in memory: teacher", "base": "in memory: base", "own_method": True},
            "retort.distill(resume='runs/a b', teacher=(model, tokenizer), base=(model, tokenizer), method=...)",
        ),
    ],
)
def test_a_user_is_told_what_leads_on(settings: dict[str, Any], words: str) -> None:
    own = settings.pop("own_method", False)
    config = configuration.resolve({"student": "a", "teacher": "b", "data": "c.jsonl"}, settings)
    found = going_on(config.model_copy(update={"own_method": own}), Path("runs/a b"))
    assert found == (words if words.startswith("retort train") else f"{words}, with the same objects")


def test_what_is_not_checked_of_a_verifier_is_said() -> None:
    held: dict[str, InMemoryModel] = {}
    assert CallerObjects(held).notes == []
    assert CallerObjects(grade=numbers).notes == []  # type: ignore[arg-type]  # importable: its name leads to it
    for grade, name in [(lambda prompt, text: 1.0, "<lambda>"), (Fails(), "Fails")]:
        (note,) = replace(CallerObjects(), grade=grade).notes
        assert f"{name}, as the one that the run was started with" in note
