"""SOD and ATOD: weights by turn, the papers' numbers, and two terms under one clip."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from toy import GROUPS, REWARDS, Toy

from retort import registry
from retort.advantages import Summand
from retort.core.context import Context
from retort.core.parts import Advantage
from retort.core.steps import Clock, Steps
from retort.errors import UserError
from retort.functional import token_losses
from retort.weights.turns import by_step, relative

#: The paper's numbers of two trajectories: d and h of the turns, and the weights that it prints (arXiv 2606.27814).
ALFWORLD = [(0.101, 0.037), (0.120, 0.013), (0.228, 0.025), (0.022, 0.010), (0.054, 0.022), (0.019, 0.006)]
ALFWORLD += [(0.138, 0.008)]
WEBSHOP = [(0.796, 0.063), (0.705, 0.132), (0.913, 0.195), (0.876, 0.158), (0.668, 0.101), (0.696, 0.132)]
WEBSHOP += [(1.214, 0.219), (0.744, 0.158)]
PRINTED = [
    (ALFWORLD, [1.00, 0.60, 1.00, 0.15, 0.60, 0.00, 0.60]),
    (WEBSHOP, [0.23, 0.48, 0.92, 0.76, 0.25, 0.47, 1.00, 0.67]),
]


def one_rollout(turns: int) -> Steps:
    tokens_N = torch.zeros(turns, dtype=torch.long)
    return Steps.of(tokens_N, turn_N=torch.arange(turns))


def weights(numbers: list[tuple[float, float]]) -> Tensor:
    """Through the whole method: a token per turn, its old log-prob is -h, its gap d."""
    gap_K, surprise_K = torch.tensor(numbers, dtype=torch.float64).T
    student, teacher = -surprise_K, -surprise_K - gap_K

    def logits(logp_K: Tensor) -> Tensor:
        return torch.stack([logp_K, torch.log1p(-logp_K.exp())], dim=-1)

    losses = token_losses(
        registry.load("atod", outcome_start=0.0, outcome_end=0.0),
        student_logits=logits(student),
        teacher_logits=logits(teacher),
        tokens=torch.zeros(len(numbers), dtype=torch.long),
        turns=torch.arange(len(numbers)),
    )
    return losses.terms["distillation"].weight


@pytest.mark.parametrize(("numbers", "printed"), PRINTED)
def test_the_numbers_of_atods_paper(numbers: list[tuple[float, float]], printed: list[float]) -> None:
    assert weights(numbers).tolist() == pytest.approx(printed, abs=0.01)


def test_soft_or_in_plain_loops() -> None:
    for numbers, _ in PRINTED:
        d, h = zip(*numbers, strict=True)
        plain = [
            1 - (1 - (x - min(d)) / (max(d) - min(d))) * (1 - (y - min(h)) / (max(h) - min(h)))
            for x, y in zip(d, h, strict=True)
        ]
        assert weights(numbers).tolist() == pytest.approx(plain, abs=1e-12)


def test_one_turn_and_turns_without_a_difference_have_three_quarters() -> None:
    assert weights([(0.3, 0.2)]).tolist() == [0.75]
    torch.testing.assert_close(weights([(0.3, 0.2)] * 3), torch.full((3,), 0.75, dtype=torch.float64))


def test_relative_numbers_stay_within_a_rollout() -> None:
    steps = Steps.of(torch.zeros(5, dtype=torch.long), tensor([0, 0, 0, 1, 1]), turn_N=tensor([0, 1, 2, 0, 1]))
    values_K = tensor([1.0, 3.0, 2.0, 10.0, 30.0])
    assert relative(values_K, steps.turns()).tolist() == [0.0, 1.0, 0.5, 0.0, 1.0]


@pytest.mark.parametrize("cap", [0.2, 0.5, math.inf])
def test_sods_product_telescopes(cap: float) -> None:
    """The form of the paper: a running product of ratios of neighbours, capped at the end."""
    gaps = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e-3
    turns, product, plain = one_rollout(12).turns(), 1.0, [1.0]
    for before, after in zip(gaps.tolist(), gaps[1:].tolist(), strict=False):
        product *= (before + 1e-6) / (after + 1e-6)
        plain.append(min(product, 1 + cap))
    ours = by_step(gaps, turns, 1e-6, cap)
    torch.testing.assert_close(ours, torch.tensor(plain, dtype=torch.float64), rtol=1e-12, atol=0)
    assert ours[0] == 1 and ours.min() > 0 and ours.max() <= 1 + cap


def test_equal_gaps_have_weight_one_and_larger_ones_less() -> None:
    turns = one_rollout(3).turns()
    assert by_step(tensor([0.4, 0.4, 0.4]), turns, 1e-6, 0.2).tolist() == [1.0, 1.0, 1.0]
    first, second, third = by_step(tensor([9.0, 18.0, 36.0]), turns, 1e-6, 0.2).tolist()
    assert first == 1.0 and second == pytest.approx(0.5) and third == pytest.approx(0.25)


def test_sods_bound_on_the_second_moment_of_what_is_weighted() -> None:
    """Proposition 3, which holds for any order of gaps; and the bound by the cap."""
    toy = Toy()
    losses = toy.losses(registry.load("sod", outcome_coef=0.0, cap=0.2))
    weight = losses.terms["distillation"].weight
    logp = [x.detach().log_softmax(-1).gather(-1, toy.tokens[:, None])[:, 0] for x in (toy.logits, toy.teacher_logits)]
    gap_N = logp[1] - logp[0]
    steps = Steps.of(toy.tokens, toy.rollouts, turn_N=toy.turns)
    turns = steps.turns()
    gap_K = turns.mean(gap_N.abs())
    bound_K = ((turns.first(gap_K) + 1e-6) / (gap_K + 1e-6)).clamp(max=1.2) ** 2 * turns.mean(gap_N**2)
    torch.testing.assert_close(turns.mean((weight * gap_N) ** 2), bound_K, rtol=1e-9, atol=1e-12)


def surrogate(toy: Toy, parts: dict[str, Tensor], low: float, high: float) -> Tensor:
    """PPO's clipped loss of the sum of all advantages, per token, in its plain form."""
    live = toy.logits.log_softmax(-1).gather(-1, toy.tokens[:, None])[:, 0]
    ratio, advantage = (live - toy.old).exp(), sum(parts.values())
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def advantages(toy: Toy, weight_N: Tensor, coef: float, outcome_coef: float) -> dict[str, Tensor]:
    teacher = toy.teacher_logits.detach().log_softmax(-1).gather(-1, toy.tokens[:, None])[:, 0]
    outcome = torch.zeros(5, dtype=torch.float64)
    for group in (0, 1):
        own = REWARDS[group == GROUPS]
        outcome[group == GROUPS] = (own - own.mean()) / (own.std() + 1e-6)
    return {"distillation": coef * weight_N * (teacher - toy.old), "outcome": outcome_coef * outcome[toy.rollouts]}


