"""ARKD against its specification: golden numbers, gradients, the state across calls."""

from __future__ import annotations

import pytest
import torch

from retort.core.context import Context
from retort.core.schedules import at
from retort.core.signals import Dense
from retort.errors import UserError
from retort.functional import token_losses
from retort.quantities.variance import student_variance, teacher_variance
from retort.registry import load

STUDENT = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
ONE = torch.tensor([0])


def losses(student: torch.Tensor = STUDENT, teacher: torch.Tensor = TEACHER, **settings: object):
    state = settings.pop("state", None)
    step = settings.pop("step", 0)
    method = load("arkd", loss_temperature=1.0, **settings)
    tokens = torch.zeros(len(student), dtype=torch.long)
    return token_losses(
        method, student_logits=student, teacher_logits=teacher, tokens=tokens, state=state, step=step, total_steps=10
    )


def test_golden_numbers() -> None:
    assert losses(mode="static", forward_weight=1.0).loss.item() == pytest.approx(0.24437, abs=5e-6)
    assert losses(mode="static", forward_weight=0.0).loss.item() == pytest.approx(0.21256, abs=5e-6)
    assert losses(mode="static").loss.item() == pytest.approx((0.24437 + 0.21256) / 2, abs=1e-5)
    # Forward KL is the larger here, so the greedy rule takes the reverse one; the other way round, the forward one.
    assert losses(mode="greedy_min").loss.item() == pytest.approx(0.21256, abs=5e-6)
    assert losses(TEACHER, STUDENT, mode="greedy_min").loss.item() == pytest.approx(0.21256, abs=5e-6)


def test_gradients_in_closed_form_at_the_loss_temperature() -> None:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(4, 9, generator=draw, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(4, 9, generator=draw, dtype=torch.float64)
    for temperature in (1.0, 2.0):
        p_s, p_t = (student.detach() / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        gap = p_s.log() - p_t.log()
        reverse = p_s * (gap - (p_s * gap).sum(-1, keepdim=True))
        for weight in (0.0, 0.3, 1.0):
            method = load("arkd", mode="static", forward_weight=weight, loss_temperature=temperature)
            tokens = torch.zeros(4, dtype=torch.long)
            loss = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tokens).loss
            (gradient,) = torch.autograd.grad(loss, student)
            wanted = (weight * (p_s - p_t) + (1 - weight) * reverse) / temperature / 4
            torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", ["bandit", "bernoulli", "paper"])
def test_the_loss_is_the_mix_that_the_policy_chose_and_v_takes_no_gradient(mode: str) -> None:
    student = STUDENT.clone().requires_grad_()
    found = losses(student, mode=mode)
    v = found.state["balance/value"]
    assert not v.requires_grad
    assert all(not value.requires_grad for value in found.state.values())
    fixed = losses(student, mode="static", forward_weight=float(v))
    torch.testing.assert_close(found.loss, fixed.loss)
    torch.testing.assert_close(torch.autograd.grad(found.loss, student)[0], torch.autograd.grad(fixed.loss, student)[0])


def test_the_state_is_carried_from_call_to_call() -> None:
    """As published, the reward is known with the loss: the policy has moved when the call returns."""
    draw = torch.Generator().manual_seed(1)
    state, values = None, list[float]()
    for step in range(6):
        student = torch.randn(8, 9, generator=draw, dtype=torch.float64)
        teacher = torch.randn(8, 9, generator=draw, dtype=torch.float64)
        found = losses(student, teacher, mode="paper", policy_learning_rate=0.05, state=state, step=step)
        forward, reverse = (found.terms[name].value.mean().item() for name in ("forward", "reverse"))
        v, state = float(found.state["balance/value"]), found.state
        reward = -(v * forward + (1 - v) * reverse)
        values.append(v)
        if step == 0:
            assert float(state["balance/baseline"]) == pytest.approx(reward, rel=1e-6)
    assert float(state["balance/count"]) == 6
    assert len(set(values)) == 6


def test_a_bandit_waits_to_be_told_what_became_of_its_choice() -> None:
    found = losses(mode="bandit")
    assert float(found.state["balance/count"]) == 0
    method = load("arkd")
    (policy,) = method.controllers
    assert policy.again
    assert set(policy.observes) == {
        "teacher_entropy",
        "student_entropy",
        "teacher_variance",
        "student_variance",
        "forward_kl",
        "reverse_kl",
        "jsd",
    }


def test_schedules_run_from_one_end_to_the_other() -> None:
    for mode, ends in (("linear_to_reverse", (1.0, 0.0)), ("linear_to_forward", (0.0, 1.0))):
        forward, reverse = load("arkd", mode=mode).terms
        for step, share in ((0, 0.0), (5, 0.5), (10, 1.0)):
            v = at(forward.coef, step, 10)
            assert v == pytest.approx(ends[0] + (ends[1] - ends[0]) * share)
            assert at(reverse.coef, step, 10) == pytest.approx(1 - v)


def test_the_variance_is_over_the_vocabulary() -> None:
    context = Context.from_logits(
        logits_NV=STUDENT, tokens_N=ONE, signals={"teacher": Dense.of(TEACHER, ONE).rows(slice(None))}
    )
    assert student_variance().value(context, "teacher").item() == pytest.approx(0.0675)
    assert teacher_variance().value(context, "teacher").item() == pytest.approx(0.0125)
    for quantity, logits in ((student_variance(), STUDENT), (teacher_variance(), TEACHER)):
        wanted = logits.exp().var(-1, correction=0)
        torch.testing.assert_close(quantity.value(context, "teacher"), wanted)


def test_a_weight_beyond_its_ends_is_refused() -> None:
    with pytest.raises(UserError, match="forward_weight must lie in"):
        load("arkd", mode="static", forward_weight=-0.1)
