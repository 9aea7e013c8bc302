"""RLSD: GRPO at its end, a verdict that is never turned round, and whose weights teach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy import GROUPS, REWARDS, Toy

from retort.advantages.outcome import group_advantage
from retort.errors import UserError
from retort.estimators import score_function
from retort.method import Method, Term
from retort.registry import load
from retort.rollout.plan import RolloutPlan
from retort.teachers.moving import frozen, hard_copy

GRPO = Method(rollout=RolloutPlan(), terms=(Term("outcome", score_function(group_advantage(), clip=(0.2, 0.28))),))


def same(ours: Toy, one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    for mine, theirs in zip(ours.gradients(one), ours.gradients(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_at_share_0_it_is_grpo() -> None:
    toy = Toy()
    old = toy.old - torch.linspace(-1, 1, len(toy.tokens), dtype=torch.float64)
    same(toy, toy.losses(load("rlsd", share=0.0), old_logp=old).loss, toy.losses(GRPO, old_logp=old).loss)
    assert not load("rlsd", share=0.0).needs()


def test_a_teacher_that_says_what_the_student_says_leaves_grpo() -> None:
    toy = Toy()
    same(toy, toy.losses(load("rlsd"), same=True).loss, toy.losses(GRPO).loss)


def test_by_hand() -> None:
    toy = Toy()
    found = toy.losses(load("rlsd"), old_logp=toy.old).terms["outcome"]
    teacher = toy.teacher_logits.detach().log_softmax(-1).gather(-1, toy.tokens[:, None]).squeeze(-1)
    live = toy.old + 0.1
    advantage = torch.empty(5, dtype=torch.float64)
    for group in (0, 1):
        own = REWARDS[group == GROUPS]
        advantage[group == GROUPS] = (own - own.mean()) / (own.std() + 1e-6)
    a = advantage[toy.rollouts]
    weight = 0.5 + 0.5 * (a.sign() * (teacher - toy.old)).exp().clamp(0.8, 1.2)
    ratio = (live - toy.old).exp()
    wanted = -torch.minimum(a * ratio, a * ratio.clamp(0.8, 1.28)) * weight
    torch.testing.assert_close(found.value.detach() * found.weight, wanted)
    torch.testing.assert_close((found.value * found.weight).mean(), toy.losses(load("rlsd"), old_logp=toy.old).loss)


def test_no_verdict_is_turned_round_and_equal_rewards_teach_nothing() -> None:
    toy = Toy()
    ours, grpo = (toy.losses(m).terms["outcome"] for m in (load("rlsd", share=1.0, bound=0.99), GRPO))
    assert torch.equal((ours.value * ours.weight).sign(), grpo.value.sign())
    nothing = toy.losses(load("rlsd"), rewards=torch.ones(5, dtype=torch.float64)).loss
    assert nothing.item() == 0.0
    assert all(not gradient.any() for gradient in toy.gradients(nothing))


def test_the_share_falls_to_grpo() -> None:
    toy, falling = Toy(), load("rlsd", share_steps=50)
    same(toy, toy.losses(falling, step=50).loss, toy.losses(GRPO).loss)
    same(toy, toy.losses(falling, step=25).loss, toy.losses(load("rlsd", share=0.25)).loss)
    same(toy, toy.losses(falling, step=80).loss, toy.losses(GRPO).loss)


def test_only_rollouts_below_the_mean_are_weighed() -> None:
    toy = Toy()
    found = toy.losses(load("rlsd", negative_only=True)).terms["outcome"].weight
    everywhere = toy.losses(load("rlsd")).terms["outcome"].weight
    above = (REWARDS == 1.0)[toy.rollouts]
    assert found[above].eq(1.0).all()
    assert torch.equal(found[~above], everywhere[~above])


@pytest.mark.parametrize(
    ("settings", "model", "weights"),
    [
        ({}, "student", frozen()),
        ({"teacher": "hard_copy"}, "student", hard_copy(10)),
        ({"teacher": "hard_copy", "copy_every": 3}, "student", hard_copy(3)),
        ({"teacher": "outside"}, "teacher", frozen()),
    ],
)
def test_whose_weights_teach(settings: dict[str, Any], model: str, weights: object) -> None:
    view = load("rlsd", **settings).views["teacher"]
    assert (view.model, view.weights) == (model, weights)
    assert view.columns == ("solution",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, "share must lie in"),
        ({"bound": 1.0}, "bound must lie in"),
        ({"share_steps": 0}, "at least 1"),
        ({"clip_low": None}, "null for both"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("rlsd", **settings)
