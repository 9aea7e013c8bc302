"""How old the tokens of a batch are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from retort.core.rollouts import Group


def token_ages(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Optimizer steps between the writing and the learning of the student's tokens: mean, most, tokens by number.

    Args:
        groups: The batch.
        version: Optimizer steps that the student who learns from it has taken.
    """
    found = Counter[int]()
    for rollout in (rollout for group in groups for rollout in group if rollout.source == "student"):
        for wrote, tokens in rollout.tokens_by_version:
            found[version - wrote] += tokens
    total = found.total()
    if not total:
        return {}
    return {
        "staleness/mean": sum(age * count for age, count in found.items()) / total,
        "staleness/max": max(found),
        **{f"staleness/tokens/{age}": count for age, count in sorted(found.items())},
    }
