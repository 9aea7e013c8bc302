"""What lies behind a shut gate reaches neither the value nor the gradient, however infinite it is."""

import math

import pytest
import torch

from retort.advantages import Summand, advantage_sum, log_ratio, return_to_go
from retort.core.losses import times
from retort.core.parts import Advantage, Baseline, Divergence, Stat
from retort.core.reduce import rollout_means
from retort.core.schedules import ScalarOrSchedule
from retort.divergences import reverse_kl
from retort.estimators import Estimator, pathwise, score_function
from retort.functional import token_losses
from retort.method import Method, Term
from retort.quantities import teacher_entropy
from retort.registry import load
from retort.rollout.plan import RolloutPlan
from retort.weights import above


@pytest.mark.parametrize(
    "estimator", [pathwise(reverse_kl()), score_function(log_ratio(), clip=0.2)], ids=["path", "score"]
)
def test_infinity_behind_a_shut_gate(estimator: Estimator) -> None:
    teacher = torch.zeros(2, 4, dtype=torch.float64)
    teacher[0, 1] = -torch.inf  # step 0: certain enough for the gate to be shut, and one id is banned
    teacher[0, 0] = 9.0
    student = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    gated = Method(rollout=RolloutPlan(), terms=(Term("term", estimator, weight=above(teacher_entropy(), 1.0)),))
    losses = token_losses(gated, student_logits=student, teacher_logits=teacher, tokens=torch.tensor([1, 2]))
    assert losses.terms["term"].weight.tolist() == [0.0, 1.0]
    losses.loss.backward()
    assert student.grad is not None
    assert torch.isfinite(losses.loss)
    assert student.grad[0].tolist() == [0.0] * 4
    assert student.grad[1].abs().sum() > 0


def test_a_factor_of_zero_wins() -> None:
    value = torch.tensor([torch.inf, -torch.inf, 2.0, torch.nan], requires_grad=True)
    found = times(torch.tensor([0.0, 0.0, 3.0, 0.0]), value)
    assert found.tolist() == [0.0, 0.0, 6.0, 0.0]
    found.sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [0.0, 0.0, 3.0, 0.0]
    assert times(0.0, value.detach()).tolist() == [0.0] * 4
    assert times(torch.tensor(torch.nan), torch.tensor(1.0)).isnan()  # what is no number is not switched off


#: A term whose own value is infinite, and the one that is learnt beside it.
INFINITE = (pathwise(reverse_kl()), score_function(log_ratio()), score_function(return_to_go(0.5)))


@pytest.mark.parametrize("off", [0.0, lambda step, total: 0.0], ids=["number", "schedule"])
@pytest.mark.parametrize("estimator", INFINITE, ids=["path", "score", "to_go"])
def test_a_coefficient_of_zero_switches_an_infinite_term_off(estimator: Estimator, off: ScalarOrSchedule) -> None:
    teacher = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    finite = pathwise(Divergence("ours", lambda context, view: context.student_logp_N))

    def loss(*terms: Term) -> tuple[float, list[list[float]]]:
        student = torch.tensor([[0.3, 0.1, 0.0], [0.2, 0.0, 0.5]], dtype=torch.float64).requires_grad_()
        method = Method(rollout=RolloutPlan(), terms=terms)
        found = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=torch.tensor([1, 2])).loss
        found.backward()
        assert student.grad is not None
        return float(found.detach()), student.grad.tolist()

    assert loss(Term("off", estimator, coef=off), Term("on", finite)) == loss(Term("on", finite))
    assert loss(Term("off", estimator, coef=off)) == (0.0, [[0.0] * 3] * 2)
    assert not math.isfinite(loss(Term("on", estimator, coef=1e-9))[0])


def test_parts_that_multiply_keep_to_it() -> None:
    banned = Advantage("banned", lambda context, view: torch.full_like(context.student_logp_N.detach(), -torch.inf))
    none = Baseline("none", lambda context, view: torch.full_like(context.student_logp_N, math.inf))
    zeros = (
        return_to_go(0.0, 0.0),
        return_to_go(1.0, 0.0),
        advantage_sum(Summand(banned, 0.0)),
    )
    teacher = torch.tensor([[0.0, -torch.inf]])
    for advantage in zeros:
        for baseline, coef in ((None, 1.0), (none, 0.0)):
            estimator = score_function(advantage, baseline=baseline, baseline_coef=coef)
            method = Method(rollout=RolloutPlan(), terms=(Term("term", estimator),))
            logits = torch.zeros(1, 2)
            found = token_losses(method, student_logits=logits, teacher_logits=teacher, tokens=torch.tensor([1]))
            assert found.loss.abs().item() == 0.0, (advantage.name, coef)


def test_a_step_that_a_denominator_leaves_out_may_be_infinite() -> None:
    kept = Stat("kept", None, lambda values_N, steps, clock: torch.tensor([0.0, 1.0]))
    value = Divergence("d", lambda context, view: context.student_logp_N.new_tensor([math.inf, 2.0]), stats=(kept,))
    method = Method(rollout=RolloutPlan(), terms=(Term("t", pathwise(value), denominator=rollout_means("kept")),))
    logits = torch.zeros(2, 2)
    found = token_losses(method, student_logits=logits, teacher_logits=logits, tokens=torch.tensor([0, 1]))
    assert found.loss.item() == 2.0


def test_bf16_logits_are_tempered_in_fp32() -> None:
    logits = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(64)
    method = load("opd", temperature=0.7)
    losses = token_losses(method, student_logits=logits, teacher_logits=logits.clone(), tokens=tokens)
    assert losses.terms["reverse"].value.abs().max() < 1e-5
