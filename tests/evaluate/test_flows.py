"""What is measured of a flow model, against numbers computed apart; and what of it a run's folder keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flows.linear import Linear, model
from flows.paths import prompts, sampling
from torch import Tensor

from retort import config as configuration
from retort.core.images import opened
from retort.core.random_streams import generator
from retort.core.rollouts import Message, Prompt
from retort.errors import RunError, UserError
from retort.evaluate.flows import FlowEvaluator
from retort.evaluate.passk import Estimate
from retort.flows import FlowModel
from retort.flows.sampling import FlowRequest, denoise, samples
from retort.rewards.base import Grade
from retort.teachers.flow import FlowTeacher
from retort.teachers.routed import RoutedTeacher
from retort.train.output import results

HOW = {"samples": 4, "steps": 6, "seed": 0, "batch": 8, "sampling": sampling(window=1)}


class BySize:
    """Grades samples by their first coordinate, and by whether they lie right of the prompt's length."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def grade(self, samples: Tensor, prompts: Sequence[Prompt]) -> list[Grade]:
        self.asked += [prompt.id for prompt in prompts]
        first = samples.flatten(1)[:, 0].sigmoid().tolist()
        long = [float(len(prompt.text) > 5) for prompt in prompts]
        return [Grade(own, {"first": own, "long": other}) for own, other in zip(first, long, strict=True)]


def evaluator(asked: Sequence[Prompt] = (), **changes: Any) -> FlowEvaluator:
    grader = changes.pop("grader", BySize())
    return FlowEvaluator(asked or prompts(), grader, **HOW | changes)


def request(prompt: Prompt, member: int) -> FlowRequest:
    return FlowRequest(prompt.text, (0, "evaluation", prompt.id, member), (0, "evaluation", prompt.id))


def points(*, shift: float = 0.0, seed: int = 0) -> FlowModel:
    """A model of points in the plane whose velocity is the same everywhere, so that a sample is its noise, moved."""
    own = Linear((2,), seed=seed)
    with torch.no_grad():
        for parameter in own.module.parameters():
            parameter.zero_()
        own.module.of_text.fill_(shift)  # type: ignore[operator]
    return FlowModel(own, f"moved by {shift}")


