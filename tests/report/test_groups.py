"""Runs that differ only in their seed are shown as one, with intervals over seeds."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from report_page import Page

from retort.report import build_report
from retort.report.groups import Group, over_seeds
from retort.report.read import RunFiles

MakeRun = Callable[..., Path]


def test_a_folder_of_runs_is_grouped_over_seeds(tmp_path: Path, make_run: MakeRun) -> None:
    for method in ("opd", "eopd"):
        for seed in range(3):
            make_run(tmp_path / "runs" / method / f"seed-{seed}", seed=seed, method=method)
    page = Page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    assert "2 experiments, 6 runs: eopd, opd" in page.text
    assert "3 seeds (0, 1, 2): weak" in page.text
    reverse = page.plots()["Reverse KL"]["series"]
    assert [one["name"] for one in reverse] == ["eopd", "opd"]
    assert all(
        low <= y <= high for one in reverse for low, y, high in zip(one["low"], one["y"], one["high"], strict=True)
    )
    assert "eopd" in page.plots()["Entropy of each token"]["series"][0]["name"]
    assert page.plots()["Forward KL by the teacher’s entropy"]["series"][1]["low"]
    assert "opd − eopd" in page.text
    assert "within each of 3 seeds (weak)" in page.text


def test_means_and_intervals_are_those_of_the_runs(tmp_path: Path, make_run: MakeRun) -> None:
    """avg@8 after is 0.58 + 0.03 seed in the made-up runs: mean 0.61, t(2) * 0.03 / sqrt(3) on either side."""
    for seed in range(3):
        make_run(tmp_path / "runs" / f"seed-{seed}", seed=seed)
    page = Page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    half = 4.303 * 0.03 / 3**0.5
    assert "61.0\u202f%" in page.text
    assert f"[{100 * (0.61 - half):.1f}, {100 * (0.61 + half):.1f}]" in page.text


def test_runs_named_one_by_one_stand_side_by_side(tmp_path: Path, make_run: MakeRun) -> None:
    runs = [make_run(tmp_path / f"seed-{seed}", seed=seed) for seed in range(2)]
    page = Page(build_report(runs, tmp_path / "report.html"))
    assert "2 runs: seed-0, seed-1" in page.text
    assert not any("low" in one for one in page.plots()["Reverse KL"]["series"])


def test_the_same_seed_twice_is_no_second_seed(tmp_path: Path, make_run: MakeRun) -> None:
    for name in ("old", "new"):
        make_run(tmp_path / "runs" / name, seed=0)
    assert "2 runs: new, old" in Page(build_report([tmp_path / "runs"], tmp_path / "report.html")).text


def test_a_student_named_after_its_seed_is_the_same_experiment(tmp_path: Path, make_run: MakeRun) -> None:
    for seed in range(2):
        run = make_run(tmp_path / "runs" / f"seed-{seed}", seed=seed)
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"student": f"students/small-{seed}"}))
    page = Page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    assert "2 seeds (0, 1): weak" in page.text


def test_settings_that_differ_keep_runs_apart(tmp_path: Path, make_run: MakeRun) -> None:
    for seed, rate in ((0, 1e-4), (1, 1e-3)):
        run = make_run(tmp_path / "runs" / f"seed-{seed}", seed=seed)
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"optimizer": {"learning_rate": rate}}))
    page = Page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    assert "2 runs: seed-0, seed-1" in page.text
    assert "optimizer.learning_rate" in page.text


def test_a_model_folder_inside_a_run_is_no_run(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "runs" / "one")
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    assert "eopd · one" in Page(build_report([tmp_path / "runs"], tmp_path / "report.html")).text


def test_the_mean_needs_half_of_the_curves() -> None:
    points, band = over_seeds([{1: 1.0, 2: 2.0}, {1: 3.0, 2: 4.0}, {1: 2.0}, {1: 2.0}, {1: 2.0}])
    assert [x for x, _ in points] == [1]
    assert points[0][1] == pytest.approx(2.0)
    assert band[0][0] < 2.0 < band[0][1]
    assert over_seeds([{3: 1.0, 1: 2.0}]) == ([(1, 2.0), (3, 1.0)], [])
    assert over_seeds([]) == ([], [])


@pytest.mark.parametrize(
    ("metric", "limits"),
    [("reverse_kl", (0.0, math.inf)), ("length", (0.0, math.inf)), ("uncertain", (0.0, 1.0)), ("avg@2", (0.0, 1.0))],
)
def test_an_interval_over_seeds_ends_where_the_measure_does(metric: str, limits: tuple[float, float]) -> None:
    def run(seed: int, value: float) -> RunFiles:
        row = {"who": "student after", metric: {"value": value, "low": value, "high": value}}
        return RunFiles("run", config={"seed": seed}, eval={"rows": [row]})

    found = Group("both", [run(0, 0.1), run(1, 0.9)]).cell("student after", metric)
    assert found["value"] == pytest.approx(0.5)
    assert found["low"] == limits[0]
    assert found["high"] == limits[1] if limits[1] == 1 else found["high"] > 1


def test_a_verifiers_own_number_may_be_beyond_0_and_1() -> None:
    def run(seed: int, value: float, high: float) -> RunFiles:
        row = {"who": "student after", "avg@2": {"value": value, "low": value, "high": high}}
        return RunFiles("run", config={"seed": seed}, eval={"rows": [row]})

    found = Group("both", [run(0, 0.1, 0.2), run(1, 0.9, 3.0)]).cell("student after", "avg@2")
    assert found["low"] < 0 and found["high"] > 1
