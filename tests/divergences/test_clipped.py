"""Clipped divergences: the formula of the gradient, the signs, and the closed form against the definition."""

import math

import pytest
import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.signals import Dense
from retort.divergences import clipped, clipped_mass, clipped_values, jsd_values, kl_values, teacher_top
from retort.errors import UserError

TEACHER = torch.tensor([[0.9148, 0.06, 0.0252]], dtype=torch.float64)
STUDENT = torch.tensor([[0.4963, 0.3, 0.2037]], dtype=torch.float64)
KAPPA = 0.05


def context(student: Tensor, teacher: Tensor) -> Context:
    tokens = torch.zeros(len(student), dtype=torch.long)
    return Context.from_logits(
        student, tokens, {"teacher": Dense.of(teacher, tokens).rows(slice(None), student.shape[1])}
    )


def drawn(rows: int = 6, vocab: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=draw, dtype=torch.float64).requires_grad_()
    return student, 2 * torch.randn(rows, vocab, generator=draw, dtype=torch.float64)


def test_the_clipped_loss_may_be_negative_and_pushes_the_clipped_id_down() -> None:
    # The facts of the specification: .410 -> -.099, and the gradient of the first id -.4185 -> +.0423.
    student = STUDENT.log().requires_grad_()
    plain = clipped(None).value(context(student, TEACHER.log()), "teacher")
    cut = clipped(KAPPA).value(context(student, TEACHER.log()), "teacher")
    assert plain.item() == pytest.approx(0.410, abs=5e-4)
    assert cut.item() == pytest.approx(-0.099, abs=5e-4)
    (before,), (after,) = torch.autograd.grad(plain, student)[0], torch.autograd.grad(cut, student)[0]
    assert before[0].item() == pytest.approx(-0.4185, abs=5e-5)
    assert after[0].item() == pytest.approx(0.0423, abs=5e-5)
    mass = clipped_mass(KAPPA).value(context(student, TEACHER.log()), "teacher")
    assert mass.item() == pytest.approx(0.9148)


def test_the_clipped_mass_on_a_support_and_without_a_clip() -> None:
    here = context(STUDENT.log(), TEACHER.log())
    found = clipped_mass(KAPPA, 0.0, teacher_top(2)).value(here, "teacher").item()
    # Renormalised on two ids: .9148 of .9748 against .4963 of .7963.
    assert found == pytest.approx(0.9148 / 0.9748)
    assert clipped_mass(KAPPA, 0.0, teacher_top(3)).value(here, "teacher").item() == pytest.approx(0.9148)
    for support in (None, teacher_top(2)):
        assert clipped_mass(None, 0.0, support).value(here, "teacher").item() == 0


def test_point_nine_against_point_eight_five_is_clipped() -> None:
    teacher, student = torch.tensor([[0.9, 0.1]]).double().log(), torch.tensor([[0.85, 0.15]]).double().log()
    assert clipped_mass(KAPPA).value(context(student, teacher), "teacher").item() == pytest.approx(0.9)


@pytest.mark.parametrize(("start", "end"), [(0.86, 0.9), (0.84, 0.0)])
def test_a_student_near_the_teacher_comes_to_it_and_one_farther_leaves_it(start: float, end: float) -> None:
    teacher = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    logits = torch.tensor([[start, 1 - start]], dtype=torch.float64).log()
    for _ in range(2000):
        live = logits.requires_grad_()
        (gradient,) = torch.autograd.grad(clipped(KAPPA).value(context(live, teacher), "teacher").sum(), live)
        logits = logits.detach() - gradient
    assert logits.softmax(-1)[0, 0].item() == pytest.approx(end, abs=0.02)


def test_the_formula_of_the_gradient_and_finite_differences() -> None:
    student, teacher = drawn()
    (gradient,) = torch.autograd.grad(clipped(KAPPA).value(context(student, teacher), "teacher").sum(), student)
    p_t, p_s = teacher.softmax(-1), student.detach().softmax(-1)
    kept = (p_t * (p_t.log() - p_s.log()) <= KAPPA).double()
    assert 0 < kept.mean() < 1
    torch.testing.assert_close(gradient, p_s * (kept * p_t).sum(-1, keepdim=True) - p_t * kept, rtol=1e-12, atol=1e-12)
    for weight in (0.0, 0.4, 1.0):
        part = clipped(KAPPA, weight)
        assert torch.autograd.gradcheck(lambda x, part=part: part.value(context(x, teacher), "teacher"), (student,))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("clip", [1e-3, KAPPA, 1e9])
