"""TrOPD: the draw, what it estimates, and the two terms on either side of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy import Toy

import retort
from retort.core.context import Context
from retort.core.signals import Dense
from retort.core.steps import Clock, Steps
from retort.divergences import total_variation
from retort.errors import UserError
from retort.functional import token_losses
from retort.weights.acceptance import acceptance_probability, accepted, drawn

F64 = torch.float64


def pair(vocab: int = 8) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(vocab, generator=draw, dtype=F64), torch.randn(vocab, generator=draw, dtype=F64)


def context(student: Tensor, teacher: Tensor) -> Context:
    """Of every token once."""
    tokens = torch.arange(len(student))
    rows = Dense.of(teacher.expand(len(tokens), -1), tokens).rows(tokens)
    return Context.from_logits(student.expand(len(tokens), -1), tokens, {"teacher": rows})


def test_the_mean_acceptance_is_one_minus_the_total_variation() -> None:
    student, teacher = pair()
    here = context(student, teacher)
    mean = (student.softmax(-1) * acceptance_probability().value(here, "teacher")).sum()
    torch.testing.assert_close(mean, 1.0 - total_variation().value(here, "teacher")[0], rtol=1e-13, atol=0.0)


def test_draws_accept_with_their_probability() -> None:
    student, teacher = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.8, 0.2]).double().log()
    count = 20_000
    losses = token_losses(
        "tropd",
        student_logits=student.expand(count, 2),
        teacher_logits=teacher.expand(count, 2),
        tokens=torch.ones(count, dtype=torch.long),
        rollouts=torch.arange(count) // 10,
    )
    share = losses.terms["reverse"].weight.mean().item()
    assert abs(share - 0.4) < 3.3 * math.sqrt(0.4 * 0.6 / count)
    assert torch.equal(losses.terms["forward"].weight, 1.0 - losses.terms["reverse"].weight)


def test_a_token_that_the_teacher_prefers_is_always_accepted_and_one_that_it_rules_out_never() -> None:
    student, teacher = pair()
    teacher[int(student.argmax())] = -math.inf
    tokens = torch.arange(8).repeat(50)
    losses = token_losses(
        "tropd",
        student_logits=student.expand(400, 8),
        teacher_logits=teacher.expand(400, 8),
        tokens=tokens,
    )
    weight, gap = losses.terms["reverse"].weight, (teacher.log_softmax(-1) - student.log_softmax(-1))[tokens]
    assert (weight[gap >= 0] == 1.0).all()
    assert (weight[gap == -math.inf] == 0.0).all()
    assert losses.loss.isfinite(), "what is refused is not in the policy gradient"
    assert 0 < weight[(gap < 0) & gap.isfinite()].mean() < 1


def test_golden_numbers() -> None:
    """p = (.5, .5), q = (.8, .2): accepted tokens have -ln(q / p), refused ones the forward KL of .1927 nats."""
    student, teacher = torch.tensor([0.5, 0.5], dtype=F64).log(), torch.tensor([0.8, 0.2], dtype=F64).log()
    given = {
        "student_logits": student.expand(4, 2),
        "teacher_logits": teacher.expand(4, 2),
        "tokens": torch.tensor([0, 1] * 2),
    }
    losses = token_losses("tropd", **given)  # type: ignore[arg-type]
    kl = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    taken, refused = losses.terms["reverse"], losses.terms["forward"]
    assert kl == pytest.approx(0.1927, abs=1e-4)
    gap = [-math.log(1.6), -math.log(0.4)] * 2
    expected = [g if w else kl for g, w in zip(gap, taken.weight.tolist(), strict=True)]
    assert (taken.value * taken.weight + refused.value * refused.weight).tolist() == pytest.approx(expected, abs=1e-14)
    cut = token_losses(retort.load("tropd", top_k=1, leniency=0.0), **given)  # type: ignore[arg-type]
    assert cut.terms["forward"].value.tolist() == pytest.approx([0.8 * math.log(1.6)] * 4, abs=1e-14)
    renormalised = retort.load("tropd", top_k=1, leniency=0.0, renormalise=True)
    found = token_losses(renormalised, **given)  # type: ignore[arg-type]
    assert found.terms["forward"].value.tolist() == pytest.approx([math.log(2.0)] * 4, abs=1e-14)


def test_draws_are_of_seed_step_rollout_and_place() -> None:
    rollouts = torch.tensor([0, 0, 0, 1, 1, 2])
    steps = Steps.of(torch.zeros(6, dtype=torch.long), rollouts)
    none = torch.zeros(6)
    first = drawn(none, steps, Clock(3, seed=1))
    assert torch.equal(first, drawn(none, steps, Clock(3, seed=1)))
    assert not torch.equal(first, drawn(none, steps, Clock(4, seed=1)))
    assert not torch.equal(first, drawn(none, steps, Clock(3, seed=2)))
    assert len(first.unique()) == 6
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    assert torch.equal(drawn(none, steps.select(order), Clock(3, seed=1)), first[order])
    assert torch.equal(drawn(none[:3], steps.select(order[:3]), Clock(3, seed=1)), first[order[:3]])


def test_several_updates_keep_what_was_accepted() -> None:
    """The student has moved, and the weights are still against what it was."""
    toy = Toy()
    before = toy.losses(retort.load("tropd"))
    old = toy.logits.detach().log_softmax(-1).gather(-1, toy.tokens[:, None]).squeeze(-1)
    moved = toy.logits.detach() + torch.randn(toy.logits.shape, generator=torch.Generator().manual_seed(5))
    after = toy.losses(retort.load("tropd"), student_logits=moved, old_logp=old)
    assert torch.equal(before.terms["reverse"].weight, after.terms["reverse"].weight)


def test_a_negative_leniency_is_refused() -> None:
    with pytest.raises(UserError, match="leniency must not be negative"):
        retort.load("tropd", leniency=-1.0)
    with pytest.raises(UserError, match="leniency must not be negative"):
        accepted(-0.5)
