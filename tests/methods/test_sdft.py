"""SDFT: the divergence, the tokens that are skipped, and a rollout that knows nothing of the demonstration."""

import pytest
import torch
from toy import Toy

from retort import registry
from retort.core.rollouts import Message, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.divergences import kl_values
from retort.errors import UserError
from retort.teachers.moving import ema
from retort.teachers.view_input import ViewInput


@pytest.mark.parametrize("skip", [0, 1, 3, 7])
def test_skipping_is_a_mask(skip: int) -> None:
    toy = Toy()
    losses = toy.losses(registry.load("sdft", skip=skip))
    place = torch.cat([torch.arange(n) for n in torch.bincount(toy.rollouts).tolist()])
    kl = kl_values(toy.teacher_logits.log_softmax(-1), toy.logits.log_softmax(-1))
    by_hand = kl[place >= skip].mean()
    torch.testing.assert_close(losses.loss, by_hand)
    for ours, theirs in zip(toy.gradients(losses.loss), toy.gradients(by_hand), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(losses.terms["divergence"].weight, (place >= skip).double())


def test_answers_too_short_to_teach_anything() -> None:
    toy = Toy(steps=5)
    losses = toy.losses(registry.load("sdft"))
    assert losses.loss.item() == 0


def test_the_top_k_cross_entropy_has_the_gradient_of_the_forward_kl_on_the_whole_vocabulary() -> None:
    toy = Toy()
    logits = toy.logits.detach().requires_grad_()
    losses = toy.losses(registry.load("sdft", top_k=toy.vocab, skip=0), student_logits=logits)
    entropy = -(toy.teacher_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(torch.autograd.grad(losses.loss, logits), torch.autograd.grad(entropy, logits))


def test_only_the_teacher_sees_the_demonstration() -> None:
    method = registry.load("sdft")
    view = method.views["teacher"]
    assert view.model == "student"
    assert view.weights == ema(0.01)
    assert method.rollout.sources == {"student"}
    prompt = Prompt("a", (Message("user", "Greet me."),), response="Good morning to you.")
    rollout = Rollout(prompt, TokenSequence.of([1]).then([2], decided=True))
    seen = view.prompt(ViewInput(rollout, (rollout,)))
    assert seen is not None
    assert "Good morning to you." in seen.messages[-1].content
    assert "Good morning" not in prompt.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip": -1}, "at least 0"),
        ({"top_k": 1}, "nothing would be learnt"),
        ({"divergence": "jsd", "teacher_weight": 1.0}, "strictly between"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.load("sdft", **settings)
