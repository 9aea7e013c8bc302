"""The built-in task through the command, as a newcomer starts it (shorter)."""

from __future__ import annotations

import json
import re
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
    times = next(line for line in shown.splitlines() if line.startswith("time of the steps: "))
    assert re.match(r"time of the steps: [\d.]+ s for [\d,]+ tokens \([\d,.]+ tokens/s\): ", times)
    spent = times.split(": ")[2]
    shares = {part.rsplit(" ", 1)[0]: float(part.rsplit(" ", 1)[1].rstrip("%")) for part in spent.split(", ")}
    assert {"generate", "teacher", "student", "loss", "backward", "everything else"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    config = json.loads((out / "config.json").read_text())
    assert config["method"]["name"] == method
    assert config["student"] == "countdown:student", "no path of this machine in the run's settings"
    results = json.loads((out / "eval.json").read_text())
    rows = {row["who"]: row for row in results["rows"]}
    assert rows["teacher"]["avg@4"]["value"] > rows["student before"]["avg@4"]["value"]
    assert rows["teacher"]["reverse_kl"]["value"] == pytest.approx(0.0, abs=1e-5)
    for who in rows:
        counted = results["profile"][who]["histogram"]
        assert sum(counted["student_entropy"]) == sum(counted["teacher_entropy"]) > 0
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert {answer["who"] for answer in answers} == set(rows)
    assert len({answer["prompt"] for answer in answers}) == len(answers) / len(rows), "the same prompts to everybody"


def test_eval_of_the_bundled_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "countdown:teacher", "problems=40", "--json"]) == 0
    teacher = json.loads(capsys.readouterr().out)["rows"][0]
    assert main(["eval", "countdown:student", "problems=40", "--json"]) == 0
    student = json.loads(capsys.readouterr().out)["rows"][0]
    assert student["avg@8"]["value"] <= 0.5 * teacher["avg@8"]["value"]
    assert teacher["avg@8"]["value"] > 0.6


def test_a_folder_named_like_the_data_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "countdown").mkdir()
    monkeypatch.chdir(tmp_path)
    shorter = ["eval.problems=2", "eval.samples=1", "rollout.prompts=4"]
    assert main(["train", "--steps", "1", "--out", "run", *shorter]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == "countdown"
    assert main(["train", "--resume", "run", "--steps", "2"]) == 0


def test_the_built_in_problems_as_evaluation_of_other_data(tmp_path: Path) -> None:
    """They must be the held-out ones: `countdown` as training data means the others."""
    from retort import config as configuration
    from retort.train.setup.prepare import prepare
    from retort.train.setup.prompts import countdown_prompts

    data = tmp_path / "own.jsonl"
    rows = [{"prompt": prompt.text, "answer": prompt.answer} for prompt in countdown_prompts("train", 20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = configuration.recipe("countdown")
    sections = {"data": str(data), "eval": {"data": "countdown", "problems": 12}}
    setup = prepare(configuration.resolve(settings, sections))
    assert [prompt.id for prompt in setup.held_out] == [prompt.id for prompt in countdown_prompts("held_out", 12)]
    assert setup.eval_grader is not None
    assert setup.eval_grader.name == "countdown"


def test_bundled_models_are_shown_words_that_they_know() -> None:
    from retort.api import assemble

    named = assemble({"student": "coached:student", "data": "coached", "method": {"name": "opsd"}})
    assert named.templates == assemble({"data": "coached", "method": {"name": "opsd"}}).templates
    assert named.templates["solution"] == "solution {text} ;"
    own = assemble({"student": "coached:student", "data": "bait", "templates": {"hint": "{text}"}})
    assert own.templates["hint"] == "{text}"
    assert own.templates["frame"] == "{sections} {prompt}"
    assert assemble({"student": "somebody/else", "data": "coached"}).templates == {}
