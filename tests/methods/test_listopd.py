"""ListOPD: the closed form and its golden numbers, the toy flow, the measured masses, lambda held below the cliff."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import retort
from retort import registry
from retort.errors import UserError
from retort.functional import token_losses
from retort.quantities.extrapolation import (
    budget_midpoint,
    capped_from,
    drift_steps,
    implied_base_mass,
    lambda_star,
    logit,
    target_mass,
    with_budget,
)

GOLDEN = [
    (0.9993, 0.5, 5, 1.2216),
    (0.9993, 0.81, 5, 1.2769),
    (0.99996, 0.81, 5, 1.1855),
    (0.99996, 0.5, 5, 1.1589),
    (0.9993, 0.81, 1.5, 1.0698),
    (0.9993, 0.95, 5, 1.3727),
    (0.7, 0.5, 5, 3.2474),
    (0.9, 0.5, 5, 1.7712),
    (0.99511, 0.81, 5, 1.4174),
    (0.957, 0.5, 2, 1.2306),
    (0.98, 0.9, 2, 1.4150),
    (0.999, 0.9, 5, 1.3419),
    (0.99, 0.5, 2, 1.1519),
    (0.99, 0.5, 1.2, 1.0400),
    (0.9993, 0.998, 5, 2.53),
]


# --- the closed form ---


@pytest.mark.parametrize(("p", "b", "c", "expected"), GOLDEN)
def test_golden_numbers(p: float, b: float, c: float, expected: float) -> None:
    assert lambda_star(p, b, c) == pytest.approx(expected, abs=0.006 if expected == 2.53 else 6e-5)


@pytest.mark.parametrize(("p", "b", "c"), [row[:3] for row in GOLDEN])
def test_the_other_writing_of_eq_4(p: float, b: float, c: float) -> None:
    rest = math.log((1 - b) / b)
    expected = (math.log((1 - p) / (c - 1 + p)) - rest) / (math.log((1 - p) / p) - rest)
    assert lambda_star(p, b, c) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("p", "b", "c"), [row[:3] for row in GOLDEN])
def test_at_the_threshold_the_ratio_of_the_rest_is_the_cap(p: float, b: float, c: float) -> None:
    there = target_mass(p, b, lambda_star(p, b, c))
    assert (1 - p) / (1 - there) == pytest.approx(c, rel=1e-9)
    assert there == pytest.approx(capped_from(p, c), rel=1e-12)


def test_limits_and_monotonicity() -> None:
    assert lambda_star(0.9, 0.5, 1.0) == 1.0
    assert lambda_star(1 - 1e-12, 0.5, 5) == pytest.approx(1.0, abs=0.06)
    assert lambda_star(0.9, 0.9 - 1e-12, 5) > 1e9
    for p, b in ((0.9, 0.9), (0.9, 0.95)):
        assert lambda_star(p, b, 5) == math.inf
    assert lambda_star(0.99, 0.5, 5) > lambda_star(0.999, 0.5, 5)
    assert lambda_star(0.99, 0.5, 5) > lambda_star(0.99, 0.5, 2)
    assert lambda_star(0.99, 0.8, 5) > lambda_star(0.99, 0.5, 5)
    slope = (lambda_star(0.9993, 0.8106, 5) - lambda_star(0.9993, 0.8104, 5)) / (logit(0.8106) - logit(0.8104))
    assert slope == pytest.approx(0.0477, abs=1e-4)
    for bad in ((1.0, 0.5, 5.0), (0.5, 0.0, 5.0), (0.9, 0.5, 0.9)):
        with pytest.raises(UserError, match="must"):
            lambda_star(*bad)


def test_the_target() -> None:
    assert target_mass(0.9, 0.7, 1.0) == pytest.approx(0.9)
    assert target_mass(0.9, 0.7, 0.0) == pytest.approx(0.7)
    assert target_mass(0.9, 0.7, 1.5) == pytest.approx(0.946454, abs=5e-7)
    assert target_mass(0.9, 0.5, 1.3) == pytest.approx(1 / (1 + math.exp(-1.3 * logit(0.9))))
    assert target_mass(0.9, 0.7, 1.2) > target_mass(0.9, 0.7, 1.1)
    assert target_mass(0.7, 0.9, 1.2) < target_mass(0.7, 0.9, 1.1)


def test_the_budget() -> None:
    assert budget_midpoint(42) == pytest.approx(1.22)
    assert budget_midpoint(70) == pytest.approx(1.12)
    assert budget_midpoint(200) == pytest.approx(1.0225)
    assert with_budget(1.18, 42) == pytest.approx(1.18)
    assert with_budget(1.18, 14) == pytest.approx(1.18)
    assert with_budget(1.28, 70) == pytest.approx(1.18)
    assert with_budget(1.18, 200) == 1.0, "and not below"
    assert implied_base_mass(0.9993, 0.209) == pytest.approx(0.811, abs=5e-4)
    assert drift_steps(1e-2, 1.0, 0.9) == pytest.approx(1 / (1e-2 * 0.09), rel=1e-3)


# --- the loss ---


def two(mass: float) -> Tensor:
    return torch.tensor([[mass, 1 - mass]] * 2, dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("ratio", "expected"), [("none", 0.946454), ("train_rollout", 0.946454), ("teacher_student", 0.94457)]
)
def test_where_the_expected_gradient_vanishes(ratio: str, expected: float) -> None:
    """(p, b, lambda, c) = (.9, .7, 1.5, 5): the cap that Eq. 3 prints moves the fixed point, the configured one not."""
    logits, tokens = torch.zeros(2, dtype=torch.float64), torch.tensor([0, 1])
    method = registry.load("listopd", reward_weight=1.5, ratio=ratio, clip=None)
    for _ in range(600):
        live = logits.clone().requires_grad_()
        found = token_losses(
            method,
            student_logits=live.expand(2, 2),
            teacher_logits=two(0.9),
            tokens=tokens,
            extra_views={"base": two(0.7)},
        ).terms["reverse"]
        (live.softmax(-1).detach() * found.value * found.weight).sum().backward()
        logits -= 2.0 * live.grad  # type: ignore[operator]
        if live.grad.abs().max() < 1e-9:  # type: ignore[union-attr]
            break
    assert logits.softmax(-1)[0].item() == pytest.approx(expected, abs=1e-5)


def structured(teacher: float, base: float, steps: int = 12) -> dict[str, Tensor]:
    """Steps of one kind of position: three ids, the first one the teacher's."""
    rows = lambda mass: torch.tensor([[mass, (1 - mass) / 2, (1 - mass) / 2]] * steps, dtype=torch.float64).log()  # noqa: E731
    return {"student": rows(base), "teacher": rows(teacher), "base": rows(base)}


