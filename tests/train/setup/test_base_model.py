"""A second frozen model in a run: which one it is, what is refused, that a resumed run gets the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retort import api
from retort.errors import UserError
from retort.train import runner
from retort.train.setup.prepare import prepare

METHOD = {"name": "gopd", "reward_weight": 1.5}


def prepared(settings: dict[str, Any], **more: Any) -> Any:
    return prepare(api.assemble(settings, {"method": METHOD}, more))


def test_by_default_it_is_the_student_as_it_was(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    once = {"optimizer": {"updates": 1}}  # the live student is then the one that the advantage is against
    run = runner.start(api.assemble(tiny_run, {"method": METHOD}, once), tmp_path / "run")
    base = run.prepared.teachers.lms.get("base")
    assert base is not None
    before = base.digest()
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    start = {name: p.detach().clone() for name, p in run.student.model.named_parameters()}
    run.go()
    assert base.digest() == before
    moved = dict(run.student.model.named_parameters())
    assert any(not torch.equal(moved[name], start[name]) for name in start)
    for name, parameter in base.model.named_parameters():
        torch.testing.assert_close(parameter.float(), start[name])
    row = json.loads((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()[0])
    columns = row["columns"]
    assert columns["base_logp"] != columns["teacher_logp"]
    shown = [
        1.5 * (t - b) - (s - b)
        for t, b, s in zip(columns["teacher_logp"], columns["base_logp"], columns["student_logp"], strict=True)
    ]
    assert columns["reverse.advantage"] == pytest.approx(shown, abs=1e-4)


def test_at_the_start_the_base_is_the_student(tiny_run: dict[str, Any]) -> None:
    setup = prepared(tiny_run)
    assert setup.teachers.behind(setup.method)["base"] is not setup.teachers.behind(setup.method)["teacher"]
    assert setup.teachers.lms["base"].digest() == setup.student.digest()


def test_a_base_of_ones_own(tiny_run: dict[str, Any], model_folder: Callable[..., Path]) -> None:
    other = model_folder(seed=3)
    setup = prepared(tiny_run, base=str(other))
    assert setup.teachers.lms["base"].name == str(other)
    assert setup.teachers.lms["base"].digest() != setup.student.digest()


def test_what_is_refused(tiny_run: dict[str, Any], model_folder: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="base and teacher are the same model"):
        prepared(tiny_run, base=tiny_run["teacher"])
    with pytest.raises(UserError, match="asks no base model anything"):
        prepare(api.assemble(tiny_run, {"method": {"name": "opd"}, "base": tiny_run["student"]}))
    with pytest.raises(UserError, match="asks no base model anything"):
        prepare(api.assemble(tiny_run, {"method": {**METHOD, "reward_weight": 1.0}, "base": tiny_run["student"]}))
    with pytest.raises(UserError, match="base nowhere/at/all: no such folder"):
        prepared(tiny_run, base="nowhere/at/all")
    # Student and teacher alike leave nothing to learn, unless a base sets them apart from something.
    with pytest.raises(UserError, match="nothing to learn"):
        prepared({**tiny_run, "teacher": tiny_run["student"]})
    setup = prepared({**tiny_run, "teacher": tiny_run["student"]}, base=str(model_folder(seed=3)))
    assert setup.teachers.lms.get("base") is not None


def test_a_checkpoint_knows_its_base(
    tiny_run: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    settings = api.assemble(tiny_run, {"method": METHOD, "base": str(model_folder(seed=3)), "steps": 2})
    runner.start(settings, tmp_path / "run").go()
    page = api.write_report(tmp_path / "run").read_text()
    assert "<dt>Base</dt>" in page
    written = tmp_path / "run" / "config.json"
    config = json.loads(written.read_text())
    assert Path(config["base"]).is_absolute()
    written.write_text(json.dumps({**config, "base": str(model_folder(seed=4))}))
    with pytest.raises(UserError, match="the base model's weights changed since this checkpoint"):
        runner.resume(tmp_path / "run", steps=3)
    written.write_text(json.dumps(config))
    assert runner.resume(tmp_path / "run", steps=3).go().step == 3
