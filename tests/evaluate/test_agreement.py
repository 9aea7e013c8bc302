"""A teacher's scores against rewards: by hand, at perfect and reversed order, with ties, and where undefined."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from retort.evaluate.agreement import (
    average_ranks,
    brier,
    by_prompt,
    kendall,
    pairwise_accuracy,
    prompt_agreement,
    spearman,
)


def given(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_perfect_and_reversed_order() -> None:
    rewards = given(0, 1, 0, 1, 1)
    scores = given(-3, -1, -2, -0.5, -0.1)
    right = prompt_agreement(scores, rewards)
    assert (right["kendall"], right["pairwise_accuracy"], right["auc"]) == (1.0, 1.0, 1.0)
    assert 0 < (right["spearman"] or 0) < 1, "rewards tie"
    assert 0 < (right["point_biserial"] or 0) < 1
    wrong = prompt_agreement(-scores, rewards)
    assert (wrong["kendall"], wrong["pairwise_accuracy"], wrong["auc"]) == (-1.0, 0.0, 0.0)
    assert wrong["spearman"] == pytest.approx(-(right["spearman"] or 0))


def test_by_hand() -> None:
    rewards, scores = given(1, 0, 1, 0), given(-1, -2, -3, -4)
    found = prompt_agreement(scores, rewards)
    # Pairs of unequal reward: (a b) and (a d) and (c d) in order, (b c) not.
    assert found["pairwise_accuracy"] == pytest.approx(3 / 4)
    assert found["auc"] == pytest.approx(3 / 4)
    assert found["kendall"] == pytest.approx((3 - 1) / 4)
    # Ranks 4 3 2 1 and 3.5 1.5 3.5 1.5: covariance 2, norms sqrt(5) and 2.
    assert found["spearman"] == pytest.approx(2 / (math.sqrt(5) * 2))
    assert found["point_biserial"] == pytest.approx(1.0 / math.sqrt(5))
    square = sum((1 / (1 + math.exp(-s)) - r) ** 2 for s, r in zip(scores.tolist(), rewards.tolist(), strict=True))
    assert found["brier"] == pytest.approx(square / 4)


def test_graded_rewards_have_a_perfect_rank_correlation() -> None:
    assert spearman(given(-3, -2, -1), given(0.0, 0.2, 1.0)) == pytest.approx(1.0)
    assert kendall(given(-3, -1, -2), given(0.0, 0.2, 1.0)) == pytest.approx(1 / 3)


def test_ties_of_scores() -> None:
    rewards, scores = given(1, 0, 1, 0), given(-1, -1, -1, -2)
    found = prompt_agreement(scores, rewards)
    assert found["auc"] == pytest.approx((0.5 + 1 + 0.5 + 1) / 4), "half credit"
    assert found["pairwise_accuracy"] == pytest.approx(2 / 4), "no credit"
    assert found["kendall"] == 1.0, "left out"
    assert average_ranks(scores).tolist() == [3.0, 3.0, 3.0, 1.0]
    flat = prompt_agreement(given(-1, -1, -1, -1), rewards)
    assert flat["kendall"] is None
    assert flat["spearman"] is None
    assert flat["auc"] == 0.5


def test_equal_rewards_are_undefined_and_not_0() -> None:
    for rewards in (given(0, 0, 0), given(1, 1, 1)):
        found = prompt_agreement(given(-1, -2, -3), rewards)
        assert {name: value for name, value in found.items() if name != "brier"} == dict.fromkeys(
            ("spearman", "kendall", "pairwise_accuracy", "auc", "point_biserial")
        )
    assert pairwise_accuracy(given(-1.0), given(1.0)) is None


def test_a_score_is_never_taken_for_more_than_even() -> None:
    assert brier(given(0, 0), given(1, 0)) == pytest.approx(0.25)
    assert brier(given(-50, -50), given(0, 0)) == pytest.approx(0.0)


def test_prompts_are_averaged_and_only_those_with_both_kinds() -> None:
    scores = given(-1, -2, -2, -1, -1, -2, math.nan, -1)
    rewards = given(1, 0, 1, 0, 1, 1, 0, math.nan)
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0])
    found = by_prompt(scores, rewards, groups)
    assert found["auc"] == pytest.approx(0.5), "1 and 0; the third prompt's only wrong one has no score"
    assert found["kendall"] == pytest.approx(0.0)
    assert not by_prompt(scores[4:6], rewards[4:6], groups[4:6])
    assert not by_prompt(scores[:0], rewards[:0], groups[:0])
