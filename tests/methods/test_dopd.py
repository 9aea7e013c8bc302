"""DOPD: regimes against plain Python, what each is taught, and that the bare student has no say in the routing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toy import Toy

from retort.core.losses import TokenLosses
from retort.divergences import jsd_values, kl_values
from retort.errors import UserError
from retort.functional import token_losses
from retort.registry import load
from retort.weights.privilege import AGREED, STUDENT, TEACHER, VAGUE, regimes, trimmed_mean

N, VOCAB = 40, 9
TERMS = {"teacher_firm": TEACHER, "teacher_light": AGREED, "student_weak": VAGUE, "student_light": STUDENT}
DRAW = torch.Generator().manual_seed(0)
STUDENT_LOGITS, TEACHER_LOGITS, HINTED_LOGITS = (
    2 * torch.randn(N, VOCAB, generator=DRAW, dtype=torch.float64) for _ in range(3)
)
TOKENS = torch.randint(0, VOCAB, (N,), generator=DRAW)
ROLLOUTS = torch.arange(N) * 3 // N


def losses(student: torch.Tensor, hinted: torch.Tensor = HINTED_LOGITS, **settings: Any) -> TokenLosses:
    teacher = settings.pop("teacher", TEACHER_LOGITS)
    return token_losses(
        load("dopd", **settings),
        student_logits=student,
        teacher_logits=teacher,
        extra_views={"privileged_student": hinted},
        tokens=TOKENS,
        rollouts=ROLLOUTS,
    )


def at_tokens(logits: torch.Tensor) -> list[float]:
    return logits.log_softmax(-1).gather(-1, TOKENS[:, None]).squeeze(-1).tolist()


def without_outliers(values: list[float]) -> float:
    kept = sorted(values)[: len(values) - math.ceil(0.05 * len(values))]
    return sum(kept) / len(kept)


def by_hand() -> list[int]:
    l_t, l_s = at_tokens(TEACHER_LOGITS), at_tokens(HINTED_LOGITS)
    q_t, q_s = [math.exp(x) for x in l_t], [math.exp(x) for x in l_s]
    gaps = [abs(a - b) for a, b in zip(l_t, l_s, strict=True)]
    gap, sure, found = without_outliers(gaps), without_outliers(q_t) + without_outliers(q_s), []
    for t in range(N):
        if gaps[t] >= gap:
            found.append(TEACHER if q_t[t] >= q_s[t] else STUDENT)
        else:
            found.append(AGREED if q_t[t] + q_s[t] >= sure else VAGUE)
    return found


def test_every_token_is_in_one_regime() -> None:
    wanted = by_hand()
    assert set(wanted) == {AGREED, VAGUE, TEACHER, STUDENT}
    found = losses(STUDENT_LOGITS)
    for name, number in TERMS.items():
        assert found.terms[name].weight.tolist() == [float(regime == number) for regime in wanted]
    signed = torch.tensor(at_tokens(TEACHER_LOGITS)) - torch.tensor(at_tokens(HINTED_LOGITS))
    firm = found.terms["teacher_firm"].weight + found.terms["student_light"].weight > 0
    assert torch.equal(found.terms["teacher_firm"].weight[firm] > 0, signed[firm] >= 0)


def test_the_loss_by_hand() -> None:
    student = STUDENT_LOGITS.clone().requires_grad_()
    # k = |V| - 1 and one bucket are the whole vocabulary.
    found = losses(student, top_k=VOCAB - 1)
    s, teacher, itself = (x.log_softmax(-1) for x in (student, TEACHER_LOGITS, HINTED_LOGITS))
    value = {
        TEACHER: jsd_values(teacher, s, 0.5),
        AGREED: 0.6 * kl_values(s, teacher),
        VAGUE: 0.3 * kl_values(s, itself),
        STUDENT: 0.6 * kl_values(s, itself),
    }
    chosen = torch.stack([value[regime][t] for t, regime in enumerate(by_hand())])
    wanted = torch.stack([chosen[rollout == ROLLOUTS].mean() for rollout in range(3)]).mean()
    torch.testing.assert_close(found.loss, wanted, rtol=1e-9, atol=0)
    (ours,), (theirs,) = torch.autograd.grad(found.loss, student), torch.autograd.grad(wanted, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_a_small_support_is_of_the_teacher_or_of_the_student() -> None:
    found = losses(STUDENT_LOGITS, top_k=2)
    s, teacher = STUDENT_LOGITS.log_softmax(-1).exp(), TEACHER_LOGITS.log_softmax(-1).exp()

    def bucketed(ids: torch.Tensor, t: int) -> float:
        pairs = [(float(s[t, v]), float(teacher[t, v])) for v in ids.tolist()]
        pairs.append((1 - sum(a for a, _ in pairs), 1 - sum(b for _, b in pairs)))
        return sum(a * math.log(a / b) for a, b in pairs)

    t = by_hand().index(AGREED)
    ours = found.terms["teacher_light"].value[t].item()
    assert ours == pytest.approx(bucketed(teacher[t].topk(2).indices, t))
    ours = losses(STUDENT_LOGITS, top_k=2, support="student").terms["teacher_light"].value[t].item()
    assert ours == pytest.approx(bucketed(s[t].topk(2).indices, t))


def test_only_the_privileged_policies_route() -> None:
    weights = {name: term.weight for name, term in losses(STUDENT_LOGITS).terms.items()}
    bare = losses(STUDENT_LOGITS.flip(0))
    assert all(torch.equal(bare.terms[name].weight, weight) for name, weight in weights.items())
    hinted = losses(STUDENT_LOGITS, HINTED_LOGITS.flip(0))
    assert any(not torch.equal(hinted.terms[name].weight, weight) for name, weight in weights.items())


def test_an_empty_hint_teaches_nothing_where_the_student_teaches() -> None:
    student = STUDENT_LOGITS.clone().requires_grad_()
    found = losses(student, student.detach())
    for name in ("student_weak", "student_light"):
        term = found.terms[name]
        assert term.weight.any()
        assert (term.value * term.weight).abs().max() < 1e-12
        (gradient,) = torch.autograd.grad((term.value * term.weight).sum(), student, retain_graph=True)
        assert gradient.abs().max() < 1e-12
    assert found.loss > 0.01


def test_a_teacher_that_is_the_student_gets_all_tokens() -> None:
    found = losses(STUDENT_LOGITS, TEACHER_LOGITS)
    assert found.terms["teacher_firm"].weight.all()
    only = losses(STUDENT_LOGITS, light_coef=0.0, weak_coef=0.0)
    firm = only.terms["teacher_firm"]
    means = [(firm.value * firm.weight)[rollout == ROLLOUTS].mean() for rollout in range(3)]
    assert only.loss.item() == pytest.approx(float(sum(means)) / 3)


def test_trimmed_mean() -> None:
    values = torch.arange(1.0, 42.0)
    assert trimmed_mean(values, 0.05).item() == pytest.approx(sum(range(1, 39)) / 38)  # three of 41 go
    assert trimmed_mean(values[:1], 0.05).item() == 1.0
    assert trimmed_mean(values, 0.0).item() == 21.0
    banned = torch.tensor([-math.inf, -1.0])
    assert regimes(banned, banned, 0.05).tolist() == [TEACHER, TEACHER]
    with pytest.raises(UserError, match=r"\[0, 1\)"):
        load("dopd", trim=1.0)
    with pytest.raises(UserError, match="negative"):
        load("dopd", light_coef=-0.1)


def test_a_rollout_without_a_hint_enters_no_mean() -> None:
    from retort.core.signals import Dense

    toy, method = Toy(), load("dopd")
    valid = toy.rollouts != 1
    hidden, head = toy.view("privileged_student")
    itself = Dense.of(hidden @ head.T, toy.tokens)
    object.__setattr__(itself, "valid_N", valid)
    found = toy.losses(method, extra_views={"privileged_student": itself})
    kept = toy.losses(method, valid.nonzero().squeeze(-1))
    torch.testing.assert_close(found.loss, kept.loss, rtol=1e-12, atol=0)
    assert torch.equal(found.terms["student_weak"].weight[valid], kept.terms["student_weak"].weight)