@pytest.mark.parametrize(
    ("name", "settings", "step", "coefs"),
    [
        ("sod", {"outcome_coef": 0.5}, 0, (1.0, 0.5)),
        ("sod", {"coef": 0.3, "clip_low": 0.05, "clip_high": 0.05}, 0, (0.3, 1.0)),
        ("atod", {"reduction": "tokens"}, 0, (1.0, 1.0)),
        ("atod", {"reduction": "tokens", "clip": 0.05}, 40, (0.55, 1.5)),
        ("atod", {"reduction": "tokens"}, 200, (0.1, 2.0)),
    ],
)
def test_both_terms_are_the_clipped_surrogate_of_the_sum(
    name: str, settings: dict[str, Any], step: int, coefs: tuple[float, float]
) -> None:
    toy, method = Toy(), registry.load(name, **settings)
    # Far enough from the student for the clip to bind, on both sides.
    toy.old = toy.old + torch.linspace(-0.6, 0.6, len(toy.old), dtype=torch.float64)
    losses = toy.losses(method, old_logp=toy.old, step=step)
    parts = advantages(toy, losses.terms["distillation"].weight, *coefs)
    low, high = (
        settings.get("clip_low", settings.get("clip", 0.2)),
        settings.get("clip", 0.28 if name == "sod" else 0.2),
    )
    high = settings.get("clip_high", high)
    plain_N = surrogate(toy, parts, low, high)
    ours_N = sum(coef * term.value * term.weight for coef, term in zip(coefs, losses.terms.values(), strict=True))
    torch.testing.assert_close(ours_N, plain_N, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses.loss, plain_N.mean(), rtol=1e-12, atol=1e-12)
    for one, two in zip(toy.gradients(losses.loss), toy.gradients(plain_N.mean()), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)
    apart = sum(surrogate(toy, {key: part}, low, high) for key, part in parts.items())
    assert not torch.allclose(apart, plain_N), "the clip of the sum was that of each term"


