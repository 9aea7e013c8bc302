"""The environment of a run in servers that Ray places: the run that plays it itself, also when a server is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from clustered import Nodes, after_step, command, ended, rows, weights

from retort.envs.elsewhere import REPLAYED

pytestmark = pytest.mark.cluster

TOML = """
student = "rooms:student"
teacher = "rooms:teacher"
data = "rooms"
steps = 4
seed = 3
precision = "fp32"
device = "cpu"
checks = "skip"
method.name = "opd"
rollout = { prompts = 4, max_new_tokens = 40 }
eval.problems = 0
checkpoint = { every = 1, keep = 4 }
cluster = { ranks = 1, rank_cpus = 1 }
"""


def test_an_environment_on_servers_that_are_killed(nodes: Nodes, tmp_path: Path) -> None:
    config, out, alone = tmp_path / "run.toml", tmp_path / "served", tmp_path / "alone"
    config.write_text(TOML)
    process = nodes.train(str(config), "--out", str(out), "cluster.environments=2")
    for step in (1, 2):
        after_step(step, out, process)
        for pid in nodes.pids("ray::EnvironmentServer"):
            os.kill(pid, signal.SIGKILL)
    printed = " ".join(ended(process).split())
    assert "of the environment had ended, and was started again" in printed
    ended(command("-m", "retort", "train", str(config), "--out", str(alone), "threads=1"))
    found = rows(out)
    assert all(row.pop(REPLAYED) >= 0 for row in found)
    assert found == rows(alone)
    mine, others = weights(out), weights(alone)
    assert all(bool((mine[name] == others[name]).all()) for name in mine)
