"""Every rank reads and writes one cache, and a run with it is the run without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.ranks

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from test_ranks import command, environment  # noqa: E402


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per", "teacher_cache"))} for row in rows
    ]


def rates(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["teacher_cache/hit_rate"] for row in rows]


def test_two_ranks_share_a_cache(tmp_path: Path) -> None:
    words = command(2, str(HERE / "caching.py"), str(tmp_path))
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    plain = load_file(tmp_path / "plain" / "model" / "model.safetensors")
    for name in ("empty", "full"):
        found = load_file(tmp_path / name / "model" / "model.safetensors")
        assert all(torch.equal(found[key], values) for key, values in plain.items()), name
        assert lines(tmp_path / name) == lines(tmp_path / "plain")
    assert rates(tmp_path / "empty")[0] == 0.0
    assert rates(tmp_path / "full") == [1.0, 1.0, 1.0]
    assert rates(tmp_path / "adapted")[0] == 0.0
    for rank in range(2):
        assert "set ranks.teacher=replicated, or leave out cache.dir" in (tmp_path / f"refused-{rank}.txt").read_text()
