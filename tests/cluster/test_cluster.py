"""`retort train --cluster` on two nodes of Ray: the numbers of torchrun to the last bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from clustered import STEPS, Nodes, after_step, alike, command, ended, ids, one_line, rows

pytestmark = pytest.mark.cluster


def test_two_nodes_make_the_run_of_torchrun_and_of_one_process(nodes: Nodes, config: Path, torchrun: Path) -> None:
    out, alone = config.parent / "ray", config.parent / "alone"
    printed = ended(nodes.train(str(config), "--out", str(out)))
    alike(out, torchrun)
    ended(command("-m", "retort", "train", str(config), "--out", str(alone)))
    for one, two in zip(rows(alone), rows(out), strict=True):
        for metric in ("loss", "grad_norm"):
            assert two[metric] == pytest.approx(one[metric], rel=1e-4), metric
    names = [{path.name for path in run.iterdir()} for run in (out, alone)]
    assert names[0] == names[1]
    assert f"step {STEPS}/{STEPS}" in printed and f"report: {out / 'report.html'}" in printed
    assert "raylet" not in printed and "WARNING" not in printed


def test_what_the_cluster_or_a_rank_refuses(nodes: Nodes, config: Path, tmp_path: Path) -> None:
    refused = {
        "cluster.ranks=9": "the run needs 18 CPUs (9 ranks of 2), and the cluster has 4 on 2 machines",
        "cluster.rank_cpus=3": "cluster.rank_cpus = 3, and the largest machine of the cluster has 2 CPUs",
        "rollout.prompts=1": "ranks",
    }
    # At once: a command needs more time for its imports than for anything else.
    asked = {word: nodes.train(str(config), "--out", str(tmp_path / word), word) for word in refused}
    for word, process in asked.items():
        assert refused[word] in one_line(process, code=2)
    assert not list(tmp_path.iterdir())


def test_workers_that_ray_places_write_what_the_ranks_would_though_one_is_killed(
    nodes: Nodes, config: Path, torchrun: Path
) -> None:
    out = config.parent / "workers"
    process = nodes.train(str(config), "--out", str(out), "rollout.workers=2", "cluster.rank_cpus=1")
    after_step(2, out, process)
    os.kill(nodes.pids("ray::Worker")[0], signal.SIGKILL)
    printed = " ".join(ended(process).split())
    assert "had ended, and was started again" in printed
    undisturbed, after = rows(torchrun), rows(out)
    assert [row["loss"] for row in after] == pytest.approx([row["loss"] for row in undisturbed], abs=1e-5)
    assert ids(out) == ids(torchrun)
    assert after[0]["engine/restarts"] == 0 < after[-1]["engine/restarts"]
    assert not nodes.pids("ray::Worker")
