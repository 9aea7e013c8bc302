"""UniSD: every component against plain Python, its presets, and the published denominator that cancels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toy import Toy

from retort.core.signals import Dense, Sampled
from retort.divergences import forward_kl, kl_values
from retort.divergences.guarded import capped, contrastive_hinge
from retort.errors import SignalError, UserError
from retort.estimators import match_hidden, pathwise
from retort.functional import linear_token_losses, token_losses
from retort.method import Method, Term
from retort.methods._unisd import PRESETS
from retort.quantities import student_entropy
from retort.registry import load
from retort.rollout.plan import RolloutPlan
from retort.teachers.moving import ema, frozen
from retort.weights import above
from retort.weights.agreement import disagreement, sequence_weights, token_weights

F64 = torch.float64


def alone(term: Term, **views: Any) -> Method:
    method = load("unisd")
    return Method(RolloutPlan(), (term,), views=dict.fromkeys(("teacher", *views), method.views["teacher"]))


def by_rollout(toy: Toy, values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values[toy.rollouts == rollout].mean() for rollout in range(5)])


# --- agreement ---


def test_weights_by_hand() -> None:
    logp_KN = torch.tensor([[-1.0, -2.0], [-2.0, -2.0], [-6.0, -2.0]], dtype=F64)
    assert disagreement(logp_KN, "variance", "token").tolist() == pytest.approx([7.0, 0.0])  # (4 + 1 + 9) / 2
    assert disagreement(logp_KN, "variance", "sequence").tolist() == pytest.approx([14 / 3, 0.0])
    assert disagreement(logp_KN, "range", "token").tolist() == [5.0, 0.0]
    apart = torch.arange(0.0, 21.0, dtype=F64)  # its 95th percentile is 19
    assert token_weights(apart, 0.5)[[0, 19]].tolist() == pytest.approx([1.0, 1 / 1.5])
    assert token_weights(torch.tensor([0.0] * 99 + [1.0], dtype=F64), 1.0)[-1].item() == pytest.approx(1 / 11)
    assert token_weights(apart, 1e9)[1:].tolist() == [0.01] * 20
    assert sequence_weights(torch.tensor([0.0, 2.0, 99.0], dtype=F64), 1.0).tolist() == pytest.approx(
        [1.0, math.exp(-2), 1e-6]
    )
    assert (token_weights(apart, 0.3).diff() < 0).all()


def agreed(toy: Toy, **settings: Any) -> Any:
    return toy.losses(load("unisd", temperature=1.0, gamma=0.5, **settings))


def contexts(toy: Toy) -> torch.Tensor:
    found = []
    for name in ("context_0", "context_1", "context_2"):
        hidden, head = toy.view(name)
        found.append((hidden @ head.T).log_softmax(-1).gather(-1, toy.tokens[:, None]).squeeze(-1).detach())
    return torch.stack(found)


def test_token_agreement_and_its_denominator() -> None:
    toy = Toy()
    kl = kl_values(toy.teacher_logits.log_softmax(-1), toy.logits.log_softmax(-1))
    apart = contexts(toy).var(0)
    usual = torch.quantile(apart, 0.95)
    weight = 1 / (1 + 0.5 * (apart / usual).clamp_max(10))
    found = agreed(toy, preset="token_agreement")
    torch.testing.assert_close(found.terms["divergence"].weight, weight.clamp_min(0.01), rtol=1e-12, atol=0)
    wanted = (by_rollout(toy, weight * kl) / by_rollout(toy, weight)).mean()
    torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=0)
    steps = agreed(toy, preset="token_agreement", divided_by="steps").loss
    torch.testing.assert_close(steps, by_rollout(toy, weight * kl).mean(), rtol=1e-12, atol=0)


def test_sequence_agreement_counts_here_and_cancels_as_published() -> None:
    toy = Toy()
    kl = by_rollout(toy, kl_values(toy.teacher_logits.log_softmax(-1), toy.logits.log_softmax(-1)))
    scores = torch.stack([by_rollout(toy, logp) for logp in contexts(toy)])
    weight = torch.exp(-0.5 * scores.var(0, correction=0))
    assert weight.std() > 0.01
    found = agreed(toy, preset="sequence_agreement").loss
    torch.testing.assert_close(found, (weight * kl).mean(), rtol=1e-12, atol=0)
    published = agreed(toy, preset="sequence_agreement", divided_by="weights").loss
    torch.testing.assert_close(published, kl.mean(), rtol=1e-12, atol=0)


def test_contexts_that_agree_weigh_nothing() -> None:
    toy, method = Toy(), load("unisd", preset="token_agreement", gamma=5.0, temperature=1.0)
    same = {f"context_{place}": toy.teacher_logits for place in range(3)}
    found = toy.losses(method, extra_views=same)
    assert torch.equal(found.terms["divergence"].weight, torch.ones(37, dtype=F64))
    with pytest.raises(UserError, match="at least 2 contexts"):
        load("unisd", contexts=1)


# --- hinge and cap ---


def test_the_hinge_by_hand() -> None:
    student = torch.tensor([[0.5, 0.5]] * 3, dtype=F64).log().requires_grad_()
    good = Sampled(torch.zeros(3, dtype=torch.long), logp_N=torch.tensor([0.5, 0.4, 0.25], dtype=F64).log())
    bad = Sampled(torch.zeros(3, dtype=torch.long), logp_N=torch.tensor([0.1, 0.4, 0.5], dtype=F64).log())
    found = token_losses(
        alone(Term("hinge", pathwise(contrastive_hinge(0.5))), wrong=bad),
        student_logits=student,
        teacher_logits=good,
        extra_views={"wrong": bad},
        tokens=torch.zeros(3, dtype=torch.long),
    )
    # At the teacher and 1.6 nats from the wrong one: 0. Both the same: the margin. The wrong way round: more.
    assert found.terms["hinge"].value.tolist() == pytest.approx([0.0, 0.5, 0.5 + math.log(2)])
    (gradient,) = torch.autograd.grad(found.loss, student)
    assert gradient[:2].abs().max() == 0.0
    assert gradient[2, 0] > 0, "descent makes the token less likely, as the right one has it"


def test_a_cap() -> None:
    toy = Toy()
    kl = kl_values(toy.teacher_logits.log_softmax(-1), toy.logits.log_softmax(-1)).detach()
    middle = kl.sort().values[17:19].mean().item()  # between two
    found = toy.losses(alone(Term("kl", pathwise(capped(forward_kl(), middle)))))
    torch.testing.assert_close(found.terms["kl"].value, kl.clamp_max(middle))
    (gradient,) = torch.autograd.grad(found.loss, toy.hidden)
    assert torch.equal(gradient.abs().sum(-1) > 0, kl < middle)
    lowest = toy.losses(alone(Term("kl", pathwise(capped(forward_kl(), kl.min().item() - 1e-9)))))
    assert all(gradient.abs().max() == 0 for gradient in toy.gradients(lowest.loss))
    quantile = toy.losses(alone(Term("kl", pathwise(capped(forward_kl(), 0.6, quantile=True)))))
    torch.testing.assert_close(quantile.terms["kl"].value, kl.clamp_max(torch.quantile(kl, 0.6).item()))
    for wrong in ({"cap": 0.0}, {"cap": 1.5, "quantile": True}):
        with pytest.raises(UserError, match="cap must be positive"):
            capped(forward_kl(), **wrong)  # type: ignore[arg-type]


# --- hidden states ---


def test_hidden_states_are_compared_step_by_step() -> None:
    toy, method = Toy(), load("unisd", preset="matching_only")
    apart = (toy.hidden - toy.teacher_hidden.detach()).square().mean(-1)
    for found in (toy.losses(method), toy.linear(method, chunk=5)):
        torch.testing.assert_close(found.terms["matching"].value, apart, rtol=1e-13, atol=0)
        torch.testing.assert_close(found.loss, apart.mean(), rtol=1e-13, atol=0)
        (gradient,) = torch.autograd.grad(found.loss, toy.hidden)
        torch.testing.assert_close(gradient, 2 * (toy.hidden - toy.teacher_hidden).detach() / 6 / 37)
    assert toy.losses(method, same=True).loss.item() == 0.0


def test_both_kinds_of_terms_add_up() -> None:
    toy = Toy()
    parts = [toy.linear(load("unisd", preset=preset), chunk=7).loss for preset in ("base", "matching_only")]
    both = toy.linear(load("unisd", preset="joint_matching"), chunk=7).loss
    torch.testing.assert_close(both, parts[0] + 0.1 * parts[1], rtol=1e-12, atol=0)
    wanted = [a + 0.1 * b for a, b in zip(*(toy_gradients(toy, part) for part in parts), strict=True)]
    for ours, theirs in zip(toy_gradients(toy, both), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def toy_gradients(toy: Toy, loss: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, (toy.hidden, toy.head), allow_unused=True, retain_graph=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


def test_what_hidden_states_need() -> None:
    toy, method = Toy(), load("unisd", preset="matching_only")
    given = {"student_logits": toy.logits, "tokens": toy.tokens}
    with pytest.raises(UserError, match="needs its last hidden states from 'teacher'"):
        token_losses(method, teacher_logits=toy.teacher_logits, student_hidden=toy.hidden, **given)
    signal = Dense.of(toy.teacher_logits, toy.tokens, hidden_ND=toy.teacher_hidden)
    with pytest.raises(UserError, match="needs student_hidden"):
        token_losses(method, teacher_logits=signal, **given)
    with pytest.raises(SignalError, match="width 6 .* and 4"):
        wide = Dense.of(toy.teacher_logits, toy.tokens, hidden_ND=toy.teacher_hidden[:, :4])
        token_losses(method, teacher_logits=wide, student_hidden=toy.hidden, **given)
    with pytest.raises(UserError, match="has no weight"):
        Method(RolloutPlan(), (Term("m", match_hidden(), weight=above(student_entropy(), 1.0)),))
    chosen = torch.tensor([5, 2])
    assert torch.equal(signal.select(chosen).hidden_states(), toy.teacher_hidden[chosen])


def test_masked_steps_and_steps_without_context_are_not_compared() -> None:
    toy, method = Toy(), load("unisd", preset="matching_only")
    apart = (toy.hidden - toy.teacher_hidden).square().mean(-1).detach()
    mask = torch.arange(37) % 3 > 0
    torch.testing.assert_close(toy.linear(method, mask=mask).loss.detach(), apart[mask].mean())
    signal = Dense.of(toy.teacher_logits, toy.tokens, hidden_ND=toy.teacher_hidden)
    object.__setattr__(signal, "valid_N", mask)
    found = linear_token_losses(
        method,
        student_hidden=toy.hidden,
        student_head=toy.head,
        extra_views={"teacher": signal},
        tokens=toy.tokens,
    )
    torch.testing.assert_close(found.loss.detach(), apart[mask].mean())
    (gradient,) = torch.autograd.grad(found.loss, toy.hidden)
    assert gradient[~mask].abs().max() == 0.0


# --- presets ---


def test_presets_are_the_papers_settings() -> None:
    star = PRESETS["star"]
    assert (star.agreement, star.contexts, star.gamma, star.contrastive_coef, star.contrastive_margin) == (
        "token",
        3,
        0.001,
        0.01,
        0.1,
    )
    assert (star.update_rate, star.update_every, star.matching_coef, star.cap) == (0.02, 10, 0.01, math.inf)
    assert PRESETS["star_clip"].cap == PRESETS["clip"].cap == 10.0
    assert (PRESETS["contrastive"].contrastive_coef, PRESETS["contrastive"].contrastive_margin) == (0.1, 0.5)
    assert (PRESETS["token_agreement"].gamma, PRESETS["token_agreement"].contexts) == (0.01, 3)


def test_what_a_preset_switches_on() -> None:
    method = load("unisd")
    assert [term.name for term in method.terms] == ["divergence", "contrastive", "matching"]
    assert [term.coef for term in method.terms] == [1.0, 0.01, 0.01]
    assert list(method.views) == ["teacher", "wrong", "context_0", "context_1", "context_2"]
    assert {view.weights for view in method.views.values()} == {ema(0.02, every=10)}
    base = load("unisd", preset="base")
    assert (list(base.views), base.views["teacher"].weights) == (["teacher"], frozen())
    changed = load("unisd", preset="star", contrastive_coef=0.0, update_rate=0.5, contexts=2)
    assert list(changed.views) == ["teacher", "context_0", "context_1"]
    assert changed.views["teacher"].weights == ema(0.5, every=10)
    with pytest.raises(UserError, match="nothing would be learnt"):
        load("unisd", preset="base", divergence_coef=0.0)
    with pytest.raises(UserError, match="exclude each other"):
        load("unisd", preset="clip", cap_quantile=0.99)
    with pytest.raises(UserError, match="must not be negative"):
        load("unisd", matching_coef=-1.0)


@pytest.mark.parametrize(("weight", "name"), [(0.0, "forward_kl"), (1.0, "reverse_kl"), (0.3, "jsd")])
def test_the_ends_of_the_divergence_are_other_ones(weight: float, name: str) -> None:
    toy = Toy()
    ours = toy.losses(load("unisd", preset="base", teacher_weight=weight, temperature=1.0))
    theirs = toy.losses(load("gkd", divergence=name, teacher_weight=0.3, temperature=1.0))
    one, two = (next(iter(found.terms.values())).value for found in (ours, theirs))
    torch.testing.assert_close(one, two)
