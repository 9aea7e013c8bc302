"""DASD: its coefficient by hand, its invariants, and that without it GRPO is left."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toy import GROUPS, REWARDS, Toy

from retort.advantages.outcome import group_advantage
from retort.core.signals import Sampled
from retort.core.steps import Clock, Rollouts, Steps
from retort.errors import UserError
from retort.estimators import score_function
from retort.functional import token_losses
from retort.method import Method, Term
from retort.registry import load
from retort.rollout.plan import RolloutPlan
from retort.weights.direction import directed, routed, scaled

DRAW = torch.Generator().manual_seed(4)
ENTROPY = torch.rand(20, generator=DRAW, dtype=torch.float64)
GAP = torch.randn(20, generator=DRAW, dtype=torch.float64)
ROLLOUTS = torch.arange(20) // 12  # of 12 and of 8 steps


def rollouts(rollout_N: torch.Tensor = ROLLOUTS) -> Rollouts:
    return Steps.of(rollout_N, rollout_N).rollouts()


def quantile(values: list[float], share: float) -> float:
    """Interpolated between the two nearest, in plain Python."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def by_hand(entropies: list[float], gaps: list[float], share: float) -> list[float]:
    """omega times the scaled gap of one rollout."""
    tau, mean = quantile(entropies, share), sum(entropies) / len(entropies)
    sigma = sum(abs(h - mean) for h in entropies) / len(entropies)
    size = sum(abs(d) for d in gaps) / len(gaps)
    found = []
    for h, d in zip(entropies, gaps, strict=True):
        bar = d / (size + 1e-6)
        found.append(math.tanh((tau - h) / (sigma + 1e-6)) / (1 + math.exp(1 - abs(bar))) * bar)
    return found


def corrections(entropy: torch.Tensor = ENTROPY, gap: torch.Tensor = GAP, **settings: Any) -> dict[str, torch.Tensor]:
    """What is stored, from given entropies and gaps."""
    part = directed(group_advantage(), 1.0, **{"quantile": 0.8, **settings})
    given, found = {"direction.gap": gap, "direction": entropy}, dict[str, torch.Tensor]()
    for stat in part.stats:
        if stat.name.startswith("direction"):
            found[stat.name] = stat.finish(
                given.get(stat.name, torch.zeros(20)), Steps.of(ROLLOUTS, ROLLOUTS, stored=found), Clock()
            )
    return found


def test_the_coefficient_by_hand() -> None:
    found = corrections()
    wanted = [
        x for own in (slice(0, 12), slice(12, 20)) for x in by_hand(ENTROPY[own].tolist(), GAP[own].tolist(), 0.8)
    ]
    assert found["direction.correction"].tolist() == pytest.approx(wanted, rel=1e-12)
    assert found["direction.largest"].tolist() == pytest.approx([max(map(abs, wanted))] * 20)
    assert found["direction"].abs().max() < 1


def test_the_gate_of_reliability() -> None:
    # 0.269 without a gap, 0.5 at its usual size, 1 far from it.
    gate = corrections(gap=torch.tensor([0.0] + [1.0] * 19, dtype=torch.float64), scale="none", router="attract")
    assert gate["direction"][:2].tolist() == pytest.approx([0.26894142, 0.5])
    assert gate["direction.correction"][0] == 0.0
    assert corrections(gap=GAP + 50, scale="none", router="repel")["direction"].tolist() == pytest.approx([-1.0] * 20)


def test_signs() -> None:
    found = corrections()
    for own in (slice(0, 12), slice(12, 20)):
        tau = quantile(ENTROPY[own].tolist(), 0.8)
        assert torch.equal(found["direction"][own].sign(), (tau - ENTROPY[own]).sign())
    raised = found["direction.correction"] > 0
    assert torch.equal(raised, (found["direction"] > 0) == (GAP > 0))
    flipped = corrections(gap=-GAP)
    assert torch.equal(flipped["direction.correction"], -found["direction.correction"])
    forced = corrections(router="attract")["direction.correction"]
    assert torch.equal(forced, -corrections(router="repel")["direction.correction"])
    assert torch.equal(forced.sign(), GAP.sign())


