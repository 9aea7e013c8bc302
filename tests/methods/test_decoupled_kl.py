"""decoupled_kl against its specification: mixing, the two gradients, prefixes, the chain rule."""

from __future__ import annotations

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

STUDENT = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
ONE = torch.tensor([0])


def random(seed: int, steps: int = 5, vocab: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(steps, vocab, generator=draw, dtype=torch.float64).requires_grad_()
    teacher = 2 * torch.randn(steps, vocab, generator=draw, dtype=torch.float64)
    return student, teacher, torch.randint(0, vocab, (steps,), generator=draw)


def loss_and_gradient(student: Tensor, teacher: Tensor, tokens: Tensor, **settings: object) -> tuple[Tensor, Tensor]:
    method = load("decoupled_kl", **settings)
    loss = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tokens).loss
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def test_golden_numbers() -> None:
    def value(weight: float) -> float:
        method = load("decoupled_kl", reverse_weight=weight)
        return token_losses(method, student_logits=STUDENT, teacher_logits=TEACHER, tokens=ONE).loss.item()

    assert value(0.0) == pytest.approx(0.24437, abs=5e-6)
    assert value(1.0) == pytest.approx(0.21256, abs=5e-6)
    assert value(0.2) == pytest.approx(0.2 * 0.2125553 + 0.8 * 0.2443727, abs=1e-5)


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.8])
def test_the_mix_is_affine_in_value_and_gradient_and_no_jsd(weight: float) -> None:
    student, teacher, tokens = random(0)
    mixed = loss_and_gradient(student, teacher, tokens, reverse_weight=weight)
    reverse = loss_and_gradient(student, teacher, tokens, reverse_weight=1.0)
    forward = loss_and_gradient(student, teacher, tokens, reverse_weight=0.0)
    for ours, r, f in zip(mixed, reverse, forward, strict=True):
        torch.testing.assert_close(ours, weight * r + (1 - weight) * f, rtol=1e-12, atol=1e-13)
    jsd = token_losses(
        load("gkd", teacher_weight=weight), student_logits=student, teacher_logits=teacher, tokens=tokens
    ).loss
    assert mixed[0] > 2 * jsd


