"""The built-in task through the command, as a newcomer starts it (shorter)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retort.cli import main

SHORT = ["eval.problems=12", "eval.samples=4", "rollout.prompts=24"]


@pytest.mark.parametrize("method", ["opd", "gkd", "eopd", "vopd"])
def test_two_steps_of_every_method(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--method", method, "--steps", "2", "--out", str(out), *SHORT]) == 0
    shown = capsys.readouterr().out
    for word in (
        "countdown:student",
        "countdown:teacher",
        "asked of teacher",
        "memory",
        "student after",
        "report.html",
    ):
        assert word in shown, word
    config = json.loads((out / "config.json").read_text())
    assert config["method"]["name"] == method
    assert config["student"] == "countdown:student", "no path of this machine in the run's settings"
    results = json.loads((out / "eval.json").read_text())
    rows = {row["who"]: row for row in results["rows"]}
    assert rows["teacher"]["avg@4"]["value"] > rows["student before"]["avg@4"]["value"]
    assert rows["teacher"]["reverse_kl"]["value"] == pytest.approx(0.0, abs=1e-5)


def test_eval_of_the_bundled_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "countdown:teacher", "problems=40", "--json"]) == 0
    teacher = json.loads(capsys.readouterr().out)["rows"][0]
    assert main(["eval", "countdown:student", "problems=40", "--json"]) == 0
    student = json.loads(capsys.readouterr().out)["rows"][0]
    assert student["avg@8"]["value"] <= 0.5 * teacher["avg@8"]["value"]
    assert teacher["avg@8"]["value"] > 0.6
