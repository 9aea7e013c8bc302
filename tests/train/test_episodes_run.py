"""Runs in an environment with tiny models: what a step logs is what its record says, turn by turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pipeline
import pytest
from players import TEMPLATES, make_player, often_ending
from trained import make_model_of

from retort import config as configuration
from retort.train import runner
from retort.train.learning.diagnose import TURNS

pytestmark = pytest.mark.usefixtures("models_kept")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("players")
    tasks = [{"prompt": f"three {number}"} for number in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    return {
        "student": str(make_player(folder / "student", seed=1)),
        "teacher": str(make_player(folder / "teacher", seed=2, hidden_size=24)),
        "data": str(folder / "data.jsonl"),
        "precision": "fp32",
        "device": "cpu",
        "checks": "skip",
        "steps": 3,
        "rollout": {"prompts": 4, "max_new_tokens": 40, "env": "players:Walk"},
        "optimizer": {"learning_rate": 1e-3, "batch_tokens": 512},
        "eval": {"problems": 0},
        "record": {"rollouts": 99},
        "checkpoint": {"every": 0},
    }


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def check_by_hand(metrics: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    """Recomputes means of a step from the record of all its rollouts; returns the number of turns of the longest."""
    for name in ("success", "turns", "tool_errors"):
        assert metrics[name] == pytest.approx(mean([row["measures"][name] for row in rows]))
    turns = [row.get("turns", [0] * len(row["ids"])) for row in rows]
    assert [max(own) + 1 for own in turns] == [row["measures"]["turns"] for row in rows]
    longest = max(map(max, turns)) + 1
    curves = {key.rpartition("/turn-")[0] for key in metrics if "/turn-" in key}
    assert curves or longest == 1, "a step with several turns has curves by turn"
    for curve in curves:
        for turn in range(min(longest, TURNS)):
            values = [
                value
                for row, own in zip(rows, turns, strict=True)
                for value, at in zip(row["columns"][curve], own, strict=True)
                if min(at, TURNS - 1) == turn and value is not None
            ]
            assert metrics[f"{curve}/turn-{turn + 1}"] == pytest.approx(mean(values), rel=1e-4, abs=2e-5), curve
        assert f"{curve}/turn-{longest + 1}" not in metrics
    return longest


@pytest.mark.parametrize(
    ("method", "horizons", "env"),
    [
        ({"name": "tcod", "every": 1}, [1, 2, 3], "players:Walk"),
        ({"name": "tcod", "curriculum": "backward", "every": 2, "reduction": "turns"}, [1, 1, 2], "rooms"),
        ({"name": "sod", "samples": 2}, None, "players:Walk"),
        ({"name": "sod", "samples": 4, "coef": 0.0}, None, "players:Walk"),
        ({"name": "atod", "samples": 2}, None, "players:Walk"),
        ({"name": "eopd", "top_k": 4}, None, "players:Walk"),
    ],
    ids=["tcod", "tcod, backward", "sod", "sod, reward alone", "atod", "eopd"],
)
@pipeline.models_once()
def test_a_run_logs_by_turn_what_its_record_says(
    settings: dict[str, Any], tmp_path: Path, method: dict[str, Any], horizons: list[int] | None, env: str
) -> None:
    own = configuration.merge(settings, {"method": method, "rollout": {"env": env}})
    run = runner.start(configuration.resolve(own), tmp_path)
    run.go()
    steps, rows = lines(tmp_path, "metrics.jsonl"), lines(tmp_path, "rollouts.jsonl")
    assert [row.get("horizon") for row in steps] == (horizons or [None] * 3)
    longest: list[int] = []
    for metrics in steps:
        recorded = [row for row in rows if row["step"] == metrics["step"]]
        assert len(recorded) == 4 * method.get("samples", 1)
        longest.append(check_by_hand(metrics, recorded))
        assert metrics["grad_norm"] > 0
    if method.get("curriculum") == "backward":  # who is left a turn reads the expert's others
        roles = [[role for role, _ in row["messages"]] for row in rows]
        assert all(own == ["user", *["assistant", "user"] * (len(own) // 2)] for own in roles)
        assert max(map(len, roles)) > 3
    elif horizons:
        assert longest[0] == 1 and all(found <= most for found, most in zip(longest, horizons, strict=True))
    if env != "rooms":
        assert max(longest) > 1


def test_a_teacher_with_another_tokenizer_reads_whole_episodes(settings: dict[str, Any], tmp_path: Path) -> None:
    """Each turn's bytes in units of its own, and the stop behind them; the environment's replies are in none."""
    student = often_ending(make_model_of(tmp_path / "student", "gemma", seed=1, scale=0.1), TEMPLATES[0], by=8.0)
    teacher = often_ending(make_model_of(tmp_path / "teacher", "byte-level", seed=2, width=24), TEMPLATES[1], by=1.0)
    more = {"student": str(student), "teacher": str(teacher), "steps": 2, "eval": {"problems": 2, "samples": 1}}
    own = configuration.merge(settings, {**more, "method": {"name": "opd"}})
    runner.start(configuration.resolve(own), tmp_path / "run").go()
    steps, rows = lines(tmp_path / "run", "metrics.jsonl"), lines(tmp_path / "run", "rollouts.jsonl")
    for metrics in (row for row in steps if "grad_norm" in row):
        check_by_hand(metrics, [row for row in rows if row["step"] == metrics["step"]])
        shares = [metrics[f"view/teacher/{part}"] for part in ("one_to_one", "spans", "unread")]
        assert sum(shares) == pytest.approx(1.0) and shares[2] < 0.5
        assert metrics["grad_norm"] > 0
    several = [row for row in rows if "turns" in row]
    assert several, "no episode came to its second turn"
    for row in several:
        units, turns = row["units"]["teacher"], row["turns"]
        ends = [place for place, turn in enumerate(turns[1:]) if turn != turns[place]]
        assert len(ends) == max(turns)
        assert all(units["sizes"][place] == 1 for place in ends), "a stop is a unit of its own"
        assert units["tokens"].count("</s>") == row["tokens"].count("</s>") >= len(ends)
        assert sum(size or 0 for size in units["sizes"]) == len(units["tokens"])
    rows = json.loads((tmp_path / "run" / "eval.json").read_text())["rows"]
    found = [row["bytes_in_units"]["value"] for row in rows if row["who"].startswith("student")]
    assert len(found) == 2 and min(found) >= 0 and 0 < max(found) <= 1
