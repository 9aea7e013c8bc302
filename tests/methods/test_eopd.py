"""EOPD against the specification: golden numbers, gate, denominator, gradients, and the toy experiment."""

import math

import pytest
import torch
from torch import Tensor

from retort.core.signals import TopK, entropy, entropy_lower_bound
from retort.divergences import forward_kl, kl_values
from retort.errors import UserError
from retort.estimators import pathwise
from retort.functional import token_losses
from retort.method import Method, Term
from retort.registry import load
from retort.rollout.plan import RolloutPlan

STUDENT = torch.tensor([[0.5, 0.4, 0.1]] * 2, dtype=torch.float64).log()
TEACHER = torch.tensor([0.6, 0.3], dtype=torch.float64).log()


def golden_signal(entropies: tuple[float, float] = (0.2, 1.0), steps: int = 2) -> TopK:
    return TopK(
        torch.zeros(steps, dtype=torch.long),
        ids_NK=torch.tensor([[0, 1]] * steps),
        logp_NK=TEACHER.repeat(steps, 1),
        sampled_logp_N=TEACHER[:1].repeat(steps),
        entropy_N=torch.tensor(entropies, dtype=torch.float64),
    )


def test_golden_numbers() -> None:
    # eopd.md invariant 5
    losses = token_losses(
        load("eopd", top_k=2), student_logits=STUDENT, teacher_logits=golden_signal(), tokens=torch.tensor([0, 0])
    )
    forward = losses.terms["forward"]
    assert (forward.value * forward.weight).tolist() == pytest.approx([0.0, 0.1310142], abs=5e-8)
    reverse = losses.terms["reverse"].value.mean().item()
    assert losses.loss.item() - reverse == pytest.approx(0.0655071, abs=5e-8)
    assert reverse == pytest.approx(math.log(0.5 / 0.6))


def test_the_gate_is_strict() -> None:
    losses = token_losses(
        load("eopd", top_k=2, entropy_threshold=0.8),
        student_logits=STUDENT,
        teacher_logits=golden_signal((0.8, 0.8000001)),
        tokens=torch.tensor([0, 0]),
    )
    assert losses.terms["forward"].weight.tolist() == [0.0, 1.0]


def test_masked_steps_neither_gate_nor_count() -> None:
    # Entropies (1, 1); masking the first must give the whole contribution of the second, divided by one step.
    losses = token_losses(
        load("eopd", top_k=2),
        student_logits=STUDENT,
        teacher_logits=golden_signal((1.0, 1.0)),
        tokens=torch.tensor([0, 0]),
        mask=torch.tensor([False, True]),
    )
    assert losses.loss.item() == pytest.approx(0.1310142 + math.log(0.5 / 0.6), abs=5e-8)
    assert losses.terms["forward"].value[0] == 0


def test_the_forward_term_is_divided_by_all_tokens() -> None:
    def contribution(extra: int) -> float:
        signal = golden_signal((1.0, *([0.2] * (1 + extra))), 2 + extra)  # type: ignore[arg-type]
        losses = token_losses(
            load("eopd", top_k=2),
            student_logits=STUDENT[:1].repeat(2 + extra, 1),
            teacher_logits=signal,
            tokens=torch.zeros(2 + extra, dtype=torch.long),
        )
        return losses.loss.item() - losses.terms["reverse"].value.mean().item()

    assert contribution(2) == pytest.approx(contribution(0) / 2, rel=1e-12)


def _forward_only(k: int) -> Method:
    from retort.divergences import teacher_top

    return Method(rollout=RolloutPlan(), terms=(Term("forward", pathwise(forward_kl(teacher_top(k)))),))


def test_gradient_is_student_minus_truncated_teacher() -> None:
    # invariant 3
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 11, generator=draw, dtype=torch.float64).requires_grad_()
    teacher = 2 * torch.randn(4, 11, generator=draw, dtype=torch.float64)
    losses = token_losses(
        _forward_only(3), student_logits=logits, teacher_logits=teacher, tokens=torch.zeros(4, dtype=torch.long)
    )
    (gradient,) = torch.autograd.grad(losses.loss * 4, logits)
    kept, ids = teacher.softmax(-1).topk(3)
    truncated = torch.zeros_like(teacher).scatter(1, ids, kept / kept.sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, logits.detach().softmax(-1) - truncated, rtol=1e-11, atol=1e-11)


