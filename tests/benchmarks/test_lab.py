"""The lab: everybody takes part once, runs are read as they were, and the page shows them."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from retort import config, registry

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("lab")


def test_every_method_takes_part_with_the_same_models_and_prompts(lab: ModuleType, tmp_path: Path) -> None:
    jobs = list(lab.jobs(tmp_path, (), 3))
    assert {job.settings["method"]["name"] for job in jobs} == set(registry.names())
    assert len({job.folder for job in jobs}) == len(jobs) == 3 * len(lab.entries())
    shared = [{k: v for k, v in job.settings.items() if k not in ("method", "seed", "eval")} for job in jobs]
    assert all(settings == shared[0] for settings in shared)
    for job in jobs[: len(lab.entries())]:
        config.resolve(config.recipe("countdown"), job.settings)


def _row(method: str, seed: int, share: float) -> dict[str, Any]:
    before = {"avg@8": 0.2, "pass@8": 0.7, "student_entropy": 0.4, "reverse_kl": 0.6, "forward_kl_uncertain": 0.8}
    after = {**before, "avg@8": share, "student_entropy": 0.1}
    curve = [{"step": 0, "tokens": 0, **before}, {"step": 60, "tokens": 9000, **after}]
    return {
        "method": method, "seed": seed, "before": before, "after": after,
        "teacher": None, "curve": curve, "pass_at": {"student after": {"1": share, "8": 0.9}},
        "tokens": 9000, "seconds": 20.0,
    }  # fmt: skip


def test_the_page_has_the_best_first_with_its_interval_and_names_who_is_missing(lab: ModuleType) -> None:
    rows = [_row("opd", seed, 0.3 + 0.01 * seed) for seed in range(3)] + [_row("eopd", 0, 0.5)]
    about = {name: {"method": name, "note": ""} for name in ("opd", "eopd", "gkd")}
    text = sys.modules["lab_page"].page(rows, about, ["opd", "eopd", "gkd"])
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert table[0].startswith("| `eopd` | faithful | 1 | 50.0 |")
    assert table[1].startswith("| `opd` | faithful | 3 | 31.0 ± 2.5 | 70.0 ± 0.0 | 25 ± 0 |")
    assert "Without a finished run: gkd." in text
    bare = _row("gkd", 0, 0.1)
    bare["after"] = {name: bare["after"][name] for name in ("avg@8", "pass@8")}
    unknown = sys.modules["lab_page"].page([*rows, bare], about, ["opd", "eopd", "gkd"])
    assert "| `gkd` | faithful | 1 | 10.0 | 70.0 | – | – | – | 9 | 20 |" in unknown, (
        "what was not measured is no number"
    )
    assert "n = 1 is weak" in text


def test_a_run_is_read_and_drawn(lab: ModuleType, tmp_path: Path) -> None:
    job = next(iter(lab.jobs(tmp_path / "runs", ["opd"], 1)))
    small = {**job.settings["eval"], "problems": 12, "every": 1}
    job = dataclasses.replace(job, settings={**job.settings, "steps": 2, "eval": small})
    sys.modules["runs"].run(job)
    rows = lab.read([job])
    assert [point["step"] for point in rows[0]["curve"]] == [0, 1, 2]
    assert rows[0]["tokens"] == rows[0]["curve"][-1]["tokens"] > 2 * 64 * 4 * 5
    assert rows[0]["teacher"]["avg@8"] > rows[0]["before"]["avg@8"]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: benchmarks)")
    lab.plots(rows, tmp_path)
    for name in ("accuracy", "pass-at-k", "entropy"):
        assert "<svg" in (tmp_path / f"lab-{name}.svg").read_text()
