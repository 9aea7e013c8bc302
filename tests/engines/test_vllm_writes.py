"""Runs whose rollouts vLLM writes: it follows the student, says how far it is from it, and is not left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.ours import ROOT, serving
from engines.vllm import PYTHON

from retort import config as configuration
from retort.core.random_streams import uniforms
from retort.core.sequences import TokenSequence
from retort.errors import UnreachableError, UserError
from retort.models.load import load_model
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.hf import HFEngine
from retort.rollout.engines.pool import PoolSettings
from retort.rollout.engines.vllm import VLLMEngine, VLLMSettings
from retort.rollout.engines.vllm_pool import VLLMPool
from retort.tasks import countdown
from retort.train import runner

pytestmark = pytest.mark.engines

VOCAB, ROOM = 266, 40
PROBE = [TokenSequence.of([2, 58, 61, 60, 9 + n]) for n in range(8)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMEngine]:
    cpu = torch.device("cpu")
    lm = load_model(str(countdown.student_path()), role="student", precision="fp32", device=cpu)
    made = VLLMEngine(lm, VOCAB, VLLMSettings(str(PYTHON)), probe=PROBE)
    made.open(tmp_path_factory.mktemp("vllm") / "engine")
    made.update(0)
    yield made
    made.close()


def requests(count: int = 64) -> list[Request]:
    contexts = [TokenSequence.of([2, 58, 61, 60, 9 + n % 20]) for n in range(count)]
    return [Request(own, uniforms(0, "rollouts", n, count=ROOM)) for n, own in enumerate(contexts)]


def ids(completions: list[Completion]) -> list[list[int]]:
    return [own.ids for own in completions]


def moved(lm: Any, name: str, size: float = 0.05) -> None:
    """Changes the parameters whose names hold a text."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own, parameter in lm.model.named_parameters():
            if name in own:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * size)


def test_the_likeliest_completions_are_those_of_the_own_loop(engine: VLLMEngine) -> None:
    own = HFEngine(engine.lm, vocab=VOCAB, max_parallel=64)
    one, two = engine.generate(requests(), Sampling(ROOM, 0.0)), own.generate(requests(), Sampling(ROOM, 1e-6))
    equal = sum(mine == other for mine, other in zip(ids(one), ids(two), strict=True)) / len(one)
    print(f"equal completions at temperature 0: {equal:.0%}")
    assert equal >= 0.95
    assert all(bool((completion.logp_A == 0).all()) for completion in one)


def test_it_writes_what_the_student_would_after_each_of_its_parts_has_moved(engine: VLLMEngine) -> None:
    """The embedding is the head, too: vLLM on a CPU would keep its packed copy of a head that is tied."""
    for name in ("embed_tokens", "self_attn", "mlp", "norm"):
        before = engine.generate(requests(), Sampling(ROOM))
        moved(engine.lm, name)
        engine.update(engine.version + 1)
        after = engine.generate(requests(), Sampling(ROOM))
        assert engine.noise_floor < 1e-4, name
        assert ids(before) != ids(after), name
        assert {own.version for own in after} == {engine.version}
    folder = engine._folder  # pyright: ignore[reportPrivateUsage]
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == ["vllm.log", f"weights-{engine.version}"]


def test_weights_that_are_refused_or_others_leave_the_old_ones_at_work(engine: VLLMEngine) -> None:
    before, version = ids(engine.generate(requests(), Sampling(ROOM))), engine.version
    others = {name: tensor * 0.5 for name, tensor in engine.lm.model.state_dict().items()}
    with pytest.raises(UserError, match=rf"keeps those of version {version}: vLLM computes something else .* nats"):
        engine.update(version + 1, others)
    assert ids(engine.generate(requests(), Sampling(ROOM))) == before
    with pytest.raises(UnreachableError, match=rf"keeps those of version {version}: vLLM at .* 500"):
        engine.update(version + 1, {"model.nothing": torch.ones(3)})
    found = engine.generate(requests(), Sampling(ROOM))
    assert ids(found) == before
    assert {own.version for own in found} == {engine.version} == {version}


def test_a_server_that_is_gone_is_one_line(engine: VLLMEngine) -> None:
    """The last test of this engine: one that is asked again would start it anew."""
    (pid,) = engine.pids
    os.killpg(pid, signal.SIGKILL)
    with pytest.raises(UnreachableError, match=r"vLLM has ended.*its log: .*vllm\.log"):
        engine.generate(requests(), Sampling(ROOM))


