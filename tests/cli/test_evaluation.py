"""`retort eval` on any model folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retort.cli import main
from retort.cli.evaluation import tasks

SMALL = ["task=exact", "precision=fp32", "samples=4", "problems=3", "max_new_tokens=5", "top_p=1.0"]


def test_a_data_file_with_answers(
    model_folder: Callable[..., Path], prompts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(model_folder(seed=1))
    words = ["eval", folder, "--data", str(prompts_file), "--json", *SMALL]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["k"], first["problems"]) == (4, 3)
    assert {"avg@4", "pass@4", "length", "student_entropy"} <= set(first["rows"][0])
    assert first["pass_at"][folder].keys() == {"1", "2", "4"}
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == first, "the same seed must give the same answers"


def test_compared_with_a_teacher(
    model_folder: Callable[..., Path], prompts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = str(model_folder(seed=2, hidden_size=24, padded_to=64))
    words = ["eval", str(model_folder(seed=1)), "--data", str(prompts_file), "--teacher", teacher, "--json", *SMALL]
    assert main(words) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["reverse_kl"]["value"] > 0
    assert row["forward_kl_uncertain"]["value"] > 0


def test_a_table_for_people(
    model_folder: Callable[..., Path], prompts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(model_folder(seed=1)), "--data", str(prompts_file), *SMALL]) == 0
    assert "pass@4" in capsys.readouterr().out


def test_data_without_answers(
    model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bare.jsonl"
    data.write_text('{"prompt": "1 + 1 ="}\n')
    assert main(["eval", str(model_folder(seed=1)), "--data", str(data)]) == 2
    assert "nothing can be graded" in capsys.readouterr().err
    assert main(["eval", str(model_folder(seed=1)), "--data", str(data), "sampels=3"]) == 2
    assert "did you mean 'eval.samples'" in capsys.readouterr().err
    for words, message in (
        (["teacher=x"], "does not read 'teacher'"),
        (["optimizer.learning_rate=1"], "does not read 'optimizer.learning_rate'"),
        (["problems=0"], "nothing to evaluate"),
        (["task=exact"], "has no answer"),
    ):
        assert main(["eval", str(model_folder(seed=1)), "--data", str(data), *words]) == 2
        assert message in capsys.readouterr().err


def test_only_the_settings_given_count(
    model_folder: Callable[..., Path], prompts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No method is run here, so no paper's recipe may change how it samples."""
    words = ["eval", str(model_folder(seed=1)), "--data", str(prompts_file), "task=exact", "precision=fp32", "--json"]
    small = ["problems=2", "samples=2"]
    assert main([*words, *small, "max_new_tokens=300"]) == 2
    assert "exceed the model's context of 128" in capsys.readouterr().err
    found = []
    for more in ([], ["top_p=1.0"], ["top_p=0.3"]):
        assert main([*words, *small, "max_new_tokens=6", *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["rows"])
    assert found[0] == found[1] != found[2]


def test_a_length_that_nobody_gave_is_made_to_fit(
    model_folder: Callable[..., Path], prompts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(model_folder(seed=1)), "--data", str(prompts_file), "task=exact", "precision=fp32"]
    assert main([*words, "problems=1", "samples=1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the model's context of 128 holds no more" in shown


@pytest.mark.parametrize(
    ("data", "env", "expected"),
    [
        (None, None, ("countdown", ["samples=4"])),
        ("mine.jsonl", None, ("mine.jsonl", ["samples=4"])),
        (None, "rooms", ("rooms", ["rollout.env=rooms", "samples=4"])),
        ("mine.jsonl", "rooms", ("mine.jsonl", ["rollout.env=rooms", "samples=4"])),
        ("mine.jsonl", "my:Game", ("mine.jsonl", ["rollout.env=my:Game", "samples=4"])),
    ],
)
def test_an_environment_brings_its_own_tasks(
    data: str | None, env: str | None, expected: tuple[str, list[str]]
) -> None:
    assert tasks(data, env, ["samples=4"]) == expected


def test_an_environment_without_tasks_needs_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "nowhere", "--env", "my:Game"]) == 2
    assert "name a file of tasks with --data" in capsys.readouterr().err
