"""A run survives: kill -9, interruption, damaged checkpoints, a full disk, and being watched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import killed
from safetensors.torch import load_file
from support import tiny_settings

from retort import config as configuration
from retort.errors import RunError, UserError
from retort.train import runner
from retort.train.events.observe import Silent
from retort.train.storage import checkpoint
from retort.train.storage.metrics import JsonLines

pytestmark = pytest.mark.usefixtures("models_kept")


def go(settings: dict[str, Any], folder: Path) -> runner.Run:
    return runner.start(configuration.resolve(settings), folder).go()


def changed(settings: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return configuration.merge(settings, sections)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Lines without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"} for row in rows]


def assert_same(one: Path, two: Path) -> None:
    assert lines(one) == lines(two)
    assert lines(one, "rollouts.jsonl") == lines(two, "rollouts.jsonl")
    assert json.loads((one / "eval.json").read_text()) == json.loads((two / "eval.json").read_text())
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    "sections",
    [
        {"method": {"name": "eopd"}},
        {"method": {"name": "gkd"}, "rollout": {"prompts": 7}},
        {"method": {"name": "vopd"}, "precision": "bf16", "optimizer": {"epochs": 2, "warmup": 3}},
        {"method": {"name": "arkd", "policy_learning_rate": 0.1, "on_policy_fraction": 0.5}},
        {"method": {"name": "decoupled_kl", "prefix": "teacher"}, "rollout": {"prompts": 9}},
    ],
    ids=["eopd", "gkd-mixture", "vopd-bf16", "arkd-mixture", "decoupled-kl-teacher"],
)
def test_kill_9_and_resume_is_bit_identical(tiny_run: dict[str, Any], tmp_path: Path, sections: dict[str, Any]) -> None:
    settings = changed(tiny_run, steps=6, eval={"every": 3}, **sections)
    go(settings, tmp_path / "whole")
    assert killed(settings, tmp_path / "killed", 5) == -signal.SIGKILL
    assert len(lines(tmp_path / "killed")) == 5
    assert checkpoint.newest(tmp_path / "killed" / "checkpoints") == tmp_path / "killed" / "checkpoints" / "step-4"
    runner.resume(tmp_path / "killed").go()
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = changed(tiny_run, checkpoint={"every": 0})
    assert killed(settings, tmp_path / "killed", 2) == -signal.SIGKILL
    with pytest.raises(UserError, match="holds a run already; go on with --resume"):
        runner.start(configuration.resolve(settings), tmp_path / "killed")
    runner.resume(tmp_path / "killed").go()
    go(settings, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_judging_changes_nothing_and_repeats(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    go(changed(tiny_run, eval={"every": 0}), tmp_path / "unwatched")
    go(changed(tiny_run, eval={"every": 1}), tmp_path / "watched")
    watched = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in lines(tmp_path / "watched")]
    assert lines(tmp_path / "unwatched") == watched
    assert any("eval/avg@2" in row for row in lines(tmp_path / "watched"))
    for name, tensor in weights(tmp_path / "unwatched").items():
        assert torch.equal(tensor, weights(tmp_path / "watched")[name])


def test_seeds_matter(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    go(changed(tiny_run, seed=0), tmp_path / "zero")
    go(changed(tiny_run, seed=1), tmp_path / "one")
    assert lines(tmp_path / "zero")[0]["loss"] != lines(tmp_path / "one")[0]["loss"]


def test_micro_batches_do_not_change_the_step(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    go(changed(tiny_run, steps=2, optimizer={"batch_tokens": 10**6}), tmp_path / "whole")
    go(changed(tiny_run, steps=2, optimizer={"batch_tokens": 1}), tmp_path / "cut")
    for one, two in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    go(changed(tiny_run, steps=2), tmp_path / "plain")
    go(changed(tiny_run, steps=2, optimizer={"gradient_checkpointing": True}), tmp_path / "checkpointed")
    for one, two in zip(lines(tmp_path / "plain"), lines(tmp_path / "checkpointed"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_steps_can_be_extended(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    go(changed(tiny_run, steps=2, optimizer={"schedule": "constant"}), tmp_path / "short")
    runner.resume(tmp_path / "short", steps=4).go()
    go(changed(tiny_run, steps=4, optimizer={"schedule": "constant"}), tmp_path / "long")
    assert lines(tmp_path / "short") == lines(tmp_path / "long")
    for name, tensor in weights(tmp_path / "long").items():
        assert torch.equal(tensor, weights(tmp_path / "short")[name])


def test_steps_before_the_checkpoint_are_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="is at step 4 already"):
        runner.resume(finished, steps=2)
    assert json.loads((finished / "config.json").read_text())["steps"] == 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], prompts_file: Path) -> Path:
    """The run that `tiny_run` makes when nothing disturbs it; it is only read."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    go(tiny_settings(model_folder, prompts_file), folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_saves_and_says_how_to_go_on(
    tiny_run: dict[str, Any], tmp_path: Path, whole: Path, number: signal.Signals
) -> None:
    class Interrupter(Silent):
        def step(self, step: int, steps: int, metrics: object) -> None:
            if step == 1:
                os.kill(os.getpid(), number)

    run = runner.start(configuration.resolve(tiny_run), tmp_path / "cut", Interrupter())
    with pytest.raises(RunError, match=r"at step [12] of 4; everything is saved, go on with: retort train --resume"):
        run.go()
    runner.resume(tmp_path / "cut").go()
    assert_same(whole, tmp_path / "cut")


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_previous_one_serves(
    finished: Path, name: str, harm: str
) -> None:
    folder = finished
    file = folder / "checkpoints" / "step-4" / name
    content = file.read_bytes()
    if harm == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "flip":
        place = len(content) // 2
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        file.unlink()
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder / "checkpoints" / "step-4")
    message = str(caught.value)
    assert str(folder / "checkpoints" / "step-4") in message
    assert name in message or name == "manifest.json"
    assert f"--resume {folder / 'checkpoints' / 'step-2'}" in message
    assert checkpoint.load(folder / "checkpoints" / "step-2").step == 2


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_resume_from_the_previous_checkpoint_reaches_the_same_end(finished: Path) -> None:
    folder = finished
    wanted = weights(folder)
    (folder / "checkpoints" / "step-4" / "weights.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="weights.safetensors is truncated or was changed"):
        runner.resume(folder)
    runner.resume(folder / "checkpoints" / "step-2").go()
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, wanted[name])


