"""skew_kl, akl, abkd, todi, temperature: golden numbers, bounds, gradients and the limits their formulas leave open."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.divergences import ab_values, kl_values
from retort.divergences.adaptive import head_weights, total_variation
from retort.errors import UserError
from retort.estimators import pathwise
from retort.functional import token_losses
from retort.method import Method, Term
from retort.registry import load
from retort.rollout.plan import RolloutPlan

P = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
Q = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
DENSE = [("skew_kl", {}), ("skew_kl", {"direction": "reverse"}), ("akl", {}), ("todi", {}), ("abkd", {})]
DENSE += [("abkd", {"alpha": 0.2, "beta": 0.7}), ("abkd", {"alpha": 0.0, "beta": 0.0}), ("temperature", {})]
NAMED = [f"{name}{settings or ''}" for name, settings in DENSE]


def loss(name: str, student: Tensor = Q, teacher: Tensor = P, **settings: Any) -> Tensor:
    tokens = torch.zeros(len(student), dtype=torch.long)
    return token_losses(load(name, **settings), student_logits=student, teacher_logits=teacher, tokens=tokens).loss


def pair(vocab: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(5, vocab, generator=draw, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


# akl and todi hold their weights fixed: their gradients are compared with their own formulas below.
WHOLE = [place for place, (name, _) in enumerate(DENSE) if name not in ("akl", "todi")]


@pytest.mark.parametrize("place", WHOLE, ids=[NAMED[place] for place in WHOLE])
def test_gradients_are_those_of_the_values(place: int) -> None:
    name, settings = DENSE[place]
    student, teacher = pair(vocab=7)
    torch.autograd.gradcheck(lambda logits: loss(name, logits, teacher, **settings), student.requires_grad_())


@pytest.mark.parametrize(("name", "settings"), DENSE, ids=NAMED)
def test_not_negative_and_in_fp32_as_in_fp64(name: str, settings: dict[str, Any]) -> None:
    student, teacher = pair(vocab=5000)
    exact = loss(name, student, teacher, **settings)
    assert exact > 0
    single = loss(name, student.float(), teacher.float(), **settings)
    assert single.item() == pytest.approx(exact.item(), rel=2e-5)


@pytest.mark.parametrize(("name", "settings"), [*DENSE[:6], DENSE[7]], ids=[*NAMED[:6], NAMED[7]])
def test_an_id_that_both_rule_out_changes_nothing(name: str, settings: dict[str, Any]) -> None:
    student, teacher = pair()
    wider = [
        torch.cat([logits, torch.full((5, 1), -math.inf, dtype=torch.float64)], 1) for logits in (student, teacher)
    ]
    wider[0].requires_grad_()
    wide = loss(name, *wider, **settings)
    assert wide.item() == pytest.approx(loss(name, student, teacher, **settings).item(), rel=1e-12)
    wide.backward()
    assert wider[0].grad is not None
    assert wider[0].grad.isfinite().all()


def test_skew_of_the_specification_and_its_bound() -> None:
    mixture = (0.1 * P.exp() + 0.9 * Q.exp()).log()
    assert loss("skew_kl").item() == pytest.approx(kl_values(P, mixture).item(), abs=1e-14)
    mixture = (0.9 * P.exp() + 0.1 * Q.exp()).log()
    assert loss("skew_kl", direction="reverse").item() == pytest.approx(kl_values(Q, mixture).item(), abs=1e-14)
    apart = torch.tensor([[50.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 50.0]], dtype=torch.float64)
    for direction in ("forward", "reverse"):
        assert loss("skew_kl", *apart, direction=direction).item() == pytest.approx(-math.log(0.1), abs=1e-9)
        banned = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
        assert loss("skew_kl", apart[1], banned, direction=direction).isfinite()
        assert loss("skew_kl", direction=direction, skew=0.999).item() < 1e-5
    with pytest.raises(UserError, match="skew must be at least 0 and below 1"):
        load("skew_kl", skew=1.0)


def test_akl_of_the_specification() -> None:
    head = head_weights(P.exp(), Q.exp(), 0.5)
    assert head.item() == pytest.approx(0.5, abs=1e-12)
    assert loss("akl").item() == pytest.approx(0.22846, abs=5e-6)
    assert head_weights(P.exp(), Q.exp(), 1e-9).item() == pytest.approx(0.5), "the most likely id is always head"
    assert head_weights(P.exp(), Q.exp(), 0.75).item() == pytest.approx(0.5 / 0.6)
    assert loss("akl", P, P).item() == pytest.approx(0.0, abs=1e-15)


def test_akl_and_todi_descend_with_their_weights_held() -> None:
    student, teacher = pair()
    student.requires_grad_()
    q, p = teacher.log_softmax(-1), student.log_softmax(-1)
    head = head_weights(q.exp(), p.exp(), 0.5).detach()
    share = torch.sigmoid(2.0 * (q - p)).detach()
    wanted = {
        "akl": (head * kl_values(q, p) + (1 - head) * kl_values(p, q)).mean(),
        "todi": (share * q.exp() * (q - p) + (1 - share) * p.exp() * (p - q)).sum(-1).mean(),
    }
    for name, settings in (("akl", {}), ("todi", {"sharpness": 2.0})):
        found = loss(name, student, teacher, **settings)
        torch.testing.assert_close(found, wanted[name], rtol=1e-12, atol=0)
        grads = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (found, wanted[name])]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-14)


def test_todi_at_its_ends() -> None:
    both = (kl_values(P, Q) + kl_values(Q, P)).item()
    assert loss("todi", sharpness=0.0).item() == pytest.approx(both / 2, abs=1e-14)
    share = P.exp() / (P.exp() + Q.exp())
    by_hand = (share * P.exp() * (P - Q) + (1 - share) * Q.exp() * (Q - P)).sum().item()
    assert loss("todi").item() == pytest.approx(by_hand, abs=1e-14)


def test_alpha_beta_of_the_specification() -> None:
    hellinger = 4 * (1 - (P.exp() * Q.exp()).sqrt().sum()).item()
    assert loss("abkd").item() == pytest.approx(hellinger, abs=1e-14)
    assert loss("abkd", alpha=0.0, beta=0.0).item() == pytest.approx(((Q - P) ** 2).sum().item() / 2, abs=1e-14)


@pytest.mark.parametrize("point", [(0.7, 0.0), (0.0, 0.7), (0.6, -0.6), (-0.4, 0.4), (2.0, 0.0)], ids=str)
def test_alpha_beta_meets_its_limits_from_all_sides(point: tuple[float, float]) -> None:
    alpha, beta = point
    there = ab_values(P, Q, alpha, beta).item()
    for near in (1e-4, -1e-4):
        # What the released code divides by is off by a factor of alpha or beta: far more than this.
        assert ab_values(P, Q, alpha + near, beta + 2 * near).item() == pytest.approx(there, rel=2e-3)


def test_alpha_beta_in_fp32_survives_its_cancellation() -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair(vocab=1000))
    for alpha, beta in ((0.5, 1e-3), (1e-3, 0.5), (0.4, -0.399)):
        exact = ab_values(teacher, student, alpha, beta)
        torch.testing.assert_close(
            ab_values(teacher.float(), student.float(), alpha, beta).double(), exact, rtol=1e-4, atol=0
        )


def test_total_variation() -> None:
    term = Term("distance", pathwise(total_variation()))
    method = Method(RolloutPlan(), (term,))
    found = token_losses(method, student_logits=Q, teacher_logits=P, tokens=torch.tensor([0])).loss
    assert found.item() == pytest.approx(0.3, abs=1e-14)
    student, teacher = pair()
    torch.autograd.gradcheck(
        lambda logits: (
            token_losses(method, student_logits=logits, teacher_logits=teacher, tokens=torch.zeros(5).long()).loss
        ),
        student.requires_grad_(),
    )


# --- temperature ---


def test_the_gradients_of_tempered_kls() -> None:
    student, teacher = pair(vocab=12)
    student.requires_grad_()
    tau = 3.0
    p, q = (student / tau).softmax(-1), (teacher / tau).softmax(-1)
    gap = student - teacher
    wanted = {
        "forward_kl": (p - q) / tau,
        "reverse_kl": p * (gap - (p * gap).sum(-1, keepdim=True)) / tau**2,
    }
    for divergence, gradient in wanted.items():
        found = loss("temperature", student, teacher, divergence=divergence, loss_temperature=tau, squared=False)
        torch.testing.assert_close(
            torch.autograd.grad(found, student)[0], gradient.detach() / 5, rtol=1e-10, atol=1e-13
        )


def test_towards_an_infinite_temperature_both_kls_are_the_variance_of_the_gap() -> None:
    student, teacher = pair(vocab=12)
    gap = student - teacher
    limit = (gap - gap.mean(-1, keepdim=True)).square().mean(-1).mean().item() / 2
    for divergence in ("forward_kl", "reverse_kl"):
        found = loss("temperature", student, teacher, divergence=divergence, loss_temperature=1e4)
        assert found.item() == pytest.approx(limit, rel=1e-3)


def test_the_temperature_is_not_that_of_sampling() -> None:
    method = load("temperature", loss_temperature=4.0)
    assert method.rollout.temperature == 1.0
    shifted = loss("temperature", Q + 3.0, P - 2.0)
    assert shifted.item() == pytest.approx(loss("temperature").item(), abs=1e-14)


def _gradient(name: str, student: Tensor, teacher: Tensor, settings: dict[str, Any]) -> Tensor:
    logits = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(name, logits, teacher, **settings), logits)
    return found.double()


@pytest.mark.parametrize(("name", "settings"), DENSE, ids=NAMED)
def test_gradients_hold_in_fp32_over_a_large_vocabulary(name: str, settings: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 150_000, generator=draw, dtype=torch.float64) for _ in range(2))
    exact = _gradient(name, student, teacher, settings)
    single = _gradient(name, student.float(), teacher.float(), settings)
    assert ((single - exact).norm() / exact.norm()).item() < 5e-5


@pytest.mark.parametrize("alpha", [-1.5, -0.5, 0.0, 0.2, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("beta", [-1.5, -0.5, 0.0, 0.2, 0.5, 1.0, 1.5])
def test_alpha_beta_of_an_id_that_one_side_rules_out(alpha: float, beta: float) -> None:
    """Against the value at ever smaller probabilities: infinite exactly where that grows without bound, never NaN."""
    full = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    for ours, exponent in ((True, beta), (False, alpha)):
        near = []
        for power in (-200.0, -400.0):
            lacking = torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64).log()
            lacking[0, 2] = power
            pair_of = (full, lacking) if ours else (lacking, full)
            near.append(ab_values(*pair_of, alpha, beta).item())
        lacking = torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64).log().requires_grad_()
        pair_of = (full, lacking) if ours else (lacking, full)
        found = ab_values(*pair_of, alpha, beta)
        if exponent > 0 and alpha + beta > 0:
            assert near[0] == pytest.approx(near[1], rel=1e-9)
            assert found.item() == pytest.approx(near[1], rel=1e-9)
        else:
            assert near[1] > 1.5 * near[0]
            assert found.item() == math.inf
        (gradient,) = torch.autograd.grad(found.sum(), lacking)
        assert gradient[0, :2].isfinite().all()


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_todi_tends_to_infinity_and_is_infinite_where_one_side_rules_an_id_out(side: str, sharpness: float) -> None:
    """Two ids, (.5, .5) against logits (0, -g): for large g half of g and more, so infinite at the end."""
    level = torch.zeros(1, 2, dtype=torch.float64)
    near = [torch.tensor([[0.0, -gap]], dtype=torch.float64) for gap in (100.0, 1000.0, math.inf)]
    pairs = [(other, level) if side == "student" else (level, other) for other in near]
    found = [loss("todi", student, teacher, sharpness=sharpness).item() for student, teacher in pairs]
    share = 0.5 if sharpness == 0.0 else 1.0
    # The other id has alpha at p_T = 1, p_S = 1/2 (or the reverse), ln 2 apart.
    alpha = 1.0 / (1.0 + 2.0**-sharpness) if side == "teacher" else 1.0 / (1.0 + 2.0**sharpness)
    p_t, p_s, log = (1.0, 0.5, math.log(2.0)) if side == "teacher" else (0.5, 1.0, -math.log(2.0))
    first = alpha * p_t * log - (1.0 - alpha) * p_s * log
    for gap, value in zip((100.0, 1000.0), found, strict=False):
        assert value == pytest.approx(share * 0.5 * (gap - math.log(2.0)) + first, rel=1e-12)
    assert found[2] == math.inf


def test_todi_behind_infinity_leaves_other_steps_their_gradient() -> None:
    student = torch.randn(2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    teacher = torch.zeros(2, 3, dtype=torch.float64)
    teacher[0, 1] = -math.inf
    (gradient,) = torch.autograd.grad(loss("todi", student, teacher), student)
    assert not gradient.isnan().any()
    assert gradient[1].abs().max() > 0


def test_akl_with_all_ids_as_the_head_is_the_forward_kl_in_fp32_and_float64() -> None:
    draw = torch.Generator().manual_seed(11)
    student, teacher = (3.0 * torch.randn(64, 5000, generator=draw, dtype=torch.float64) for _ in range(2))
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        ours = loss("akl", student.to(dtype), teacher.to(dtype), head_mass=1.0).item()
        logs = student.to(dtype).double().log_softmax(-1), teacher.to(dtype).double().log_softmax(-1)
        assert ours == pytest.approx((logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean().item(), rel=tolerance)