def weight_in_effect(teacher: float, base: float, total_steps: int = 42, **settings: object) -> float:
    """From the advantages: linear in lambda, with both models' log-ratio as its slope."""
    logits, tokens = structured(teacher, base), torch.zeros(12, dtype=torch.long)
    found = token_losses(
        registry.load("listopd", ratio="none", clip=None, **settings),
        student_logits=logits["student"],
        teacher_logits=logits["teacher"],
        tokens=tokens,
        rollouts=torch.arange(12) // 6,
        extra_views={"base": logits["base"]},
        total_steps=total_steps,
    )
    advantage = -found.terms["reverse"].value[0].item()
    return advantage / (math.log(teacher) - math.log(base))  # student = base: A = lambda (log p - log b)


def test_lambda_is_held_below_the_predicted_cliff() -> None:
    assert weight_in_effect(0.9993, 0.81, reward_weight=1.5) == pytest.approx(1.5)
    assert weight_in_effect(0.9993, 0.81, reward_weight=1.5, hold=True) == pytest.approx(1.2769 - 0.05, abs=1e-4)
    assert weight_in_effect(0.9993, 0.81, reward_weight=1.5, hold=True, base_mode="direct") == pytest.approx(
        1.2769 - 0.05, abs=1e-4
    )
    assert weight_in_effect(0.9993, 0.81, reward_weight=1.1, hold=True) == pytest.approx(1.1), "below it already"
    assert weight_in_effect(0.9993, 0.81, 70, reward_weight=1.5, hold=True) == pytest.approx(1.1269, abs=1e-4)
    assert weight_in_effect(0.9993, 0.81, 10**6, reward_weight=1.5, hold=True) == pytest.approx(1.0)
    assert weight_in_effect(0.85, 0.81, reward_weight=1.5, hold=True) == pytest.approx(1.5), "no structure, no cliff"
    assert weight_in_effect(0.95, 0.97, reward_weight=1.5, hold=True) == pytest.approx(1.5), "the base is surer"