class Pictures(Linear):
    """Its samples are images: the latent, enlarged."""

    def __init__(self, size: int) -> None:
        super().__init__((3, 2, 2))
        self.size = size

    def decoded(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(latents, size=(self.size, self.size)).sigmoid()


def test_rewards_are_means_with_intervals_over_prompts_and_by_domain() -> None:
    flow = model()
    row = evaluator().evaluate(flow)
    asked = [request(prompt, member) for prompt in prompts() for member in range(4)]
    first_RK = samples(flow, asked, steps=6, batch=12).flatten(1)[:, 0].sigmoid().reshape(3, 4).float().double()
    sums = first_RK.sum(1).tolist()
    by_hand = Estimate.share(sums, [4.0] * 3)
    assert by_hand is not None
    assert row["avg@4"] == pytest.approx(by_hand.plain(), rel=1e-6)
    right = (first_RK >= 0.5).sum(1)
    assert 0 < int(right.sum()) < 12
    assert row["pass_at"]["1"] == pytest.approx(float((right / 4).mean()))
    assert row["pass@4"]["value"] == pytest.approx(float((right > 0).double().mean()))
    assert row["reward/first"]["value"] == pytest.approx(float(first_RK.mean()))
    assert row["reward/long"]["value"] == pytest.approx(2 / 3)
    assert 0 <= row["reward/long"]["low"] < 2 / 3 < row["reward/long"]["high"] <= 1
    matrix = row["by_domain"]
    assert {domain: {name: cell["value"] for name, cell in own.items()} for domain, own in matrix.items()} == {
        "ring": {"first": pytest.approx(float(first_RK[[0, 2]].mean())), "long": 0.5},
        "moons": {"first": pytest.approx(float(first_RK[1].mean())), "long": 1.0},
    }
    assert matrix["moons"]["first"]["low"] <= matrix["moons"]["first"]["value"] <= matrix["moons"]["first"]["high"]


def test_nothing_depends_on_the_batch() -> None:
    flow, teacher = model(), FlowTeacher(model(seed=3), batch=5)
    one, other = (evaluator(batch=batch).evaluate(flow, teacher) for batch in (1, 64))
    for name in ("avg@4", "pass@4", "reward/first", "reverse_kl"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)
    assert one["kl_by_step"] == pytest.approx(other["kl_by_step"], rel=1e-9)


def test_all_models_start_from_the_same_noise() -> None:
    """A prompt's points under two models differ by how far these move it, and by nothing else."""
    asked = prompts()
    still, moved = (evaluator().evaluate(points(shift=shift))["samples"] for shift in (0.0, 10.0))
    assert [(one["prompt"], one["member"]) for one in still] == [(own.id, n) for own in asked for n in range(4)]
    for one, other in zip(still, moved, strict=True):
        noise = torch.randn(2, generator=generator(0, "evaluation", one["prompt"], one["member"]))
        assert one["point"] == pytest.approx(noise.tolist(), abs=1e-4)
        by = 0.1 * len(one["text"]) * 10.0
        assert [a - b for a, b in zip(one["point"], other["point"], strict=True)] == pytest.approx([by, by], abs=1e-3)
    assert still[4]["domain"] == "moons"
    assert set(still[4]["rewards"]) == {"first", "long"}


def test_the_kl_to_the_routed_teacher_is_that_of_velocities_step_by_step() -> None:
    student, experts = model(), {"ring": model(seed=3), "moons": model(seed=4)}
    routed = RoutedTeacher({name: FlowTeacher(own, batch=5) for name, own in experts.items()}, lambda own: own.domain)
    row = evaluator().evaluate(student, routed)
    how = replace(sampling(), window=None)
    by_hand = torch.zeros(3, 4, dtype=torch.float64)
    for at, prompt in enumerate(prompts()):
        path = denoise(student, [request(prompt, 0)], how)[0]
        for step in range(4):
            x, sigma, then = path.latents[step : step + 1], 1 - step / 5, 0.8 - step / 5
            v, w = (
                one.velocity(x, torch.tensor([sigma]), [prompt.text]).detach()
                for one in (student, experts[prompt.domain])
            )
            s = 0.7 * (sigma / (1 - min(sigma, 0.8))) ** 0.5
            weight = (sigma - then) / 2 * (1 / s + s * (1 - sigma) / (2 * sigma)) ** 2
            by_hand[at, step] = weight * (v - w).square().sum()
    assert row["kl_by_step"] == pytest.approx(by_hand.mean(0).tolist(), rel=1e-6)
    assert row["reverse_kl"]["value"] == pytest.approx(float(by_hand.mean()), rel=1e-6)
    assert row["reverse_kl"]["low"] < row["reverse_kl"]["value"] < row["reverse_kl"]["high"]
    same = evaluator().evaluate(student, FlowTeacher(student, batch=8))
    assert same["kl_by_step"] == [0.0] * 4
    alone = evaluator().evaluate(student)
    assert "reverse_kl" not in alone
    assert "kl_by_step" not in alone


def test_each_prompt_may_have_a_model_of_its_own() -> None:
    """The row of several experts: each makes the samples of its prompts."""
    experts = {"ring": points(shift=0.0), "moons": points(shift=10.0)}
    together = evaluator().evaluate(lambda prompt: experts[prompt.domain])
    for name, expert in experts.items():
        own = [one for one in evaluator().evaluate(expert)["samples"] if one["domain"] == name]
        assert [one for one in together["samples"] if one["domain"] == name] == own


def test_without_a_grader_there_are_samples_and_no_rewards() -> None:
    row = evaluator(grader=None).evaluate(points())
    assert set(row) == {"samples"}
    assert row["samples"][0]["rewards"] == {}


def test_progress_counts_prompts_and_every_prompt_is_graded_once() -> None:
    seen: list[tuple[int, int]] = []
    grader = BySize()
    evaluator(grader=grader).evaluate(model(), None, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (2, 3), (3, 3)]
    assert grader.asked == [prompt.id for prompt in prompts() for _ in range(4)]


def test_of_many_points_2000_are_kept_and_of_every_prompt_some() -> None:
    asked = [Prompt(str(at), (Message("user", "a ring"),), domain="ring") for at in range(300)]
    kept = evaluator(asked, samples=8, steps=1, batch=4096).evaluate(points())["samples"]
    assert len(kept) == 1800
    assert {one["prompt"] for one in kept} == {own.id for own in asked}


@pytest.fixture(scope="module")
def pictured() -> dict[str, Any]:
    asked = [Prompt(str(at), (Message("user", "a red <b>"),), domain="red") for at in range(14)]
    flow = FlowModel(Pictures(24), "pictures")
    return evaluator(asked, samples=3).evaluate(flow)


def test_images_are_kept_of_the_first_prompts_and_hold_the_samples_pixels(pictured: dict[str, Any]) -> None:
    kept = pictured["samples"]
    assert [(one["prompt"], one["member"]) for one in kept] == [(str(at), n) for at in range(12) for n in range(2)]
    own = Pictures(24)
    asked = [FlowRequest("a red <b>", (0, "evaluation", "3", 1), (0, "evaluation", "3"))]
    sample = own.decoded(samples(FlowModel(own, "pictures"), asked, steps=6, batch=1))[0]
    image = opened(kept[7]["image"].encoded())
    assert image.size == (24, 24)
    assert image.mode == "RGB"
    for x, y in ((0, 0), (23, 0), (3, 20)):
        assert image.getpixel((x, y)) == tuple((sample[:, y, x] * 255).round().int().tolist())


def test_large_images_are_kept_small() -> None:
    row = evaluator(grader=None).evaluate(FlowModel(Pictures(512), "pictures"))
    assert {one["image"].size for one in row["samples"]} == {(256, 256)}


def test_images_without_pillow_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"pictures of samples need Pillow: pip install 'retort-distill\[vision\]'"):
        evaluator(grader=None).evaluate(FlowModel(Pictures(8), "pictures"))
    evaluator(grader=None).evaluate(points())


