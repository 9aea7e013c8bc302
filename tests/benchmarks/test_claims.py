"""The benchmark of EOPD's claims: its runs, what it reads from them and what it concludes."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from retort import config

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("eopd_claims")


@pytest.fixture
def table(claims: ModuleType) -> ModuleType:
    return sys.modules["claims_table"]


def test_every_run_has_settings_that_exist_and_a_folder_of_its_own(claims: ModuleType, tmp_path: Path) -> None:
    jobs = list(claims.jobs(tmp_path, (), None))
    assert len({job.folder for job in jobs}) == len(jobs)
    for job in jobs:
        config.resolve(config.recipe("countdown"), job.settings)
    varied = [job.settings["method"] for job in jobs if job.method == "eopd"]
    assert {method["top_k"] for method in varied} >= {2, 8}
    assert {method.get("entropy_threshold") for method in varied} >= {None, 0.0, 1.2}


@pytest.mark.slow
def test_a_run_is_made_read_and_not_made_again(claims: ModuleType, tmp_path: Path) -> None:
    job = next(iter(claims.jobs(tmp_path, ["cut"], 1)))
    small = {**job.settings["eval"], "problems": 12, "every": 1}
    job = dataclasses.replace(job, settings={**job.settings, "steps": 2, "eval": small})
    sys.modules["runs"].run(job)
    assert job.finished
    assert job.done == 2
    rows = claims.read([job])
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert {"avg@8", "pass@8", "student_entropy", "student_entropy_uncertain", "forward_kl_uncertain"} <= set(row)


def _rows(differences: list[float], measure: str = "pass@8") -> list[dict[str, Any]]:
    about = {"condition": "base", "step": 10}
    return [
        {**about, "method": method, "seed": seed, measure: 0.3 + 0.1 * seed + (difference if method == "eopd" else 0.0)}
        for seed, difference in enumerate(differences)
        for method in ("opd", "eopd")
    ]


def test_differences_are_taken_within_a_seed(table: ModuleType) -> None:
    found = table.summary(_rows([0.02, 0.03, 0.04, 0.03]), {"base": "?"})
    (cell,) = found["differences"]
    assert cell["value"] == pytest.approx(0.03)
    assert cell["high"] - cell["low"] < 0.03, "seeds differ by 0.1, which is not noise of the difference"
    means = {row["method"]: row["pass@8"] for row in found["means"]}
    assert means["opd"]["high"] - means["opd"]["low"] > 0.2


@pytest.mark.parametrize(
    ("differences", "measure", "verdict"),
    [
        ([0.02, 0.03, 0.04, 0.03], "pass@8", "holds"),
        ([-0.02, -0.03, -0.04, -0.03], "pass@8", "opposite"),
        ([-0.02, 0.03, -0.04, 0.03], "pass@8", "open"),
        ([-0.02, -0.03, -0.04, -0.03], "forward_kl_uncertain", "holds"),
        ([0.02, 0.03, 0.04], "pass@8", "holds, weak"),
        ([0.02], "pass@8", "one seed"),
    ],
)
def test_what_an_interval_says_of_a_claim(
    table: ModuleType, differences: list[float], measure: str, verdict: str
) -> None:
    (cell,) = table.summary(_rows(differences, measure), {})["differences"]
    assert table.verdict(cell, table.CLAIMS[measure][1]) == verdict
    assert f" {verdict} |" in table.markdown(table.summary(_rows(differences, measure), {"base": "?"}))


def test_a_condition_that_changes_eopd_alone_is_held_against_the_base(table: ModuleType) -> None:
    rows = _rows([0.0, 0.0])
    other = [{**row, "condition": "gate-0", "pass@8": row["pass@8"] + 0.2} for row in rows if row["method"] == "eopd"]
    cells = {cell["condition"]: cell for cell in table.summary(rows + other, {})["differences"]}
    assert cells["gate-0"]["value"] == pytest.approx(0.2)
