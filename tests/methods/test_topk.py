"""topk_kl and topk_score: two objectives under one name in the literature; and power_opd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from retort import divergences
from retort.core.context import Context
from retort.core.signals import Dense
from retort.divergences import kl_values
from retort.divergences.support import support_ids
from retort.errors import UserError
from retort.estimators import pathwise
from retort.functional import token_losses
from retort.method import Method, Term
from retort.registry import load
from retort.rollout.plan import RolloutPlan

K, VOCAB = 4, 20


def pair(seed: int = 0, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(6, VOCAB, generator=draw, dtype=torch.float64)
    teacher = student + torch.randn(6, VOCAB, generator=draw, dtype=torch.float64)
    return student.requires_grad_(), teacher


def value(name: str, student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    tokens = torch.zeros(len(student), dtype=torch.long)
    losses = token_losses(load(name, **settings), student_logits=student, teacher_logits=teacher, tokens=tokens)
    return losses.terms["divergence"].value


def support(whose: str, student: Tensor, teacher: Tensor, row: int) -> list[int]:
    ours, theirs = (set(logits[row].topk(K).indices.tolist()) for logits in (student, teacher))
    chosen = {
        "student": ours,
        "teacher": theirs,
        "union": ours | theirs,
        "intersection": ours & theirs,
        "symmetric_difference": ours ^ theirs,
    }
    return sorted(chosen[whose])


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("tail", ["renormalised", "bucket"])
@pytest.mark.parametrize("whose", ["student", "teacher", "union", "intersection"])
def test_topk_kl_is_the_kl_on_the_support(whose: str, tail: str, direction: str) -> None:
    student, teacher = pair()
    found = value("topk_kl", student, teacher, top_k=K, support=whose, tail=tail, direction=direction)
    wanted = []
    for row in range(len(student)):
        ids = support(whose, student, teacher, row)
        p, q = (logits[row].log_softmax(-1)[ids] for logits in (student, teacher))
        if tail == "bucket":
            p, q = (torch.cat([logp, (1 - logp.exp().sum()).log()[None]]) for logp in (p, q))
        else:
            p, q = p.log_softmax(-1), q.log_softmax(-1)
        wanted.append(kl_values(p, q) if direction == "reverse" else kl_values(q, p))
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-10, atol=1e-13)
    grads = [torch.autograd.grad(v.sum(), student, retain_graph=True)[0] for v in (found, torch.stack(wanted))]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighting", ["student", "teacher", "uniform"])
@pytest.mark.parametrize("whose", ["student", "teacher", "union", "intersection", "symmetric_difference"])
def test_topk_score_is_a_policy_gradient_on_every_id(whose: str, weighting: str) -> None:
    student, teacher = pair()
    found = value("topk_score", student, teacher, top_k=K, support=whose, weighting=weighting)
    total, values = torch.zeros((), dtype=torch.float64), []
    for row in range(len(student)):
        ids = support(whose, student, teacher, row)
        p, q = (logits[row].log_softmax(-1)[ids] for logits in (student, teacher))
        weights = {"student": p.exp(), "teacher": q.exp(), "uniform": torch.ones_like(p)}[weighting].detach()
        if whose != "symmetric_difference":
            weights = weights / weights.sum()
        values.append((weights * (p - q)).sum().detach())
        total = total - (weights * (q - p).detach() * p).sum()
    torch.testing.assert_close(found.detach(), torch.stack(values), rtol=1e-10, atol=1e-13)
    grads = [torch.autograd.grad(v, student, retain_graph=True)[0] for v in (found.sum(), total)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_a_support_names_every_id_once() -> None:
    student, teacher = pair()
    tokens = torch.zeros(6, dtype=torch.long)
    context = Context.from_logits(student, tokens, {"teacher": Dense.of(teacher, tokens).rows(slice(0, 6))})
    for whose in ("student", "teacher", "union", "intersection", "symmetric_difference"):
        ids_NK, inside_NK = support_ids(context, "teacher", whose, K)  # type: ignore[arg-type]
        for row in range(6):
            kept = ids_NK[row][inside_NK[row]].tolist()
            assert sorted(kept) == support(whose, student, teacher, row)


def test_the_two_forms_differ_and_meet_at_the_whole_vocabulary() -> None:
    student, teacher = pair()
    apart = [
        torch.autograd.grad(value(name, student, teacher, top_k=K).sum(), student)[0]
        for name in ("topk_kl", "topk_score")
    ]
    assert (apart[0] - apart[1]).abs().max() > 1e-2
    exact = kl_values(student.log_softmax(-1), teacher.log_softmax(-1))
    wanted = torch.autograd.grad(exact.sum(), student)[0]
    for name in ("topk_kl", "topk_score"):
        found = value(name, student, teacher, top_k=VOCAB)
        torch.testing.assert_close(found.detach(), exact.detach(), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), student)[0], wanted, rtol=1e-9, atol=1e-12)


def test_one_id_teaches_only_in_the_released_form() -> None:
    student, teacher = pair()
    one = Method(RolloutPlan(), (Term("divergence", pathwise(divergences.topk_kl(k=1))),))
    losses = token_losses(one, student_logits=student, teacher_logits=teacher, tokens=torch.zeros(6, dtype=torch.long))
    assert losses.terms["divergence"].value.abs().max() == 0.0
    with pytest.raises(UserError, match="nothing would be learnt"):
        load("topk_kl", top_k=1)
    best = student.argmax(-1, keepdim=True)
    gap = (student.log_softmax(-1) - teacher.log_softmax(-1)).gather(-1, best).squeeze(-1)
    torch.testing.assert_close(value("topk_score", student, teacher, top_k=1), gap)


def test_a_bucket_never_sees_more_than_there_is() -> None:
    for seed in range(20):
        student, teacher = pair(seed)
        exact = kl_values(student.log_softmax(-1), teacher.log_softmax(-1))
        before = torch.zeros_like(exact)
        for k in (1, 4, 10, VOCAB):
            found = value("topk_kl", student, teacher, top_k=k, tail="bucket")
            assert (found <= exact + 1e-12).all()
            assert (found >= before - 1e-12).all(), "a finer partition sees more"
            before = found


def test_nothing_shared_is_nothing_to_say() -> None:
    student = torch.tensor([[9.0, 8.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 9.0, 8.0]], dtype=torch.float64)
    for name in ("topk_kl", "topk_score"):
        found = value(name, student, teacher, top_k=2, support="intersection")
        assert found.item() == 0.0
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert gradient.abs().max() == 0.0


def test_k_must_be_positive() -> None:
    for name in ("topk_kl", "topk_score"):
        with pytest.raises(UserError, match="k must be at least 1"):
            load(name, top_k=0)


# --- power_opd ---


def advantage(teacher_p: float, old_p: float, **settings: Any) -> float:
    student = torch.tensor([[old_p, 1 - old_p]], dtype=torch.float64).log()
    teacher = torch.tensor([[teacher_p, 1 - teacher_p]], dtype=torch.float64).log()
    arguments: dict[str, Any] = {"student_logits": student, "teacher_logits": teacher, "tokens": torch.tensor([0])}
    # On the first update the ratio is 1, and the value is minus the advantage.
    return -token_losses(load("power_opd", **settings), **arguments).loss.item()


def test_the_power_reward() -> None:
    assert advantage(0.9, 0.6, power=2.0) == pytest.approx(0.81 - 0.36, abs=1e-14)
    assert advantage(0.0, 0.6, power=2.0) == pytest.approx(-0.36, abs=1e-14), "finite where the teacher rules it out"
    assert advantage(0.7, 0.7) == 0.0
    for seed in range(20):
        one, other = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        for power in (0.1, 5.0, 500.0):
            reward = advantage(one, other, power=power)
            assert abs(reward) <= 1.0
            assert reward == 0.0 or (reward > 0) == (one > other)
        assert advantage(one, other, power=1e-6) / 1e-6 == pytest.approx(math.log(one / other), rel=1e-4)


def test_the_rewards_it_is_compared_with() -> None:
    gap = math.log(0.001 / 0.6)
    assert advantage(0.001, 0.6, reward="log_ratio") == pytest.approx(gap)
    assert advantage(0.001, 0.6, reward="clip", bound=1.0) == pytest.approx(-1.0)
    assert advantage(0.001, 0.6, reward="tanh", bound=5.0) == pytest.approx(math.tanh(gap / 5))
    assert advantage(0.001, 0.6, reward="lower_clip", lower=0.3) == pytest.approx(-1.72, abs=1e-3)
    assert advantage(0.6, 0.001, reward="lower_clip", lower=0.3) == pytest.approx(-gap), "only from below"
    for settings, words in (
        ({"power": 0.0}, "power must be positive"),
        ({"reward": "lower_clip", "lower": 1.0}, "strictly between 0 and 1"),
        ({"reward": "tanh", "bound": 0.0}, "scale must be positive"),
        ({"reward": "clip", "bound": -1.0}, "must lie below high"),
    ):
        with pytest.raises(UserError, match=words):
            load("power_opd", **settings)
