"""What `torchrun` starts in the tests: some runs, of which each writes down what its steps came to.

torchrun --nproc-per-node 2 tests/ranks/worker.py FOLDER CASE...
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from retort import api, ranks
from retort import config as configuration
from retort.models.sharding import full
from retort.train import runner

#: Two updates of a batch, each of several packs; fp32, as a user has it.
SMALL: dict[str, Any] = {
    "steps": 5,
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
    "gkd": {"method": {"name": "gkd"}},
    "arkd": {"method": {"name": "arkd"}},  # a controller that learns
    "skew_kl": {"method": {"name": "skew_kl"}},  # replay
    "sdpo": {"data": "coached", "method": {"name": "sdpo"}},  # its own teacher, which moves, and rewards
    "unisd": {"data": "coached", "method": {"name": "unisd"}},  # statistics of the whole batch
    "rlsd": {"data": "coached", "method": {"name": "rlsd"}},
    "lora": {"method": {"name": "eopd"}, "lora": {"rank": 4}},
}


class Watching:
    """Writes down what a step came to."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_step(self, run: runner.Run, metrics: dict[str, Any]) -> None:
        weights = [full(x.detach()).double() for x in run.student.trainable().values()]
        norm = math.sqrt(sum(float(x.square().sum()) for x in weights))
        row: dict[str, Any] = {name: metrics[name] for name in ("loss", "grad_norm", "tokens")}
        row |= {"weights": float(sum(x.sum() for x in weights)), "norm": norm, "keys": sorted(metrics)}
        self.rows.append(row)


def case(name: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each step of one case."""
    watching = Watching()
    run = runner.start(api.assemble(configuration.merge(SMALL, CASES[name])), folder / name)
    run.callbacks = (watching,)
    run.go()
    return watching.rows


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    ranks.join()
    for name in names:
        rows = case(name, folder)
        (folder / f"{name}.{ranks.here().rank}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
