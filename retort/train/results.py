"""The before/after table, `eval.json`: written as soon as each row is known, so that nothing computed is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retort.config import Config
from retort.evaluate.judge import Judge
from retort.files import write_text

BEFORE, AFTER, TEACHER = "student before", "student after", "teacher"


def read(folder: Path, judge: Judge | None, config: Config) -> dict[str, Any]:
    """The table of a resumed run, or an empty one."""
    path = folder / "eval.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {
        "k": config.eval.samples,
        "problems": len(judge.prompts) if judge else 0,
        "seed": config.seed,
        "task": "countdown" if config.builtin else (config.task or "data"),
        "threshold": config.eval.threshold,
        "rows": [],
        "pass_at": {},
        "gap_recovered": {},
    }


def has(results: Mapping[str, Any], who: str) -> bool:
    """Whether the table has a row."""
    return any(row["who"] == who for row in results["rows"])


def add(folder: Path, results: Mapping[str, Any], who: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The table with one more row (or that row anew), written to disk."""
    order = [BEFORE, AFTER, TEACHER]
    cells = {name: cell for name, cell in row.items() if name != "pass_at"}
    rows = [old for old in results["rows"] if old["who"] != who] + [{"who": who, **cells}]
    updated = {
        **results,
        "rows": sorted(rows, key=lambda found: order.index(found["who"])),
        "pass_at": {**results["pass_at"], **({who: row["pass_at"]} if "pass_at" in row else {})},
    }
    updated["gap_recovered"] = _recovered(updated)
    write_text(folder / "eval.json", json.dumps(updated, indent=2) + "\n")
    return updated


def _recovered(results: Mapping[str, Any]) -> dict[str, float]:
    """Share of the gap between student and teacher that was closed: (after - before) / (teacher - before)."""
    rows = {row["who"]: row for row in results["rows"]}
    if not {BEFORE, AFTER, TEACHER} <= set(rows):
        return {}
    shares: dict[str, float] = {}
    for name in (f"avg@{results['k']}", f"pass@{results['k']}"):
        cells = [rows[who].get(name) for who in (BEFORE, AFTER, TEACHER)]
        if all(cells):
            before, after, teacher = (cell["value"] for cell in cells)
            if teacher > before:
                shares[name] = (after - before) / (teacher - before)
    return shares