def test_the_closed_form_is_the_definition(weight: float, clip: float) -> None:
    student, teacher = drawn(seed=1)
    ours = clipped(clip, weight).value(context(student, teacher), "teacher")
    theirs = clipped_values(teacher.log_softmax(-1), student.log_softmax(-1), clip, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    upstream = torch.linspace(-1, 2, len(ours), dtype=torch.float64)
    one, two = (torch.autograd.grad(value, student, upstream)[0] for value in (ours, theirs))
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)
    plain = {0.0: kl_values(teacher.log_softmax(-1), student.log_softmax(-1))}
    plain[1.0] = kl_values(student.log_softmax(-1), teacher.log_softmax(-1))
    known = plain[weight] if weight in plain else jsd_values(teacher.log_softmax(-1), student.log_softmax(-1), weight)
    assert (ours <= known + 1e-12).all()
    if clip == 1e9:
        torch.testing.assert_close(ours, known, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_teachers_top_k_renormalised(weight: float) -> None:
    student, teacher = drawn(seed=2)
    found = clipped(KAPPA, weight, teacher_top(3)).value(context(student, teacher), "teacher")
    ids = teacher.topk(3, dim=-1).indices
    by_hand = clipped_values(
        teacher.gather(-1, ids).log_softmax(-1), student.gather(-1, ids).log_softmax(-1), KAPPA, weight
    )
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-13)
    one, two = (torch.autograd.grad(value.sum(), student)[0] for value in (found, by_hand))
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)
    whole = clipped(KAPPA, weight, teacher_top(10**6)).value(context(student, teacher), "teacher")
    exact = clipped(KAPPA, weight).value(context(student, teacher), "teacher")
    torch.testing.assert_close(whole, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_ids_that_somebody_rules_out(weight: float) -> None:
    student = torch.tensor([[1.0, 2.0, -math.inf, 0.5, -math.inf]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.5, -math.inf, 1.0, 0.1, -math.inf]], dtype=torch.float64)
    ours = clipped(KAPPA, weight).value(context(student, teacher), "teacher")
    theirs = clipped_values(teacher.log_softmax(-1), student.log_softmax(-1), KAPPA, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    (defined,) = torch.autograd.grad(theirs.sum(), student)
    assert torch.isfinite(ours).all()
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(gradient, defined, rtol=1e-11, atol=1e-13)


def test_what_is_no_distribution_stays_nan() -> None:
    student = torch.tensor([[1.0, math.nan, 0.0]], dtype=torch.float64)
    teacher = Distribution(torch.tensor([[1.0, 0.0, -math.inf]], dtype=torch.float64))
    found = clipped(KAPPA).value(
        Context.from_logits(student, torch.zeros(1, dtype=torch.long), {"teacher": _Rows(teacher)}), "teacher"
    )
    assert found.isnan().all()


class _Rows:
    def __init__(self, distribution: Distribution) -> None:
        self.distribution = distribution


def test_fp32_at_a_large_vocabulary() -> None:
    draw = torch.Generator().manual_seed(3)
    student = 3 * torch.randn(2, 50_000, generator=draw)
    teacher = student + 0.5 * torch.randn(2, 50_000, generator=draw)
    single = student.clone().requires_grad_()
    value = clipped(0.001).value(context(single, teacher), "teacher")
    (gradient,) = torch.autograd.grad(value.sum(), single)
    double = student.double().requires_grad_()
    exact = clipped_values(teacher.double().log_softmax(-1), double.log_softmax(-1), 0.001)
    (expected,) = torch.autograd.grad(exact.sum(), double)
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(("clip", "weight", "message"), [(0.0, 0.0, "must be positive"), (0.1, 1.5, "lie in")])
def test_settings_that_mean_nothing(clip: float, weight: float, message: str) -> None:
    for make in (clipped, clipped_mass):
        with pytest.raises(UserError, match=message):
            make(clip, weight)
