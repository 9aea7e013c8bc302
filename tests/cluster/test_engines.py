"""vLLM where Ray puts it: a worker with a vLLM of its own, which two ranks ask."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from clustered import ROLLOUTS, Nodes, after_step, ended, ids, one_line, rows, until
from engines.vllm import PYTHON

from retort.rollout.engines.processes import lives

pytestmark = pytest.mark.cluster

#: Fewer steps than other tests make. Two CPUs for each rank, which these have, would be all.
STEPS = 4
WRITTEN = (f"steps={STEPS}", "rollout.engine=vllm", "cluster.rank_cpus=1")


def vllm_of(run: Path) -> list[int]:
    """Processes of a vLLM whose weights are in the folder of a run."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            told = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if b"vllm.entrypoints" in told and f"{run}/engine".encode() in told:
            found.append(int(path.name))
    return found


def test_a_vllm_that_is_not_there(nodes: Nodes, config: Path, tmp_path: Path) -> None:
    process = nodes.train(
        str(config), "--out", str(tmp_path / "run"), *WRITTEN, f"rollout.vllm_python={tmp_path}/python"
    )
    told = one_line(process, code=2)
    assert "worker 0 does not start: rollout.vllm_python = " in told and "there is no such file" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
    not PYTHON.exists() and not os.environ.get("CI"), reason="vLLM has no environment: `make engines` builds it"
)
def test_ranks_are_written_for_by_a_vllm_that_is_killed_with_its_worker(
    nodes: Nodes, config: Path, torchrun: Path
) -> None:
    out = config.parent / "vllm"
    process = nodes.train(str(config), "--out", str(out), *WRITTEN, f"rollout.vllm_python={PYTHON}")
    after_step(1, out, process)
    groups = {os.getpgid(pid) for pid in vllm_of(out)}
    assert groups
    os.kill(nodes.pids("ray::Worker")[0], signal.SIGKILL)
    until(lambda: not any(map(lives, groups)), process)
    until(lambda: vllm_of(out), process)
    groups = {os.getpgid(pid) for pid in vllm_of(out)}
    printed = " ".join(ended(process).split())
    assert "worker 0 had ended, and was started again" in printed
    found = rows(out)
    assert len(found) == STEPS and all(row["engine/noise_floor"] < 1e-4 for row in found)
    assert found[0]["engine/restarts"] == 0 < found[-1]["engine/restarts"]
    assert ids(out) == ids(torchrun)[: STEPS * ROLLOUTS]
    written = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert {row["policy_version"] for row in written} == set(range(STEPS))
    until(lambda: not any(map(lives, groups)) and not nodes.pids("ray::Worker"))
