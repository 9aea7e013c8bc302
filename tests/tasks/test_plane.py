"""The task of flows in the plane: shapes, prompts, and models of which each expert knows one half."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from retort.config import recipe
from retort.core.messages import Message
from retort.core.rollouts import Prompt
from retort.flows.small import SmallFlow
from retort.rewards.samples import SampleGrader
from retort.tasks.matching import Fit, fit
from retort.tasks.plane import DOMAINS, MODELS_DIR, build, rows, student_path, teacher_paths
from retort.tasks.plane.build import CONFIG, STUDENT, Stage, measure, training
from retort.tasks.plane.problems import WORDS, domain
from retort.tasks.plane.shapes import NEAR, SHAPES, on_shape, points


@cache
def scored(name: str) -> dict[str, float]:
    flow = SmallFlow.open(MODELS_DIR / name)
    return {own: measure(flow, own, 100) for own in DOMAINS}


@cache
def merged() -> SmallFlow:
    flow, *others = (SmallFlow.open(path) for path in teacher_paths().values())
    weights = [own.module.state_dict() for own in (flow, *others)]
    flow.module.load_state_dict({name: sum(own[name] for own in weights) / len(weights) for name in weights[0]})
    return flow


def test_points_of_a_shape_are_on_it() -> None:
    for name in SHAPES:
        drawn = points(name, 500, torch.Generator().manual_seed(0))
        assert drawn.shape == (500, 2)
        assert on_shape(name, drawn).float().mean() > 0.97
        assert torch.equal(drawn, points(name, 500, torch.Generator().manual_seed(0)))


def test_halves_are_apart_and_both_are_their_union() -> None:
    grid = torch.cartesian_prod(torch.linspace(-2.5, 2.5, 101), torch.linspace(-2.5, 2.5, 101))
    for kind in ("moon", "gaussians"):
        upper, lower = (on_shape(f"{half} {kind}", grid) for half in ("upper", "lower"))
        both = on_shape("both moons" if kind == "moon" else "both gaussians", grid)
        assert torch.equal(both, upper | lower)
        assert (upper & lower).sum() < 0.1 * upper.sum()  # the moons come as near as 0.5
        assert upper.sum() > 100 and lower.sum() > 100


def test_distances() -> None:
    upper = SHAPES["upper moon"].distance_N
    given = torch.tensor([[-0.5, -0.25], [-0.5, 1.75], [0.5, -0.65], [-1.9, -0.25 - 0.3]], dtype=torch.float64)
    expected = torch.tensor([1.0, 1.0, 0.4, 0.5], dtype=torch.float64)  # middle, above, below an end, beside the other
    torch.testing.assert_close(upper(given), expected)
    eight = SHAPES["both gaussians"].distance_N(torch.zeros(1, 2))
    torch.testing.assert_close(eight, torch.tensor([1.6]))
    assert NEAR < 0.5


def test_rows() -> None:
    every = rows("train")
    assert len(every) == len({row["id"] for row in every}) == 384
    assert rows("train", 5) == every[:5] and rows("train", 2, seed=1)[0]["id"] != every[0]["id"]
    assert not {row["id"] for row in every} & {row["id"] for row in rows("held_out")}
    assert {row["prompt"] for row in every} == set(SHAPES)
    assert [row["domain"] for row in every[:4]] == ["moons", "gaussians"] * 2
    assert {row["domain"] for row in every} == set(DOMAINS) == set(teacher_paths())
    assert all(set(row["prompt"].split()) <= set(WORDS) for row in every)
    for wrong in ({"split": "test"}, {"split": "train", "count": 385}):
        with pytest.raises(ValueError, match="the splits are"):
            rows(**wrong)


def test_rows_can_be_graded() -> None:
    grader = SampleGrader(recipe("plane")["flow"]["rewards"])
    grader.check([Prompt(row["id"], (Message("user", row["prompt"]),)) for row in rows("train")])


def test_the_student_learns_from_wide_points_and_an_expert_from_sharp_ones_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    for stage, sharp in ((STUDENT, ()), (Stage(("moons",), Fit(1)), ("moons",))):
        data, texts = training(stage)(2000, generator)
        for own in DOMAINS:
            near = [bool(on_shape(text, data[row : row + 1])) for row, text in enumerate(texts) if domain(text) == own]
            assert (sum(near) / len(near) > 0.9) == (own in sharp)


def test_models_are_what_the_script_makes() -> None:
    for path in (student_path(), *teacher_paths().values()):
        flow = SmallFlow.open(path)
        assert flow.config == CONFIG
        assert flow.identity == SmallFlow.open(student_path()).identity
        assert "python -m retort.tasks.plane.build" in (path / "README.md").read_text(encoding="utf-8")
    assert sum(file.stat().st_size for file in MODELS_DIR.rglob("*")) < 1_000_000


def test_each_expert_knows_one_half_and_the_student_neither() -> None:
    for own, other in (DOMAINS, DOMAINS[::-1]):
        assert scored(own)[own] > scored("student")[own] + 0.3
        assert scored(own)[other] < scored("student")[other] + 0.1


def test_the_mean_of_the_experts_is_between() -> None:
    for own in DOMAINS:
        assert scored("student")[own] + 0.05 < measure(merged(), own, 100) < scored(own)[own] - 0.1


def test_a_fit_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build, "STUDENT", Stage((), Fit(steps=3, batch=8)))
    monkeypatch.setattr(build, "EXPERTS", {name: Stage((name,), Fit(steps=2, batch=8)) for name in DOMAINS})
    monkeypatch.setattr(build, "measure", lambda flow, own: 0.5)
    saved = []
    for folder, seed in (("one", 0), ("same", 0), ("other", 1)):
        monkeypatch.setattr(sys, "argv", ["build", "--out", str(tmp_path / folder), "--seed", str(seed)])
        build.main()
        saved.append([(tmp_path / folder / name / "model.safetensors").read_bytes() for name in ("student", *DOMAINS)])
    assert saved[0] == saved[1] != saved[2]
    assert len(set(saved[0])) == 3
    assert "moons: step 2 of 2" in capsys.readouterr().out
    card = (tmp_path / "one" / "moons" / "README.md").read_text(encoding="utf-8")
    assert "2 steps of 8 points" in card and "around moons" in card


def test_fit_learns() -> None:
    flow = SmallFlow.new(CONFIG, 0)
    before = measure(flow, "moons", 50)
    fit(flow, training(Stage(DOMAINS, Fit(1))), Fit(steps=60, batch=64))
    assert measure(flow, "moons", 50) > before + 0.05
