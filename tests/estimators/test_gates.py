"""What lies behind a shut gate reaches neither the value nor the gradient, however infinite it is."""

import pytest
import torch

from retort.advantages import log_ratio
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


def test_bf16_logits_are_tempered_in_fp32() -> None:
    logits = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(64)
    method = load("opd", temperature=0.7)
    losses = token_losses(method, student_logits=logits, teacher_logits=logits.clone(), tokens=tokens)
    assert losses.terms["reverse"].value.abs().max() < 1e-5
