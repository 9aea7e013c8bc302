"""The first steps of a few runs, as they were when they were written down: a refactoring leaves them as they were.

Losses, gradient norms, and the sum and the norm of the weights that learn, after each of three steps, are held to 1e-5.
The models are in float64: other processors add in other orders, which by the third step moves these numbers by 1e-15,
and those of a run in fp32 by 2e-5. Between two commits on one machine the bits of a run in fp32 must be equal, which
`benchmarks/same_numbers.py` checks. Where a change is meant to move the numbers, this writes them anew:

    PYTHONPATH=tests python tests/train/test_trajectory.py
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import models_once

from retort import api
from retort import config as configuration
from retort.train import runner

FILE = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-5
#: Two updates of a batch, each of several packs.
SMALL: dict[str, Any] = {
    "steps": 3,
    "seed": 3,
    "limit": 40,
    "precision": "fp32",
    "device": "cpu",
    "checks": "skip",
    "rollout": {"prompts": 4, "max_new_tokens": 14},
    "optimizer": {"learning_rate": 1e-3, "warmup": 0, "updates": 2, "batch_tokens": 64},
    "eval": {"problems": 0},
    "record": {"rollouts": 0},
    "checkpoint": {"every": 0},
}
CASES: dict[str, dict[str, Any]] = {
    "opd": {"method": {"name": "opd"}},
    "eopd": {"method": {"name": "eopd"}},
    "arkd": {"method": {"name": "arkd"}},  # a controller that learns
    "sdpo": {"data": "coached", "method": {"name": "sdpo"}},  # its own teacher, which moves, and rewards
    "unisd": {"data": "coached", "method": {"name": "unisd"}},  # statistics of the whole batch
}


class Watching:
    """Writes down what a step came to."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_step(self, run: runner.Run, metrics: dict[str, Any]) -> None:
        weights = [x.detach().double() for x in run.student.trainable().values()]
        self.rows.append(
            {
                "loss": metrics["loss"],
                "grad_norm": metrics["grad_norm"],
                "tokens": metrics["tokens"],
                "weights": float(sum(x.sum() for x in weights)),
                "weights_norm": math.sqrt(sum(float(x.square().sum()) for x in weights)),
            }
        )


def trajectory(name: str, folder: Path) -> list[dict[str, float]]:
    """Of one case, a row for each step."""
    watching = Watching()
    with models_once(torch.float64):
        run = runner.start(api.assemble(configuration.merge(SMALL, CASES[name])), folder / name)
        run.callbacks = (watching,)
        run.go()
    return watching.rows


@pytest.mark.parametrize("name", CASES)
def test_the_first_steps_are_as_they_were(name: str, tmp_path: Path) -> None:
    found = trajectory(name, tmp_path)
    assert len(found) == SMALL["steps"]
    for step, (row, was) in enumerate(zip(found, json.loads(FILE.read_text())[name], strict=True), start=1):
        assert row == pytest.approx(was, rel=TOLERANCE), f"step {step}"


def test_every_case_learns_something() -> None:
    for name, rows in json.loads(FILE.read_text()).items():
        assert all(row["grad_norm"] > 100 * TOLERANCE for row in rows), name
        assert len({row["weights"] for row in rows}) == SMALL["steps"], name


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        written = {name: trajectory(name, Path(place)) for name in CASES}
    FILE.write_text(json.dumps(written, indent=1) + "\n")
