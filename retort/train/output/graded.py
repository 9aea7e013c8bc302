"""What a step's metrics say of a judge that graded its rollouts, where the task has a grader of its own besides."""

from __future__ import annotations

import math

import torch

from retort.core.grading import FAILED, VERIFIED
from retort.core.rollouts import RIGHT_FROM, Pack
from retort.evaluate.agreement import by_prompt
from retort.evaluate.ranks import auroc

__all__ = ["against_verifier"]


def against_verifier(pack: Pack) -> dict[str, float]:
    """How well a judge's rewards tell the completions that are right from the others; empty where nobody knows.

    `judge/auc` is over all completions, `judge/auc_by_prompt` the mean over prompts with both kinds. Groups without a
    usable verdict are left out.

    Args:
        pack: The rollouts of a step.
    """
    judged = [FAILED in own.measures and VERIFIED in own.reward_parts for own in pack.rollouts]
    if not any(judged):
        return {}
    usable = [is_judged and not own.measures[FAILED] for is_judged, own in zip(judged, pack.rollouts, strict=True)]
    verified_R = torch.tensor(
        [own.reward_parts[VERIFIED] if known else math.nan for known, own in zip(usable, pack.rollouts, strict=True)]
    )
    score_R = pack.reward_R.masked_fill(~torch.tensor(usable), math.nan)
    whole, each = auroc(score_R, verified_R >= RIGHT_FROM), by_prompt(score_R, verified_R, pack.group_R).get("auc")
    found = {"judge/auc": whole, "judge/auc_by_prompt": each}
    return {name: value for name, value in found.items() if value is not None}
