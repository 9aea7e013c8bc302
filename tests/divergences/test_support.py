"""The Jensen-Shannon divergence on a few ids and one bucket: reference, gradient, what merging ids does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retort.core.context import Context
from retort.core.parts import Divergence
from retort.core.signals import Dense
from retort.divergences import jsd_values, topk_jsd, topk_kl
from retort.errors import UserError

VOCAB = 12


def value(part: Divergence, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    tokens_N = torch.zeros(len(student_NV), dtype=torch.long)
    rows = Dense.of(teacher_NV, tokens_N).rows(slice(None))
    return part.value(Context.from_logits(student_NV, tokens_N, {"teacher": rows}), "teacher")


def pair(seed: int, rows: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student = 1.5 * torch.randn(rows, VOCAB, generator=draw, dtype=torch.float64)
    return student.requires_grad_(), student.detach() + torch.randn(rows, VOCAB, generator=draw, dtype=torch.float64)


def by_hand(student_V: Tensor, teacher_V: Tensor, k: int, weight: float, tail: str) -> Tensor:
    p, q = student_V.softmax(-1), teacher_V.softmax(-1)
    ids = p.detach().topk(k).indices
    p, q = (torch.cat([x[ids], 1 - x[ids].sum(0, keepdim=True)]) for x in (p, q))
    if tail == "renormalised":
        p, q = p[:-1] / p[:-1].sum(), q[:-1] / q[:-1].sum()
    m = weight * q + (1 - weight) * p
    return weight * (q * (q / m).log()).sum() + (1 - weight) * (p * (p / m).log()).sum()


@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
@pytest.mark.parametrize("weight", [0.5, 0.1, 0.9])
@pytest.mark.parametrize("k", [2, 5, VOCAB - 1])
def test_value_and_gradient_are_those_of_the_definition(k: int, weight: float, tail: str) -> None:
    student, teacher = pair(0)
    found = value(topk_jsd(weight, k, "student", tail), student, teacher)  # type: ignore[arg-type]
    wanted = torch.stack([by_hand(s, t, k, weight, tail) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)
    ours, theirs = (torch.autograd.grad(v.sum(), student, retain_graph=True)[0] for v in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    student, teacher = pair(1, rows=2)
    for tail in ("bucket", "renormalised"):
        part = topk_jsd(0.3, 4, "student", tail)  # type: ignore[arg-type]
        assert torch.autograd.gradcheck(lambda x, part=part: value(part, x, teacher), (student,))


def test_a_bucket_by_hand() -> None:
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
    m = [0.55, 0.45]
    wanted = 0.5 * sum(q * math.log(q / mm) for q, mm in zip((0.4, 0.6), m, strict=True))
    wanted += 0.5 * sum(p * math.log(p / mm) for p, mm in zip((0.7, 0.3), m, strict=True))
    assert value(topk_jsd(0.5, 1), student, teacher).item() == pytest.approx(wanted, abs=1e-12)
    reverse = 0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / 0.6)
    assert value(topk_kl("reverse", 1, "student", "bucket"), student, teacher).item() == pytest.approx(reverse)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_merging_ids_never_makes_it_larger(seed: int, weight: float) -> None:
    student, teacher = pair(seed)
    for make in (
        lambda k: topk_jsd(weight, k),
        lambda k: topk_kl("forward", k, "student", "bucket"),
        lambda k: topk_kl("reverse", k, "student", "bucket"),
    ):
        rising = torch.stack([value(make(k), student, teacher).detach() for k in range(1, VOCAB + 1)])
        assert (rising.diff(dim=0) >= -1e-12).all()


def test_all_but_one_id_and_a_bucket_are_the_whole_distribution() -> None:
    student, teacher = pair(3)
    whole = jsd_values(teacher.log_softmax(-1), student.log_softmax(-1), 0.5)
    for k in (VOCAB - 1, VOCAB, 10**9):
        torch.testing.assert_close(value(topk_jsd(0.5, k), student, teacher), whole, rtol=1e-10, atol=1e-13)


def test_certainty_on_both_sides_is_finite() -> None:
    sure = torch.tensor([[0.0, -80.0, -90.0]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[-80.0, 0.0, -90.0]], dtype=torch.float64)
    found = value(topk_jsd(0.5, 1), sure, other)
    assert found.item() == pytest.approx(math.log(2.0))
    assert torch.autograd.grad(found.sum(), sure)[0].isfinite().all()


def test_bad_settings() -> None:
    for weight in (0.0, 1.0):
        with pytest.raises(UserError, match="strictly between"):
            topk_jsd(weight)
    with pytest.raises(UserError, match="at least 1"):
        topk_jsd(0.5, 0)


@pytest.mark.parametrize("offset", [6.0, 12.0, 16.0, 20.0, 30.0])
@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("whose", ["student", "union", "intersection"])
def test_a_small_bucket_in_fp32_is_that_of_float64(kind: str, whose: str, offset: float) -> None:
    """Both sides sure, with a tail down to 1e-11: value and gradient of autograd in float64 on the summed tail."""
    draw = torch.Generator().manual_seed(7)
    k, vocab = 5, 400
    student = torch.randn(6, vocab, generator=draw, dtype=torch.float64)
    teacher = student + 0.7 * torch.randn(6, vocab, generator=draw, dtype=torch.float64)
    student[:, :k] += offset
    teacher[:, :k] += offset
    part = topk_jsd(0.5, k, whose) if kind == "jsd" else topk_kl(kind, k, whose, "bucket")  # type: ignore[arg-type]
    single = student.float().requires_grad_()
    exact = single.detach().double().requires_grad_()
    found = value(part, single, teacher.float())
    wanted = torch.stack([_bucket(s, t, whose, k, kind) for s, t in zip(exact, teacher.float().double(), strict=True)])
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=2e-4, atol=1e-7)
    ours = torch.autograd.grad(found.sum(), single)[0].double()
    theirs = torch.autograd.grad(wanted.sum(), exact)[0]
    # The tail by itself: what a share of all of the gradient would hide.
    for ids in (slice(None, k), slice(k, None)):
        apart = (ours[:, ids] - theirs[:, ids]).norm() / theirs[:, ids].norm()
        assert apart < 2e-3, f"{float(apart):.1e}"


def _bucket(student_V: Tensor, teacher_V: Tensor, whose: str, k: int, kind: str) -> Tensor:
    ours, theirs = (set(x.detach().topk(k).indices.tolist()) for x in (student_V, teacher_V))
    ids = sorted({"student": ours, "union": ours | theirs, "intersection": ours & theirs}[whose])
    rest = [v for v in range(len(student_V)) if v not in ids]
    p, q = (torch.cat([x.softmax(-1)[ids], x.softmax(-1)[rest].sum(0, keepdim=True)]) for x in (student_V, teacher_V))
    if kind == "jsd":
        m = (p + q) / 2
        return ((q * (q / m).log()).sum() + (p * (p / m).log()).sum()) / 2
    return (p * (p / q).log()).sum() if kind == "reverse" else (q * (q / p).log()).sum()
