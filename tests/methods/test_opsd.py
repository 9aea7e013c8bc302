"""OPSD: its objective by hand, its variants, what its teacher sees."""

import pytest
import torch
from toy import Toy

from retort import registry
from retort.core.rollouts import Message, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.divergences import kl_values
from retort.errors import UserError
from retort.teachers.moving import ema, frozen, live
from retort.teachers.view_input import ViewInput


def test_the_loss_by_hand() -> None:
    toy = Toy()
    losses = toy.losses(registry.load("opsd"))
    p_t, logp_s = (toy.teacher_logits / 1.1).softmax(-1), (toy.logits / 1.1).log_softmax(-1)
    by_hand = (p_t * (p_t.log() - logp_s)).clamp(max=0.05).sum(-1).mean()
    torch.testing.assert_close(losses.loss, by_hand)
    for ours, theirs in zip(toy.gradients(losses.loss), toy.gradients(by_hand), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_jensen_shannon_divergence_is_clipped_by_entry_too() -> None:
    toy = Toy()
    losses = toy.losses(registry.load("opsd", teacher_weight=0.5, kl_clip=0.02))
    p_t, p_s = ((logits / 1.1).softmax(-1) for logits in (toy.teacher_logits, toy.logits))
    m = (p_t + p_s) / 2
    entries = p_t * (p_t / m).log() / 2 + p_s * (p_s / m).log() / 2
    torch.testing.assert_close(losses.loss, entries.clamp(max=0.02).sum(-1).mean())


def test_without_a_clip_the_gradient_is_the_difference_of_probabilities() -> None:
    toy = Toy()
    logits = toy.logits.detach().requires_grad_()
    losses = toy.losses(registry.load("opsd", kl_clip=None, temperature=1.0), student_logits=logits)
    (gradient,) = torch.autograd.grad(losses.loss * len(logits), logits)
    torch.testing.assert_close(gradient, logits.detach().softmax(-1) - toy.teacher_logits.softmax(-1))


def test_the_sampled_variant_descends_the_reverse_kl() -> None:
    """Over all tokens that one state may write, weighed by the student's probabilities."""
    toy = Toy(steps=1)
    logits = toy.logits.detach().requires_grad_()
    method = registry.load("opsd", estimator="sampled", temperature=1.0)
    probabilities = logits.detach().softmax(-1)[0]
    gradient, value = torch.zeros_like(logits), 0.0
    for token, p in enumerate(probabilities):
        losses = toy.losses(method, student_logits=logits, tokens=torch.tensor([token]))
        gradient += p * torch.autograd.grad(losses.loss, logits)[0]
        value += float(p * losses.terms["divergence"].value[0].detach())
    kl = kl_values(logits.log_softmax(-1), toy.teacher_logits.detach().log_softmax(-1)).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(kl, logits)[0])
    # Written with a ratio (of 1) the surrogate's value is the KL, too; that of A log p_S, which is printed, is not.
    assert value == pytest.approx(kl.item())


def test_whose_weights_and_what_the_teacher_sees() -> None:
    made = {kind: registry.load("opsd", weights=kind).views["teacher"] for kind in ("frozen", "ema", "live")}
    assert {kind: view.weights for kind, view in made.items()} == {
        "frozen": frozen(),
        "ema": ema(0.001),
        "live": live(),
    }
    assert all(view.model == "student" for view in made.values())
    prompt = Prompt("a", (Message("user", "What is 1 + 1?"),), answer="2", privileged={"solution": "Count: one, two."})
    scene = _scene(prompt)
    seen = made["frozen"].prompt(scene)
    assert seen is not None
    assert "Count: one, two." in seen.messages[-1].content
    assert "What is 1 + 1?" in seen.messages[-1].content
    assert made["frozen"].prompt(_scene(Prompt("b", prompt.messages))) is None
    both = registry.load("opsd", shows=("solution", "hint")).views["teacher"]
    assert both.prompt(scene) is None, "no hint in this row"


@pytest.mark.parametrize("name", ["opsd", "sdft", "pw_opsd"])
def test_an_outside_teacher_is_shown_the_same_and_never_moves(name: str) -> None:
    own = registry.load(name).views["teacher"]
    outside = registry.load(name, teacher="outside", weights="ema").views["teacher"]
    assert (own.model, outside.model) == ("student", "teacher")
    assert outside.weights == frozen()
    assert outside.columns == own.columns


def _scene(prompt: Prompt) -> ViewInput:
    rollout = Rollout(prompt, TokenSequence.of([1]).then([2], decided=True))
    return ViewInput(rollout, (rollout,))


def test_the_clipped_mass_is_watched() -> None:
    names = [watch.name for watch in registry.load("opsd").watch]
    assert "clipped_mass" in names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 1}, "nothing would be learnt"),
        ({"kl_clip": 0.0}, "must be positive"),
        ({"weights": "moving"}, "weights"),
        ({"shows": []}, "nothing to teach"),
        ({"shows": ["clean"]}, "method.shows"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.load("opsd", **settings)
