"""SDPO: what is left out, the ratio that only weighs, whose weights teach, and the mix with GRPO."""

from __future__ import annotations

from typing import Any

import pipeline
import pytest
import torch
from torch import Tensor
from toy import GROUPS, REWARDS, Toy

from retort.advantages.outcome import group_advantage
from retort.core.losses import TokenLosses
from retort.core.rollouts import Message, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense
from retort.errors import UserError
from retort.estimators import score_function
from retort.method import Method, Term
from retort.registry import load
from retort.rollout.plan import RolloutPlan
from retort.teachers.moving import ema, frozen, live, trust_region
from retort.teachers.view_input import ViewInput


def shown_to(toy: Toy, valid_N: Tensor) -> Dense:
    teacher_NV = toy.teacher_logits.detach()
    return Dense(toy.tokens, "teacher", lambda rows: teacher_NV[rows], toy.vocab, valid_N=valid_N)


def test_rollouts_with_nothing_to_show_are_left_out_of_the_sum_and_of_the_count() -> None:
    toy, method = Toy(), load("sdpo")
    valid = (toy.rollouts != 0) & (toy.rollouts != 3)  # the only success of each group
    found = toy.losses(method, teacher_logits=shown_to(toy, valid))
    alone = toy.losses(method, valid.nonzero().squeeze(-1))
    torch.testing.assert_close(found.loss, alone.loss)
    assert not found.terms["distillation"].counted[~valid].any()


def test_an_empty_target_batch_is_0_and_not_nan() -> None:
    toy = Toy()
    found = toy.losses(load("sdpo"), teacher_logits=shown_to(toy, torch.zeros_like(toy.rollouts, dtype=torch.bool)))
    assert found.loss.item() == 0.0
    assert all(not gradient.any() for gradient in toy.gradients(found.loss))


def shown(method: Method, rewards: list[float], own: int, feedback: str = "") -> str | None:
    prompt = Prompt("p", (Message("system", "Be brief."), Message("user", "What?")))
    sequence = TokenSequence.of([1]).then([2], decided=True)
    words = [f"<think>hm</think> attempt {index}" for index in range(len(rewards))]
    group = tuple(
        Rollout(prompt, sequence, member=index, text=words[index], reward=reward, feedback=feedback)
        for index, reward in enumerate(rewards)
    )
    found = method.views["teacher"].prompt(ViewInput(group[own], group))
    if found is None:
        return None
    assert found.messages[0] == prompt.messages[0]
    return found.messages[1].content


def test_the_first_success_but_never_oneself_and_feedback_in_its_place() -> None:
    method = load("sdpo")
    text = shown(method, [0.0, 1.0, 1.0], own=0, feedback="off by one")
    assert text is not None
    assert "attempt 1" in text
    assert "attempt 2" not in text
    assert "hm" not in text
    assert "off by one" not in text
    assert "attempt 2" in (shown(method, [0.0, 1.0, 1.0], own=1) or "")
    assert shown(method, [0.0, 1.0], own=1) is None
    assert "off by one" in (shown(method, [0.0, 1.0], own=1, feedback="off by one") or "")
    assert shown(load("sdpo", feedback="never"), [0.0, 1.0], own=1, feedback="off by one") is None
    assert "off by one" in (shown(load("sdpo", feedback="always"), [0.0, 1.0], own=0, feedback="off by one") or "")
    assert shown(method, [0.0, 0.4], own=0) is None
    assert shown(load("sdpo", threshold=0.4), [0.0, 0.4], own=0) is not None
    assert "hm" in (shown(load("sdpo", thoughts=True), [0.0, 1.0], own=0) or "")


def weights(found: TokenLosses) -> Tensor:
    return found.terms["distillation"].weight


def test_the_ratio_weighs_and_has_no_gradient() -> None:
    toy, method = Toy(), load("sdpo")
    assert weights(toy.losses(method)).eq(1.0).all()  # strictly on-policy
    gap = torch.linspace(-30.0, 30.0, len(toy.tokens), dtype=torch.float64)
    old = toy.old + 0.1 - gap
    found = toy.losses(method, old_logp=old)
    torch.testing.assert_close(weights(found), gap.clamp(-20, 20).exp().clamp_max(2.0))
    value = toy.losses(method).terms["distillation"].value
    by_hand = (value * gap.clamp(-20, 20).exp().clamp_max(2.0)).mean()
    for ours, theirs in zip(toy.gradients(found.loss), toy.gradients(by_hand), strict=True):
        torch.testing.assert_close(ours, theirs)
    engine = toy.old + 0.1 - 5.0
    assert weights(toy.losses(method, engine_logp=engine)).eq(2.0).all()
    assert weights(toy.losses(load("sdpo", truncation=None), engine_logp=engine)).eq(1.0).all()


def test_a_run_knows_that_the_ratio_needs_the_student_before_the_batch() -> None:
    assert load("sdpo").uses_old_logp
    assert load("sdpo", ratio_cap=None).uses_old_logp
    assert not load("sdpo", ratio_cap=None, truncation=None).uses_old_logp


def test_a_run_of_several_updates_keeps_the_student_before_the_batch(tiny_run: dict[str, Any]) -> None:
    for more, kept in (({}, True), ({"ratio_cap": None, "truncation": None}, False)):
        setup = pipeline.prepared(tiny_run, "sdpo", **more)
        batch = pipeline.scored(setup, pipeline.ragged(setup))
        assert ("old_logp" in batch.steps.stored) == kept


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, ema(0.05)),
        ({"update_rate": 0.01}, ema(0.01)),
        ({"teacher": "trust_region"}, trust_region(0.05)),
        ({"teacher": "frozen"}, frozen()),
        ({"teacher": "live"}, live()),
    ],
)
def test_whose_weights_teach(settings: dict[str, Any], wanted: object) -> None:
    view = load("sdpo", **settings).views["teacher"]
    assert view.model == "student"
    assert view.weights == wanted
    assert view.rewards


def test_another_model_may_teach() -> None:
    assert load("sdpo", teacher="outside").views["teacher"].model == "teacher"


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_the_mix_is_convex(share: float) -> None:
    toy = Toy()
    outcome = Method(rollout=RolloutPlan(), terms=(Term("outcome", score_function(group_advantage(), clip=0.2)),))
    mixed = toy.losses(load("sdpo", distillation_weight=share), old_logp=toy.old).loss
    parts = share * toy.losses(load("sdpo"), old_logp=toy.old).loss
    parts = parts + (1 - share) * toy.losses(outcome, old_logp=toy.old).loss
    torch.testing.assert_close(mixed, parts)


def test_rewards_are_not_learnt_from() -> None:
    toy = Toy()
    given = {"groups": GROUPS, "rewards": 1.0 - REWARDS}
    assert torch.equal(toy.losses(load("sdpo"), **given).loss, toy.losses(load("sdpo")).loss)


def test_both_distributions_are_at_the_temperature_of_sampling() -> None:
    toy = Toy()
    hot = toy.losses(load("sdpo", temperature=2.0)).loss
    by_hand = toy.losses(load("sdpo"), student_logits=toy.logits / 2, teacher_logits=toy.teacher_logits / 2).loss
    torch.testing.assert_close(hot, by_hand)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation_weight": 0.0}, "distillation_weight"),
        ({"top_k": 1, "tail": "renormalised"}, "tail=bucket"),
        ({"teacher_weight": 1.0}, "strictly between"),
        ({"ratio_cap": 0.0}, "positive"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("sdpo", **settings)
