"""The commands about a flow model: evaluating it, and looking at a pair before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flowing import planes, settings

from retort import config as configuration
from retort.cli.commands import main
from retort.preflight.doctor import examine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("flows")
    planes(found)
    return found


def test_eval_measures_rewards_by_domain_and_the_distance_to_a_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plane:student", "--data", "plane", "--teacher", "plane:moons", "--json"]
    assert main(["eval", *words, "problems=6", "samples=2", "flow.eval_steps=4", "flow.steps=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert found["each"] == "sample"
    assert 0 <= row["reward/on_shape"]["value"] <= 1 and row["reverse_kl"]["value"] > 0
    assert set(found["by_domain"]["plane:student"]) == {"moons", "gaussians"}
    assert len(found["kl_by_step"]["plane:student"]) == 3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["eval.top_p=0.5"], "retort eval does not read 'eval.top_p'"),
        (["flow.rewards=[]"], "nothing is measured: name rewards"),
        (["--teacher", "glyphs:glyph"], "glyphs:glyph cannot teach plane:student: its architecture is"),
        (['flow.rewards=["glyph"]'], "reward 'glyph' finds nothing to grade by"),
    ],
)
def test_eval_of_what_cannot_be_measured(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "plane:student", "--data", "plane", "problems=6", *words]) == 2
    assert line in capsys.readouterr().err


def test_the_doctor_compares_experts_with_the_student(folder: Path) -> None:
    changed = {"data": "plane", "flow": {"rewards": ["on_shape"], "eval_steps": 5}, "eval": {"samples": 4}}
    given = settings(folder, student="plane:student", **changed)
    given["models"] = {name: {"path": f"plane:{name}"} for name in ("moons", "gaussians")}
    found = examine(configuration.resolve(given))
    assert found.verdict == "ok"
    values = dict(found["expert moons"].values)
    assert values["expert"] > values["student"] + 0.1
    swapped = given | {
        "student": "plane:moons",
        "models": {"moons": {"path": "plane:student"}, **{"gaussians": {"path": "plane:gaussians"}}},
    }
    assert examine(configuration.resolve(swapped))["expert moons"].verdict == "warn"


def test_the_doctor_says_why_a_run_would_not_start(folder: Path) -> None:
    found = examine(configuration.resolve(settings(folder, method={"name": "eopd"})))
    assert found.verdict == "fatal" and "cannot teach denoising steps" in found["setup"].saw


def test_trust_is_about_tokens(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from retort.train import runner

    runner.start(configuration.resolve(settings(folder, steps=1)), tmp_path / "run").go()
    assert main(["trust", str(tmp_path / "run")]) == 2
    assert "retort trust is about tokens" in capsys.readouterr().err
