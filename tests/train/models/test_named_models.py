"""Models by name: one way to say each, what is refused, and a third model in a run, on disk and in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import retort
from retort import api
from retort import config as configuration
from retort.config.sections import shorthands
from retort.config.toml import overrides
from retort.divergences import reverse_kl
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Method, Term
from retort.preflight.doctor import examine_setup
from retort.rollout.plan import RolloutPlan
from retort.teachers.view import View
from retort.train import runner
from retort.train.given.given import CallerObjects, going_on
from retort.train.output.identity import identity
from retort.train.output.summary import summary
from retort.train.setup import pair
from retort.train.setup.memory import forecast
from retort.train.setup.prepare import prepare
from retort.train.teaching.digests import digests, refuse_others

CRITIC = Method(
    RolloutPlan(),
    (Term("learn", pathwise(reverse_kl())), Term("stay", pathwise(reverse_kl()), against="kept", coef=0.1)),
    {"teacher": View(), "kept": View(model="critic")},
    name="two",
)


@pytest.fixture
def with_critic(tiny_run: dict[str, Any], model_folder: Callable[..., Path]) -> dict[str, Any]:
    optimizer = {**tiny_run["optimizer"], "schedule": "constant"}  # the same however long a run is
    return {**tiny_run, "optimizer": optimizer, "models": {"critic": {"path": str(model_folder(seed=3))}}}


def resolved(*layers: Mapping[str, Any]) -> configuration.Config:
    return configuration.resolve(*layers, own=CRITIC)


def test_a_shorthand_and_its_table_are_one_setting() -> None:
    named = ("student", "teacher", "base")
    short = resolved({name: f"the/{name}" for name in named})
    table = resolved({"models": {name: {"path": Path(f"the/{name}")} for name in named}})
    assert short == table and short.models == {}
    assert short.model_paths == {name: f"the/{name}" for name in named}
    assert resolved({"teacher": "x", "models": {"teacher": {"path": "x"}}}).teacher == "x"
    assert resolved(overrides(["models.critic.path=DIR"]), {"student": "s"}).model_paths == {
        "student": "s",
        "critic": "DIR",
    }
    # Later layers win, whichever way each says it.
    assert resolved({"teacher": "x"}, overrides(["models.teacher.path=y"])).teacher == "y"
    assert resolved({"models": {"teacher": {"path": "x"}}}, {"teacher": "y"}).teacher == "y"
    assert api.assemble({"models": {"student": {"path": "x"}}}).teacher is None, "no built-in recipe beneath"


@pytest.mark.parametrize("name", ["student", "teacher", "base"])
def test_a_model_that_is_named_twice_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is named twice: {name} = 'x' and models.{name}.path = 'y'"):
        shorthands({name: "x", "models": {name: {"path": "y"}}})
    with pytest.raises(UserError, match=f"{name} is given twice, as an argument"):
        api.doctor(**{name: "x"}, models={name: "x"})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"{name} is given twice, as an argument"):
        api.doctor(**{name: "x"}, settings={"models": {name: {"path": "y"}}})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("models", "complaint"),
    [
        ("x", "models is a table: give models.NAME.path, not 'x'"),
        ({"critic": "x"}, "models.critic: give its folder or hub name as models.critic.path, not 'x'"),
        ({"critic": {}}, "models.critic: give its folder or hub name as models.critic.path"),
        ({"critic": {"path": "x", "dtype": "bf16"}}, "unknown key 'models.critic.dtype'; a model has a path"),
        ({"teacher": {"path": "x", "weights": 1}}, "unknown key 'models.teacher.weights'"),
        ({"a.b": {"path": "x"}}, "'a.b' cannot be a model's name"),
        ({"\x1b[31m": {"path": "x"}}, "cannot be a model's name"),
        ({"critic": {"path": 3}}, "models.critic.path: Input should be a valid string (it is 3)"),
        ({"critic": {"path": ""}}, "models.critic.path"),
    ],
)
def test_what_is_no_table_of_models_is_one_line(models: Any, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved({"models": models})
    assert complaint in str(caught.value) and "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_objects_by_name_are_one_line_if_they_are_none() -> None:
    with pytest.raises(UserError, match="give a mapping by name"):
        api.doctor(models=["x"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="models: critic is None"):
        api.doctor(models={"critic": None})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="critic is a int; give a model of transformers with its tokenizer"):
        api.doctor(models={"critic": 3})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="models.critic.path is given twice, as an argument"):
        api.doctor(models={"critic": "x"}, settings={"models": {"critic": {"path": "y"}}})


def test_every_model_is_asked_and_every_asked_model_is_there() -> None:
    config = resolved({"models": {"critic": {"path": "x"}}})
    assert pair.further(config, CRITIC) == {"critic": "x"}
    with pytest.raises(UserError, match="view 'kept' of method 'two' is of a model 'critic'.*did you mean 'critics'"):
        pair.further(resolved({"models": {"critics": {"path": "x"}}}), CRITIC)
    with pytest.raises(UserError, match="name it with models.critic.path"):
        pair.further(resolved({}), CRITIC)
    with pytest.raises(UserError, match="models.critic.path = x is given, but no view of method 'plain'"):
        pair.further(config, replace(CRITIC, name="plain", views={"teacher": View(), "kept": View()}))
    # A phase before the method asks, too.
    plain = replace(CRITIC, name="plain", views={"teacher": View(), "kept": View()}, before=(1, CRITIC))
    assert pair.further(config, plain) == {"critic": "x"}


def test_a_frozen_model_cannot_move_whatever_it_is_called() -> None:
    from retort.teachers.moving import ema

    with pytest.raises(UserError, match="a view of the critic cannot have moving weights"):
        View(model="critic", weights=ema(0.1))


def test_all_that_counts_models_counts_a_third(with_critic: dict[str, Any], model_folder: Callable[..., Path]) -> None:
    setup = prepare(api.assemble(with_critic, own=CRITIC), CRITIC)
    assert list(setup.lms) == ["student", "teacher", "critic"]
    critic = setup.lms["critic"]
    assert critic.name == str(model_folder(seed=3)) and not any(p.requires_grad for p in critic.model.parameters())
    assert setup.teachers.behind(setup.method)["kept"].lm is critic  # type: ignore[attr-defined]
    assert digests(setup.teachers)["models"] == {
        "teacher": setup.teachers.lms["teacher"].digest(),
        "critic": critic.digest(),
    }  # type: ignore[union-attr]
    known = identity(setup)["digests"]
    assert {"the critic's weights", "the critic's tokenizer", "the prompts as the critic reads them"} <= known.keys()
    assert summary(setup)["model 'critic'"] == f"{critic.name}, frozen"
    fewer = {name: own for name, own in setup.teachers.models.items() if name != "critic"}
    without = replace(setup, teachers=replace(setup.teachers, models=fewer))
    with_it, alone = (
        forecast(replace(one, method=replace(CRITIC, views={"teacher": View(), "kept": View()})))
        for one in (setup, without)
    )
    assert with_it.models - alone.models == sum(p.numel() * p.element_size() for p in critic.model.parameters())
    assert [check.name for check in examine_setup(setup, quick=True).checks][:2] == ["tokenizer", "tokenizer of critic"]
    state = {**digests(setup.teachers), "precision": setup.student.precision}
    refuse_others(Path("run"), state, setup.teachers, setup.student)
    state["models"] = {**state["models"], "critic": "another"}
    with pytest.raises(UserError, match="the critic's weights changed since this checkpoint; put the same critic back"):
        refuse_others(Path("run"), state, setup.teachers, setup.student)
    with pytest.raises(UserError, match="the critic's weights changed"):
        less = {**state, "models": {"teacher": state["models"]["teacher"]}}
        refuse_others(Path("run"), less, setup.teachers, setup.student)


@pytest.mark.parametrize("name", ["base", "critic"])
def test_a_day_that_any_model_is_told_stays(
    tiny_run: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    shutil.copytree(model_folder(seed=3), tmp_path / "dated")
    (tmp_path / "dated" / "chat_template.jinja").write_text("{{ strftime_now('%Y') }} {{ messages[0].content }}")
    method = replace(CRITIC, views={"teacher": View(), "kept": View(model=name)})
    models = {"models": {name: {"path": tmp_path / "dated"}}}
    setup = prepare(api.assemble(tiny_run, models, own=method), method)
    assert setup.config.rollout.date is not None
    assert any(f"the chat template of the {name} writes today's date" in note for note in setup.notes)


def test_a_third_model_that_cannot_be_had_is_named(with_critic: dict[str, Any]) -> None:
    settings = {**with_critic, "models": {"critic": {"path": "nowhere/at/all"}}}
    with pytest.raises(UserError, match="critic nowhere/at/all: no such folder"):
        prepare(api.assemble(settings, own=CRITIC), CRITIC)


def test_a_run_with_a_third_model_in_memory_goes_on(
    with_critic: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """From disk and from memory it is one run; a resumed one needs the object again and equals a whole one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(seed=3)
    critic = (AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    settings = {key: value for key, value in with_critic.items() if key != "models"}
    whole = runner.start(api.assemble(with_critic, own=CRITIC), tmp_path / "whole", method=CRITIC).go()
    retort.distill(
        settings={**settings, "steps": 2}, models={"critic": critic}, method=CRITIC, out=tmp_path / "run", quiet=True
    )
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["models"] == {"critic": {"path": "in memory: critic"}}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<dt>Model critic</dt>" in page
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["models"] == {"critic": {"path": str(folder)}}
    with pytest.raises(UserError, match=r"the critic of this run was given as an object.*models=\{'critic': \(model"):
        retort.distill(resume=tmp_path / "run", method=CRITIC, quiet=True)
    assert "models={'critic': (model, tokenizer)}" in going_on(
        configuration.read_json(tmp_path / "run" / "config.json", CRITIC), tmp_path / "run"
    )
    again = retort.distill(resume=tmp_path / "run", steps=4, method=CRITIC, models={"critic": critic}, quiet=True)
    names = ("step", "loss", "grad_norm", "loss/learn", "loss/stay")
    assert [[row[n] for n in names] for row in again.metrics] == [[row[n] for n in names] for row in whole.metrics]
    assert (
        CallerObjects().again(configuration.read_json(tmp_path / "whole" / "config.json", CRITIC), tmp_path).models
        == {}
    )
