"""IDA-OPD: the influence against small steps, the weight by hand, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import retort
from retort.advantages.influence import entropy_slope
from retort.core.distribution import Distribution
from retort.errors import UserError
from retort.functional import token_losses

F64 = torch.float64
VOCAB = 8


def drawn(seed: int) -> Tensor:
    return 1.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=F64)


def entropy(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def slopes(logits: Tensor) -> Tensor:
    """Of every token."""
    return entropy_slope(Distribution(logits.expand(len(logits), -1)), logits.log_softmax(-1))


def test_the_slope_is_that_of_a_small_step() -> None:
    for seed in range(5):
        logits = drawn(seed)
        for token, slope in enumerate(slopes(logits).tolist()):
            step = 1e-5 * (torch.eye(VOCAB, dtype=F64)[token] - logits.softmax(-1))
            change = (entropy(logits + step) - entropy(logits - step)) / 2e-5
            assert slope == pytest.approx(change.item(), abs=1e-8)


def test_the_slope_of_a_uniform_student_is_0() -> None:
    assert slopes(torch.zeros(VOCAB, dtype=F64)).abs().max() < 1e-15


def test_an_impossible_id_adds_nothing() -> None:
    logits = torch.cat([drawn(0), torch.tensor([-math.inf], dtype=F64)])
    torch.testing.assert_close(slopes(logits)[:VOCAB], slopes(drawn(0)), rtol=1e-13, atol=1e-15)


def values(student: Tensor, teacher: Tensor, **settings: float) -> Tensor:
    return token_losses(
        retort.load("ida_opd", **settings),
        student_logits=student.expand(len(student), -1),
        teacher_logits=teacher.expand(len(student), -1),
        tokens=torch.arange(len(student)),
    ).terms["reverse"].value  # fmt: skip


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_only_what_would_lower_the_entropy_is_weakened(power: float) -> None:
    student, teacher = drawn(1), drawn(2)
    p, q = student.softmax(-1), teacher.softmax(-1)
    gap = (q / p).log()
    step = 1e-6 * gap[:, None] * (torch.eye(VOCAB, dtype=F64) - p)
    lowers = torch.stack([entropy(student + own) for own in step]) < entropy(student)
    wanted = torch.where(lowers, ((q - p).abs() / (q + p)) ** power, 1.0) * gap
    torch.testing.assert_close(-values(student, teacher, power=power), wanted, rtol=1e-12, atol=1e-13)
    assert 0 < int(lowers.sum()) < VOCAB


def test_golden_numbers() -> None:
    """p = (.8, .2), q = (.9, .1): both tokens lower the entropy, by weights of 1/17 and 1/3."""
    student, teacher = (torch.tensor([p, 1 - p], dtype=F64).log() for p in (0.8, 0.9))
    found = values(student, teacher).tolist()
    assert found == pytest.approx([-math.log(9 / 8) / 17, math.log(2) / 3], abs=1e-14)


def test_equal_models_teach_nothing_and_a_ruled_out_token_everything() -> None:
    student, teacher = drawn(3), drawn(4)
    assert values(student, student).abs().max() == 0.0
    teacher[2] = -math.inf
    found = values(student, teacher)
    assert found[2] == math.inf
    assert found[[0, 1, *range(3, VOCAB)]].isfinite().all()


def test_a_negative_power_is_refused() -> None:
    with pytest.raises(UserError, match="power must not be negative"):
        retort.load("ida_opd", power=-1.0)