def test_atod_anneals_in_straight_lines() -> None:
    method = registry.load("atod")
    for step, coefs in ((0, (1.0, 1.0)), (40, (0.55, 1.5)), (80, (0.1, 2.0)), (150, (0.1, 2.0))):
        assert [Clock(step).at(term.coef) for term in method.terms] == pytest.approx(coefs)


def test_equal_rewards_leave_the_teacher_alone() -> None:
    toy = Toy()
    for name in ("sod", "atod"):
        losses = toy.losses(registry.load(name), rewards=torch.ones(5, dtype=torch.float64))
        assert losses.terms["outcome"].value.abs().max() == 0 and losses.terms["distillation"].value.abs().max() > 0


def test_a_token_that_the_teacher_rules_out_keeps_its_turn_finite() -> None:
    student, teacher = tensor([[0.5, 0.5]] * 3).log(), tensor([[0.4, 0.6], [0.0, 1.0], [0.45, 0.55]]).log()
    given = {"tokens": tensor([0, 0, 0]), "turns": tensor([0, 1, 2])}
    losses = token_losses(
        registry.load("sod", outcome_coef=0.0), student_logits=student, teacher_logits=teacher, **given
    )
    assert losses.terms["distillation"].weight[1] == pytest.approx(math.log(1.25) / 100, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("sod", {"clip_low": None}, "give both"),
        ("sod", {"coef": 0.0, "outcome_coef": 0.0}, "nothing would be learnt"),
        ("sod", {"cap": -0.1}, "cap must not be negative"),
        ("sod", {"epsilon": 0.0}, "epsilon must be positive"),
        ("atod", {"anneal_steps": 0}, "anneal_steps must be at least 1"),
        ("atod", dict.fromkeys(("coef_start", "coef_end", "outcome_start", "outcome_end"), 0.0), "nothing is learnt"),
    ],
)
def test_settings_that_cannot_be(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        registry.load(name, **settings)


def test_without_an_outcome_no_rewards_are_needed() -> None:
    assert registry.load("sod", outcome_coef=0.0).needs_rewards is None
    assert registry.load("atod", outcome_start=0.0, outcome_end=0.0).needs_rewards is None
    assert registry.load("sod").needs_rewards is not None


# --- tcod ---


def test_the_horizon_grows_as_published() -> None:
    for every, most, start, reached in ((2, 30, 1, 58), (4, 30, 1, 116), (6, 30, 1, 174), (2, 15, 1, 28)):
        plan = registry.load("tcod", every=every, start=start).rollout.curriculum
        assert plan is not None
        turns = [min(plan.horizon(n), most) for n in range(300)]
        assert turns[0] == start and turns == sorted(turns)
        assert turns.index(start + 1) == every and turns.index(most) == reached == (most - start) * every


def test_every_turn_counts_alike() -> None:
    toy = Toy()
    losses = toy.losses(registry.load("tcod", reduction="turns", clip=None))
    value = losses.terms["reverse"].value
    plain = [
        value[(toy.rollouts == rollout) & (toy.turns == turn)].mean()
        for rollout in range(5)
        for turn in range(int(toy.turns[toy.rollouts == rollout].max()) + 1)
    ]
    torch.testing.assert_close(losses.loss, torch.stack(plain).mean(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("settings", [{"start": 0}, {"every": 0}])
def test_a_curriculum_has_a_start_and_a_pace(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        registry.load("tcod", **settings)


def test_a_coefficient_of_zero_hides_an_infinite_advantage() -> None:
    ruled_out = Advantage("ruled out", lambda context, view: torch.full((1,), -math.inf))
    context = Context.from_logits(torch.zeros(1, 2), torch.tensor([0]), {})
    assert Summand(ruled_out, 0.0).at(context, "teacher").tolist() == [0.0]
    assert Summand(ruled_out, lambda step, _: 0.0).at(context, "teacher").tolist() == [0.0]
    assert Summand(ruled_out, 2.0).at(context, "teacher").tolist() == [-math.inf]
