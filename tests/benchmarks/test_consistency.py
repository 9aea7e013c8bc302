"""The benchmarks of students that teach themselves: their runs, their tables, and what is shared of a prompt."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from retort import config
from retort.data import load_prompts
from retort.tasks import coached

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def _row(condition: str, seed: int, followed: float, right: float, clean: float) -> dict[str, Any]:
    curve = None if condition == "sft" else followed
    return {
        "condition": condition,
        "seed": seed,
        "before": {"followed": 0.13, "right": 0.15, "clean": 0.54, "entropy": 0.33},
        "after": {"followed": followed, "right": right, "clean": clean, "entropy": 0.3},
        "curve": [curve] * 6,
    }


def test_all_conditions_learn_from_as_many_answers(tmp_path: Path) -> None:
    consistency = importlib.import_module("consistency")
    jobs = list(consistency.jobs(tmp_path, 3))
    assert len({job.folder for job in jobs}) == len(jobs) == 12
    for job in jobs:
        own = job.own() if job.own else None
        resolved = config.resolve(job.settings, own=own)
        samples = own.rollout.samples if own else resolved.method["samples"]
        assert resolved.rollout.prompts * samples == consistency.ANSWERS
        assert (resolved.eval.data, resolved.optimizer.updates, resolved.optimizer.learning_rate) == ("bait", 1, 5e-4)
        assert (resolved.data == "bait") is (own is None)


def test_the_control_learns_clean_answers_to_prompts_with_the_suggestion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consistency = importlib.import_module("consistency")
    monkeypatch.setattr(consistency, "STEPS", 1)
    monkeypatch.setattr(consistency, "ANSWERS", 64)
    path = tmp_path / "answers.jsonl"
    consistency.answers(path)
    rows = load_prompts(str(path))
    assert len(rows) == len({row.id for row in rows}) == 64
    assert all(coached.bait(row.text) for row in rows)
    assert all(row.response is not None for row in rows)
    # The student solves half without the suggestion, and a seventh with it.
    right = sum(coached.check(row.text, row.response or "") for row in rows)
    assert right > 20
    assert sum(coached.followed(row.text, row.response or "") for row in rows) < 4
    assert consistency.imitation().rollout.sources == {"dataset"}


def test_the_page_compares_within_a_seed_and_keeps_shares_above_nothing() -> None:
    importlib.import_module("consistency")
    pages = sys.modules["consistency_page"]
    words = {"opct": "`opct`: its defaults", "sft": "the control"}
    rows = [_row("opct", seed, 0.002 * seed, 0.4 + 0.05 * seed, 0.5) for seed in range(3)]
    rows += [_row("sft", seed, 0.01, 0.3 + 0.05 * seed, 0.45) for seed in range(3)]
    text = pages.page(rows, words, 60, 96)
    assert "| before training | 3 | 13.0 [13.0, 13.0] | 15.0 [15.0, 15.0] | 54.0 | 0.33 [0.33, 0.33] |" in text
    assert "| `opct`: its defaults | 3 | 0.2 [0.0, 0.7] | 45.0 [32.6, 57.4] | 50.0 [50.0, 50.0] | 0.30" in text
    assert "right with the suggestion +10.0 [+10.0, +10.0], right without +5.0 [+5.0, +5.0]." in text
    assert "n = 3 is weak" in text
    assert "15.4 %" in text


def test_the_plot_is_of_runs_with_a_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots of the benchmarks need matplotlib, which Retort does not")
    importlib.import_module("consistency")
    pages = sys.modules["consistency_page"]
    rows = [_row(name, seed, 0.1, 0.4, 0.5) for name in ("opct", "sft") for seed in range(2)]
    pages.plots(rows, {"opct": "?", "sft": "?"}, tmp_path / "images" / "plot.svg")
    assert "followed" in (tmp_path / "images" / "plot.svg").read_text()
    assert pages.smooth([0.0, 0.3, 0.6, 0.9]) == pytest.approx([0.0, 15.0, 30.0, 60.0])


def test_the_table_of_trust_has_the_first_interval_and_the_range_of_all(tmp_path: Path) -> None:
    trust = importlib.import_module("trust_table")
    jobs = list(trust.jobs(tmp_path))
    assert len({job.folder for job in jobs}) == len(trust.CONDITIONS)
    assert all(config.resolve(job.settings).steps == (60 if "after" in job.condition else 1) for job in jobs)
    cell = {"value": 0.8, "low": 0.7, "high": 0.9}
    found = [
        {
            "predictors": [
                {"predictor": "late position", "claimed_by": "PW-OPSD", "viable": {**cell, "value": v}, "helps": helps}
            ],
            "branches": 1200, "viable": 0.5, "alone": 0.25, "differing": 7, "shift_against_entropy": 0.3,
        }
        for v, helps in ((0.8, cell), (0.6, None))
    ]  # fmt: skip
    told = trust.table({"opsd, start": found})
    assert "| opsd, start | late position | PW-OPSD | **80 [70, 90]** (60 to 80) | – |" in told
    assert "| opsd, start | 1,200 | 50.0 | 25.0 | 7 | +0.30, +0.30 |" in trust.counts({"opsd, start": found})


def test_a_shared_prompt_is_counted_once() -> None:
    prefix = importlib.import_module("shared_prefix")
    sequences = prefix.grouped([[1, 2, 3, 4], [5, 6]], [[[7, 8], [9, 9, 9]], [[7], [8, 8]]])
    assert sequences[1].tokens_L.tolist() == [1, 2, 3, 4, 9, 9, 9]
    assert [sequence.steps for sequence in sequences] == [2, 3, 1, 2]
    # What stands behind the last decision is not computed: the last token of each.
    assert prefix.computed(sequences, share=False) == (4 + 1) + (4 + 2) + 2 + (2 + 1)
    assert prefix.computed(sequences, share=True) == 4 + 1 + 2 + 2 + 0 + 1


def test_results_that_ship_are_of_the_conditions_that_are_there() -> None:
    consistency = importlib.import_module("consistency")
    rows = json.loads((FOLDER / "results" / "consistency.json").read_text())["rows"]
    assert {row["condition"] for row in rows} == {condition.name for condition in consistency.CONDITIONS}
    assert all(len(row["curve"]) == consistency.STEPS for row in rows)