def test_a_full_disk_leaves_the_last_checkpoint_intact(
    tiny_run: dict[str, Any], tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checkpoint.save_file, [0]

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls[0] += 1
        real(tensors, path)
        if calls[0] == 4:  # the second checkpoint's optimizer
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    run = runner.start(configuration.resolve(tiny_run), tmp_path / "run")
    with pytest.raises(RunError, match=r"the disk is full.*the last good checkpoint is .*step-2"):
        run.go()
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-2"]
    monkeypatch.undo()
    runner.resume(tmp_path / "run").go()
    assert_same(whole, tmp_path / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_the_metrics_is_said(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    class Filler(Silent):
        def phase(self, text: str, done: int, total: int) -> None:
            (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)
            (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")

    with pytest.raises(RunError, match="metrics.jsonl: the disk is full"):
        runner.start(configuration.resolve(tiny_run), tmp_path / "run", Filler()).go()


def test_changed_data_is_noticed(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(Path(tiny_run["data"]).read_text())
    go(changed(tiny_run, data=str(data)), tmp_path / "run")
    data.write_text(data.read_text().replace("1 + 1", "1 + 7"))
    with pytest.raises(UserError, match="the training data changed"):
        runner.resume(tmp_path / "run")


def test_checkpoints_kept_are_the_newest_and_the_best(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in range(1, 6):
        checkpoint.save(folder, checkpoint.Checkpoint(step, {"w": torch.ones(1)}, {}, {}))
    checkpoint.prune(folder, keep=2, best=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4", "step-5"]


def test_a_finished_run_is_not_overwritten(tiny_run: dict[str, Any], finished: Path) -> None:
    folder = finished
    with pytest.raises(UserError, match="holds a run already; go on with --resume"):
        runner.start(configuration.resolve(tiny_run), folder)


def test_the_student_learns(model_folder: Callable[..., Path], tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """End to end: the exact reverse KL on held-out prompts falls."""
    sections = {"method": {"name": "gkd", "on_policy_fraction": 1.0, "divergence": "reverse_kl"}, "steps": 60}
    run = go(changed(tiny_run, rollout={"prompts": 8}, checkpoint={"every": 0}, **sections), tmp_path / "run")
    rows = {row["who"]: row for row in run.results["rows"]}
    assert rows["student after"]["reverse_kl"]["value"] < 0.7 * rows["student before"]["reverse_kl"]["value"]


def test_going_back_sets_later_checkpoints_aside(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Otherwise the next resume would jump to a checkpoint of the abandoned course."""
    settings = changed(tiny_run, steps=6, checkpoint={"every": 2, "keep": 3})
    go(settings, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"

    said: list[str] = []

    class Interrupter(Silent):
        def note(self, text: str) -> None:
            said.append(text)

        def step(self, step: int, steps: int, metrics: object) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunError, match="interrupted at step 3"):
        runner.resume(checkpoints / "step-2", Interrupter(), steps=9).go()
    assert any("the learning rate rises" in note for note in said)
    assert checkpoint.newest(checkpoints) == checkpoints / "step-3"
    runner.resume(tmp_path / "run").go()
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, 10))
    assert sorted(path.name for path in (checkpoints / "superseded").iterdir()) == ["step-4", "step-6"]


def test_line_separators_inside_text_do_not_cut_a_line(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "rollouts.jsonl")
    for step in range(1, 6):
        file.append({"step": step, "text": "a\u2028b\u2029c\u0085d" if step == 2 else "x"})
    file.cut(4)
    kept = [json.loads(line)["step"] for line in file.path.read_text().strip().split("\n")]
    assert kept == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_while_judging_says_how_to_go_on(
    tiny_run: dict[str, Any], tmp_path: Path, whole: Path, number: signal.Signals
) -> None:
    class Interrupter(Silent):
        def phase(self, text: str, done: int, total: int) -> None:
            os.kill(os.getpid(), number)

    run = runner.start(configuration.resolve(tiny_run), tmp_path / "cut", Interrupter())
    with pytest.raises(RunError, match=r"at step 0 of 4; everything is saved, go on with: retort train --resume"):
        run.go()
    runner.resume(tmp_path / "cut").go()
    assert_same(whole, tmp_path / "cut")


def test_another_teacher_or_student_is_not_resumed_with(
    model_folder: Callable[..., Path], tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    for role, message in (("teacher", "the teacher's weights changed"), ("student", "is another model")):
        own = Path(shutil.copytree(tiny_run[role], tmp_path / role))
        go(changed(tiny_run, **{role: str(own)}), tmp_path / f"run-{role}")
        shutil.rmtree(own)
        shutil.copytree(model_folder(seed=7, hidden_size=32, padded_to=64), own)
        with pytest.raises(UserError, match=message):
            runner.resume(tmp_path / f"run-{role}")


def test_a_run_is_resumed_from_another_folder(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(Path(tiny_run["data"]).read_text())
    monkeypatch.chdir(tmp_path)
    go(changed(tiny_run, data="prompts.jsonl", steps=2), tmp_path / "run")
    monkeypatch.chdir(tmp_path.parent)
    assert runner.resume(tmp_path / "run", steps=3).go().step == 3


def test_a_full_disk_under_the_table_is_said(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def full(self: Path, *arguments: Any, **more: Any) -> Any:
        if "eval.json" in self.name and "b" in "".join(arguments):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match=r"eval.json: the disk is full"):
        go(tiny_run, tmp_path / "run")


def test_the_last_step_is_saved_once(tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    real = checkpoint.save

    def noted(folder: Path, found: checkpoint.Checkpoint) -> Path:
        saved.append(found.step)
        return real(folder, found)

    monkeypatch.setattr(checkpoint, "save", noted)
    go(tiny_run, tmp_path / "run")
    assert saved == [2, 4]


def test_interruption_while_judging_inside_the_run_loses_no_line(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """The step is learnt but not logged yet when it is judged; a checkpoint taken there would claim a missing line."""
    settings = changed(tiny_run, eval={"every": 2})

    class Interrupter(Silent):
        stepped = False

        def step(self, step: int, steps: int, metrics: object) -> None:
            self.stepped = step == 1

        def phase(self, text: str, done: int, total: int) -> None:
            if self.stepped:
                os.kill(os.getpid(), signal.SIGTERM)
                self.stepped = False

    run = runner.start(configuration.resolve(settings), tmp_path / "cut", Interrupter())
    with pytest.raises(RunError, match="terminated at step 2 of 4"):
        run.go()
    runner.resume(tmp_path / "cut").go()
    go(settings, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "cut")
