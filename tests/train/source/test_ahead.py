"""Batches that are written ahead: which weights write them, what is learnt, and what a resumed run makes of them."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from following import SETTINGS, following, killed_after, killed_with_workers
from forked import started
from safetensors.torch import load_file

from retort import Method, load
from retort import config as configuration
from retort.errors import RunError, UnreachableError, UserError
from retort.rollout.plan import Replay, RolloutPlan
from retort.train import runner
from retort.train.events.observe import Silent
from retort.train.models.other_engine import other_engine
from retort.train.setup import prepare
from retort.train.source.waiting_batches import unstored
from retort.train.storage import checkpoint

pytestmark = pytest.mark.usefixtures("models_kept")
#: Metrics that depend on the clock, or on when the engine had its weights.
CLOCK = ("time/", "idle/", "tokens_per_second", "engine/")


@pytest.fixture(autouse=True)
def with_a_copy() -> Iterator[None]:
    """Every engine is a copy in this process, and no test leaves its thread."""
    with following():
        yield
    assert not [own for own in threading.enumerate() if own.name == "retort-writer"]


def ahead(settings: dict[str, Any], staleness: int, **sections: Any) -> dict[str, Any]:
    own = {"rollout": {**SETTINGS, "staleness": staleness}, "eval": {"problems": 0}, "method": {"name": "opd"}}
    return configuration.merge(configuration.merge(settings, own), sections)


def start(settings: dict[str, Any], folder: Path, observer: Any = None) -> runner.Run:
    return runner.start(configuration.resolve(settings), folder, observer)


def engine_of(run: runner.Run) -> Any:
    return run.prepared.other_engine  # type: ignore[attr-defined]


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(CLOCK)} for row in rows]


def assert_same(one: Path, two: Path) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert lines(one, name) == lines(two, name)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


class Crash(Silent):
    """Ends the run as a power cut would: nothing is saved after it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: int, steps: int, metrics: object) -> None:
        if step == self.at:
            raise SystemExit("crashed")