def test_the_table_takes_the_row_and_the_folder_its_images(pictured: dict[str, Any], tmp_path: Path) -> None:
    config = configuration.resolve({"student": "a", "teacher": "b", "data": "c", "method": {"name": "flow_opd"}})
    own = evaluator()
    table = results.read(tmp_path, own, config)
    assert table["problems"] == 3
    table = results.add(tmp_path, table, results.BEFORE, pictured)
    names = [one["image"] for one in table["samples"][results.BEFORE]]
    assert len(set(names)) == 24
    for name in names:
        content = (tmp_path / name).read_bytes()
        assert name == f"samples/{Path(name).stem}.png"
        assert opened(content).format == "PNG"
    assert sorted(f"samples/{file.name}" for file in (tmp_path / "samples").iterdir()) == sorted(names)
    moved = evaluator().evaluate(points(), FlowTeacher(points(shift=1.0), batch=4))
    table = results.add(tmp_path, table, results.AFTER, moved)
    again = results.read(tmp_path, own, config)
    assert again == json.loads(json.dumps(table))
    cells = again["rows"][1]
    assert set(cells) == {"who", "avg@4", "pass@4", "reward/first", "reward/long", "reverse_kl"}
    assert results.scores(cells)["reverse_kl"] == pytest.approx(sum(again["kl_by_step"][results.AFTER]) / 4)
    assert set(again["by_domain"]) == {results.BEFORE, results.AFTER}
    assert again["samples"][results.AFTER][0]["point"] == moved["samples"][0]["point"]


def test_an_expert_has_a_row_of_its_own_behind_the_others(tmp_path: Path) -> None:
    config = configuration.resolve({"student": "a", "teacher": "b", "data": "c", "method": {"name": "flow_opd"}})
    table = results.read(tmp_path, None, config)
    row = evaluator().evaluate(points())
    for who in (results.of_teacher("color"), results.AFTER, results.of_teacher("glyph"), results.BEFORE):
        table = results.add(tmp_path, table, who, row)
    order = ["student before", "student after", "teacher color", "teacher glyph"]
    assert [one["who"] for one in table["rows"]] == order
    assert [one["who"] for one in results.read(tmp_path, None, config)["rows"]] == order


def test_a_folder_that_takes_no_images_is_one_line(pictured: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("in the way")
    config = configuration.resolve({"student": "a", "teacher": "b", "data": "c", "method": {"name": "flow_opd"}})
    with pytest.raises(RunError, match="cannot write .*samples"):
        results.add(tmp_path, results.read(tmp_path, None, config), results.BEFORE, pictured)
