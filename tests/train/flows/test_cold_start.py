"""The cold start of a student that decides denoising steps: examples of its experts, then its own trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flowing import planes, settings
from safetensors.torch import load_file

from retort import config as configuration
from retort.advantages import group_advantage
from retort.core.trajectory import Noise, Straight, Trajectory
from retort.errors import UserError
from retort.estimators import score_function
from retort.flows.model import FlowModel
from retort.method import Method, Term
from retort.rollout.plan import RolloutPlan
from retort.train import runner
from retort.train.flows.source import FlowSource
from retort.train.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("flows")
    planes(found)
    return found


def started(given: dict[str, Any], out: Path) -> Run:
    return runner.start(configuration.resolve(given), out)


def test_first_its_teachers_samples_then_its_own(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[tuple[str, Any, int, int]] = []
    usual = FlowSource.rollouts

    def watched(self: FlowSource, *given: Any) -> Any:
        groups = usual(self, *given)
        for rollout in (rollout for group in groups for rollout in group):
            path = rollout.sequence
            assert isinstance(path, Trajectory)
            seen.append((rollout.source, type(path.noise), path.steps, rollout.member))
        return groups

    monkeypatch.setattr(FlowSource, "rollouts", watched)
    run = started(settings(folder, cold_start={"steps": 2}, steps=3), tmp_path / "run").go()
    assert set(seen[:6]) == {("teacher", Straight, 4, 0)}, "as many steps of a sample as a trajectory has decisions"
    assert set(seen[6:]) == {("student", Noise, 4, member) for member in range(3)} and len(seen) == 6 + 9
    assert ["loss/sft" in row for row in run.metrics] == [True, True, False]
    assert [row["denoising_steps"] for row in run.metrics] == [3 * 4, 3 * 4, 3 * 3 * 4]


def test_against_the_experts_velocities_it_takes_the_student_towards_them(folder: Path, tmp_path: Path) -> None:
    plain = started(settings(folder, steps=1), tmp_path / "plain").go()
    given = settings(folder, cold_start={"steps": 30, "loss": "forward_kl"}, steps=31, rollout={"prompts": 4})
    run = started(given, tmp_path / "cold").go()
    loss = [row["loss/forward_kl"] for row in run.metrics[:30]]
    assert sum(loss[-5:]) < 0.5 * sum(loss[:5])
    assert run.metrics[30]["reverse_kl"] < 0.2 * plain.metrics[0]["reverse_kl"]


def test_going_on_within_it_is_bit_identical(folder: Path, tmp_path: Path) -> None:
    given = settings(folder, cold_start={"steps": 3}, checkpoint={"every": 2})
    run = started(given, tmp_path / "run").go()
    model, lines = tmp_path / "run" / "model" / "model.safetensors", [row["loss"] for row in run.metrics]
    whole = load_file(model)
    again = runner.resume(tmp_path / "run" / "checkpoints" / "step-2").go()
    assert [row["loss"] for row in again.metrics] == lines
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(model).items())


def test_an_expert_that_no_prompt_names_makes_no_sample(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    rows = [line for line in (folder / "data.jsonl").read_text().splitlines() if '"moons"' in line]
    (tmp_path / "moons.jsonl").write_text("\n".join(rows))
    given = settings(folder, data=str(tmp_path / "moons.jsonl"), steps=2, cold_start={"steps": 1})
    run = started(given, tmp_path / "run")
    asked = set[str]()
    usual = FlowModel.velocity
    monkeypatch.setattr(FlowModel, "velocity", lambda own, *given: asked.add(own.name) or usual(own, *given))
    run.go()
    assert str(folder / "moons") in asked and str(folder / "gaussians") not in asked


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"cold_start": {"steps": 1, "answers": "dataset"}}, "cold_start.answers = dataset: the data hold no samples"),
        ({"cold_start": {"steps": 1, "attempts": 2}}, "cold_start.attempts is for answers in words"),
        ({"cold_start": {"steps": 4}}, "leaves none of the run's 4 to 'flow_opd'"),
    ],
    ids=["data", "attempts", "steps"],
)
def test_what_it_cannot_be_is_one_line(folder: Path, tmp_path: Path, changed: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as raised:
        started(settings(folder, **changed), tmp_path / "run")
    assert "\n" not in str(raised.value)


def nothing(samples: torch.Tensor, prompts: Any) -> list[float]:
    """A reward of the user's own."""
    return [0.0 for _ in prompts]


def test_grpo_after_a_cold_start_on_several_experts(folder: Path, tmp_path: Path) -> None:
    """A baseline of the paper: the method itself asks no teacher, and its cold start asks the experts."""
    given = settings(folder, flow={"rewards": [f"{__name__}:nothing"]}, cold_start={"steps": 1}, steps=2)
    method = Method(
        name="grpo",
        rollout=RolloutPlan(samples=3),
        views={},
        terms=(Term("reward", score_function(group_advantage())),),
    )
    run = runner.start(configuration.resolve(given), tmp_path / "run", method=method).go()
    assert ["loss/sft" in row for row in run.metrics] == [True, False]
    assert "loss/reward" in run.metrics[1]
