"""Stage times of real runs on this machine: what `cluster_sim.py` is fed with, and what it has to predict.

    python benchmarks/cluster_sim.py measure --rounds 5

Every round makes the same runs one after another: one process with the teacher beside the student, one whose teacher is
in a process of its own (`retort serve`), two ranks under torchrun, and one with a process that generates besides; each
with small batches and with a large one. So whatever else the machine does, it does to all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What was measured and predicted.
RESULTS = Path(__file__).parent / "results" / "cluster_sim.json"
SETTINGS: dict[str, Any] = {
    "student": "countdown:student",
    "teacher": "countdown:teacher",
    "data": "countdown",
    "seed": 3,
    "precision": "fp32",
    "device": "cpu",
    "checks": "skip",
    "method": {"name": "opd"},
    "optimizer": {"warmup": 0},
    "eval": {"problems": 0},
    "record": {"rollouts": 0, "overlap": 0},
    "checkpoint": {"every": 0},
}
#: Steps at the beginning of a run that are not counted: they compile and allocate.
FIRST = 2
#: Stages of `metrics.jsonl`, by what the simulator calls them.
STAGES = {
    "generate": ("time/generate",),
    "teacher": ("time/teacher",),
    "keep": ("time/sync",),
    "learn": ("time/score", "time/student", "time/loss", "time/backward", "time/optimizer"),
}


@dataclass(frozen=True)
class Setting:
    """A run that is measured.

    Attributes:
        name: Of the deployment.
        prompts: Prompts of a batch, one completion each.
        steps: Steps of the run, without the first ones.
        ranks: Processes of the trainer.
        served: The teacher is in a process of its own.
        workers: Processes that generate besides.
        staleness: Steps by which they may be ahead.
        predicted: It is not fed to the simulator, which has to predict it.
    """

    name: str
    prompts: int
    steps: int
    ranks: int = 1
    served: bool = False
    workers: int = 0
    staleness: int = 0
    predicted: bool = False

    @property
    def key(self) -> str:
        """The name of its rows."""
        ahead = f", staleness {self.staleness}" if self.staleness else ""
        return f"{self.name}, {self.prompts} prompts{ahead}"

    def settings(self, teacher: str | None) -> dict[str, Any]:
        """Those of its run; `teacher` is the server's address."""
        more = {"teacher": teacher} if self.served else {}
        own = {"steps": FIRST + self.steps, "rollout": {"prompts": self.prompts, "max_new_tokens": 48}}
        if self.workers:
            own["rollout"] |= {"workers": self.workers, "staleness": self.staleness}
        return {**SETTINGS, **more, **own}


ONE, SERVED, TWO, WORKER = "one process", "teacher in `retort serve`", "two ranks", "one process that generates besides"
#: The large batch is not far beyond the larger of the two that are fed, for a line through two points says little of
#: what lies twice as far: see the page on what was tried.
PLAN = (
    Setting(ONE, 32, 20),
    Setting(ONE, 128, 16),
    Setting(ONE, 192, 12, predicted=True),
    Setting(SERVED, 32, 20, served=True),
    Setting(SERVED, 128, 16, served=True),
    Setting(SERVED, 192, 12, served=True, predicted=True),
    Setting(TWO, 64, 20, ranks=2),
    Setting(TWO, 320, 12, ranks=2, predicted=True),
)
#: Runs that write ahead (`rollout.workers`, `rollout.staleness`); fed without staleness, predicted with it. Of a small
#: one with staleness only what it takes to hand out the weights is fed.
AHEAD = (
    Setting(WORKER, 32, 20, workers=1),
    Setting(WORKER, 128, 16, workers=1),
    Setting(WORKER, 32, 20, workers=1, staleness=1),
    Setting(WORKER, 192, 12, workers=1, staleness=1, predicted=True),
)


class Watching:
    """Keeps the times of each step, and of all that lies between two of them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._last = time.perf_counter()

    def on_step(self, run: Any, metrics: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        row = {stage: sum(metrics.get(key, 0.0) for key in keys) for stage, keys in STAGES.items()}
        whole = now - self._last
        # A batch that is written ahead takes time that is none of the step's.
        row |= {"besides": max(0.0, whole - sum(row.values())), "whole": whole, "tokens": float(metrics["tokens"])}
        self.rows.append(row)
        self._last = now


def worker(out: Path, tasks: Sequence[Mapping[str, Any]], repeats: int) -> None:
    """Makes runs one after another, several times, in this process (a rank of it); the first rank writes the rows."""
    import torch

    from retort import api, ranks
    from retort.train import runner

    torch.set_num_threads(1)
    world = ranks.join()
    found: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        for number, task in enumerate(tasks):
            run, watching = runner.start(api.assemble(task["settings"]), out / f"run-{repeat}-{number}"), Watching()
            run.callbacks = (watching,)
            run.go()
            found.setdefault(task["key"], []).extend(watching.rows[FIRST:])
    if world.leads:
        (out / "rows.json").write_text(json.dumps(found))


def keep(rounds: Sequence[Mapping[str, Any]], path: Path = RESULTS) -> None:
    """Writes what was measured into the file of results; what else is there stays."""
    import measure

    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found |= {"machine": measure.machine("cpu", 1), "rounds": list(rounds)}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def made(plan: Sequence[Setting], teacher: str | None, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Rows of some runs of the same number of ranks, made in one process for each rank."""
    import servers

    ranks = plan[0].ranks
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    tasks = [{"key": one.key, "settings": one.settings(teacher)} for one in plan]
    with tempfile.TemporaryDirectory(prefix="retort-stages-") as folder:
        words = [*start, str(Path(__file__).resolve()), folder, json.dumps(tasks), str(repeats)]
        done = subprocess.run(words, env=servers.surroundings(), capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return json.loads((Path(folder) / "rows.json").read_text())


def measured(rounds: int, repeats: int, plan: Sequence[Setting] = PLAN) -> list[dict[str, Any]]:
    """The median row of every run of a plan, for each round; with the machine's load while it was made."""
    import servers

    found: list[dict[str, Any]] = []
    with servers.ours("countdown:teacher") as server:
        for number in range(rounds):
            rows: dict[str, list[dict[str, float]]] = {}
            for ranks in sorted({one.ranks for one in plan}):
                rows |= made([one for one in plan if one.ranks == ranks], server.url, repeats)
            load = os.getloadavg()[0]
            found.append({"load": round(load, 1), "runs": {key: median(own) for key, own in rows.items()}})
            print(f"round {number + 1} of {rounds}, load {load:.1f}", file=sys.stderr, flush=True)
    return found


def median(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each number."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


if __name__ == "__main__":
    worker(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
