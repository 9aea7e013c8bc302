"""Runs of a benchmark: each one of the command's own, in a folder of its own, that stops and resumes like one."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retort.method import Method


@dataclass(frozen=True)
class Job:
    """One run of one method, in a condition that others share; `own` makes a method that is not published."""

    condition: str
    method: str
    seed: int
    folder: Path
    settings: Mapping[str, Any]
    own: Callable[[], Method] | None = None

    @property
    def steps(self) -> int:
        """Batches of rollouts."""
        return int(self.settings["steps"])

    @property
    def done(self) -> int:
        """Steps on disk."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.folder / "model" / "config.json").exists()


def run(job: Job) -> None:
    """Starts or resumes a run, in a process of its own."""
    import torch

    from retort import api
    from retort.console.terminal import quiet_libraries
    from retort.train import runner

    torch.set_num_threads(1)
    quiet_libraries()
    own = None if job.own is None else job.own()
    if (job.folder / "config.json").exists():
        runner.resume(job.folder, method=own).go()
    else:
        runner.start(api.assemble(job.settings, own=own), job.folder, method=own).go()


def run_all(todo: Sequence[Job], workers: int, nice: int = 5) -> list[str]:
    """Runs what is not finished, with a bar of steps over all of them; returns what went wrong."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    left = [job for job in todo if not job.finished]
    context = multiprocessing.get_context("spawn")
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Niceness adds up, so it is set once per process and not once per run.
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=os.nice, initargs=(nice,))
    with pool, Progress(*columns) as bar:
        waiting: dict[Future[None], Job] = {pool.submit(run, job): job for job in left}
        task = bar.add_task("steps", total=sum(job.steps for job in todo), start=True)
        while waiting:
            for future in [future for future in waiting if future.done()]:
                job = waiting.pop(future)
                error = future.exception()
                if error is not None:
                    failed.append(f"{job.folder}: {error}")
                    bar.console.print(failed[-1], markup=False)
            running = [
                f"{job.condition}/{job.method}/{job.seed}" for future, job in waiting.items() if future.running()
            ]
            bar.update(task, completed=sum(job.done for job in todo), description=" ".join(running[:workers]))
            time.sleep(2)
    return failed
