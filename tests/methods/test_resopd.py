"""ResOPD against enumeration: its mean over the sampled token is the reverse KL, in value and in gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import retort
from retort.core.context import Context
from retort.core.signals import Dense, TopK
from retort.divergences import reverse_kl, tail_residual, topk_kl
from retort.errors import UserError
from retort.functional import token_losses
from retort.quantities import gradient_variance, residual_variance
from retort.rollout.plan import RolloutPlan

F64 = torch.float64
VOCAB = 9


def drawn(seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(VOCAB, generator=draw, dtype=F64) for _ in range(2))
    return student, teacher


def each_token(
    student: Tensor, teacher: Tensor, top_k: int, old: Tensor | None = None, name: str = "resopd"
) -> tuple[Tensor, Tensor]:
    """Value [V] and gradient [V, V] of the loss where each of the tokens was sampled."""
    method = retort.load(name, top_k=top_k) if name == "resopd" else retort.load(name)
    logits = student.expand(VOCAB, VOCAB).clone().requires_grad_()
    tokens = torch.arange(VOCAB)
    losses = token_losses(
        method,
        student_logits=logits,
        teacher_logits=teacher.expand(VOCAB, VOCAB),
        tokens=tokens,
        old_logp=None if old is None else old.log_softmax(-1),
    )
    value = torch.stack([term.value for term in losses.terms.values()]).sum(0)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def exact(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    live = student.clone().requires_grad_()
    p, q = live.log_softmax(-1), teacher.log_softmax(-1)
    value = (p.exp() * (p - q)).sum()
    return value.detach(), torch.autograd.grad(value, live)[0]


@pytest.mark.parametrize("top_k", [1, 2, 4, VOCAB - 1, VOCAB])
def test_the_mean_over_the_sampled_token_is_the_reverse_kl(top_k: int) -> None:
    for seed in range(20):
        student, teacher = drawn(seed)
        value, gradient = each_token(student, teacher, top_k)
        p = student.softmax(-1)
        kl, slope = exact(student, teacher)
        torch.testing.assert_close((p * value).sum(), kl, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(p @ gradient, slope, rtol=1e-12, atol=1e-12)


def test_it_stays_unbiased_where_the_tokens_are_of_the_student_before_other_updates() -> None:
    student, teacher = drawn(3)
    old = student + 0.3 * drawn(4)[0]
    value, gradient = each_token(student, teacher, 3, old)
    kl, slope = exact(student, teacher)
    was = old.softmax(-1)
    torch.testing.assert_close((was * value).sum(), kl, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(was @ gradient, slope, rtol=1e-11, atol=1e-12)


def test_with_one_id_left_no_token_changes_anything() -> None:
    """S of V - 1 ids: the bucket is the last id, so every token gives the exact gradient."""
    student, teacher = drawn(5)
    _, gradient = each_token(student, teacher, VOCAB - 1)
    torch.testing.assert_close(gradient, exact(student, teacher)[1].expand(VOCAB, VOCAB), rtol=1e-12, atol=1e-12)


def test_golden_numbers() -> None:
    """p = (.5, .3, .2), q = (.6, .1, .3), k = 1: tau_p = .5, tau_q = .4."""
    p, q = (torch.tensor(values, dtype=F64).log() for values in ((0.5, 0.3, 0.2), (0.6, 0.1, 0.3)))
    bucket = 0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4)
    losses = token_losses(
        retort.load("resopd", top_k=1),
        student_logits=p.expand(3, 3),
        teacher_logits=q.expand(3, 3),
        tokens=torch.arange(3),
    )
    assert losses.terms["bucket"].value.tolist() == pytest.approx([bucket] * 3, abs=1e-14)
    tail = math.log(0.5 / 0.4)
    wanted = [0.0, math.log(0.3 / 0.1) - tail, math.log(0.2 / 0.3) - tail]
    assert losses.terms["residual"].value.tolist() == pytest.approx(wanted, abs=1e-14)


def test_a_list_with_the_sampled_token_is_enough_and_gives_the_same() -> None:
    student, teacher = drawn(6)
    whole = each_token(student, teacher, 3)[0]
    logp, ids = teacher.log_softmax(-1).topk(3)
    tokens = torch.arange(VOCAB)
    listed = TopK(
        tokens, "server", ids.expand(VOCAB, 3), logp.expand(VOCAB, 3), teacher.log_softmax(-1), entropy_N=None
    )
    losses = token_losses(
        retort.load("resopd", top_k=3),
        student_logits=student.expand(VOCAB, VOCAB),
        teacher_logits=listed,
        tokens=tokens,
    )
    found = losses.terms["bucket"].value + losses.terms["residual"].value
    torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-12)


def context(student: Tensor, teacher: Tensor) -> Context:
    tokens = torch.zeros(len(student), dtype=torch.long)
    rows = Dense.of(teacher, tokens).rows(torch.arange(len(student)))
    return Context.from_logits(student, tokens, {"teacher": rows})


@pytest.mark.parametrize("top_k", [1, 4, VOCAB])
def test_the_exact_variance_is_that_of_every_token(top_k: int) -> None:
    for seed in range(4):
        student, teacher = drawn(seed)
        _, gradient = each_token(student, teacher, top_k)
        p = student.softmax(-1)
        apart = gradient - p @ gradient
        wanted = (p * apart.square().sum(-1)).sum()
        found = residual_variance(top_k).value(context(student[None], teacher[None]), "teacher")
        torch.testing.assert_close(found, wanted[None], rtol=1e-10, atol=1e-12)


def test_the_variance_is_usually_lower_and_not_always() -> None:
    """3,000 pairs of 50 ids: lower where the teacher is near; of pairs without anything in common not always."""
    draw = torch.Generator().manual_seed(0)
    student, other = (4.0 * torch.randn(3000, 50, generator=draw, dtype=F64) for _ in range(2))

    def ratio(teacher: Tensor) -> Tensor:
        here = context(student, teacher)
        return residual_variance(4).value(here, "teacher") / gradient_variance().value(here, "teacher")

    near, strange = ratio(student + other / 4), ratio(other)
    assert near.median() < 0.8
    assert near.max() < strange.max()
    assert strange.median() < 1.0
    assert strange.max() > 3.0, "it must never be promised"


def test_equal_models_leave_nothing_whatever_was_sampled() -> None:
    student, _ = drawn(7)
    value, gradient = each_token(student, student, 3)
    assert value.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


def test_a_token_that_the_teacher_rules_out_is_infinite_and_harms_no_other() -> None:
    student, teacher = drawn(8)
    teacher[int(teacher.argmin())] = -math.inf
    value, gradient = each_token(student, teacher, 2)
    banned = teacher == -math.inf
    assert value[banned].isinf().all()
    assert value[~banned].isfinite().all()
    assert gradient[~banned].isfinite().all()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (RolloutPlan(top_p=0.9), "top_p = 0.9; set it to 1"),
        (RolloutPlan(temperature=0.7), "drawn at the loss temperature 1, and the rollout plan has 0.7"),
        (RolloutPlan(on_policy_fraction=0.5, off_policy="teacher"), "mixes in the teacher's"),
    ],
    ids=["top-p", "temperature", "teacher"],
)
def test_plans_that_would_bias_it_are_refused(plan: RolloutPlan, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        replace(retort.load("resopd"), rollout=plan)
    assert "\n" not in str(caught.value)


def test_the_parts_alone() -> None:
    student, teacher = drawn(9)
    here = context(student[None], teacher[None])
    whole = topk_kl("reverse", VOCAB, "teacher", "bucket").value(here, "teacher")
    torch.testing.assert_close(whole, reverse_kl().value(here, "teacher"), rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match="k must be at least 1"):
        tail_residual(0)
    with pytest.raises(UserError, match="must not be negative"):
        retort.load("resopd", top_k=-1)
