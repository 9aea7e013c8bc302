"""Exact expectations: every sequence of a tiny language is enumerated, so these are equalities, not statistics."""

import itertools

import pytest
import torch
from torch import Tensor

from retort.divergences import k1, k2, k3, kl_values
from retort.errors import UserError
from retort.estimators import pathwise
from retort.functional import token_losses
from retort.method import Method, Term
from retort.registry import load
from retort.rollout.plan import RolloutPlan

V, T = 5, 3


def _tables(seed: int) -> tuple[Tensor, Tensor]:
    """Student and teacher logits of every prefix: [prefixes, V], prefixes being all sequences shorter than T."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = sum(V**length for length in range(T))
    student = torch.randn(prefixes, V, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), 2 * torch.randn(prefixes, V, generator=generator, dtype=torch.float64)


def _place(prefix: tuple[int, ...]) -> int:
    start = sum(V**length for length in range(len(prefix)))
    return start + sum(token * V ** (len(prefix) - 1 - at) for at, token in enumerate(prefix))


def _expected_gradient(method: Method | str, student: Tensor, teacher: Tensor) -> Tensor:
    """Probability-weighted sum over all V^T sequences of the gradient of the method's loss (summed over its steps)."""
    total = torch.zeros_like(student)
    logp = student.detach().log_softmax(-1)
    for sequence in itertools.product(range(V), repeat=T):
        places = torch.tensor([_place(sequence[:length]) for length in range(T)])
        tokens = torch.tensor(sequence)
        probability = logp[places].gather(-1, tokens[:, None]).sum().exp()
        losses = token_losses(method, student_logits=student[places], teacher_logits=teacher[places], tokens=tokens)
        (gradient,) = torch.autograd.grad(losses.loss * T, student)
        total += probability * gradient
    return total


def _exact_gradient(student: Tensor, teacher: Tensor, *, forward: bool = False) -> Tensor:
    """Gradient of the divergence at each prefix, weighted by the probability of reaching it."""
    total = torch.zeros_like(student)
    logp = student.detach().log_softmax(-1)
    for length in range(T):
        for prefix in itertools.product(range(V), repeat=length):
            reach = torch.tensor(0.0, dtype=torch.float64)
            for at in range(length):
                reach = reach + logp[_place(prefix[:at]), prefix[at]]
            row = student[_place(prefix)].log_softmax(-1)[None]
            other = teacher[_place(prefix)].log_softmax(-1)[None]
            value = kl_values(other, row) if forward else kl_values(row, other)
            (gradient,) = torch.autograd.grad(reach.exp() * value.sum(), student)
            total += gradient
    return total


@pytest.mark.parametrize(
    "method",
    [
        load("opd"),
        load("opd", clip=0.2),
        load("vopd", top_k=None),
        load("vopd", top_k=2),
        load("vopd", baseline_coef=0.5),
        load("eopd", forward_coef=0.0),
    ],
    ids=lambda method: f"{method.name}-{sorted(method.settings.items())}",
)
def test_score_function_methods_descend_the_reverse_kl(method: Method) -> None:
    student, teacher = _tables(0)
    torch.testing.assert_close(
        _expected_gradient(method, student, teacher), _exact_gradient(student, teacher), rtol=1e-12, atol=1e-12
    )


def _pathwise(divergence: object) -> Method:
    return Method(rollout=RolloutPlan(), terms=(Term("term", pathwise(divergence)),))  # type: ignore[arg-type]


def test_k2_descends_the_reverse_kl_and_k3_the_forward() -> None:
    student, teacher = _tables(1)
    torch.testing.assert_close(_expected_gradient(_pathwise(k2()), student, teacher), _exact_gradient(student, teacher))
    torch.testing.assert_close(
        _expected_gradient(_pathwise(k3()), student, teacher), _exact_gradient(student, teacher, forward=True)
    )


def test_k1_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="does not depend on the teacher"):
        pathwise(k1())


def test_value_baseline_has_zero_mean_advantage_and_never_lowers_the_reward() -> None:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(1, V, generator=generator, dtype=torch.float64)
    teacher = torch.randn(1, V, generator=generator, dtype=torch.float64)
    every = torch.arange(V)
    losses = token_losses(
        load("vopd", top_k=None),
        student_logits=student.expand(V, V),
        teacher_logits=teacher.expand(V, V),
        tokens=every,
    )
    advantage = -losses.terms["reverse"].value
    reward = teacher.log_softmax(-1)[0] - student.log_softmax(-1)[0]
    assert (student.softmax(-1)[0] * advantage).sum().item() == pytest.approx(0.0, abs=1e-12)
    kl = kl_values(student.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(advantage - reward, kl.expand(V))
    assert kl.item() > 0


def test_clip_takes_the_larger_loss() -> None:
    # Ratio 1.5 and 0.5 against each sign of the advantage; epsilon 0.2.
    student = torch.tensor([[0.6, 0.4], [0.2, 0.8]], dtype=torch.float64).log()
    old = torch.tensor([0.4, 0.4], dtype=torch.float64).log()
    for better in (True, False):
        target = 0.9 if better else 0.1
        teacher = torch.tensor([[target, 1 - target]] * 2, dtype=torch.float64).log()
        losses = token_losses(
            load("opd", clip=0.2),
            student_logits=student,
            teacher_logits=teacher,
            tokens=torch.tensor([0, 0]),
            old_logp=old,
        )
        advantage = teacher[0, 0].item() - old[0].item()
        ratios = [1.5, 0.5]
        expected = [max(-advantage * r, -advantage * min(max(r, 0.8), 1.2)) for r in ratios]
        torch.testing.assert_close(losses.terms["reverse"].value, torch.tensor(expected, dtype=torch.float64))


def test_vopd_variance_falls_where_rewards_are_spread() -> None:
    """vopd.md invariant 4, logit space, V = 50: exact total variance of the gradient, reward spread large."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(40):
        student = torch.randn(50, generator=generator, dtype=torch.float64)
        teacher = 3 * torch.randn(50, generator=generator, dtype=torch.float64)
        p = student.softmax(-1)
        reward = teacher.log_softmax(-1) - student.log_softmax(-1)
        square = 1 - 2 * p + (p**2).sum()  # |grad log p(y)|^2 in logit space
        plain = (p * reward**2 * square).sum()
        value = (p * reward).sum()
        based = (p * (reward - value) ** 2 * square).sum()
        ratios.append((based / plain).item())
    assert sum(ratio < 1 for ratio in ratios) / len(ratios) > 0.9
