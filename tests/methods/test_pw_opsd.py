"""PW-OPSD: the golden numbers of its weights, its reduction, and that they are of the answer and not of the batch."""

import math

import pytest
import torch
from toy import Toy

from retort import registry
from retort.errors import UserError
from retort.weights import position_weights

MODERATE = {"min_weight": 0.25, "midpoint": 0.3, "width": 0.1}


def weights(steps: int, **settings: float) -> torch.Tensor:
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return position_weights(u, **{**MODERATE, **settings})


@pytest.mark.parametrize(("steps", "mean"), [(1, 0.91060), (8, 0.77163), (1024, 0.77142)])
def test_golden_means(steps: int, mean: float) -> None:
    assert weights(steps).mean().item() == pytest.approx(mean, abs=5e-6)


def test_golden_ends_and_the_closed_form_of_the_mean() -> None:
    found = weights(1024)
    assert found[0].item() == pytest.approx(0.28574, abs=5e-6)
    assert found[-1].item() == pytest.approx(0.99931, abs=5e-6)
    assert (found.diff() > 0).all()
    assert ((found > 0.25) & (found < 1)).all()
    a, tau, s = MODERATE.values()
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    mean = a + (1 - a) * s * (softplus((1 - tau) / s) - softplus(-tau / s))
    assert mean == pytest.approx(0.77142, abs=5e-6)
    assert weights(100_000).mean().item() == pytest.approx(mean, abs=1e-8)


def test_a_narrow_sigmoid_is_a_step() -> None:
    found = weights(10, width=1e-9)
    assert found.tolist() == pytest.approx([0.25] * 3 + [1.0] * 7)


@pytest.mark.parametrize("reduction", ["rollouts", "tokens"])
def test_the_loss_by_hand(reduction: str) -> None:
    toy = Toy()
    losses = toy.losses(registry.load("pw_opsd", reduction=reduction))
    p_t, logp_s = (toy.teacher_logits / 1.1).softmax(-1), (toy.logits / 1.1).log_softmax(-1)
    token = (p_t * (p_t.log() - logp_s)).clamp(max=0.05).sum(-1)
    lengths = torch.bincount(toy.rollouts).tolist()
    assert len(set(lengths)) > 1
    weighed = [part * weights(len(part)) for part in token.split(lengths)]
    means = torch.stack([part.mean() for part in weighed])
    by_hand = means.mean() if reduction == "rollouts" else torch.cat(weighed).mean()
    torch.testing.assert_close(losses.loss, by_hand)
    for ours, theirs in zip(toy.gradients(losses.loss), toy.gradients(by_hand), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_at_a_least_weight_of_one_it_is_opsd_by_answers() -> None:
    toy = Toy()
    token = toy.losses(registry.load("opsd")).terms["divergence"].value
    means = torch.stack([part.mean() for part in token.split(torch.bincount(toy.rollouts).tolist())])
    torch.testing.assert_close(toy.losses(registry.load("pw_opsd", min_weight=1.0)).loss, means.mean())


def test_equal_lengths_need_no_other_reduction() -> None:
    toy = Toy(steps=35)
    assert torch.bincount(toy.rollouts).tolist() == [7] * 5
    ours, theirs = toy.losses(registry.load("pw_opsd", min_weight=1.0)), toy.losses(registry.load("opsd"))
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_weights_are_those_of_the_answer_whatever_is_beside_it() -> None:
    toy, method = Toy(), registry.load("pw_opsd")
    whole = toy.losses(method).terms["divergence"].weight
    for rollout in range(5):
        rows = (toy.rollouts == rollout).nonzero().squeeze(-1)
        alone = toy.losses(method, rows, rollouts=None, groups=None, rewards=None)
        torch.testing.assert_close(alone.terms["divergence"].weight, whole[rows])
        torch.testing.assert_close(whole[rows], weights(len(rows)))


def test_padding_and_empty_answers_count_for_nothing() -> None:
    toy, method = Toy(), registry.load("pw_opsd")
    rows = torch.cat([(toy.rollouts == r).nonzero().squeeze(-1) for r in (0, 1, 3, 4)])
    without = toy.losses(method, rows)
    masked = toy.losses(method, mask=toy.rollouts != 2)
    torch.testing.assert_close(masked.loss, without.loss)
    padded = torch.cat([rows, torch.full((9,), 4)])
    mask = torch.arange(len(padded)) < len(rows)
    torch.testing.assert_close(toy.losses(method, padded, mask=mask).loss, without.loss)


def test_settings_that_cannot_be() -> None:
    for settings in ({"width": 0.0}, {"min_weight": 1.5}, {"top_k": 1}):
        with pytest.raises(UserError):
            registry.load("pw_opsd", **settings)