def test_shift_and_scale_do_not_matter() -> None:
    found = corrections()["direction"]
    torch.testing.assert_close(corrections(entropy=3 * ENTROPY + 2)["direction"], found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        scaled(7 * GAP, rollouts(), "absolute"), scaled(GAP, rollouts(), "absolute"), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(scaled(7 * GAP, rollouts(), "std"), scaled(GAP, rollouts(), "std"), rtol=1e-5, atol=0)
    assert torch.equal(scaled(GAP, rollouts(), "none"), GAP)
    assert torch.equal(scaled(torch.zeros(20), rollouts(), "absolute"), torch.zeros(20))


def test_a_rollout_of_one_entropy_and_the_threshold_itself() -> None:
    assert torch.equal(routed(torch.full((20,), 0.7), rollouts(), 0.8), torch.zeros(20))
    one = routed(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), rollouts(torch.zeros(6, dtype=torch.long)), 0.8)
    assert one[4] == 0.0
    assert (one[:4] > 0).all()
    assert one[5] < 0


def test_the_two_readings_of_rho() -> None:
    """Where most tokens are sure, the literal 20th percentile attracts nothing; the top 20% attracts 4 in 5."""
    draw = torch.Generator().manual_seed(0)
    forks = torch.rand(1000, generator=draw, dtype=torch.float64)
    entropy_N = torch.where(forks < 0.6, 0.001 * forks, 2 * forks)
    own = rollouts(torch.zeros(1000, dtype=torch.long))
    literal, top = routed(entropy_N, own, 0.2), routed(entropy_N, own, 0.8)
    assert (literal > 0.1).sum() == 0
    assert 0.7 < (top > 0.1).double().mean() < 0.8
    assert 0.15 < (top < -0.1).double().mean() < 0.2


def grpo() -> Method:
    return Method(RolloutPlan(samples=8), (Term("policy", score_function(group_advantage(), clip=0.2)),))


def test_without_the_correction_it_is_grpo() -> None:
    toy = Toy()
    ours = toy.losses(load("dasd", direction_coef=0.0), old_logp=toy.old)
    theirs = toy.losses(grpo(), old_logp=toy.old)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-13, atol=1e-13)
    for one, two in zip(toy.gradients(ours.loss), toy.gradients(theirs.loss), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
    assert (toy.losses(load("dasd")).loss - toy.losses(grpo()).loss).abs() > 1e-4


def test_masked_steps_never_enter_a_rollout() -> None:
    toy, mask = Toy(), torch.arange(37) % 4 != 1
    cut = toy.losses(load("dasd"), mask.nonzero().squeeze(-1))
    torch.testing.assert_close(toy.losses(load("dasd"), mask=mask).loss, cut.loss, rtol=1e-13, atol=1e-13)


def test_a_limit_holds_and_a_rollout_without_context_is_left_out() -> None:
    free, bound = corrections(), corrections(limit=0.1)
    assert bound["direction.correction"].abs().max() == pytest.approx(0.1)
    assert torch.equal(bound["direction.largest"], free["direction.largest"])
    toy = Toy()
    logp = toy.teacher_logits.log_softmax(-1).gather(-1, toy.tokens[:, None]).squeeze(-1)
    valid = toy.rollouts != 2
    signal = Sampled(toy.tokens, logp_N=logp, valid_N=valid)
    found = token_losses(
        load("dasd"),
        student_logits=toy.logits,
        teacher_logits=signal,
        tokens=toy.tokens,
        rollouts=toy.rollouts,
        groups=GROUPS,
        rewards=REWARDS,
    )
    assert torch.equal(found.terms["policy"].counted, valid)
    with pytest.raises(UserError, match="positive"):
        load("dasd", correction_limit=0.0)


@pytest.mark.parametrize("scale", ["absolute", "none"])
def test_the_raw_correction_differs_by_the_scale_of_the_rollout(scale: str) -> None:
    toy = Toy()
    at = lambda logits: logits.detach().log_softmax(-1).gather(-1, toy.tokens[:, None]).squeeze(-1)  # noqa: E731
    gap = at(toy.teacher_logits) - at(toy.logits)
    parts = {
        kind: -toy.losses(load("dasd", correction=kind, gap_scale=scale, clip=None)).terms["policy"].value.detach()
        + toy.losses(load("dasd", direction_coef=0.0, clip=None)).terms["policy"].value.detach()
        for kind in ("normalised", "raw")
    }
    size = torch.ones_like(gap)
    if scale == "absolute":
        for rollout in toy.rollouts.unique():
            own = toy.rollouts == rollout
            size[own] = gap[own].abs().mean() + 1e-6
    torch.testing.assert_close(parts["raw"], parts["normalised"] * size, rtol=1e-9, atol=1e-12)
    assert parts["raw"].abs().max() > 0
