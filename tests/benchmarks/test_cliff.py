"""The benchmark of the cliff: its runs, the prediction they are held against, and what it concludes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from retort import config
from retort.quantities.extrapolation import lambda_star, with_budget
from retort.tasks import ranking

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cliff(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("cliff")


@pytest.fixture
def pages(cliff: ModuleType) -> ModuleType:
    return sys.modules["cliff_page"]


@pytest.fixture
def judge(cliff: ModuleType) -> ModuleType:
    return sys.modules["cliff_judge"]


def _row(weight: float, seed: int, parse: float, **more: Any) -> dict[str, Any]:
    """A run of six steps that parses as often at its end as in its last third."""
    return {
        "condition": "base", "weight": weight, "seed": seed, "steps": 60, "cap": 5.0, "teacher_mass": 0.9993,
        "base_mass": 0.81, "safe": 1.1855, "before": 0.99, "parse": parse, "length": 52.0, "ndcg": 1.0,
        "one_missing": 0.0, "greedy": None, "curve": [0.99, 0.99, 0.9, 0.9, parse, parse],
        "tail": [2e-4, 1e-4, 2e-4, 2e-4, 3e-4, 5e-4],
        "boundary": 1.4e-4,
        "seconds": 1.0, **more,
    }  # fmt: skip


def _rows(rates: dict[float, float], spread: float = 0.005) -> list[dict[str, Any]]:
    return [_row(weight, seed, rate + spread * (seed - 1)) for weight, rate in rates.items() for seed in range(3)]


def test_every_run_has_settings_that_exist_and_a_folder_of_its_own(cliff: ModuleType, tmp_path: Path) -> None:
    jobs = list(cliff.jobs(tmp_path, (), 3))
    assert len({job.folder for job in jobs}) == len(jobs)
    for job in jobs:
        resolved = config.resolve(job.settings)
        assert resolved.method["reward_weight"] == float(job.method)
        assert (resolved.student, resolved.base, resolved.threads) == ("ranking:teacher", "ranking:student", 1)
    lower = {job.settings["optimizer"]["learning_rate"] for job in jobs if job.condition == "rate-low"}
    assert lower == {1e-4}


def test_the_prediction_is_the_librarys_from_what_the_runs_measured(pages: ModuleType) -> None:
    rows = [_row(1.0, seed, 0.9, base_mass=0.80 + 0.01 * seed) for seed in range(3)] + [_row(3.0, 1, 0.5)]
    found = pages.prediction(rows, 60)
    assert found["typical"] == pytest.approx(lambda_star(0.9993, 0.81, 5.0)) == pytest.approx(1.2769, abs=5e-5)
    assert found["budget"] == pytest.approx(with_budget(found["typical"], 60)) == pytest.approx(1.2019, abs=5e-5)
    assert (found["safe"], found["safe_budget"]) == pytest.approx((1.1855, 1.1105), abs=5e-5)
    assert pages.last_below([0.5, 1.0, 1.1, 1.2, 1.25, 1.5], found) == 1.2
    assert pages.last_below([0.5, 1.5], found) is None


def test_a_cliff_is_called_one_and_a_wobble_is_not(pages: ModuleType) -> None:
    rates = {1.0: 0.99, 1.1: 0.98, 1.5: 0.5, 3.0: 0.2}
    found = pages.summary(_rows(rates), [], {"base": "?"})
    said = pages.verdict(found["cells"], found["predictions"]["base"])
    assert "at lambda = 1.5, 3; of those above" in said[0]
    assert said[0].endswith("fewer than at lambda = 1.1 at lambda = 1.5, 3.")
    assert "Rollouts of the last third" in said[1]
    assert said[2].endswith("is reached at lambda = 3.")

    wobble = [_row(w, seed, 0.99 - 0.12 * ((seed + n) % 3 == 0)) for n, w in enumerate(rates) for seed in range(3)]
    found = pages.summary(wobble, [], {"base": "?"})
    said = pages.verdict(found["cells"], found["predictions"]["base"])
    assert "by more than the seeds' spread, at none" in said[0]
    assert said[0].endswith("at none, not at lambda = 1.5, 3.")
    assert said[2].endswith("is not reached up to lambda = 3.")


def test_of_one_seed_nothing_is_concluded(pages: ModuleType) -> None:
    rows = [row for row in _rows({1.0: 0.99, 1.1: 0.98, 1.5: 0.2, 3.0: 0.2}) if row["weight"] != 3.0 or not row["seed"]]
    said = pages.verdict(pages.summary(rows, [], {"base": "?"})["cells"], pages.prediction(rows, 60))
    assert said[0].endswith("fewer than at lambda = 1.1 at lambda = 1.5.")
    assert said[2] == "With one seed there is no spread, so nothing is said here of lambda = 3."


def test_differences_are_taken_within_a_seed(pages: ModuleType) -> None:
    rows = [_row(w, seed, 0.5 + 0.2 * seed - drop) for w, drop in ((1.1, 0.0), (1.5, 0.1)) for seed in range(3)]
    cell = pages.summary(rows, [], {"base": "?"})["cells"][1]
    assert cell["parse"]["high"] - cell["parse"]["low"] > 0.8
    for measure in ("parse", "late"):
        found = cell[f"{measure}_against_below"]
        assert (found["low"], found["value"], found["high"]) == pytest.approx((-0.1, -0.1, -0.1))
    assert cell["parse_against_start"]["value"] == pytest.approx(0.6 - 0.99)
    pooled = pages.summary([*rows, _row(3.0, 0, 0.2)], [], {"base": "?"})["above_minus_below"]["base"]["parse"]
    assert pooled["value"] == pytest.approx((-0.2 - 0.1 - 0.1) / 3), "seed 0 has two lambdas above"
    assert cell["worst"] == pytest.approx(0.4)
    assert cell["tail"]["value"] == pytest.approx(4e-4)
    assert cell["beyond"] == pytest.approx(1 / 6)


def test_the_page_has_a_line_per_lambda_and_the_measured_prediction(pages: ModuleType) -> None:
    rows = _rows({1.0: 0.99, 1.1: 0.98, 1.5: 0.9})
    direct = [{**row, "condition": "direct", "base_mass": 0.998} for row in rows[:3]]
    aims = [{"weight": 1.5, "parse": 0.999}]
    text = pages.page(pages.summary(rows + direct, aims, {"base": "sixty steps", "direct": "?"}), rows, {"steps": 2})
    assert "Runs that are not finished, by condition: `steps` 2." in text
    assert "lambda* is **1.28** for the mean p" in text
    assert "**1.20** and 1.11" in text
    assert "b = 0.9980 and lambda* is 2.53" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| 1.5 | 3 |")]
    assert line.startswith("| 1.5 | 3 | 90.0 [88.8, 91.2] | −9.0 [−10.2, −7.8] | −8.0 [−8.0, −8.0] |")
    assert line.endswith("| 99.9 |")
    assert "n = 3 is weak" in text


def test_windows_are_means_at_their_last_step(pages: ModuleType) -> None:
    steps, shares = zip(*pages.windows([1.0, 0.5, 0.5, 1.0, 0.5, 0.8, 0.6]), strict=True)
    assert steps == (5, 7)
    assert shares == pytest.approx((70.0, 70.0))


def test_the_target_is_the_fixed_point_of_the_objective(judge: ModuleType) -> None:
    """logit q = lambda logit p + (1 - lambda) logit b: (.9, .7, 1.5) gives .946454; at 1 the teacher, at 0 the base."""
    teacher, base = (torch.tensor([[p, 1 - p]], dtype=torch.float64).log() for p in (0.9, 0.7))
    for weight, mass in ((1.5, 0.946454), (1.0, 0.9), (0.0, 0.7)):
        assert float(judge.extrapolated(teacher, base, weight)[0, 0].exp()) == pytest.approx(mass, abs=1e-6)


def test_answers_are_judged(judge: ModuleType) -> None:
    row = ranking.rows("held_out", 1)[0]
    prompt, right = str(row["prompt"]), str(row["response"])
    found = judge.judged([prompt] * 4, [right, right, right[:-1], ""])
    assert found == {"parse": 0.5, "ndcg": 1.0, "one_missing": 0.0}
    assert judge.judged([prompt], ["["])["ndcg"] is None


def test_at_one_the_target_writes_as_the_teacher_does(judge: ModuleType) -> None:
    found = judge.target(1.0, 12)
    assert found["parse"] > 0.9
    assert found["ndcg"] == pytest.approx(1.0)
    assert 42 < found["length"] < 63
    assert judge.target(0.0, 12)["parse"] < 0.8, "at 0 it is the base, which breaks half of its lists"


@pytest.mark.slow
def test_a_run_is_read_judged_and_drawn(cliff: ModuleType, pages: ModuleType, tmp_path: Path) -> None:
    job = next(iter(cliff.jobs(tmp_path / "runs", ["base"], 1)))
    small = {
        **job.settings,
        "steps": 2,
        "rollout": {**job.settings["rollout"], "prompts": 8},
        "eval": {**job.settings["eval"], "problems": 6},
    }
    job = dataclasses.replace(job, settings=small)
    sys.modules["runs"].run(job)
    (job.folder / "greedy.json").write_text(json.dumps(sys.modules["cliff_judge"].greedy(job.folder / "model", 6)))
    (row,) = cliff.read([job])
    assert (row["weight"], row["steps"], len(row["curve"])) == (3.0, 2, 2)
    assert 0.99 < row["teacher_mass"] < 1.0
    assert row["base_mass"] < row["teacher_mass"]
    assert 0.0 <= row["parse"] <= 1.0
    assert 0.0 <= row["greedy"] <= 1.0
    assert row["ndcg"] is None or 0.0 <= row["ndcg"] <= 1.0
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: benchmarks)")
    found = pages.summary([row], [{"weight": 0.5, "parse": 0.9}], {"base": "?"})
    pages.plots(found, [row], tmp_path)
    for name in ("parse", "steps"):
        assert "<svg" in (tmp_path / f"cliff-{name}.svg").read_text()