def test_a_batch_is_written_with_the_weights_of_so_many_steps_before(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    run = start(ahead(tiny_run, 2, steps=5, optimizer={"updates": 1}), tmp_path / "run").go()
    versions = [version for version, _ in engine_of(run).wrote]
    assert versions == [0, 0, 0, 1, 2]
    assert {thread for _, thread in engine_of(run).wrote} == {"retort-writer"}
    assert [row["staleness/max"] for row in run.metrics] == [0, 1, 2, 2, 2]
    assert [row["staleness/mean"] for row in run.metrics] == [0, 1, 2, 2, 2]
    assert [row[f"staleness/tokens/{min(n, 2)}"] for n, row in enumerate(run.metrics)] == [
        row["tokens"] for row in run.metrics
    ]
    assert {row["policy_version"] for row in lines(tmp_path / "run", "rollouts.jsonl") if row["step"] == 5} == {2}


def test_staleness_0_is_the_run_that_writes_when_it_needs(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    uncorrected = {"correction": "none"}
    run = start(ahead(tiny_run, 0, rollout=uncorrected), tmp_path / "none").go()
    start(ahead(tiny_run, 0, rollout={**uncorrected, "engine": "own"}), tmp_path / "own").go()
    assert_same(tmp_path / "none", tmp_path / "own")
    assert {thread for _, thread in engine_of(run).wrote} == {"MainThread"}
    assert not any(name.startswith(("staleness/", "idle/", "time/wait")) for name in run.metrics[0])


@pytest.mark.parametrize("staleness", [1, 2])
def test_kill_9_and_resume_learns_what_an_undisturbed_run_does(
    tiny_run: dict[str, Any], tmp_path: Path, staleness: int
) -> None:
    settings = ahead(tiny_run, staleness, steps=5, checkpoint={"every": 2}, record={"rollouts": 100})
    start(settings, tmp_path / "whole").go()
    process = started(killed_after, settings, tmp_path / "killed", 3)
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert len(lines(tmp_path / "killed")) == 3
    runner.resume(tmp_path / "killed").go()
    assert_same(tmp_path / "whole", tmp_path / "killed")
    learnt = [(row["step"], row["prompt_id"], row["member"]) for row in lines(tmp_path / "killed", "rollouts.jsonl")]
    assert len(learnt) == len(set(learnt)) == 5 * 4


def test_a_checkpoint_waits_for_the_batches_under_way_and_holds_them(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    run = start(ahead(tiny_run, 2, steps=3, checkpoint={"every": 1}), tmp_path / "run").go()
    found = [checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-{step}") for step in (2, 3)]
    held = [[own.step for own in unstored(one.parts, run.source.prompts)] for one in found]
    assert held == [[2], []]


def test_another_staleness_is_refused_when_a_run_is_resumed(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(SystemExit):
        start(ahead(tiny_run, 2), folder, Crash(3)).go()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"staleness": 2', '"staleness": 1'))
    with pytest.raises(UserError, match=r"rollout.staleness = 1 \(it was 2\); put them back in"):
        runner.resume(folder)


def test_what_fails_ahead_is_said_at_the_step_that_needs_it_and_what_was_written_is_learnt(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    run = start(ahead(tiny_run, 2, steps=6, checkpoint={"every": 0}), tmp_path / "run")

    def gone(number: int) -> None:
        if number == 4:
            raise UnreachableError("the engine is gone")

    engine_of(run).before = gone
    with pytest.raises(UnreachableError, match="the engine is gone; everything is saved at step 4 of 6, go on with"):
        run.go()
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3, 4]
    resumed = runner.resume(tmp_path / "run").go()
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3, 4, 5, 6]
    # The batches that could not be written are written by the student as it is now.
    assert [row["staleness/max"] for row in resumed.metrics[4:]] == [0, 2]


def test_a_teacher_that_fails_leaves_the_batch_for_the_resumed_run(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ahead(tiny_run, 1, steps=5)
    start(settings, tmp_path / "whole").go()
    run = start(settings, tmp_path / "cut")
    score = type(run.teachers).score

    def fails(*arguments: Any) -> Any:
        if run.step == 3:
            raise UnreachableError("the teacher is gone")
        return score(*arguments)

    monkeypatch.setattr(type(run.teachers), "score", fails)
    with pytest.raises(UnreachableError, match="the teacher is gone; everything is saved at step 3 of 5"):
        run.go()
    monkeypatch.undo()
    runner.resume(tmp_path / "cut").go()
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_saves_what_is_written_and_ends_the_thread(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = ahead(tiny_run, 1)
    start(settings, tmp_path / "whole").go()

    class Interrupter(Silent):
        def step(self, step: int, steps: int, metrics: object) -> None:
            if step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunError, match="everything is saved, go on with"):
        start(settings, tmp_path / "cut", Interrupter()).go()
    runner.resume(tmp_path / "cut").go()
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_run_that_breaks_off_closes_the_engine_under_the_thread(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    run = start(ahead(tiny_run, 2), tmp_path / "run", Crash(1))
    engine, begun = engine_of(run), threading.Event()

    def until_closed(number: int) -> None:
        while number == 3 and not engine.closed:
            begun.wait(0.01)

    engine.before = until_closed
    with pytest.raises(SystemExit):
        run.go()
    assert engine.closed


PLANS: dict[str, dict[str, Any]] = {
    "the data write some": {"method": {"name": "gkd"}},
    "a share that a controller moves": {
        "method": {"name": "skew_kl", "validate_every": 2},
        "optimizer": {"learning_rate": 0.1},
    },
    "easy to hard": {"method": {"name": "sead"}},
    "a cold start": {"cold_start": {"steps": 2, "answers": "dataset"}},
    "a teacher that moves": {"method": {"name": "sdpo", "samples": 3, "top_k": 8}, "teacher": None},
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_is_resumed_exactly(tiny_run: dict[str, Any], tmp_path: Path, plan: str) -> None:
    resumed_exactly(ahead(tiny_run, 2, steps=5, record={"rollouts": 100}, **PLANS[plan]), tmp_path)


def test_old_rollouts_are_used_again_exactly(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    replayed = RolloutPlan(samples=2, replay=Replay(capacity=6, fresh=0.5))
    own = Method(name="mine", rollout=replayed, terms=load("gkd").terms)
    resumed_exactly(ahead(tiny_run, 2, steps=6, method={"name": "gkd"}), tmp_path, own)
    assert any("replayed_fraction" in row for row in lines(tmp_path / "cut"))


def test_episodes_of_many_turns_are_resumed_exactly(tmp_path: Path) -> None:
    """Their environment begins them with other messages than the data's row."""
    from players import make_player

    tasks = tmp_path / "data.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": f"three {number}"}) + "\n" for number in range(12)))
    models = {name: str(make_player(tmp_path / name, seed=seed)) for name, seed in (("student", 1), ("teacher", 2))}
    settings = {
        **models,
        "data": str(tasks),
        "precision": "fp32",
        "device": "cpu",
        "checks": "skip",
        "rollout": {"prompts": 4, "max_new_tokens": 40, "env": "rooms"},
        "optimizer": {"learning_rate": 1e-3, "batch_tokens": 512},
        "checkpoint": {"every": 2},
    }
    method = {"name": "tcod", "curriculum": "backward", "every": 2}
    resumed_exactly(ahead(settings, 1, steps=4, method=method), tmp_path)


def resumed_exactly(settings: dict[str, Any], folder: Path, own: Method | None = None) -> None:
    config = configuration.resolve(settings, own=own)
    runner.start(config, folder / "whole", method=own).go()
    with pytest.raises(SystemExit):
        runner.start(config, folder / "cut", Crash(3), method=own).go()
    runner.resume(folder / "cut", method=own).go()
    assert_same(folder / "whole", folder / "cut")


@pytest.mark.slow
def test_workers_write_ahead_and_a_resumed_run_learns_the_same(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    workers = {"engine": "own", "vllm_python": None, "workers": 1, "noise_bound": 1.0}
    settings = ahead(tiny_run, 1, rollout=workers, method={"name": "gkd", "divergence": "reverse_kl"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "other_engine", other_engine)
        whole = start(settings, tmp_path / "whole").go()
        process = started(killed_with_workers, settings, tmp_path / "killed", 3)
        process.join(600)
        assert process.exitcode == -signal.SIGKILL
        runner.resume(tmp_path / "killed").go()
    assert [row["staleness/max"] for row in whole.metrics] == [0, 2, 2, 2]
    assert_same(tmp_path / "whole", tmp_path / "killed")
