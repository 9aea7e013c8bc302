"""The benchmark of whole steps: its tables say what was measured, its runs are runs. Never wall-clock."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("measure", "training_systems", "large_vocabulary", "end_to_end")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_markdown_and_json(scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = scripts.measure.markdown(["a", "b"], [[1.234, None], [12345.6, 0.0001]])
    assert table.splitlines() == ["| a | b |", "|---|---|", "| 1.23 | – |", "| 12,346 | 1.0e-04 |"]
    scripts.measure.finish(scripts.measure.machine("cpu", 1), {"x": 1}, table, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["x"] == 1
    assert "cores" in capsys.readouterr().out


def test_a_worker_that_dies_is_a_note_and_not_the_end(scripts: SimpleNamespace, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import sys\nif len(sys.argv) > 1:\n    raise SystemExit('no memory')\nprint('{\"a\": 1}')\n")
    assert scripts.measure.in_own_process(script, []) == {"a": 1}
    assert scripts.measure.in_own_process(script, ["x"]) == {"failed": "no memory"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_peak_memory_sees_what_is_held_and_given_back(scripts: SimpleNamespace) -> None:
    peak = scripts.measure.Peak().start()
    if not peak.exact:
        pytest.skip("this kernel does not let a process set back its high-water mark")
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert 50 < peak.stop() < 200


def test_runs_of_one_system_are_merged_and_failures_kept(scripts: SimpleNamespace) -> None:
    good = {"seconds": [1.0, 2.0], "tokens": [100, 100], "phases": {"generate": 1.0}}
    good |= {"peak_rss_mib": 5.0, "peak_above_mib": 1.0}
    found = scripts.end_to_end.merged([good, {"failed": "killed"}])
    assert found["tokens_per_second"] == 75.0 and found["steps"] == 2 and found["failed_runs"] == ["killed"]
    assert scripts.end_to_end.merged([{"failed": "killed"}]) == {"failed": "killed"}
    half = {**found, "tokens_per_second": 37.5}
    text = scripts.end_to_end.pair_table(
        "small", {"retort": found, "trl, tuned": half, "trl, defaults": {"failed": "x"}}
    )
    assert "2.00 x as fast" in text and len({line.count("|") for line in text.splitlines() if "|" in line}) == 1


def test_growth_table_says_how_far_from_flat(scripts: SimpleNamespace) -> None:
    def one(seconds: float) -> dict[str, object]:
        return {"seconds": [seconds], "tokens": [1000], "peak_rss_mib": 9.0, "peak_above_mib": 1.0}

    text = scripts.end_to_end.growth_table({"1": one(0.9), "2": one(1.1), "3": {"failed": "killed"}})
    assert "±10 %" in text and "killed" in text


def test_a_whole_run_of_retort_is_timed(scripts: SimpleNamespace) -> None:
    found = scripts.training_systems.retort(scripts.end_to_end.small(2, 2), 1)
    assert len(found["seconds"]) == 1 and found["tokens"][0] > 0 and {"generate", "student"} <= set(found["phases"])


@pytest.mark.filterwarnings("ignore")
def test_a_whole_run_of_trl_is_timed(scripts: SimpleNamespace) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    found = scripts.training_systems.trl(scripts.end_to_end.small(2, 2), 1, tuned=True)
    assert len(found["seconds"]) == 1 and found["tokens"][0] > 0 and "generate" in found["phases"]


def test_the_large_pair_writes_full_answers(scripts: SimpleNamespace, tmp_path: Path) -> None:
    found = scripts.training_systems.retort(scripts.end_to_end.large(tmp_path, 2, quick=True), 1)
    assert found["tokens"] == pytest.approx([16 * 16], abs=32)
