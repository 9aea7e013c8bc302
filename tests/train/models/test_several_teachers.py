"""A run with several teachers: what its settings take and refuse, what it says of them, and that it resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from trained import make_model_of

import retort
from retort import api
from retort import config as configuration
from retort.config.toml import overrides
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError
from retort.preflight.doctor import examine_setup
from retort.train import runner
from retort.train.models.several import route
from retort.train.output.summary import summary
from retort.train.setup import pair
from retort.train.setup.memory import forecast
from retort.train.setup.prepare import prepare, run_method

NAMES = ["sums", "others"]
MODELS = {name: {"path": f"the/{name}"} for name in NAMES}


def resolved(*layers: Mapping[str, Any], method: str = "opd") -> configuration.Config:
    return configuration.resolve({"method": {"name": method}, "models": MODELS}, *layers)


@pytest.mark.parametrize(
    ("teachers", "complaint"),
    [
        ({"combine": "mixture"}, "combine does nothing without teachers.models"),
        ({"models": ["sums"]}, "models must be two different names or more"),
        ({"models": ["sums", "sums"]}, "models must be two different names or more"),
        ({"models": NAMES, "combine": "vote"}, "teachers.combine: Input should be 'route', 'mixture'"),
        ({"models": NAMES, "combine": "best", "by": "my:rule"}, "by is for combine = route, not best"),
        ({"models": NAMES, "by": "subject"}, "by must be domain, or a function of a prompt as module:name"),
        ({"models": NAMES, "weights": [1, 1]}, "weights are for combine = mixture or product, not route"),
        ({"models": NAMES, "combine": "mixture", "weights": [1]}, "weights must be 2 numbers of at least 0"),
        ({"models": NAMES, "combine": "mixture", "weights": [1, -1]}, "weights must be 2 numbers of at least 0"),
        ({"models": NAMES, "combine": "mixture", "weights": [0, 0]}, "weights must not all be 0"),
        ({"modles": NAMES}, "unknown key 'teachers.modles'; did you mean 'models'?"),
    ],
)
def test_settings_that_say_nothing_are_refused_in_a_line(teachers: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved({"teachers": teachers})
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_and_python_say_the_same() -> None:
    shell = resolved(overrides(['teachers.models=["sums", "others"]', "teachers.combine=mixture"]))
    assert shell.teachers.models == NAMES and shell.teachers.combine == "mixture"
    assert pair.further(shell, retort.load("opd")) == {"sums": "the/sums", "others": "the/others"}
    assert pair.model_paths(shell, retort.load("opd"), "s", None) == {
        "student": "s",
        **pair.further(shell, retort.load("opd")),
    }


@pytest.mark.parametrize(
    ("method", "more", "complaint"),
    [
        ("sdft", {}, "but method 'sdft' asks no teacher"),
        (
            "opd",
            {"cold_start": {"steps": 1}},
            "learns from completions of a teacher, and of several (teachers.models)",
        ),
        ("opd", {"teachers": {"models": ["sums", "other"]}}, "teachers.models names 'other', which is no model of the"),
        ("opd", {"teacher": "x"}, "teacher = x and teachers.models = ['sums', 'others'] are both given"),
        ("opd", {"teachers": {"models": NAMES, "combine": "best"}}, "with samples = 1 there is nothing to compare"),
    ],
)
def test_what_several_teachers_cannot_do_is_refused(method: str, more: dict[str, Any], complaint: str) -> None:
    settings = {"samples": 1} if method == "opd" else {}
    config = resolved({"teachers": {"models": NAMES}, "method": {"name": method, **settings}}, more)
    with pytest.raises(UserError) as caught:
        pair.without_idle_teacher(config, run_method(config, None))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_every_prompt_must_have_a_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def prompt(name: str, domain: str) -> Prompt:
        return Prompt(name, (Message("user", name),), domain=domain)

    settings = resolved({"teachers": {"models": NAMES}}).teachers
    assert route(settings, [prompt("x", "sums")])(prompt("y", "others")) == "others"
    with pytest.raises(UserError, match="row 'x' has no `domain`, which names its teacher; .*columns.domain="):
        route(settings, [prompt("x", "")])
    with pytest.raises(UserError, match="row 'x' has the domain 'sum', which is none of .*; did you mean 'sums'"):
        route(settings, [prompt("y", "others"), prompt("x", "sum")])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_routes.py").write_text(
        "def short(prompt):\n    return 'sums' if len(prompt.text) < 3 else 'others'\n\n"
        "def broken(prompt):\n    raise KeyError('x')\n\n"
        "def other(prompt):\n    return 3\n"
    )

    def own(name: str) -> Any:
        return route(resolved({"teachers": {"models": NAMES, "by": f"my_routes:{name}"}}).teachers, [prompt("x", "")])

    assert own("short")(prompt("longer", "")) == "others"
    with pytest.raises(UserError, match="teachers.by = my_routes:broken: it raised KeyError: 'x' on row 'x'"):
        own("broken")
    with pytest.raises(UserError, match="row 'x' is given to .my_routes:other. '?3'?, which is none of"):
        own("other")
    with pytest.raises(UserError, match="teachers.by = my_routes:none: .*none"):
        own("none")


@pytest.fixture(scope="module")
def several_run(
    model_folder: Callable[..., Path], prompts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Settings of a run of a second or two whose teachers have vocabularies that are padded differently."""
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    data = tmp_path_factory.mktemp("several") / "data.jsonl"
    data.write_text("".join(json.dumps(row | {"domain": NAMES[i % 2]}) + "\n" for i, row in enumerate(rows)))
    return {
        "student": str(model_folder(seed=1)),
        "models": {
            "sums": {"path": str(model_folder(seed=2, hidden_size=24, padded_to=64))},
            "others": {"path": str(model_folder(seed=3, padded_to=80))},
        },
        "teachers": {"models": NAMES},
        "data": str(data),
        "task": "exact",
        "precision": "fp32",
        "device": "cpu",
        "checks": "warn",  # random weights, and meant to be
        "steps": 3,
        "method": {"name": "opd", "samples": 2},
        "rollout": {"prompts": 4, "max_new_tokens": 6, "max_prompt_tokens": 32},
        "optimizer": {"learning_rate": 1e-2, "updates": 2, "batch_tokens": 64, "schedule": "constant"},
        "eval": {"problems": 4, "samples": 2, "top_p": 1.0, "max_new_tokens": 6},
        "checkpoint": {"every": 2},
        "record": {"overlap_every": 2},
    }