def test_both_gradients_are_those_of_proposition_1() -> None:
    student, teacher, tokens = random(1)
    p_s, p_t = student.detach().softmax(-1), teacher.softmax(-1)
    gap = p_s.log() - p_t.log()
    _, forward = loss_and_gradient(student, teacher, tokens, reverse_weight=0.0)
    torch.testing.assert_close(5 * forward, p_s - p_t, rtol=1e-11, atol=1e-12)
    _, reverse = loss_and_gradient(student, teacher, tokens, reverse_weight=1.0)
    torch.testing.assert_close(5 * reverse, p_s * (gap - (p_s * gap).sum(-1, keepdim=True)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("prefix", "weight"), [("student", 1.0), ("teacher", 0.0)], ids=["reverse", "forward"])
def test_the_sampled_form_has_the_exact_gradient_in_expectation(prefix: str, weight: float) -> None:
    """Over every token that may be written, by whoever writes."""
    student, teacher, _ = random(2, steps=1)
    exact = loss_and_gradient(student, teacher, ONE, reverse_weight=weight, prefix=prefix)[1]
    writer = (student.detach() if prefix == "student" else teacher).softmax(-1)[0]
    mean = torch.zeros_like(exact)
    for token, uniform_stream in enumerate(writer):
        settings = {"reverse_weight": weight, "prefix": prefix, "estimator": "sampled"}
        mean += uniform_stream * loss_and_gradient(student, teacher, torch.tensor([token]), **settings)[1]
    torch.testing.assert_close(mean, exact, rtol=1e-11, atol=1e-12)


def test_what_no_sample_estimates_is_refused() -> None:
    for prefix, weight in (("student", 0.0), ("student", 0.2), ("teacher", 1.0), ("dataset", 0.5)):
        with pytest.raises(UserError, match="estimator=sampled takes"):
            load("decoupled_kl", estimator="sampled", prefix=prefix, reverse_weight=weight)
    with pytest.raises(UserError, match="reverse_weight must lie in"):
        load("decoupled_kl", reverse_weight=1.2)


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_whose_prefix_it_is_changes_nothing_about_the_loss(weight: float) -> None:
    student, teacher, tokens = random(3)
    found = [
        loss_and_gradient(student, teacher, tokens, reverse_weight=weight, prefix=prefix)
        for prefix in ("student", "teacher", "dataset")
    ]
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_who_writes() -> None:
    assert load("decoupled_kl").rollout.sources == {"student"}
    assert load("decoupled_kl", prefix="teacher").rollout.sources == {"teacher"}
    assert load("decoupled_kl", prefix="teacher").rollout.keep
    assert load("decoupled_kl", prefix="dataset").rollout.sources == {"dataset"}


def test_token_divergences_add_up_to_that_of_sequences() -> None:
    """V = 3, T = 3, every sequence: KL of sequences = sum over prefixes, weighted by who writes, of the token KLs."""
    draw = torch.Generator().manual_seed(4)
    prefixes = [prefix for length in range(3) for prefix in itertools.product(range(3), repeat=length)]
    student = {prefix: torch.randn(3, generator=draw, dtype=torch.float64).log_softmax(-1) for prefix in prefixes}
    teacher = {prefix: torch.randn(3, generator=draw, dtype=torch.float64).log_softmax(-1) for prefix in prefixes}

    def logp(model: dict[tuple[int, ...], Tensor], sequence: tuple[int, ...]) -> Tensor:
        return torch.stack([model[sequence[:t]][sequence[t]] for t in range(len(sequence))] or [torch.zeros(())]).sum()

    for writer, weight in ((student, 1.0), (teacher, 0.0)):
        method = load("decoupled_kl", reverse_weight=weight)
        tokenwise = torch.zeros((), dtype=torch.float64)
        for prefix in prefixes:
            loss = token_losses(
                method, student_logits=student[prefix][None], teacher_logits=teacher[prefix][None], tokens=ONE
            ).loss
            tokenwise += logp(writer, prefix).exp() * loss
        whole = torch.zeros((), dtype=torch.float64)
        other = teacher if writer is student else student
        for sequence in itertools.product(range(3), repeat=3):
            mine = logp(writer, sequence)
            whole += mine.exp() * (mine - logp(other, sequence))
        torch.testing.assert_close(tokenwise, whole, rtol=1e-12, atol=1e-13)


def test_estimators_of_the_reverse_kl() -> None:
    """k1 and k3 in expectation, k3 >= 0, k2 to second order; D is the reverse KL."""
    student, teacher, _ = random(5, steps=1, vocab=6)
    p_s = student.detach().softmax(-1)[0]
    exact = kl_values(student.detach().log_softmax(-1), teacher.log_softmax(-1))[0]

    def values(divergence: object, near: Tensor) -> Tensor:
        tokens = torch.arange(6)
        method = Method(rollout=RolloutPlan(), terms=(Term("term", pathwise(divergence)),))  # type: ignore[arg-type]
        return (
            token_losses(
                method, student_logits=student.detach().expand(6, -1), teacher_logits=near.expand(6, -1), tokens=tokens
            )
            .terms["term"]
            .value
        )

    torch.testing.assert_close((p_s * values(k3(), teacher)).sum(), exact, rtol=1e-12, atol=1e-13)
    assert (values(k3(), teacher) >= 0).all()
    gap = student.detach().log_softmax(-1)[0] - teacher.log_softmax(-1)[0]
    torch.testing.assert_close((p_s * gap).sum(), exact, rtol=1e-12, atol=1e-13)
    assert k1().not_pathwise is not None
    for size in (1e-2, 1e-3):
        near = student.detach() + size * (teacher - student.detach())
        small = kl_values(student.detach().log_softmax(-1), near.log_softmax(-1))[0]
        assert abs((p_s * values(k2(), near)).sum() - small) < 20 * size * small
