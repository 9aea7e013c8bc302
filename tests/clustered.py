"""What tests of `make cluster` share: commands on a Ray cluster, its processes, and runs that are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
STEPS = 8
#: Rollouts of a step, all of which are recorded.
ROLLOUTS = 4
TOML = f"""
student = "countdown:student"
teacher = "countdown:teacher"
data = "countdown"
steps = {STEPS}
seed = 3
limit = 40
precision = "fp32"
device = "cpu"
checks = "skip"
method.name = "opd"
rollout = {{ prompts = {ROLLOUTS}, max_new_tokens = 14 }}
optimizer = {{ learning_rate = 1e-3, warmup = 0, batch_tokens = 64 }}
eval.problems = 0
record.rollouts = {ROLLOUTS}
checkpoint = {{ every = 1, keep = {STEPS} }}
cluster = {{ ranks = 2, rank_cpus = 2 }}
"""
#: What of the metrics is a matter of time.
TIMES = ("time/", "tokens_per_second")
#: Seconds after which a test gives up: a guard against what hangs.
LONGEST = 600
#: `cluster.hangs` of runs in which something hangs, seconds: runs that are not disturbed are never silent for as long.
HANGS = 10


@dataclass
class Nodes:
    """Nodes of Ray: their head's address, and the folder that is in the environment of all their processes.

    A command to a cluster may need a network namespace of its own, and variables.
    """

    address: str
    folder: str
    process: subprocess.Popen[str] | None = None
    within: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=lambda: {})

    def pids(self, name: str) -> list[int]:
        """Processes of the cluster whose command begins with a name, the oldest first."""
        found: list[int] = []
        for process in Path("/proc").iterdir():
            try:
                if process.name.isdigit() and self.folder.encode() in (process / "environ").read_bytes():
                    words = (process / "cmdline").read_bytes().split(b"\0")[0].decode()
                    found += [int(process.name)] if Path(words).name.startswith(name) else []
            except (OSError, UnicodeDecodeError):
                continue
        return sorted(found)

    def second(self) -> list[int]:
        """All processes of the node that is not the head's."""
        (raylet,) = [pid for pid in self.pids("raylet") if b"--head" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        own, parents = [raylet], {pid: _parent(pid) for pid in self.pids("")}
        for pid in own:
            own += [child for child, parent in parents.items() if parent == pid]
        return own

    def add(self) -> None:
        """Adds a node."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def train(self, *words: str) -> subprocess.Popen[str]:
        """`retort train` on the cluster."""
        start = ("-m", "retort", "train", "--cluster", self.address)
        return command(*start, *words, within=self.within, more=self.variables)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    left = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "RAY_ADDRESS")}
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # the nodes' address is 127.0.0.1
    return left | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **loopback, **more}


def quick_start(folder: str) -> dict[str, str]:
    """The environment of nodes of Ray that keep what they write in a folder, and do not give way to others."""
    return environment(
        RAY_TMPDIR=folder,
        RAY_worker_niceness="0",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_raylet_start_wait_time_s="300",
    )


def command(*words: str, within: tuple[str, ...] = (), more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*within, sys.executable, *words],
        env=environment(**(more or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a command printed that ended with a code."""
    printed = process.communicate(timeout=LONGEST)[0]
    assert process.returncode == code, printed
    return printed


def one_line(process: subprocess.Popen[str], code: int = 1) -> str:
    """The one line in which a command said why it ended."""
    printed = ended(process, code)
    told = [line for line in printed.splitlines() if line.startswith("retort: ")]
    assert len(told) == 1 and "Traceback" not in printed, printed
    return told[0]


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of every step, without those that are a matter of time."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in found]


def ids(run: Path) -> list[tuple[int, str, int]]:
    """What was learnt: step, prompt and member of every rollout, in the order of the record."""
    found = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    return [(row["step"], row["prompt_id"], row["member"]) for row in found]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def alike(one: Path, other: Path) -> None:
    """The same metrics of every step, the same rollouts, each once, and the same weights to the last bit."""
    assert len(rows(one)) == STEPS
    assert rows(one) == rows(other)
    assert ids(one) == ids(other) and len(set(ids(one))) == len(ids(one)) == STEPS * ROLLOUTS
    mine, others = weights(one), weights(other)
    assert mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def until(true: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Waits until something is true, while a command is at work."""
    ends = time.monotonic() + LONGEST
    while not true():
        assert process is None or process.poll() is None, process and process.communicate()[0]
        assert time.monotonic() < ends
        time.sleep(0.05)


def after_step(step: int, run: Path, process: subprocess.Popen[str]) -> None:
    """Waits until a run has saved a step."""
    until(lambda: any((run / "checkpoints").glob(f"step-{step}")), process)


def after_next_step(run: Path, process: subprocess.Popen[str]) -> None:
    """Waits until a run that was resumed has saved a step of its own: how many there are already depends on time."""
    saved = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    after_step(saved + 1, run, process)


def leader(run: Path) -> int:
    """The process of the first rank, which has the run's folder."""
    return int(json.loads((run / ".lock").read_text())["pid"])
