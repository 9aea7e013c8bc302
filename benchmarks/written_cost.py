"""What it costs that a teacher writes before it scores: CPU seconds of a batch, beside the same method without.

    python benchmarks/written_cost.py

Runs of a few batches on one thread, each condition in turn and all of that several times. CPU seconds are those of the
process, which other work on the machine disturbs less than the clock.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lab
import measure
import torch
from lab_benches import WRITTEN
from lab_written_page import WROTE

from retort import api
from retort.console.terminal import quiet_libraries
from retort.train import runner

BATCHES, SKIPPED, REPEATS = 6, 2, 2


class _Clock:
    """Notes when a batch is done."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step(self, run: runner.Run, metrics: dict[str, Any]) -> None:
        self.ends.append(time.process_time())


def batches(job: lab.Job, folder: Path) -> list[float]:
    """CPU seconds of each batch of a short run, without the first ones."""
    settings = {**job.settings, "steps": BATCHES, "eval": {"problems": 0}}
    run, clock = runner.start(api.assemble(settings), folder), _Clock()
    run.callbacks = (clock,)
    run.go()
    spent = [end - begin for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]
    return spent[SKIPPED - 1 :]


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    quiet_libraries()
    jobs = {job.method: job for job in lab.jobs(WRITTEN, Path(), (), 1)}
    wanted = list(dict.fromkeys(name for one, other, _ in WROTE for name in (one, other)))
    found: dict[str, list[float]] = {name: [] for name in wanted}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(REPEATS):
            for name in wanted:
                measure.progress(f"{name}, {repeat + 1} of {REPEATS}")
                found[name] += batches(jobs[name], Path(folder) / f"{name}-{repeat}")
    lines: list[list[Any]] = []
    for one, other, what in WROTE:
        ours, theirs = (statistics.median(found[name]) for name in (one, other))
        lines.append([f"{one} / {other}", what, f"{ours:.2f} / {theirs:.2f}", f"{ours / theirs:.2f}"])
    print(measure.in_words(measure.machine("cpu", 1)), "", sep="\n")
    print(measure.markdown(["", "written", "CPU seconds of a batch", "ratio"], lines))


if __name__ == "__main__":
    main()
