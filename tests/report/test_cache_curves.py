"""The plots of a run with a cache of its teacher's scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from retort.report.page import build_report


def test_what_the_cache_had_has_a_title_and_a_unit(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "run", steps=6)
    assert "cache" not in build_report([folder]).read_text().partition("Curves</h2>")[2]
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"teacher_cache/hit_rate": 0.25, "teacher_cache/damaged": 2.0} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = build_report([folder]).read_text()
    for title, unit in (
        ("Teacher’s scores that the cache had", "share of sequences"),
        ("Faults of the cache", "sequences of a step, computed anew"),
    ):
        (found,) = (part for part in page.split("<figure") if f'data-title="{title}"' in part)
        assert unit in found
    assert "teacher_cache/" not in page, "no curve under its bare name"