def test_masses_are_means_of_rollout_means_at_contract_positions() -> None:
    """Two rollouts of unequal length and one position that is no structure."""
    from retort.core.context import Context
    from retort.core.signals import Dense
    from retort.core.steps import Clock, Steps
    from retort.loss.terms import finish_stats, stat_values

    masses = torch.tensor([0.95, 0.99, 0.97, 0.5, 0.99], dtype=torch.float64)
    others = torch.tensor([0.8, 0.9, 0.7, 0.4, 0.6], dtype=torch.float64)
    rows = lambda mass: torch.stack([mass, (1 - mass) * 0.7, (1 - mass) * 0.3], -1).log()  # noqa: E731
    tokens, rollouts = torch.zeros(5, dtype=torch.long), torch.tensor([0, 0, 0, 1, 1])
    signals = {
        "teacher": Dense.of(rows(masses), tokens).rows(slice(None)),
        "base": Dense.of(rows(others), tokens).rows(slice(None)),
    }
    context = Context.from_logits(rows(others), tokens, signals)
    for mode in ("direct", "implied"):
        method = registry.load("listopd", base_mode=mode)
        found = finish_stats(method, stat_values(method)(context), Steps.of(tokens, rollouts), Clock())
        first, second = (0.95 + 0.99 + 0.97) / 3, 0.99
        assert found["contract_typical"].tolist() == pytest.approx([(first + second) / 2] * 5)
        assert found["contract_safe"].tolist() == pytest.approx([0.99] * 5)
        if mode == "direct":
            expected = ((0.8 + 0.9 + 0.7) / 3 + 0.6) / 2
        else:
            gaps = (masses / others).log()
            expected = math.exp(-float((gaps[:3].mean() + gaps[4]) / 2))
        assert found["contract_base"].tolist() == pytest.approx([expected] * 5)


def test_settings() -> None:
    defaults = registry.defaults("listopd")
    assert (defaults["reward_weight"], defaults["cap"], defaults["margin"], defaults["contract"]) == (
        1.15,
        5,
        0.05,
        0.9,
    )
    with pytest.raises(UserError, match="at least 0"):
        registry.load("listopd", reward_weight=-1.0)


# --- in a run, on the structured-output task ---


@pytest.mark.parametrize("hold", [False, True])
def test_a_run_draws_the_prediction(tmp_path: Path, hold: bool) -> None:
    run = retort.distill(
        data="ranking",
        method={"name": "listopd", "hold": hold, "reward_weight": 6.0},
        steps=2,
        out=str(tmp_path / "run"),
        settings={"rollout": {"prompts": 6}, "eval": {"problems": 2, "samples": 1}},
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert 1.0 < row["lambda_star_safe"] <= row["lambda_star_typical"]
        assert 1.0 <= row["lambda_star_budget"] <= row["lambda_star_safe"]
        assert 0.99 < row["contract_teacher_mass"] < 1.0
        assert row["contract_base_mass"] < row["contract_teacher_mass"]
        assert 0.5 < row["contract_fraction"] <= 1.0
        assert row["contract_tail"] > row["contract_tail_boundary"], "a warm-started student is far from the boundary"
        expected = max(1.0, row["lambda_star_budget"] - 0.05) if hold else 6.0
        assert row["reward_weight"] == pytest.approx(expected)
    assert "Predicted cliff" in (tmp_path / "run" / "report.html").read_text()
    assert run.results["task"] == "ranking"
