"""OPCT: the return-to-go, whose prompt is whose, and what it is when both prompts are one."""

from typing import Any

import pipeline
import pytest
import torch
from toy import Toy

from retort import registry
from retort.core.rollouts import Message, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.divergences import kl_values
from retort.errors import UserError
from retort.teachers.itself import SelfTeacher
from retort.teachers.moving import frozen
from retort.teachers.view_input import ViewInput


def advantages(toy: Toy, discount: float, coef: float) -> torch.Tensor:
    logp = [
        logits.detach().log_softmax(-1).gather(-1, toy.tokens[:, None])[:, 0]
        for logits in (toy.logits, toy.teacher_logits)
    ]
    gap = logp[1] - logp[0]
    found = torch.zeros_like(gap)
    for step in range(len(gap)):
        for later in range(step, len(gap)):
            if toy.rollouts[later] == toy.rollouts[step]:
                found[step] += discount ** (later - step) * gap[later]
    return coef * found


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("coef", [1.0, 2.0])
def test_returns_and_gradient_by_hand(discount: float, coef: float) -> None:
    toy = Toy()
    losses = toy.losses(registry.load("opct", discount=discount, kl_coef=coef))
    expected = advantages(toy, discount, coef)
    torch.testing.assert_close(losses.terms["consistency"].value, -expected)
    written = toy.logits.log_softmax(-1).gather(-1, toy.tokens[:, None])[:, 0]
    for ours, theirs in zip(toy.gradients(losses.loss), toy.gradients(-(expected * written).mean()), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_comes_later_in_another_rollout_or_is_masked_does_not_count() -> None:
    toy, method = Toy(), registry.load("opct", discount=1.0)
    mask = torch.arange(len(toy.tokens)) % 4 != 3
    kept = mask.nonzero().squeeze(-1)
    values = toy.losses(method, mask=mask).terms["consistency"].value
    plain = toy.losses(registry.load("opct")).terms["consistency"].value
    for step in kept.tolist():
        later = [u for u in kept.tolist() if u >= step and toy.rollouts[u] == toy.rollouts[step]]
        torch.testing.assert_close(values[step], plain[later].sum())


def test_the_order_of_rollouts_is_nothing_to_returns() -> None:
    toy, method = Toy(), registry.load("opct", discount=0.9)
    order = torch.cat([(toy.rollouts == rollout).nonzero().squeeze(-1) for rollout in (3, 0, 4, 2, 1)])
    torch.testing.assert_close(toy.losses(method, order).loss, toy.losses(method).loss)


@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_one_prompt_and_no_training_yet_means_nothing_to_learn(discount: float) -> None:
    toy = Toy()
    losses = toy.losses(registry.load("opct", discount=discount), same=True)
    assert losses.terms["consistency"].value.abs().max() < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in toy.gradients(losses.loss))


def test_the_expected_gap_is_the_reverse_kl() -> None:
    toy = Toy(steps=1)
    probabilities = toy.logits.detach().softmax(-1)[0]
    method = registry.load("opct")
    values = [toy.losses(method, tokens=torch.tensor([token])).loss.detach() for token in range(toy.vocab)]
    kl = kl_values(toy.logits.detach().log_softmax(-1), toy.teacher_logits.detach().log_softmax(-1))
    torch.testing.assert_close((probabilities * torch.stack(values)).sum(), kl[0])
    assert kl[0] > 0


def test_the_student_answers_the_prompt_and_the_teacher_sees_the_clean_one_never_the_other_way() -> None:
    asked, cleaned = (Message("user", "I think it is B. Which is it?"),), (Message("user", "Which is it?"),)
    view = registry.load("opct").views["teacher"]
    assert (view.model, view.weights) == ("student", frozen())
    for before, after in ((asked, cleaned), (cleaned, asked)):
        prompt = Prompt("a", before, clean=after)
        rollout = Rollout(prompt, TokenSequence.of([1]).then([2], decided=True))
        seen = view.prompt(ViewInput(rollout, (rollout,)))
        assert seen is not None
        assert seen.messages == after
        assert rollout.prompt.messages == before
    alone = Prompt("b", asked)
    rollout = Rollout(alone, TokenSequence.of([1]).then([2], decided=True))
    assert view.prompt(ViewInput(rollout, (rollout,))) is None


def test_swapping_the_pair_swaps_what_is_learnt() -> None:
    """The same two distributions with their roles exchanged: at the same token the first step goes the other way."""
    toy = Toy(steps=1)
    there = toy.losses(registry.load("opct")).terms["consistency"].value
    back = (
        toy.losses(
            registry.load("opct"),
            student_logits=toy.teacher_logits.detach().requires_grad_(),
            teacher_logits=toy.logits,
        )
        .terms["consistency"]
        .value
    )
    torch.testing.assert_close(there.detach(), -back.detach())


def test_an_outside_teacher_and_bad_settings() -> None:
    assert registry.load("opct", teacher="outside").views["teacher"].model == "teacher"
    with pytest.raises(UserError, match="discount"):
        registry.load("opct", discount=1.5)


def test_in_a_run_the_student_answers_the_prompt_of_the_data_and_the_teacher_reads_its_clean_column(
    tiny_run: dict[str, Any],
) -> None:
    setup = pipeline.prepared(tiny_run, "opct")
    pack = pipeline.ragged(setup)
    teacher = setup.teachers.behind(setup.method)["teacher"]
    assert isinstance(teacher, SelfTeacher)
    read = teacher.local.prompts(pack, setup.method.views["teacher"]).contexts
    assert any(rollout.prompt.clean != rollout.prompt.messages for rollout in pack.rollouts)
    for rollout, context in zip(pack.rollouts, read, strict=True):
        assert rollout.prompt.clean is not None
        assert rollout.sequence.prefix.tokens_L.tolist() == setup.source.render(rollout.prompt).ids
        assert context.ids == setup.source.render(Prompt("x", rollout.prompt.clean)).ids
