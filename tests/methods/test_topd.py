"""TOPD: the proximal reward against enumeration, its bound and limits, and the return by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import retort
from retort.advantages.proximal import among_siblings, following_mean, proximal_log_ratio
from retort.core.context import Context
from retort.core.signals import Dense
from retort.core.steps import Steps
from retort.divergences import skew_reverse_kl
from retort.errors import UserError
from retort.functional import token_losses

F64 = torch.float64


def context(seed: int = 0, vocab: int = 8) -> tuple[Context, Tensor, Tensor]:
    """Of every token once; student and teacher probabilities."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (2.0 * torch.randn(vocab, generator=draw, dtype=F64) for _ in range(2))
    tokens = torch.arange(vocab)
    rows = Dense.of(teacher.expand(vocab, -1), tokens).rows(tokens)
    here = Context.from_logits(student.expand(vocab, -1), tokens, {"teacher": rows})
    return here, student.softmax(-1), teacher.softmax(-1)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.3, 0.9])
def test_the_mean_is_minus_the_skewed_reverse_kl(alpha: float) -> None:
    here, p, q = context()
    reward = proximal_log_ratio(alpha).value(here, "teacher")
    torch.testing.assert_close(reward, (1 - alpha + alpha * q / p).log(), rtol=1e-12, atol=1e-13)
    skewed = skew_reverse_kl(1.0 - alpha).value(here, "teacher")[0]
    torch.testing.assert_close((p * reward).sum(), -skewed, rtol=1e-12, atol=1e-13)
    assert (reward >= math.log1p(-alpha)).all()


def test_a_small_weight_leaves_the_ratio_less_one() -> None:
    here, p, q = context(1)
    reward = proximal_log_ratio(1e-7).value(here, "teacher") / 1e-7
    torch.testing.assert_close(reward, q / p - 1, rtol=1e-4, atol=1e-4)


def test_golden_means_of_what_follows() -> None:
    """Two rollouts of 3 and 2 tokens, in a mixed order; nothing follows the last of each."""
    rollouts = torch.tensor([0, 1, 0, 1, 0])
    steps = Steps.of(torch.zeros(5, dtype=torch.long), rollouts)
    values = torch.tensor([1.0, 10.0, 2.0, 20.0, 6.0], dtype=F64)
    assert following_mean(values, steps).tolist() == [4.0, 20.0, 6.0, 0.0, 0.0]


def test_golden_numbers_of_a_batch() -> None:
    """Rewards of ln 1.2 and ln 0.8 in one rollout: the first earns both; normalised, they are 1 and -1."""
    student, teacher = torch.tensor([0.5, 0.5], dtype=F64).log(), torch.tensor([1.0, 0.0], dtype=F64).log()
    given = {
        "student_logits": student.expand(2, 2),
        "teacher_logits": teacher.expand(2, 2),
        "tokens": torch.tensor([0, 1]),
    }
    plain = token_losses(retort.load("topd", normalise=False), **given)  # type: ignore[arg-type]
    both = math.log(1.2) + math.log(0.8)
    assert plain.terms["reverse"].value.tolist() == pytest.approx([-both, -math.log(0.8)], abs=1e-14)
    normalised = token_losses("topd", **given)  # type: ignore[arg-type]
    half = (both - math.log(0.8)) / 2
    assert normalised.terms["reverse"].value.tolist() == pytest.approx([-half / (half + 1e-6), half / (half + 1e-6)])


def test_a_token_is_compared_with_those_of_its_own_prompt() -> None:
    """Two prompts of two completions: each has a mean of 0 and a deviation of 1 of its own, whatever the other's."""
    steps = Steps.of(
        torch.zeros(6, dtype=torch.long),
        torch.tensor([0, 0, 1, 2, 3, 3]),
        group_N=torch.tensor([5, 5, 5, 2, 2, 2]),
    )
    found = among_siblings(torch.tensor([1.0, 2.0, 3.0, 100.0, 100.0, 400.0], dtype=F64), steps)
    edge = math.sqrt(1.5)
    assert found.tolist() == pytest.approx([-edge, 0.0, edge, -math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2)], abs=1e-5)


def test_what_the_teacher_rules_out_costs_a_bounded_amount() -> None:
    student, teacher = torch.zeros(2, 4, dtype=F64), torch.zeros(2, 4, dtype=F64)
    teacher[:, 0] = -math.inf
    method = retort.load("topd", returns="token", normalise=False, teacher_weight=0.3)
    losses = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=torch.tensor([0, 1]))
    assert losses.terms["reverse"].value[0].item() == pytest.approx(-math.log(0.7))
    assert losses.loss.isfinite()


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.1])
def test_a_weight_that_means_nothing_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match=r"method 'topd'|teacher_weight must lie in \(0, 1\]"):
        retort.load("topd", teacher_weight=alpha)
