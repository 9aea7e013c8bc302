"""`retort train --cluster` on two nodes of Ray: the numbers of torchrun to the last bit, whatever is killed meanwhile.

`make cluster` runs this. One cluster of two nodes serves all tests; the last one kills its head.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent
STEPS = 5
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
rollout = {{ prompts = 4, max_new_tokens = 14 }}
optimizer = {{ learning_rate = 1e-3, warmup = 0, batch_tokens = 64 }}
eval.problems = 0
record.rollouts = 1
checkpoint.every = 1
cluster = {{ ranks = 2, rank_cpus = 2 }}
"""
#: What of the metrics is a matter of time.
TIMES = ("time/", "tokens_per_second")
#: Seconds after which a test gives up: a guard against what hangs.
LONGEST = 600


@dataclass
class Nodes:
    """The two nodes: their head's address, and the folder that is in the environment of all their processes."""

    address: str
    folder: str

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


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    left = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "RAY_ADDRESS")}
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # the nodes' address is 127.0.0.1
    return left | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **loopback, **more}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    folder = tempfile.mkdtemp(prefix="rt")  # short: a path of a socket has at most 107 bytes
    surroundings = environment(
        RAY_TMPDIR=folder,
        RAY_worker_niceness="0",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_raylet_start_wait_time_s="300",
    )
    with open(Path(folder) / "nodes.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "nodes.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=surroundings,
            text=True,
        )
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, (Path(folder) / "nodes.log").read_text()
        found = Nodes(address, folder)
        yield found
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        for name in ("ray", "gcs", "python"):
            for pid in found.pids(name):
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run.toml"
    path.write_text(TOML)
    return path


def command(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    printed = process.communicate(timeout=LONGEST)[0]
    assert process.returncode == code, printed
    return printed


def train(nodes: Nodes, *words: str) -> subprocess.Popen[str]:
    return command("-m", "retort", "train", "--cluster", nodes.address, *words)


@pytest.fixture(scope="module")
def torchrun(config: Path) -> Path:
    """The run on two ranks that torchrun starts."""
    out = config.parent / "torchrun"
    two = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    ended(command(*two, "-m", "retort", "train", str(config), "--out", str(out)))
    return out


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in found]


def alike(one: Path, other: Path) -> None:
    """The same metrics of every step, and the same weights to the last bit."""
    assert len(rows(one)) == STEPS
    assert rows(one) == rows(other)
    mine, others = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def after_step(step: int, run: Path, process: subprocess.Popen[str]) -> None:
    """Waits until a run has saved a step."""
    ends = time.monotonic() + LONGEST
    while not any((run / "checkpoints").glob(f"step-{step}*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_two_nodes_make_the_run_of_torchrun_and_of_one_process(nodes: Nodes, config: Path, torchrun: Path) -> None:
    out, alone = config.parent / "ray", config.parent / "alone"
    printed = ended(train(nodes, str(config), "--out", str(out)))
    alike(out, torchrun)
    ended(command("-m", "retort", "train", str(config), "--out", str(alone)))
    for one, two in zip(rows(alone), rows(out), strict=True):
        for metric in ("loss", "grad_norm"):
            assert two[metric] == pytest.approx(one[metric], rel=1e-4), metric
    names = [{path.name for path in run.iterdir()} for run in (out, alone)]
    assert names[0] == names[1]
    assert f"step {STEPS}/{STEPS}" in printed and f"report: {out / 'report.html'}" in printed
    assert "raylet" not in printed and "WARNING" not in printed


def test_a_killed_rank_ends_the_run_or_has_it_go_on(nodes: Nodes, config: Path, torchrun: Path) -> None:
    out = config.parent / "killed"
    process = train(nodes, str(config), "--out", str(out), "cluster.retries=0")
    after_step(1, out, process)
    os.kill(nodes.pids("ray::Rank")[-1], signal.SIGKILL)
    printed = ended(process, code=1)
    (told,) = [line for line in printed.splitlines() if line.startswith("retort: ")]
    assert "was killed or its machine is gone" in told
    assert told.endswith(f"go on with: retort train --cluster {nodes.address} --resume {out}")
    process = train(nodes, "--resume", str(out), "cluster.retries=3")
    after_step(3, out, process)
    os.kill(nodes.pids("ray::Rank")[0], signal.SIGKILL)
    printed = " ".join(ended(process).split())
    assert "the run goes on from step-" in printed
    alike(out, torchrun)


def test_a_served_teacher_is_that_of_the_ranks_also_when_it_is_killed(
    nodes: Nodes, config: Path, torchrun: Path
) -> None:
    out = config.parent / "served"
    process = train(nodes, str(config), "--out", str(out), "cluster.rank_cpus=1", "cluster.teachers=1")
    after_step(1, out, process)
    os.kill(nodes.pids("ray::Teacher")[0], signal.SIGKILL)
    printed = " ".join(ended(process).split())
    assert "server 0 of the teacher had ended, and was started again" in printed
    assert json.loads((out / "config.json").read_text())["teacher"] == "countdown:teacher"
    alike(out, torchrun)


def test_an_interrupted_run_saves_and_goes_on(nodes: Nodes, config: Path, torchrun: Path) -> None:
    out = config.parent / "interrupted"
    process = train(nodes, str(config), "--out", str(out))
    after_step(1, out, process)
    process.send_signal(signal.SIGTERM)  # a shell in the background ignores SIGINT
    printed = ended(process, code=1)
    (told,) = [line for line in printed.splitlines() if line.startswith("retort: ")]
    assert told.startswith("retort: terminated at step ")
    assert told.endswith(f"go on with: retort train --cluster {nodes.address} --resume {out}")
    assert not nodes.pids("ray::Rank")
    ended(train(nodes, "--resume", str(out)))
    alike(out, torchrun)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["cluster.ranks=9"], "the run needs 18 CPUs (9 ranks of 2), and the cluster has 4 on 2 machines"),
        (["cluster.rank_cpus=3"], "cluster.rank_cpus = 3, and the largest machine of the cluster has 2 CPUs"),
        (["rollout.prompts=1"], "ranks"),
    ],
    ids=["ranks", "cpus", "prompts"],
)
def test_what_the_cluster_or_a_rank_refuses(
    nodes: Nodes, config: Path, tmp_path: Path, words: list[str], names: str
) -> None:
    printed = ended(train(nodes, str(config), "--out", str(tmp_path / "run"), *words), code=2)
    (told,) = [line for line in printed.splitlines() if line.startswith("retort: ")]
    assert names in told
    assert "Traceback" not in printed and not (tmp_path / "run").exists()


def test_a_cluster_that_loses_its_head(nodes: Nodes, config: Path) -> None:
    """The last test: there is no cluster any more."""
    out = config.parent / "headless"
    process = train(nodes, str(config), "--out", str(out))
    after_step(1, out, process)
    for name in ("gcs_server", "raylet"):
        for pid in nodes.pids(name):
            os.kill(pid, signal.SIGKILL)
    printed = ended(process, code=1)
    told = [line for line in printed.splitlines() if line.startswith("retort: ")]
    assert len(told) == 1, printed
    assert f"retort train --cluster {nodes.address} --resume {out}" in told[0]
