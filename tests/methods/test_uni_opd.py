"""Uni-OPD: balancing, both ways of calibrating, the filter of tokens and the denominator, each against plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toy import Toy

from retort.core.losses import TokenLosses
from retort.core.rollouts import Message, Prompt
from retort.core.steps import Clock, Steps
from retort.errors import UserError
from retort.functional import token_losses
from retort.registry import load
from retort.rollout.plan import EasyToHard
from retort.train.source.order import easy_to_hard
from retort.weights.calibration import balance, order_gap, ordered, shifts, surplus

VALUES = torch.tensor([0.3, -0.2, 0.1, 0.5, -0.1, 0.2, 0.7, 0.6], dtype=torch.float64)
RIGHT = torch.tensor([1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])  # the last has only right ones
PER, BATCH = 5, 8


@pytest.mark.parametrize("gap", ["mean", "minmax"])
@pytest.mark.parametrize("direction", ["both", "correct_up", "incorrect_down"])
@pytest.mark.parametrize("margin", [0.4, 0.0, -0.5])
def test_after_a_shift_the_gap_is_the_margin_or_was_wider(gap: Any, direction: Any, margin: float) -> None:
    found = shifts(VALUES, RIGHT, GROUP, margin=margin, gap=gap, direction=direction)
    for group in (0, 1):
        right, wrong = (group == GROUP) & RIGHT, (group == GROUP) & ~RIGHT
        before = order_gap(VALUES[right], VALUES[wrong], gap)
        after = order_gap((VALUES + found)[right], (VALUES + found)[wrong], gap)
        assert after == pytest.approx(max(before, margin), abs=1e-12)
        assert len(set(found[right].tolist())) == len(set(found[wrong].tolist())) == 1
    assert not found[GROUP == 2].any()
    if direction == "correct_up":
        assert not found[~RIGHT].any()
    if direction == "incorrect_down":
        assert not found[RIGHT].any()
    if direction == "both":
        assert (found * RIGHT).sum() >= 0
        sums = [found[(GROUP == 0) & side].mean() for side in (RIGHT, ~RIGHT)]
        assert float(sum(sums)) == pytest.approx(0.0, abs=1e-12)


def test_numbers_by_hand() -> None:
    # Group 0: mean right 0.2, mean wrong 0.15: the gap is 0.05, the shift to a margin of 0.4 is 0.35.
    found = shifts(VALUES, RIGHT, GROUP, margin=0.4, gap="mean", direction="both")
    assert found.tolist() == pytest.approx([0.175, -0.175, 0.175, -0.175, -0.05, 0.05, 0.0, 0.0])
    # The lowest right is 0.1, the highest wrong 0.5: the shift is 0.8.
    found = shifts(VALUES, RIGHT, GROUP, margin=0.4, gap="minmax", direction="correct_up")
    assert found[:4].tolist() == pytest.approx([0.8, 0.0, 0.8, 0.0])


def test_one_group_is_the_batch_and_minus_infinity_changes_nothing() -> None:
    one = shifts(VALUES, RIGHT, torch.zeros(8, dtype=torch.long), margin=0.4, gap="mean", direction="both")
    right, wrong = VALUES[RIGHT].mean(), VALUES[~RIGHT].mean()
    assert one[0].item() == pytest.approx((0.4 - (right - wrong).item()) / 2)
    assert not shifts(VALUES, RIGHT, GROUP, margin=-math.inf, gap="mean", direction="both").any()


def test_a_mask_drops_the_worst_first() -> None:
    # Group 0: dropping the wrong 0.5 widens the gap from 0.05 to 0.4, dropping the right 0.1 only to 0.15.
    kept = ordered(VALUES, RIGHT, GROUP, margin=0.4, gap="mean", retained=0.25)
    assert kept.tolist() == [True, True, True, False, True, True, True, True]
    # A wider margin drops the right 0.1 next; then one of each is left, which is as far as it goes.
    kept = ordered(VALUES, RIGHT, GROUP, margin=9.0, gap="mean", retained=0.25)
    assert kept.tolist() == [True, True, False, False, True, True, True, True]
    kept = ordered(VALUES, RIGHT, GROUP, margin=9.0, gap="mean", retained=0.75)
    assert kept[:4].tolist() == [True, True, True, False]


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("right", "wrong"), [(1, 7), (5, 3), (7, 1), (4, 4), (8, 0), (0, 8)])
def test_a_balance(ratio: float, right: int, wrong: int) -> None:
    right_R = torch.tensor([True] * right + [False] * wrong)
    group_R = torch.zeros(8, dtype=torch.long)
    chance_R = torch.rand(8, generator=torch.Generator().manual_seed(0))
    out_R = surplus(right_R, group_R, chance_R, ratio)
    assert not (out_R[right_R].any() and out_R[~right_R].any()), "only the surplus side"
    left, others = int((right_R & ~out_R).sum()), int((~right_R & ~out_R).sum())
    if not right or not wrong:
        assert not out_R.any()
        return
    targets = [int(wrong * ratio) if right > int(wrong * ratio) else int(right / ratio)]
    if targets[0] >= 1:
        assert abs(left - ratio * others) < max(1.0, ratio)
    else:
        assert not out_R.any()


def test_the_ends_of_a_balance() -> None:
    chance_R = torch.zeros(8)
    mixed = GROUP != 2
    assert torch.equal(surplus(RIGHT, GROUP, chance_R, 0.0), RIGHT & mixed)
    assert torch.equal(surplus(RIGHT, GROUP, chance_R, math.inf), ~RIGHT)
    with pytest.raises(UserError, match="negative"):
        load("uni_opd", balance=-1.0)


def draws(seed: int, step: int, keep: torch.Tensor | None = None) -> torch.Tensor:
    """The balance of 64 groups of four, three of them right; of the steps of some rollouts only."""
    rollout_N = torch.arange(256)
    kept = rollout_N if keep is None else keep
    steps = Steps.of(kept, kept, reward_N=(kept % 4 > 0).double(), group_N=kept // 4)
    return balance(1.0).stats[0].finish(torch.zeros(len(kept)), steps, Clock(step, seed=seed))


def test_draws_are_keyed_by_seed_and_step() -> None:
    assert torch.equal(draws(0, 0), draws(0, 0))
    assert not torch.equal(draws(0, 0), draws(0, 1))
    assert not torch.equal(draws(0, 0), draws(1, 0))
    assert draws(0, 0).sum() == 128
    # Whatever else is in the batch: a draw belongs to the rollout.
    some = torch.arange(32, 256)
    assert torch.equal(draws(0, 0, some), draws(0, 0)[some])


def batch(method: Any, right: list[int], ratio: torch.Tensor, **more: Any) -> TokenLosses:
    """Rollouts of one prompt whose tokens have given log-ratios."""
    rollout_N = torch.repeat_interleave(torch.arange(len(right)), torch.tensor([len(row) for row in ratio]))
    given = torch.cat(list(ratio)).double()
    student = torch.stack([torch.full_like(given, math.log(0.2)), torch.full_like(given, math.log(0.8))], -1)
    teacher = student.clone()
    wanted = (given + math.log(0.2)).exp()
    teacher[:, 0], teacher[:, 1] = wanted.log(), (1 - wanted).log()
    student.requires_grad_()
    found = token_losses(
        method,
        student_logits=student,
        teacher_logits=teacher,
        tokens=torch.zeros(len(given), dtype=torch.long),
        rollouts=rollout_N,
        groups=torch.zeros(len(right), dtype=torch.long),
        rewards=torch.tensor(right, dtype=torch.float64),
        **more,
    )
    return found


F64 = torch.float64
RATIOS: Any = [torch.tensor(row, dtype=F64) for row in ([0.1, 0.3], [-0.6], [0.5, 0.2, 0.8])]


def test_the_loss_by_hand() -> None:
    found = batch(load("uni_opd"), [1, 0, 0], RATIOS)
    # One of the two wrong rollouts is left out; the margin is taken over all three: 0.2 - (-0.6 + 0.5) / 2 = 0.25.
    half = (0.4 - 0.25) / 2
    left = 1 if found.terms["reverse"].weight[2] == 1 else 2
    weights = found.terms["reverse"].weight
    assert weights.tolist() == [1.0, 1.0, *([1.0] if left == 1 else [0.0]), *([0.0] * 3 if left == 1 else [1.0] * 3)]
    means = {0: 0.2 + half, 1: -0.6 - half, 2: 0.5 - half}
    assert found.loss.item() == pytest.approx(-(means[0] + means[left]) / 2)
    over_kept = batch(load("uni_opd", margin_over="kept"), [1, 0, 0], RATIOS)
    half = max(0.0, 0.4 - (0.2 - (means[left] + half))) / 2
    assert over_kept.terms["reverse"].value[0].item() == pytest.approx(-(0.1 + half))
    by_token = batch(load("uni_opd", reduction="tokens", calibration=None), [1, 0, 0], RATIOS)
    kept = [0.1, 0.3, *RATIOS[left].tolist()]
    assert by_token.loss.item() == pytest.approx(-sum(kept) / len(kept))


def test_a_shift_keeps_the_order_of_tokens_and_a_mask_mutes_rollouts() -> None:
    plain = batch(load("uni_opd", balance=None, calibration=None), [1, 0, 0], RATIOS).terms["reverse"].value
    moved = batch(load("uni_opd", balance=None), [1, 0, 0], RATIOS).terms["reverse"].value
    assert (plain - moved)[:2].tolist() == pytest.approx([0.075] * 2)
    assert (plain - moved)[2:].tolist() == pytest.approx([-0.075] * 4)
    masked = batch(load("uni_opd", balance=None, calibration="mask"), [1, 0, 0], RATIOS)
    assert masked.terms["reverse"].value.tolist() == pytest.approx([-0.1, -0.3, 0.6, 0.0, 0.0, 0.0])
    assert masked.loss.item() == pytest.approx((-0.2 + 0.6) / 3), "a muted rollout stays in the denominator"


def test_one_class_is_left_alone() -> None:
    plain = batch(load("uni_opd", balance=None, calibration=None), [1, 1, 1], RATIOS)
    found = batch(load("uni_opd"), [1, 1, 1], RATIOS)
    assert found.loss.item() == pytest.approx(plain.loss.item())


def test_a_token_far_off_gives_no_gradient() -> None:
    student = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-12.0, 0.0, 0.0], [-8.0, 0.0, 0.0]], dtype=torch.float64)
    found = token_losses(
        load("uni_opd", balance=None, calibration=None),
        student_logits=student,
        teacher_logits=teacher,
        tokens=torch.zeros(2, dtype=torch.long),
    )
    (gradient,) = torch.autograd.grad(found.loss, student)
    assert gradient[0].abs().max() == 0.0
    assert gradient[1].abs().max() > 0.1
    far = teacher[1].log_softmax(-1)[0].item() + math.log(3)
    assert found.loss.item() == pytest.approx(-far / 2), "it stays in the denominator"


def test_the_clip_is_wider_above() -> None:
    toy = Toy()
    method = load("uni_opd", balance=None, calibration=None, gap_limit=math.inf)
    found = toy.losses(method, old_logp=toy.old - 0.2)  # ratio exp(0.3) = 1.35
    better = found.terms["reverse"].value < 0
    advantage = toy.teacher_logits.log_softmax(-1).gather(-1, toy.tokens[:, None]).squeeze(-1) - (toy.old - 0.2)
    torch.testing.assert_close(found.terms["reverse"].value[better], -1.28 * advantage[better])


def test_rare_difficulties_are_drawn_more_often() -> None:
    order = EasyToHard("balanced", samples=8)
    # A U: 50 solved by none, 50 by all, 10 by four of eight, 30 by five.
    hard = [1.0] * 50 + [0.0] * 50 + [0.5] * 10 + [3 / 8] * 30
    odds = order.odds(hard)
    assert (odds[0], odds[50], odds[100], odds[110]) == (1.0, 1.0, 4.0, pytest.approx(50 / 30))
    found: dict[str, int] = {}
    prompts = [Prompt(str(place), (Message("user", "?"),)) for place in range(140)]
    given = {prompt.id: value for prompt, value in zip(prompts, hard, strict=True)}
    for step in range(400):
        met = easy_to_hard(prompts, given, order, seed=0, clock=Clock(step, 400), count=8)
        assert len({(visit.prompt.id, visit.epoch) for visit in met}) == 8
        for visit in met:
            found[visit.prompt.id] = found.get(visit.prompt.id, 0) + 1
    often = [sum(found.get(str(place), 0) for place in own) / len(own) for own in (range(100), range(100, 110))]
    assert 3.2 < often[1] / often[0] < 4.5
    assert load("uni_opd", difficulty="balanced").rollout.order == order
    with pytest.raises(UserError, match="most must be at least 1"):
        EasyToHard("balanced", most=0.5)
