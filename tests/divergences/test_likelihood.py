"""The likelihood of what was written."""

import torch

from retort.divergences import negative_log_likelihood
from retort.estimators import pathwise
from retort.functional import token_losses
from retort.method import Method, Term
from retort.rollout.plan import RolloutPlan


def test_value_and_gradient_are_those_of_cross_entropy_and_it_asks_nothing() -> None:
    # The teacher says something else altogether: nobody listens.
    method = Method(rollout=RolloutPlan(), terms=(Term("sft", pathwise(negative_log_likelihood())),))
    assert method.needs() == frozenset()
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 11, generator=draw, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(0, 11, (6,), generator=draw)
    loss = token_losses(method, student_logits=logits, teacher_logits=-logits, tokens=tokens).loss
    wanted = torch.nn.functional.cross_entropy(logits, tokens)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits)[0], torch.autograd.grad(wanted, logits)[0], rtol=1e-11, atol=1e-12
    )
    assert torch.autograd.gradcheck(
        lambda z: token_losses(method, student_logits=z, teacher_logits=-logits, tokens=tokens).loss, logits
    )
