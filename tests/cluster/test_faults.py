"""What is killed, hangs or is lost while a run is made in a cluster, and what then happens.

The last test kills the cluster itself.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from clustered import (
    HANGS,
    ROLLOUTS,
    STEPS,
    Nodes,
    after_next_step,
    after_step,
    alike,
    ended,
    ids,
    leader,
    one_line,
    rows,
    until,
    weights,
)

pytestmark = pytest.mark.cluster


def test_ranks_and_a_teacher_that_are_killed_or_hang(nodes: Nodes, config: Path, torchrun: Path) -> None:
    out = config.parent / "disturbed"
    served = ("cluster.rank_cpus=1", "cluster.teachers=1", f"cluster.hangs={HANGS}")
    process = nodes.train(str(config), "--out", str(out), *served)
    after_step(1, out, process)
    os.kill(next(pid for pid in nodes.pids("ray::Rank") if pid != leader(out)), signal.SIGKILL)
    after_step(2, out, process)
    os.kill(leader(out), signal.SIGSTOP)
    after_step(4, out, process)
    os.kill(nodes.pids("ray::Teacher")[0], signal.SIGKILL)
    after_step(6, out, process)
    os.kill(nodes.pids("ray::Teacher")[0], signal.SIGSTOP)
    printed = " ".join(ended(process).split())
    assert "was killed or its machine is gone" in printed and "the run goes on from step-" in printed
    assert f"rank 0 of 2 gave no sign of life for {HANGS} seconds (cluster.hangs): it hangs, or the link" in printed
    assert printed.count("server 0 of the teacher had ended, and was started again") >= 2
    assert f"server 0 of the teacher gave no sign of life for {HANGS} seconds: it is ended" in printed
    alike(out, torchrun)


def test_a_run_that_is_told_to_stop_loses_a_rank_and_then_its_driver(
    nodes: Nodes, config: Path, torchrun: Path
) -> None:
    out = config.parent / "resumed"
    advice = f"go on with: retort train --cluster {nodes.address} --resume {out}"
    process = nodes.train(str(config), "--out", str(out))
    after_step(1, out, process)
    process.send_signal(signal.SIGTERM)  # a shell in the background ignores SIGINT
    told = one_line(process)
    assert told.startswith("retort: terminated at step ") and told.endswith(advice)
    assert not nodes.pids("ray::Rank")

    process = nodes.train("--resume", str(out), "cluster.retries=0")
    after_next_step(out, process)
    os.kill(nodes.pids("ray::Rank")[-1], signal.SIGKILL)
    told = one_line(process)
    assert "was killed or its machine is gone" in told and told.endswith(advice)

    process = nodes.train("--resume", str(out))
    after_next_step(out, process)
    after_step(5, out, process)
    process.kill()
    process.communicate()
    until(lambda: not nodes.pids("ray::Rank"))
    before = rows(out)
    assert 5 <= len(before) < STEPS
    ended(nodes.train("--resume", str(out), "cluster.ranks=1"))

    undisturbed, after = rows(torchrun), rows(out)
    assert after[:5] == undisturbed[:5]
    assert [row["loss"] for row in after] == pytest.approx([row["loss"] for row in undisturbed], rel=1e-4)
    assert len(set(ids(out))) == len(ids(out)) == STEPS * ROLLOUTS and ids(out) == ids(torchrun)
    for name, weight in weights(torchrun).items():
        assert (weights(out)[name] - weight).norm() <= 1e-4 * weight.norm(), name


def test_a_node_that_is_killed_and_another_that_comes(nodes: Nodes, config: Path, torchrun: Path) -> None:
    out = config.parent / "renewed"
    process = nodes.train(str(config), "--out", str(out))
    after_step(1, out, process)
    for pid in nodes.second():
        os.kill(pid, signal.SIGKILL)
    nodes.add()
    printed = " ".join(ended(process).split())
    assert "was killed or its machine is gone" in printed and "the run goes on from step-" in printed
    alike(out, torchrun)


def test_a_cluster_that_loses_a_node_for_good_and_then_its_head(nodes: Nodes, config: Path) -> None:
    """The last test: there is no cluster any more."""
    out = config.parent / "headless"
    advice = f"go on with: retort train --cluster {nodes.address} --resume {out}"
    process = nodes.train(str(config), "--out", str(out), "cluster.wait=1")
    after_step(1, out, process)
    for pid in nodes.second():
        os.kill(pid, signal.SIGKILL)
    told = one_line(process)
    assert "did not have room for the run within 1 seconds" in told and told.endswith(advice)

    process = nodes.train("--resume", str(out), "cluster.ranks=1")
    after_next_step(out, process)
    for name in ("gcs_server", "raylet"):
        for pid in nodes.pids(name):
            os.kill(pid, signal.SIGKILL)
    told = one_line(process)
    assert "the Ray cluster ended, or this machine lost it" in told and told.endswith(advice)
