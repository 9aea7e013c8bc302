"""How well a teacher's scores of the completions of one prompt agree with their rewards.

The measures by which multi-rollout OPD (arXiv 2605.12652) compares what a teacher may be shown. Each is None where it
is undefined: where all rewards are equal, there is no order to get right, and 0 would be a verdict. Axis letters: M
completions of one prompt, R rollouts of several.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from retort.core.rollouts import RIGHT_FROM
from retort.evaluate.ranks import auroc


def average_ranks(values_M: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs, [M], float64."""
    order = values_M.sort().values
    below_M = torch.searchsorted(order, values_M, right=False)
    through_M = torch.searchsorted(order, values_M, right=True)
    return (below_M + 1 + through_M).double() / 2


def pearson(one_M: Tensor, other_M: Tensor) -> float | None:
    """Linear correlation; None where one side does not vary. With rewards of 0 and 1 it is the point-biserial one."""
    if len(one_M) < 2 or bool((one_M == one_M[0]).all()) or bool((other_M == other_M[0]).all()):
        return None
    one, other = (values.double() - values.double().mean() for values in (one_M, other_M))
    return float((one * other).sum() / (one.norm() * other.norm()))


def spearman(scores_M: Tensor, rewards_M: Tensor) -> float | None:
    """Correlation of average ranks. Rewards that tie keep it below 1 even where scores order them perfectly."""
    return pearson(average_ranks(scores_M), average_ranks(rewards_M))


def kendall(scores_M: Tensor, rewards_M: Tensor) -> float | None:
    """(C - D) / (C + D) over pairs in the same and in the opposite order; pairs that tie in either are left out."""
    signs = _pairs(scores_M) * _pairs(rewards_M)
    agreed, opposed = int((signs > 0).sum()), int((signs < 0).sum())
    return None if agreed + opposed == 0 else (agreed - opposed) / (agreed + opposed)


def pairwise_accuracy(scores_M: Tensor, rewards_M: Tensor) -> float | None:
    """Share of the pairs of unequal reward that the scores put in order; equal scores do not."""
    scores, rewards = _pairs(scores_M), _pairs(rewards_M)
    return None if not bool((rewards != 0).any()) else float((scores * rewards > 0)[rewards != 0].double().mean())


def brier(scores_M: Tensor, right_M: Tensor) -> float:
    """Mean square between sigmoid(score) and whether it was right.

    A mean log-prob is never above 0, so its sigmoid never is above one half: low says little of discrimination.
    """
    return float((scores_M.double().sigmoid() - right_M.double()).square().mean())


def _pairs(values_M: Tensor) -> Tensor:
    """The sign of the difference of each pair of completions, once."""
    first, second = torch.triu_indices(len(values_M), len(values_M), 1)
    return (values_M[first] - values_M[second]).sign()


def prompt_agreement(scores_M: Tensor, rewards_M: Tensor) -> dict[str, float | None]:
    """All measures of one prompt's completions.

    Args:
        scores_M: Of the teacher: the mean of its log-probs of a completion's tokens, nats.
        rewards_M: [M]; a completion is right from `RIGHT_FROM` on.
    """
    right_M = rewards_M >= RIGHT_FROM
    return {
        "spearman": spearman(scores_M, rewards_M),
        "kendall": kendall(scores_M, rewards_M),
        "pairwise_accuracy": pairwise_accuracy(scores_M, rewards_M),
        "auc": auroc(scores_M, right_M),
        "point_biserial": pearson(scores_M, right_M.double()),
        "brier": brier(scores_M, right_M),
    }


def by_prompt(scores_R: Tensor, rewards_R: Tensor, group_R: Tensor) -> Mapping[str, float]:
    """The mean over prompts of each measure, of prompts with a right and a wrong completion only; empty without any.

    Args:
        scores_R: See `prompt_agreement`; a rollout without a finite one is left out.
        rewards_R: NaN where nobody graded.
        group_R: [R], the index of the prompt.
    """
    known_R = scores_R.isfinite() & rewards_R.isfinite()
    found: dict[str, list[float]] = {}
    for group in group_R[known_R].unique():
        own_R = known_R & (group_R == group)
        right_M = rewards_R[own_R] >= RIGHT_FROM
        if bool(right_M.all()) or not bool(right_M.any()):
            continue
        for name, value in prompt_agreement(scores_R[own_R], rewards_R[own_R]).items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