def test_a_run_says_how_often_each_spoke_and_goes_on_as_if_never_stopped(
    several_run: dict[str, Any], tmp_path: Path
) -> None:
    whole = runner.start(api.assemble(several_run), tmp_path / "whole").go()
    shares = [[row[f"teacher_share/{name}"] for name in NAMES] for row in whole.metrics]
    assert all(sum(share) == pytest.approx(1.0) for share in shares)
    assert any(0 < share[0] < 1 for share in shares)
    far = [row.get("teacher_disagreement") for row in whole.metrics]
    assert far[0] > 0 and far[1] is None and far[2] > 0, "each is asked about everything only where it is measured"
    part = tmp_path / "part"
    runner.start(api.assemble({**several_run, "steps": 2}), part).go()
    assert json.loads((part / "config.json").read_text())["teachers"]["models"] == NAMES
    again = retort.distill(resume=part, steps=3, quiet=True)
    names = ("step", "loss", "grad_norm", *(f"teacher_share/{name}" for name in NAMES))
    assert [[row[n] for n in names] for row in again.metrics] == [[row[n] for n in names] for row in whole.metrics]
    page = (part / "report.html").read_text()
    assert (
        "teacher_share" not in page and "How often each teacher spoke" in page and "How far the teachers differ" in page
    )


@pytest.mark.parametrize("combine", ["mixture", "product", "best"])
def test_each_combination_trains_and_is_examined(several_run: dict[str, Any], tmp_path: Path, combine: str) -> None:
    settings = {**several_run, "teachers": {"models": NAMES, "combine": combine}, "steps": 1}
    setup = prepare(api.assemble(settings))
    assert list(setup.lms) == ["student", *NAMES]
    assert "sums and others" in summary(setup)["teacher"]
    assert forecast(setup).signals > 0
    checks = [check.name for check in examine_setup(setup, quick=True).checks]
    assert {f"{check} of {name}" for check in ("tokenizer", "stop token") for name in NAMES} <= set(checks)
    row = runner.start(api.assemble(settings), tmp_path / "run").go().metrics[0]
    assert row["loss"] == row["loss"] and row["teacher_disagreement"] > 0
    assert ("teacher_share/sums" in row) == (combine != "product"), "in a product all speak at every token"


def test_teachers_are_given_by_name_in_python(several_run: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paths = {name: model["path"] for name, model in several_run["models"].items()}
    held = (AutoModelForCausalLM.from_pretrained(paths["others"]), AutoTokenizer.from_pretrained(paths["others"]))
    rest = {name: value for name, value in several_run.items() if name not in ("models", "teachers")}
    teacher = {"sums": paths["sums"], "others": held}
    by_name = retort.distill(teacher=teacher, settings={**rest, "steps": 1}, quiet=True, out=tmp_path / "a")
    by_table = runner.start(api.assemble({**several_run, "steps": 1}), tmp_path / "b").go()
    assert by_name.metrics[0]["loss"] == by_table.metrics[0]["loss"]
    with pytest.raises(UserError, match="the name 'base' is another model's; give each of several teachers its own"):
        retort.doctor(teacher={"base": "x", "sums": "y"})
    with pytest.raises(UserError, match="the others of this run was given as an object"):
        retort.distill(resume=tmp_path / "a", steps=2, quiet=True)
    again = retort.distill(resume=tmp_path / "a", steps=2, teacher={"others": held}, quiet=True)
    assert len(again.metrics) == 2


def test_a_teacher_with_another_tokenizer_is_refused(several_run: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model_of(tmp_path / "other", "byte-level", seed=2, width=24)
    models = {**several_run["models"], "others": {"path": str(folder)}}
    with pytest.raises(UserError, match="teachers.models: others has another tokenizer than the student, and several"):
        prepare(api.assemble({**several_run, "models": models}))
