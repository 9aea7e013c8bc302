"""EGRSD and CL-EGRSD: whitened rewards, the three factors by hand, and what no gradient reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy import REWARDS, Toy

from retort.advantages.outcome import stored_advantage
from retort.core.parts import Stat
from retort.core.signals import Dense
from retort.errors import UserError
from retort.estimators import score_function
from retort.functional import token_losses
from retort.method import Method, Term
from retort.registry import load
from retort.rollout.plan import RolloutPlan
from retort.teachers.moving import ema, frozen, hard_copy


def advantage_by_hand(toy: Toy) -> Tensor:
    """While the rewards warm up: a right answer's 1 + 0.5 (1 - length / longest), less 0.5."""
    steps = torch.bincount(toy.rollouts).double()
    shaped = REWARDS * (1.0 + 0.5 * (1.0 - steps / steps.max()))
    return (shaped - 0.5)[toy.rollouts]


def factors(toy: Toy, gamma: float, window: int) -> tuple[Tensor, Tensor]:
    """Magnitude and gate, step by step."""
    advantage = advantage_by_hand(toy)
    teacher = toy.teacher_logits.detach().log_softmax(-1)
    delta = teacher.gather(-1, toy.tokens[:, None]).squeeze(-1) - (toy.old + 0.1)
    size = (advantage.sign() * delta).exp().clamp(0.8, 1.2)
    entropy = -(teacher.exp() * teacher).sum(-1)
    ahead = []
    for step, rollout in enumerate(toy.rollouts.tolist()):
        near = [j for j in range(step, step + window + 1) if j < len(entropy) and toy.rollouts[j] == rollout]
        ahead.append(min(entropy[j].item() for j in near))
    gate = 1.0 - gamma * torch.tensor(ahead, dtype=torch.float64) / max(1.0, entropy.max().item())
    return size, gate.clamp(0.1, 1.0)


@pytest.mark.parametrize(("name", "gamma", "window"), [("egrsd", 0.3, 0), ("cl_egrsd", 0.3, 3), ("cl_egrsd", 1.0, 5)])
def test_by_hand_in_value_and_gradient(name: str, gamma: float, window: int) -> None:
    toy = Toy()
    settings = {"gate": gamma, **({"window": window} if name == "cl_egrsd" else {})}
    found = toy.losses(load(name, **settings))
    size, gate = factors(toy, gamma, window)
    torch.testing.assert_close(found.terms["outcome"].weight, size * gate)
    logp = toy.logits.log_softmax(-1).gather(-1, toy.tokens[:, None]).squeeze(-1)
    by_hand = -(advantage_by_hand(toy) * size * gate * logp).mean()
    for ours, theirs in zip(toy.gradients(found.loss), toy.gradients(by_hand), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_without_gate_and_magnitude_it_is_reinforce_on_the_whitened_reward() -> None:
    toy = Toy()
    fixed = Stat("fixed", None, lambda *_: advantage_by_hand(toy))
    reinforce = Method(rollout=RolloutPlan(), terms=(Term("outcome", score_function(stored_advantage(fixed))),))
    ours = toy.losses(load("egrsd", gate=0.0, bound=0.0)).loss
    theirs = toy.losses(reinforce).loss
    torch.testing.assert_close(ours, theirs)
    for one, two in zip(toy.gradients(ours), toy.gradients(theirs), strict=True):
        torch.testing.assert_close(one, two)


def test_rewards_are_whitened_by_the_batches_before_and_short_answers_earn_more() -> None:
    toy, method = Toy(), load("egrsd", warmup=1, gate=0.0, bound=0.0)
    first = toy.losses(method)
    second = toy.losses(method, state=first.state)
    shaped = (advantage_by_hand(toy) + 0.5)[[int((toy.rollouts == r).nonzero()[0]) for r in range(5)]]
    whitened = (shaped - shaped.mean()) / shaped.std()
    torch.testing.assert_close(-second.terms["outcome"].value.detach(), whitened[toy.rollouts])


def test_a_teacher_that_says_what_the_student_says_has_magnitude_1() -> None:
    toy = Toy()
    found = toy.losses(load("egrsd", gate=0.0), same=True)
    torch.testing.assert_close(found.terms["outcome"].weight, torch.ones(len(toy.tokens), dtype=torch.float64))


def test_the_verdict_is_never_turned_round() -> None:
    toy = Toy()
    for name in ("egrsd", "cl_egrsd"):
        term = toy.losses(load(name, gate=1.0, bound=0.9)).terms["outcome"]
        assert (term.weight > 0).all()
        assert torch.equal((-term.value * term.weight).sign(), advantage_by_hand(toy).sign())


def test_a_reward_at_the_baseline_gives_no_gradient() -> None:
    toy = Toy()
    found = toy.losses(load("egrsd", length_bonus=0.0), rewards=torch.full((5,), 0.5, dtype=torch.float64))
    assert found.loss.item() == 0.0
    assert all(not gradient.any() for gradient in toy.gradients(found.loss))


def test_the_lookahead_weighs_at_least_as_much() -> None:
    toy = Toy()
    plain, ahead = (toy.losses(load(name)).terms["outcome"].weight for name in ("egrsd", "cl_egrsd"))
    assert (ahead >= plain).all()
    assert (ahead > plain).any()


def test_the_batchs_largest_entropy_is_of_rollouts_with_a_solution_only() -> None:
    toy = Toy()
    teacher = toy.teacher_logits.detach().clone()
    teacher[toy.rollouts == 2] = 0.0  # no context, and as unsure as can be
    valid = toy.rollouts != 2
    signal = Dense(toy.tokens, "teacher", lambda rows: teacher[rows], toy.vocab, valid_N=valid)
    found = toy.losses(load("egrsd"), teacher_logits=signal)
    weight = found.terms["outcome"].weight
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    size, _ = factors(toy, 0.3, 0)
    gate = 1.0 - 0.3 * entropy / entropy[valid].max().clamp_min(1.0)
    torch.testing.assert_close(weight[valid], (size * gate)[valid])
    assert not found.terms["outcome"].counted[~valid].any()


@pytest.mark.parametrize(
    ("settings", "model", "weights"),
    [
        ({}, "student", frozen()),
        ({"teacher": "ema"}, "student", ema(0.01)),
        ({"teacher": "hard_copy", "copy_every": 50}, "student", hard_copy(50)),
        ({"teacher": "outside"}, "teacher", frozen()),
    ],
)
def test_whose_weights_teach(settings: dict[str, Any], model: str, weights: object) -> None:
    for name in ("egrsd", "cl_egrsd"):
        view = load(name, **settings).views["teacher"]
        assert (view.model, view.weights) == (model, weights)


def test_rewards_are_needed_and_groups_are_not() -> None:
    toy, method = Toy(), load("egrsd")
    given = {"student_logits": toy.logits, "teacher_logits": toy.teacher_logits, "tokens": toy.tokens}
    with pytest.raises(UserError, match="needs rewards"):
        token_losses(method, **given, rollouts=toy.rollouts)
    alone = token_losses(method, **given, rollouts=toy.rollouts, rewards=REWARDS)
    torch.testing.assert_close(alone.loss, toy.losses(method).loss)
    assert load("egrsd", baseline="group").needs_groups
    assert not load("egrsd", baseline="group").controllers


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gate": -1.0}, "coef"), ({"length_bonus": -1.0}, "length_bonus"), ({"warmup": 0}, "warm")],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("egrsd", **settings)