def test_decomposition_and_the_whole_vocabulary() -> None:
    # invariant 4
    draw = torch.Generator().manual_seed(1)
    student = torch.randn(4, 11, generator=draw, dtype=torch.float64)
    teacher = 2 * torch.randn(4, 11, generator=draw, dtype=torch.float64)
    tokens = torch.zeros(4, dtype=torch.long)
    losses = token_losses(_forward_only(3), student_logits=student, teacher_logits=teacher, tokens=tokens)
    logp_t, ids = teacher.log_softmax(-1).topk(3)
    logp_s = student.log_softmax(-1).gather(-1, ids)
    inner = kl_values(logp_t.log_softmax(-1), logp_s.log_softmax(-1))
    torch.testing.assert_close(losses.terms["forward"].value, inner - logp_s.logsumexp(-1))
    whole = token_losses(_forward_only(10**6), student_logits=student, teacher_logits=teacher, tokens=tokens)
    exact = kl_values(teacher.log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(whole.terms["forward"].value, exact)
    same = token_losses(_forward_only(3), student_logits=teacher, teacher_logits=teacher, tokens=tokens)
    torch.testing.assert_close(same.terms["forward"].value, -logp_t.logsumexp(-1))


def test_entropy_of_the_top_k_is_a_lower_bound() -> None:
    # invariant 9
    logp = (2 * torch.randn(64, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).log_softmax(-1)
    exact = entropy(logp)
    for k in (1, 4, 19):
        bound = entropy_lower_bound(logp.topk(k).values)
        assert (bound <= exact + 1e-12).all()
    torch.testing.assert_close(entropy_lower_bound(logp.topk(19).values), exact)


def test_first_update_has_ratio_one() -> None:
    # invariant 8
    watch = next(watch for watch in load("eopd").watch if watch.name == "clip_fraction")
    from retort.core.context import Context

    context = Context.from_logits(
        logits_NV=STUDENT,
        tokens_N=torch.tensor([0, 0]),
        signals={"teacher": golden_signal().rows(slice(None))},
        stored={"old_logp": STUDENT.log_softmax(-1)[:, 0]},
    )
    assert watch.part.value(context, "teacher").tolist() == [0.0, 0.0]


def _flips(teacher: Tensor, method: Method, steps: int = 120, seed: int = 0) -> float:
    """Contexts whose most likely token changes per SGD step (rate 1), mean of the second half: tabular student."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.zeros_like(teacher).requires_grad_()
    contexts = len(teacher)
    flips: list[int] = []
    for _ in range(steps):
        tokens = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw).squeeze(-1)
        losses = token_losses(method, student_logits=logits, teacher_logits=teacher, tokens=tokens)
        (gradient,) = torch.autograd.grad(losses.loss * contexts, logits)
        before = logits.detach().argmax(-1)
        logits = (logits.detach() - gradient).requires_grad_()
        flips.append(int((logits.detach().argmax(-1) != before).sum()))
    return sum(flips[steps // 2 :]) / (steps - steps // 2)


def test_uncertain_teachers_destabilise_the_sampled_term_and_eopd_repairs_it() -> None:
    """The toy experiment of eopd.md (a reconstruction there): only the directions that it calls safe are asserted."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(400, 64, generator=draw)
    certain = base * (8 + 4 * torch.rand(400, 1, generator=draw))
    uncertain = base * (2 + torch.rand(400, 1, generator=draw))
    low = _flips(certain, load("opd"))
    high = _flips(uncertain, load("opd"))
    repaired = _flips(uncertain, load("eopd"))
    assert high > 10 * low
    assert repaired < 0.5 * high


def test_a_bound_opens_the_gate_more_rarely_and_never_wrongly() -> None:
    steps, k, tau = 64, 3, 1.0
    logits = 2 * torch.randn(steps, 12, generator=torch.Generator().manual_seed(3))
    logp, ids = logits.log_softmax(-1).topk(k)
    tokens = ids[:, 0]
    bound = TopK(tokens, "teacher", ids, logp, logp[:, 0], entropy_lower_bound(logp), entropy_exact=False)
    settings = {"entropy_threshold": tau, "top_k": k}
    used = (
        token_losses(
            load("eopd", entropy_bound="use", **settings), student_logits=logits, teacher_logits=bound, tokens=tokens
        )
        .terms["forward"]
        .weight
    )
    exact = token_losses(load("eopd", **settings), student_logits=logits, teacher_logits=logits, tokens=tokens)
    assert torch.equal(used, (entropy_lower_bound(logp) > tau).to(used.dtype))
    assert bool((used <= exact.terms["forward"].weight).all())
    assert 0 < float(used.sum()) < float(exact.terms["forward"].weight.sum())
    with pytest.raises(UserError, match="'eopd' needs entropy from 'teacher'.*entropy_bound"):
        token_losses(load("eopd", **settings), student_logits=logits, teacher_logits=bound, tokens=tokens)
