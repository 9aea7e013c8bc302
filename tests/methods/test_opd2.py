"""OPD2: centres, the gate, and where nothing is learnt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import retort
from retort import config
from retort.core.losses import TokenLosses
from retort.errors import UserError
from retort.functional import token_losses
from retort.train.setup.prepare import prepare

F64 = torch.float64
VOCAB = 8


def drawn(seed: int) -> Tensor:
    return 1.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=F64)


STUDENT, TEACHER, BASE = (drawn(seed) for seed in range(3))


def each_token(
    student: Tensor = STUDENT, teacher: Tensor = TEACHER, base: Tensor = BASE, **settings: Any
) -> TokenLosses:
    """The method where each of the tokens was sampled once, at temperature 1."""
    return token_losses(
        retort.load("opd2", temperature=1.0, **settings),
        student_logits=student.expand(len(student), -1),
        teacher_logits=teacher.expand(len(student), -1),
        tokens=torch.arange(len(student)),
        extra_views={"teacher_base": base.expand(len(student), -1)},
    )


def centred(reward: Tensor, p: Tensor, k: int) -> Tensor:
    kept = p.topk(k).indices
    return reward - (p * reward)[kept].sum()


@pytest.mark.parametrize("k", [1, 3, VOCAB])
def test_the_advantage_is_the_papers(k: int) -> None:
    p, q, b = (logits.log_softmax(-1) for logits in (STUDENT, TEACHER, BASE))
    delta, own = centred(q - b, p.exp(), k), centred(q - p, p.exp(), k)
    wanted = torch.where(delta * own > 0, 0.1 * delta, 0.0)
    found = -each_token(top_k=k).terms["delta"].value
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    assert 0 < int((wanted == 0).sum()) < VOCAB, "the gate is open here and closed there"


def test_golden_numbers() -> None:
    """p = .5, q = .8, b = .4: R is ln 2 and ln(1/3), its mean ln(2/3) / 2; of the other ratio ln(.64) / 2."""
    two = [torch.tensor([p, 1 - p], dtype=F64).log() for p in (0.5, 0.8, 0.4)]
    centre = math.log(2 / 3) / 2
    found = -each_token(*two).terms["delta"].value
    assert found.tolist() == pytest.approx([0.1 * (math.log(2) - centre), 0.1 * (math.log(1 / 3) - centre)], abs=1e-14)


def test_an_exact_centre_leaves_the_expected_gradient() -> None:
    """Over the tokens of the student: that of the reward without its centre, where the gate is open at all of them."""
    two = [torch.tensor([p, 1 - p], dtype=F64).log() for p in (0.5, 0.8, 0.4)]
    logits = two[0].expand(2, 2).clone().requires_grad_()
    losses = token_losses(
        retort.load("opd2", temperature=1.0),
        student_logits=logits,
        teacher_logits=two[1].expand(2, 2),
        tokens=torch.arange(2),
        extra_views={"teacher_base": two[2].expand(2, 2)},
    )
    (gradient,) = torch.autograd.grad(losses.terms["delta"].value.sum(), logits)
    live = two[0].clone().requires_grad_()
    plain = -(0.1 * (live.log_softmax(-1).detach().exp() * (two[1] - two[2]) * live.log_softmax(-1)).sum())
    torch.testing.assert_close(two[0].exp() @ gradient, torch.autograd.grad(plain, live)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("student", "base"), [(TEACHER, BASE), (STUDENT, TEACHER)], ids=["teacher is student", "teacher is base"]
)
def test_nothing_is_learnt_where_a_difference_is_none(student: Tensor, base: Tensor) -> None:
    losses = each_token(student, TEACHER, base)
    assert losses.terms["delta"].value.abs().max() == 0.0


def test_ids_that_somebody_rules_out_leave_other_tokens_finite() -> None:
    for who in range(3):
        logits = [STUDENT, TEACHER.clone(), BASE.clone()]
        banned = logits[min(who + 1, 2)]
        banned[0] = -math.inf
        if who == 2:
            logits[1][0] = -math.inf
        value = each_token(*logits).terms["delta"].value
        assert not value.isnan().any()
        assert value[1:].isfinite().all()


def test_a_run_without_the_base_model_is_refused(tiny_run: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="teacher_base") as caught:
        prepare(config.resolve({**tiny_run, "method": {"name": "opd2"}}))
    assert "\n" not in str(caught.value)