SETTINGS: dict[str, Any] = {
    "student": "countdown:student",
    "teacher": "countdown:teacher",
    "data": "countdown",
    "method": {"name": "opd"},
    "steps": 6,
    "precision": "fp32",
    "device": "cpu",
    "lora": {"rank": 4},
    "rollout": {"prompts": 8, "max_new_tokens": 12, "engine": "vllm", "vllm_python": str(PYTHON)},
    "optimizer": {"learning_rate": 1e-2, "warmup": 0},
    "checkpoint": {"every": 1},
    "eval": {"problems": 0},
}


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def alive(folder: Path) -> list[int]:
    """Processes whose command names this folder."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            told = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in told and int(path.name) != os.getpid():
            found.append(int(path.name))
    return found


def test_a_worker_whose_vllm_ends_starts_it_again_and_the_same_is_written(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    lm = load_model(str(countdown.student_path()), role="student", precision="fp32", device=cpu)
    pool = VLLMPool(lm, VOCAB, PoolSettings(1, more=(f"--vllm={PYTHON}",)), probe=PROBE)
    pool.open(tmp_path / "engine")
    try:
        pool.update(0)
        before, processes = ids(pool.generate(requests(8), Sampling(ROOM))), alive(tmp_path)
        assert processes and not set(processes) & set(pool.pids)
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):  # the first one takes the others along
                os.kill(pid, signal.SIGKILL)
        assert ids(pool.generate(requests(8), Sampling(ROOM))) == before
        assert pool.metrics()["engine/restarts"] == 1
        assert (tmp_path / "engine" / "worker-0" / "vllm.log").is_file()
    finally:
        pool.close()
    ends = time.monotonic() + 60
    while alive(tmp_path) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not alive(tmp_path)


def killed(settings: dict[str, Any], folder: Path, steps: int) -> Path:
    """The folder of a run in a process of its own that is killed after so many steps, when all of it has ended."""
    given = folder.with_suffix(".json")
    configuration.save(configuration.resolve(settings, {}), given)
    script = (
        "import sys\nfrom pathlib import Path\nfrom retort import config\nfrom retort.train import runner\n"
        f"runner.start(config.read_json(Path({str(given)!r})), Path({str(folder)!r})).go()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as process:
        ends = time.monotonic() + 300
        while len(rows(folder)) < steps and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.01)
        process.kill()
    ends = time.monotonic() + 60
    while alive(folder) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not alive(folder)
    return folder


def test_a_run_killed_in_the_middle_leaves_no_child_and_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = runner.start(configuration.resolve(SETTINGS, {}), tmp_path / "whole").go()
    assert [row["engine/noise_floor"] < 1e-4 for row in whole.metrics] == [True] * 6
    assert all(row["importance"] == pytest.approx(1.0, abs=1e-3) for row in whole.metrics)
    assert not alive(tmp_path / "whole")
    folder = killed(SETTINGS, tmp_path / "killed", steps=1)
    resumed = runner.resume(folder).go()
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in resumed.metrics] == pytest.approx([row["loss"] for row in whole.metrics], abs=1e-3)
    assert not alive(folder)
    assert not list((folder / "engine").glob("weights-*"))


def test_it_writes_ahead_of_a_run_and_a_killed_one_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """Weights are kept by one thread and read by another; a teacher behind a server scores groups as they come."""
    with serving("countdown:teacher", "precision=fp32", "device=cpu") as url:
        ahead = {"rollout": {**SETTINGS["rollout"], "staleness": 2}, "optimizer": {"learning_rate": 1e-3, "warmup": 0}}
        settings = {**SETTINGS, **ahead, "teacher": url, "record": {"rollouts": 100}}
        whole = runner.start(configuration.resolve(settings, {}), tmp_path / "whole").go()
        folder = killed(settings, tmp_path / "killed", steps=2)
        resumed = runner.resume(folder).go()
    assert [row["staleness/max"] for row in whole.metrics] == [0, 1, 2, 2, 2, 2]
    assert whole.metrics[0]["importance"] == pytest.approx(1.0, abs=1e-3)
    assert all(row["engine/noise_floor"] < 1e-4 for row in whole.metrics)
    assert all(abs(row["importance"] - 1.0) > 1e-4 for row in whole.metrics[2:]), "the student moves meanwhile"
    for run in (whole, resumed):
        lines = [json.loads(line) for line in (run.folder / "rollouts.jsonl").read_text().splitlines()]
        assert {(row["step"], row["policy_version"]) for row in lines} == {(n + 1, max(0, n - 2)) for n in range(6)}
        assert not alive(run.folder)
        assert not list((run.folder / "engine").glob("weights-*"))
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in resumed.metrics] == pytest.approx([row["loss"] for row in whole.metrics], abs=1e-3)


def test_a_run_that_vllm_does_not_start_for_ends_saved_in_one_line(tmp_path: Path) -> None:
    given = {"rollout": {**SETTINGS["rollout"], "vllm_options": ["--nonsense=1"]}}
    said = r"vLLM does not start with this student: .*--nonsense=1.*vllm\.log; everything is saved at step 0 of 6"
    with pytest.raises(UserError, match=said) as found:
        runner.start(configuration.resolve(SETTINGS | given, {}), tmp_path / "run").go()
    assert "\n" not in str(found.value)
    assert not alive(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "engine").iterdir()] == ["vllm.log"]
