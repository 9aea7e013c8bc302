"""Workers: who writes what, what happens when one ends or hangs, and what they refuse."""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_settings

from retort import config as configuration
from retort.core.random_streams import uniforms
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.load import load_model
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.hf import HFEngine
from retort.rollout.engines.pool import PoolSettings, WorkerPool
from retort.serve.copies import LoopCopy
from retort.serve.worker import Worker, application
from retort.train import runner
from retort.train.models.other_engine import check_other_engine, other_engine

VOCAB, ROOM = 58, 12
PROBE = [TokenSequence.of([5, 9]), TokenSequence.of([7])]


def student(folder: Path) -> Any:
    return load_model(str(folder), role="student", precision="fp32", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def pool(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    """Two processes for all tests."""
    made = WorkerPool(student(model_folder(seed=5)), VOCAB, PoolSettings(2, parallel=8, hangs=20.0), probe=PROBE)
    made.open(tmp_path_factory.mktemp("pool") / "engine")
    made.update(0)
    yield made
    made.close()


def requests(count: int = 16) -> list[Request]:
    contexts = [TokenSequence.of([5 + n % 3, 9, 12, 7][: 1 + n % 4]) for n in range(count)]
    return [Request(own, uniforms(0, "rollouts", n, count=ROOM)) for n, own in enumerate(contexts)]


def ids(completions: list[Completion]) -> list[list[int]]:
    return [own.ids for own in completions]


def test_together_they_write_what_the_own_loop_writes(pool: WorkerPool) -> None:
    own = HFEngine(pool.lm, vocab=VOCAB, max_parallel=8).generate(requests(), Sampling(ROOM, 1.3))
    found = pool.generate(requests(), Sampling(ROOM, 1.3))
    assert ids(found) == ids(own)
    assert [one.status for one in found] == [one.status for one in own]
    for mine, other in zip(found, own, strict=True):
        torch.testing.assert_close(mine.logp_A, other.logp_A, rtol=0, atol=1e-5)
    assert pool.noise_floor < 1e-5


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)],  # noticed after some time
    ids=["killed", "hung"],
)
def test_one_that_ends_or_hangs_is_started_again_and_writes_the_same(pool: WorkerPool, number: int) -> None:
    before, restarts, pids = pool.generate(requests(), Sampling(ROOM)), pool.metrics()["engine/restarts"], pool.pids
    os.killpg(pids[0], number)
    assert ids(pool.generate(requests(), Sampling(ROOM))) == ids(before)
    assert pool.metrics()["engine/restarts"] == restarts + 1
    assert pool.pids[0] != pids[0]
    assert pool.pids[1] == pids[1]


def test_weights_of_another_model_leave_the_old_ones_at_work(pool: WorkerPool) -> None:
    before, version = ids(pool.generate(requests(), Sampling(ROOM))), pool.version
    others = {name: tensor * 0.5 for name, tensor in pool.lm.model.state_dict().items()}
    with pytest.raises(UserError, match=rf"keeps those of version {version}: the pool of workers computes something"):
        pool.update(version + 1, others)
    with pytest.raises(UserError, match=rf"keeps those of version {version}: worker 0 of 2 \(its log: .*\) refuses"):
        pool.update(version + 1, {"model.nothing": torch.ones(3)})
    found = pool.generate(requests(), Sampling(ROOM))
    assert ids(found) == before
    assert {own.version for own in found} == {version}


def test_nobody_is_answered_without_the_key(pool: WorkerPool) -> None:
    url = pool._clients[0].url  # pyright: ignore[reportPrivateUsage]
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path, body in (("/v1/generate", b"{}"), ("/v1/load", b"{}")):
        asked = urllib.request.Request(url + path, body, {"Content-Type": "application/octet-stream"})
        with pytest.raises(urllib.error.HTTPError, match="401"):
            direct.open(asked, timeout=60)
    with pytest.raises(UserError, match="a worker needs a key"):
        application(Worker(LoopCopy("cpu", trust_remote_code=False)), key="")


def test_one_that_fails_again_and_again_is_one_line_and_nothing_is_left(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = WorkerPool(student(model_folder(seed=5)), VOCAB, PoolSettings(1), probe=PROBE)
    engine.open(tmp_path / "engine")
    monkeypatch.setattr("retort.rollout.engines.children.MODULE", "retort.nothing")
    with pytest.raises(
        UserError, match=r"worker 0 does not start: .*No module named retort.nothing; its log: .*0\.log"
    ):
        engine.update(0)
    assert [path.name for path in (tmp_path / "engine").iterdir()] == ["worker-0.log"]


def test_settings_that_do_not_fit_are_one_line_before_anything_is_loaded(
    model_folder: Any, image_folder: Callable[[str], Path], prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(**rollout: Any) -> Any:
        settings = tiny_settings(model_folder, prompts_file)
        return configuration.resolve(settings | {"rollout": {**settings["rollout"], **rollout}}, {})

    with pytest.raises(
        UserError, match=r"rollout.workers = 2 belongs to rollout.engine=own or vllm, not to continuous"
    ):
        check_other_engine(asked(workers=2, engine="continuous"))
    rendered: Any = None  # no prompt is rendered here
    with pytest.raises(UserError, match=r"workers generate text alone, and .* reads images; use rollout.workers=0"):
        other_engine(asked(workers=1), student(image_folder("qwen3_vl")), VOCAB, [], rendered, int)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(UserError, match=r"needs the package 'uvicorn': pip install 'retort-distill\[remote,serve\]'"):
        check_other_engine(asked(workers=1))


class KillsOne:
    """Ends the worker after the first step, while nobody asks it, and notes which it was."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def on_step(self, run: Any, metrics: Any) -> None:
        self.pids += run.prepared.other_engine.pids
        if metrics["step"] == 1:
            os.killpg(self.pids[0], signal.SIGKILL)


def test_a_run_learns_the_same_though_a_worker_is_killed_and_goes_on_without_any(
    model_folder: Any, prompts_file: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(model_folder, prompts_file) | {
        "eval": {"problems": 0},
        "checkpoint": {"every": 1, "keep": 4},
    }
    plain = runner.start(configuration.resolve(settings, {}), tmp_path / "plain").go()
    helped = {"rollout": {**settings["rollout"], "workers": 1}}
    killer = KillsOne()
    run: Any = runner.start(configuration.resolve(settings | helped, {}), tmp_path / "run")
    run.callbacks = (killer,)
    run.go()
    assert [row["loss"] for row in run.metrics] == pytest.approx([row["loss"] for row in plain.metrics], abs=1e-5)
    assert [row["engine/restarts"] for row in run.metrics] == [0, 1, 1, 1]
    assert all(row["engine/noise_floor"] < 1e-5 for row in run.metrics)
    assert len(set(killer.pids)) == 2
    assert [path.name for path in (tmp_path / "run" / "engine").iterdir()] == ["worker-0.log"]
    again = runner.resume(tmp_path / "run" / "checkpoints" / "step-2", changed={"rollout.workers": 0}).go()
    assert [row["loss"] for row in again.metrics] == pytest.approx([row["loss"] for row in plain.metrics], abs=1e-5)
    assert "engine/restarts" not in again.metrics[-1]
