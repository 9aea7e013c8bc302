"""Rewards as advantages: groups, whitening, length bonus; masks and groups in `token_losses`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from retort.advantages.outcome import group_advantage, length_bonus, running_advantage
from retort.controllers import Observation
from retort.controllers.rewards import RunningRewards
from retort.core.reduce import Denominator, loss_scales, rollout_means, rollout_sums, weighted_rollout_means
from retort.core.signals import Dense
from retort.core.steps import Steps, quantile
from retort.divergences.kl import reverse_kl
from retort.errors import UserError
from retort.estimators import pathwise, score_function
from retort.functional import token_losses
from retort.method import Method, Term
from retort.rollout.plan import RolloutPlan

STEPS, VOCAB = 12, 5
ROLLOUTS = torch.tensor([0] * 3 + [1] * 1 + [2] * 4 + [3] * 2 + [4] * 2)
GROUPS = torch.tensor([0, 0, 1, 1, 1])
REWARDS = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(STEPS, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(method: Method, **more: Any) -> Any:
    student = logits(0).requires_grad_()
    given = {"tokens": torch.arange(STEPS) % VOCAB, "rollouts": ROLLOUTS, "groups": GROUPS, "rewards": REWARDS, **more}
    return token_losses(method, student_logits=student, teacher_logits=logits(1), **given), student


def method(*terms: Term, **more: Any) -> Method:
    return Method(rollout=RolloutPlan(), terms=terms, **more)


def advantages(**settings: Any) -> torch.Tensor:
    losses, _ = run(method(Term("outcome", score_function(group_advantage(**settings)))))
    return -losses.terms["outcome"].value.detach()  # the ratio is 1


def test_group_advantage_by_hand() -> None:
    found = advantages()
    assert found[ROLLOUTS == 0].tolist() == pytest.approx([0.5 / math.sqrt(0.5)] * 3, abs=1e-5)
    assert found[ROLLOUTS == 1].tolist() == pytest.approx([-0.5 / math.sqrt(0.5)], abs=1e-5)
    third = math.sqrt((2 * (1 / 3) ** 2 + (2 / 3) ** 2) / 2)
    assert found[ROLLOUTS == 4].tolist() == pytest.approx([-2 / 3 / third] * 2, abs=1e-5)
    plain = advantages(std=False)
    assert plain[ROLLOUTS == 2].tolist() == pytest.approx([1 / 3] * 4)
    batch = advantages(std=False, scope="batch")
    assert batch[ROLLOUTS == 1].tolist() == pytest.approx([-0.6])


def test_a_group_of_one_and_equal_rewards_teach_nothing() -> None:
    losses, student = run(
        method(Term("outcome", score_function(group_advantage()))), groups=torch.arange(5), rewards=REWARDS
    )
    assert losses.loss.item() == 0.0
    assert not torch.autograd.grad(losses.loss, student)[0].any()
    losses, _ = run(method(Term("outcome", score_function(group_advantage()))), rewards=torch.ones(5))
    assert losses.loss.item() == 0.0


def test_per_step_rewards_and_groups_are_the_same() -> None:
    one, _ = run(method(Term("outcome", score_function(group_advantage()))))
    two, _ = run(
        method(Term("outcome", score_function(group_advantage()))),
        groups=GROUPS[ROLLOUTS],
        rewards=REWARDS[ROLLOUTS],
    )
    assert torch.equal(one.loss, two.loss)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="needs rewards"):
        run(method(Term("outcome", score_function(group_advantage()))), rewards=None)
    with pytest.raises(UserError, match="needs groups"):
        run(method(Term("outcome", score_function(group_advantage()))), groups=None)


def test_length_bonus() -> None:
    shaped = length_bonus(0.5)(REWARDS, torch.tensor([3, 1, 4, 2, 2]), 4)
    assert shaped.tolist() == [1.125, 0.0, 1.0, 1.25, 0.0]
    with pytest.raises(UserError, match="negative"):
        length_bonus(-1.0)


def test_running_rewards_are_those_of_all_batches_before() -> None:
    control = RunningRewards("rewards", warmup=2)
    state, seen = control.init(torch.Generator()), list[float]()
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        numbers = control.numbers(state)
        batch = torch.rand(7, generator=draw, dtype=torch.float64)
        if len(seen) >= 14:
            whole = torch.tensor(seen, dtype=torch.float64)
            assert numbers["mean"] == pytest.approx(float(whole.mean()))
            assert numbers["std"] == pytest.approx(float(whole.std()))
        else:
            assert numbers == {"mean": 0.5, "std": 1.0}
        state = control.learn(state, Observation({}, reward_R=batch, length_R=torch.ones(7)), {})
        seen += batch.tolist()


def test_running_advantage_reads_the_state_before_the_batch() -> None:
    whitened = method(
        Term("outcome", score_function(running_advantage("rewards"))),
        controllers=(RunningRewards("rewards", warmup=1),),
    )
    first, _ = run(whitened)
    assert (-first.terms["outcome"].value)[ROLLOUTS == 0].tolist() == pytest.approx([0.5] * 3)
    second, _ = run(whitened, state=first.state)
    assert (-second.terms["outcome"].value)[ROLLOUTS == 0].tolist() == pytest.approx(
        [(1 - 0.6) / float(REWARDS.std())] * 3
    )


def test_terms_leave_out_rollouts_without_context_each_on_its_own() -> None:
    distilled = Term("distilled", pathwise(reverse_kl()))
    outcome = Term("outcome", score_function(group_advantage(std=False)))
    valid = (ROLLOUTS != 1) & (ROLLOUTS != 2)
    tokens = torch.arange(STEPS) % VOCAB
    signal = Dense.of(logits(1), tokens)
    masked = Dense(tokens, "teacher", signal.logits, VOCAB, valid_N=valid)
    student = logits(0).requires_grad_()
    both = token_losses(
        method(distilled, outcome),
        student_logits=student,
        teacher_logits=masked,
        tokens=tokens,
        rollouts=ROLLOUTS,
        groups=GROUPS,
        rewards=REWARDS,
    )
    assert torch.equal(both.terms["distilled"].counted, valid)
    assert both.terms["outcome"].counted.all()
    small = token_losses(
        method(distilled), student_logits=student[valid], teacher_logits=logits(1)[valid], tokens=tokens[valid]
    )
    alone, _ = run(method(outcome))
    torch.testing.assert_close(both.loss, small.loss + alone.loss)


def test_nobody_with_context_is_no_loss_and_not_nan() -> None:
    tokens = torch.arange(STEPS) % VOCAB
    silent = torch.zeros(STEPS, VOCAB, dtype=torch.float64)
    nobody = Dense(tokens, "teacher", lambda _: silent, VOCAB, valid_N=torch.zeros(STEPS, dtype=torch.bool))
    student = logits(0).requires_grad_()
    for denominator in (None, rollout_means(), rollout_sums()):
        extra = {} if denominator is None else {"denominator": denominator}
        losses = token_losses(
            method(Term("d", pathwise(reverse_kl()), **extra)),
            student_logits=student,
            teacher_logits=nobody,
            tokens=tokens,
            rollouts=ROLLOUTS,
        )
        assert losses.loss.item() == 0.0
        assert not torch.autograd.grad(losses.loss, student)[0].any()


def test_denominators_by_rollout() -> None:
    counted = torch.ones(STEPS, dtype=torch.bool)
    kept = (ROLLOUTS != 2).double()

    def found(denominator: Denominator, weight: torch.Tensor | None = None) -> torch.Tensor:
        return loss_scales(denominator, counted_N=counted, rollout_N=ROLLOUTS, weight_N=weight)

    assert found(rollout_means())[0].item() == pytest.approx(1 / 15)
    assert found(rollout_sums())[0].item() == pytest.approx(1 / 5)
    left_out = found(rollout_means("kept"), kept)
    assert left_out[0].item() == pytest.approx(1 / 12)
    assert not left_out[ROLLOUTS == 2].any()
    weight = torch.rand(STEPS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    by_weight = found(weighted_rollout_means(), weight)
    sums = torch.zeros(5, dtype=torch.float64).index_add_(0, ROLLOUTS, by_weight * weight)
    assert sums.tolist() == pytest.approx([0.2] * 5)


def test_layout_by_rollout_whatever_the_numbers() -> None:
    steps = Steps.of(
        torch.zeros(5, dtype=torch.long),
        torch.tensor([9, 9, 4, 9, 4]),
        reward_N=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]),
    )
    rollouts = steps.rollouts()
    assert rollouts.number_N.tolist() == [1, 1, 0, 1, 0]
    assert rollouts.steps_R.tolist() == [2, 3]
    assert rollouts.reward_R is not None
    assert rollouts.reward_R.tolist() == [0.0, 1.0]
    assert steps.position_N.tolist() == [0, 1, 0, 2, 1]
    assert rollouts.mean(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist() == [4.0, pytest.approx(7 / 3)]


def test_quantiles_by_rollout_are_torchs() -> None:
    values = torch.randn(STEPS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    shuffled = torch.randperm(STEPS, generator=torch.Generator().manual_seed(6))
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        found = Steps.of(ROLLOUTS, ROLLOUTS[shuffled]).rollouts().quantile(values[shuffled], share)
        wanted = [torch.quantile(values[rollout == ROLLOUTS], share).item() for rollout in range(5)]
        assert found.tolist() == pytest.approx(wanted, rel=1e-14)
        assert quantile(values, share).item() == pytest.approx(torch.quantile(values, share).item(), rel=1e-14)
