"""Multi-rollout OPD: which siblings are shown to whom, the two denominators, and SDPO as one of its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import Toy

from retort.core.rollouts import Message, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense
from retort.errors import UserError
from retort.method import Method
from retort.registry import load
from retort.teachers.moving import ema, frozen
from retort.teachers.view_input import Stage, ViewInput

PROMPT = Prompt("p", (Message("system", "Be brief."), Message("user", "What?")))


def group(rewards: list[float], texts: list[str] | None = None, feedback: str = "") -> tuple[Rollout, ...]:
    sequence = TokenSequence.of([1]).then([2], decided=True)
    texts = texts or [f"attempt-{index}-" for index in range(len(rewards))]
    return tuple(
        Rollout(PROMPT, sequence, member=index, text=text, reward=reward, feedback=feedback)
        for index, (reward, text) in enumerate(zip(rewards, texts, strict=True))
    )


def shown(method: Method, rollouts: tuple[Rollout, ...], own: int, seed: int = 0) -> str | None:
    found = method.views["teacher"].prompt(ViewInput(rollouts[own], rollouts, Stage(seed=seed)))
    return None if found is None else found.messages[1].content


def named(text: str | None, section: str) -> list[int]:
    """The siblings in the sections of one kind, in order."""
    parts = (text or "").split(f"<{section}>")[1:]
    return [int(part.split("attempt-")[1].split("-")[0]) for part in parts]


def test_two_successes_in_order_and_one_failure_of_the_same_prompt_and_never_oneself() -> None:
    rewards = [0.0, 1.0, 0.4, 1.0, 0.5, 0.0]
    method = load("peer_opd")
    for own in range(len(rewards)):
        text = shown(method, group(rewards), own)
        assert text is not None
        right = [index for index, reward in enumerate(rewards) if reward >= 0.5 and index != own][:2]
        assert named(text, "correct") == right
        (failed,) = named(text, "failed")
        assert failed != own
        assert rewards[failed] < 0.5
        assert text.index("<correct>") < text.index("<failed>")


def test_failures_are_drawn_and_the_draw_is_repeatable() -> None:
    rollouts = group([1.0] + [0.0] * 7)
    drawn = [named(shown(load("peer_opd"), rollouts, 0, seed), "failed")[0] for seed in range(40)]
    assert drawn == [named(shown(load("peer_opd"), rollouts, 0, seed), "failed")[0] for seed in range(40)]
    assert set(drawn) == set(range(1, 8))


def test_a_sibling_that_wrote_the_same_is_a_sibling() -> None:
    twins = group([1.0, 1.0], ["attempt-0-", "attempt-0-"])
    assert named(shown(load("peer_opd"), twins, 0), "correct") == [0]


def test_failures_only_where_there_is_no_success() -> None:
    sometimes = load("peer_opd", failure_when="without_success")
    assert not named(shown(sometimes, group([1.0, 1.0, 0.0]), 0), "failed")
    assert named(shown(sometimes, group([1.0, 0.0, 0.0]), 0), "failed")


def test_the_gates() -> None:
    rollouts = group([1.0, 1.0, 0.0, 0.0])
    both, positive = shown(load("peer_opd"), rollouts, 2), shown(load("peer_opd", failures=0), rollouts, 2)
    assert both is not None
    assert positive is not None
    before, after = both.split("An earlier attempt that failed")
    assert positive.startswith(before.strip())  # flipping the failure changes its section only
    assert positive.endswith(after.split("</failed>")[1].strip())
    one_success = group([1.0, 0.0, 0.0])
    assert shown(load("peer_opd", failures=0), one_success, 1) == shown(
        load("peer_opd", successes=1, failures=0), one_success, 1
    )


def test_with_the_first_success_only_it_shows_what_sdpo_shows() -> None:
    ours = load("peer_opd", successes=1, failures=0, thoughts=False)
    for rewards in ([0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]):
        rollouts = group(rewards, feedback="off by one")
        for own in range(3):
            assert shown(ours, rollouts, own) == shown(load("sdpo"), rollouts, own)


def test_feedback_is_shown_where_no_success_is_and_can_be_left_out() -> None:
    rollouts = group([0.0, 0.0], feedback="off by one")
    assert "off by one" in (shown(load("peer_opd"), rollouts, 0) or "")
    assert "off by one" not in (shown(load("peer_opd", feedback="never"), rollouts, 0) or "")
    assert "off by one" not in (shown(load("peer_opd"), group([0.0, 1.0], feedback="off by one"), 0) or "")
    assert shown(load("peer_opd", failures=0), group([0.0, 0.0]), 0) is None


def test_the_control_fills_as_many_places_whatever_the_rewards() -> None:
    rewards = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    control, seen = load("peer_opd", choice="random"), set[bool]()
    for seed in range(30):
        text = shown(control, group(rewards), 0, seed)
        right, wrong = named(text, "correct"), named(text, "failed")
        assert (len(right), len(wrong)) == (1, 1)
        assert 0 not in right + wrong
        assert right != wrong
        seen.add(rewards[right[0]] == 1.0)
    assert seen == {True, False}


def test_the_two_denominators_differ_by_the_mean_length() -> None:
    toy = Toy()
    teacher, valid = toy.teacher_logits.detach(), toy.rollouts != 1
    signal = Dense(toy.tokens, "teacher", lambda rows: teacher[rows], toy.vocab, valid_N=valid)
    by_token = toy.losses(load("peer_opd"), teacher_logits=signal)
    by_rollout = toy.losses(load("peer_opd", reduction="rollout_sums"), teacher_logits=signal)
    torch.testing.assert_close(by_rollout.loss, by_token.loss * valid.sum() / 4)
    value = by_token.terms["distillation"].value
    sums = torch.stack([value[toy.rollouts == rollout].sum() for rollout in (0, 2, 3, 4)])
    torch.testing.assert_close(by_rollout.loss, sums.mean())


@pytest.mark.parametrize("reduction", ["token_mean", "rollout_sums"])
def test_nobody_with_a_peer_is_no_loss(reduction: str) -> None:
    toy = Toy()
    teacher = toy.teacher_logits.detach()
    nobody = torch.zeros(len(toy.tokens), dtype=torch.bool)
    signal = Dense(toy.tokens, "teacher", lambda rows: teacher[rows], toy.vocab, valid_N=nobody)
    found = toy.losses(load("peer_opd", reduction=reduction), teacher_logits=signal)
    assert found.loss.item() == 0.0
    assert all(not gradient.any() for gradient in toy.gradients(found.loss))


def test_mathematics_takes_the_reverse_kl() -> None:
    toy = Toy()
    ours = toy.losses(load("peer_opd", divergence="reverse_kl", top_k=5)).terms["distillation"].value
    theirs = toy.losses(load("topk_kl", top_k=5, tail="bucket")).terms["divergence"].value
    torch.testing.assert_close(ours, theirs)


def test_whose_weights_teach() -> None:
    assert load("peer_opd").views["teacher"].weights == ema(0.05)
    outside = load("peer_opd", teacher="outside").views["teacher"]
    assert (outside.model, outside.weights) == ("teacher", frozen())
    assert outside.rewards


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"successes": 0, "failures": 0, "feedback": "never"}, "nothing to learn from"),
        ({"successes": -1}, "negative"),
        ({"top_k": 0}, "at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("peer_opd", **settings)
