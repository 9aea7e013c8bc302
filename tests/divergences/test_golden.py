"""Numbers computed by hand or in float64, and the identities that the specification lists."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.divergences import jsd, jsd_values, kl_values, teacher_top
from retort.errors import UserError

P = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
Q = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log()


def test_forward_and_reverse_kl_of_the_specification() -> None:
    # opd.md section 9: p_T = (.4, .3, .2, .1), p_S = (.7, .1, .1, .1)
    assert kl_values(P, Q).item() == pytest.approx(0.24437, abs=5e-6)
    assert kl_values(Q, P).item() == pytest.approx(0.21256, abs=5e-6)


def test_symmetric_jsd_of_disjoint_distributions_is_ln_2() -> None:
    left = torch.tensor([[1.0, 0.0]], dtype=torch.float64).log()
    right = torch.tensor([[0.0, 1.0]], dtype=torch.float64).log()
    assert jsd_values(left, right, 0.5).item() == pytest.approx(math.log(2.0), abs=1e-12)


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.1, 1.5])
def test_jsd_refuses_the_ends(weight: float) -> None:
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        jsd(weight)


def test_jsd_rescaled_tends_to_the_two_kls() -> None:
    small = 1e-7
    assert (jsd_values(P, Q, small) / small).item() == pytest.approx(kl_values(P, Q).item(), rel=1e-5)
    assert (jsd_values(P, Q, 1 - small) / small).item() == pytest.approx(kl_values(Q, P).item(), rel=1e-5)


def test_the_weight_is_the_teachers() -> None:
    # M = w p_T + (1 - w) p_S, so the other convention is 1 - w with the sides exchanged.
    assert jsd_values(P, Q, 0.3).item() == pytest.approx(jsd_values(Q, P, 0.7).item(), abs=1e-15)
    mixture = (0.3 * P.exp() + 0.7 * Q.exp()).log()
    by_hand = 0.3 * (P.exp() * (P - mixture)).sum() + 0.7 * (Q.exp() * (Q - mixture)).sum()
    assert jsd_values(P, Q, 0.3).item() == pytest.approx(by_hand.item(), abs=1e-15)


def test_an_id_the_teacher_rules_out() -> None:
    banned = torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64).log()
    student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    forward = kl_values(banned, student.log_softmax(-1))
    assert forward.item() == pytest.approx(0.6 * math.log(0.6 * 3) + 0.4 * math.log(0.4 * 3), abs=1e-12)
    forward.sum().backward()
    expected = student.detach().softmax(-1) - banned.exp()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, expected)
    assert kl_values(student.detach().log_softmax(-1), banned).item() == math.inf
    assert torch.isfinite(jsd_values(banned, student.detach().log_softmax(-1), 0.5)).all()


def test_infinity_is_infinity_even_where_the_probability_underflows() -> None:
    tiny = torch.tensor([[0.0, -800.0]], dtype=torch.float32).log_softmax(-1)
    banned = torch.tensor([[0.0, -math.inf]], dtype=torch.float32)
    assert tiny.exp()[0, 1] == 0
    assert kl_values(tiny, banned).item() == math.inf


def test_ids_that_both_rule_out_leave_value_and_gradient_alone() -> None:
    logits = torch.tensor([[1.0, 2.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.5, 0.1, -math.inf]], dtype=torch.float64).log_softmax(-1)
    for value in (
        kl_values(teacher, logits.log_softmax(-1)),
        kl_values(logits.log_softmax(-1), teacher),
        jsd_values(teacher, logits.log_softmax(-1), 0.4),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
        assert gradient[0, 2] == 0


def test_teacher_top_needs_a_positive_k() -> None:
    with pytest.raises(UserError, match="at least 1"):
        teacher_top(0)


rows = st.lists(st.floats(-20, 20), min_size=5, max_size=5)


@given(rows, rows, st.floats(0.01, 0.99), st.floats(-50, 50))
@settings(max_examples=60, deadline=None)
def test_identities(first: list[float], second: list[float], weight: float, shift: float) -> None:
    p = torch.tensor([first], dtype=torch.float64).log_softmax(-1)
    q = torch.tensor([second], dtype=torch.float64).log_softmax(-1)
    moved = (torch.tensor([second], dtype=torch.float64) + shift).log_softmax(-1)
    order = torch.tensor([3, 1, 4, 0, 2])
    for value in (kl_values, lambda a, b: jsd_values(a, b, weight)):
        assert value(p, q).item() >= -1e-12
        assert value(p, p).item() == pytest.approx(0.0, abs=1e-12)
        assert value(p, moved).item() == pytest.approx(value(p, q).item(), abs=1e-10)
        assert value(p[:, order], q[:, order]).item() == pytest.approx(value(p, q).item(), abs=1e-10)
    assert jsd_values(p, q, 0.5).item() <= math.log(2) + 1e-12
