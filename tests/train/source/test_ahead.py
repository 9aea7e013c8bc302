"""Batches that are written ahead: which weights write them, what is learnt, and what a resumed run makes of them."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from following import SETTINGS, following, killed_after
from forked import started
from safetensors.torch import load_file

from retort import config as configuration
from retort.errors import RunError, UserError
from retort.train import runner
from retort.train.events.observe import Silent
from retort.train.storage import checkpoint

pytestmark = pytest.mark.usefixtures("models_kept")
#: Metrics that depend on the clock.
CLOCK = ("time/", "idle/", "tokens_per_second")


@pytest.fixture(autouse=True)
def with_a_copy() -> Iterator[None]:
    """Every engine is a copy in this process, and no test leaves its thread."""
    with following():
        yield
    assert not [own for own in threading.enumerate() if own.name == "retort-writer"]


def ahead(settings: dict[str, Any], staleness: int, **sections: Any) -> dict[str, Any]:
    own = {"rollout": {**SETTINGS, "staleness": staleness}, "eval": {"problems": 0}, "method": {"name": "opd"}}
    return configuration.merge(configuration.merge(settings, own), sections)


def start(settings: dict[str, Any], folder: Path, observer: Any = None) -> runner.Run:
    return runner.start(configuration.resolve(settings), folder, observer)


def engine_of(run: runner.Run) -> Any:
    return run.prepared.other_engine  # type: ignore[attr-defined]


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(CLOCK)} for row in rows]


def assert_same(one: Path, two: Path) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert lines(one, name) == lines(two, name)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_batch_is_written_with_the_weights_of_so_many_steps_before(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    run = start(ahead(tiny_run, 2, steps=5, optimizer={"updates": 1}), tmp_path / "run").go()
    versions = [version for version, _ in engine_of(run).wrote]
    assert versions == [0, 0, 0, 1, 2]
    assert {thread for _, thread in engine_of(run).wrote} == {"retort-writer"}
    assert [row["staleness/max"] for row in run.metrics] == [0, 1, 2, 2, 2]
    assert [row["staleness/mean"] for row in run.metrics] == [0, 1, 2, 2, 2]
    assert [row[f"staleness/tokens/{min(n, 2)}"] for n, row in enumerate(run.metrics)] == [
        row["tokens"] for row in run.metrics
    ]
    assert [row["policy_version"] for row in lines(tmp_path / "run", "rollouts.jsonl") if row["step"] == 5][0] == 2


def test_staleness_0_is_the_run_that_writes_when_it_needs(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    start(ahead(tiny_run, 0), tmp_path / "other")
    run = start(ahead(tiny_run, 0), tmp_path / "none").go()
    assert {thread for _, thread in engine_of(run).wrote} == {"MainThread"}
    assert not any(name.startswith(("staleness/", "idle/", "time/wait")) for name in run.metrics[0])
