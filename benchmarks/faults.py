"""A run in a cluster in which something is killed every minute, and the same run left alone: effective training time.

    build/cluster/bin/python benchmarks/faults.py
    build/cluster/bin/python benchmarks/faults.py --minutes 6 --every 60 --ranks 2 --kinds rank

Ranks and a server of the teacher, all started by Ray on this machine, are at work for some minutes each time. With
faults one process is killed with -9 at a time, by turns of a rank and the server; a run that loses a rank starts all
of them anew from its newest checkpoint. Each takes a core, so two cores hold one rank and the server. Time
counts from the first step's line in `metrics.jsonl` to the last one, so starting is left out, and starting again is
not. Effective is a step that counts at the median of the run's own steps: work that was lost, restarts, and waiting for
a server that starts again are not. The last line is the steps of the disturbed run as a share of the other's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = [
    *("student=countdown:student", "teacher=countdown:teacher", "data=countdown", "method.name=opd", "seed=3"),
    *("precision=fp32", "device=cpu", "checks=skip", "rollout.prompts=32", "rollout.max_new_tokens=32"),
    *("optimizer.warmup=0", "eval.problems=0", "record.rollouts=0", "checkpoint.every=20", "checkpoint.keep=1"),
    *("cluster.teachers=1", "cluster.retries=9"),
]
KINDS = ("rank", "teacher")


class Work:
    """A run at work, in a new folder."""

    def __init__(self, folder: Path, ranks: int) -> None:
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        settings = [*SETTINGS, f"cluster.ranks={ranks}", "--steps", "100000", "--out", str(folder)]
        words = ["-m", "retort", "train", "--cluster", "auto", *settings]
        self.folder, self.log = folder, folder.with_suffix(".log")
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *words], env=environment, stdout=out, stderr=subprocess.STDOUT
            )

    def rows(self) -> list[dict[str, float]]:
        """The metrics of its steps."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def kill(self, kind: str) -> None:
        """Kills one of its processes."""
        name = b"ray::Teacher" if kind == "teacher" else b"ray::Rank"
        found = [pid for pid in _below(self.process.pid) if _command(pid).startswith(name)]
        if found:  # one that is just being started cannot be killed
            os.kill(found[-1], signal.SIGKILL)

    def end(self) -> None:
        """Has it save and end."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _below(pid: int) -> Iterator[int]:
    """All descendants of a process."""
    for children in Path("/proc").glob(f"{pid}/task/*/children"):
        for child in children.read_text().split():
            yield int(child)
            yield from _below(int(child))


def measured(work: Work, seconds: float, every: float, kinds: Sequence[str]) -> float:
    """Steps a minute of a run; without kinds nothing is killed."""
    turns, noted = itertools.cycle(kinds), list[str]()
    while not work.rows():
        if work.process.poll() is not None:
            sys.exit(work.log.read_text()[-2000:])
        time.sleep(0.05)
    began = last = time.monotonic()
    steps, due, killed = 1, began + every, (0.0, "")
    while time.monotonic() < began + seconds:
        if work.process.poll() is not None:
            sys.exit(work.log.read_text()[-2000:])
        now = max((int(row["step"]) for row in work.rows()[-1:]), default=0)
        if now > steps:
            steps, last = now, time.monotonic()
            if killed[1]:
                noted.append(f"{killed[1]} {last - killed[0]:.1f} s")
                killed = (0.0, "")
        # The run ends with the interval of its last fault, not with the fault.
        if kinds and time.monotonic() >= due and due + every / 2 < began + seconds:
            kind, due = next(turns), due + every
            work.kill(kind)
            killed = (time.monotonic(), kind)
            time.sleep(0.2)
            steps = max([steps, *(int(row["step"]) for row in work.rows()[-1:])])  # it ended before it was killed
        time.sleep(0.05)
    rows = [row["time/step"] for row in work.rows()[1:steps]]
    work.end()
    wall, median = last - began, statistics.median(rows)
    effective = len(rows) * median / wall
    name = f"a fault every {every:g} s" if kinds else "left alone"
    print(f"{name:20} {len(rows):5} steps of {median:.2f} s in {wall:.0f} s: effective {effective:.1%}", flush=True)
    if noted:
        print("from a fault to the next step:", ", ".join(noted), flush=True)
    return len(rows) / wall * 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4, help="of each of the two runs")
    parser.add_argument("--every", type=float, default=60, help="seconds between two faults")
    parser.add_argument("--ranks", type=int, default=1, help="of each run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what is killed, by turns")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = 60 * arguments.minutes
        alone = measured(Work(Path(folder) / "alone", arguments.ranks), seconds, arguments.every, ())
        work = Work(Path(folder) / "disturbed", arguments.ranks)
        disturbed = measured(work, seconds, arguments.every, arguments.kinds)
    print(f"steps a minute: {disturbed:.1f} with faults, {alone:.1f} left alone ({disturbed / alone:.1%})")


if __name__ == "__main__":
    main()
