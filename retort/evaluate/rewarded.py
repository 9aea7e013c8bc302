"""Rewards and their parts as estimates over prompts, the same for completions and for samples of flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retort.core.rollouts import RIGHT_FROM
from retort.evaluate.passk import Estimate, pass_at_k


def of_rewards(rewards: Sequence[Sequence[float]], k: int) -> dict[str, Any]:
    """`avg@k` and `pass@k` as estimates, and `pass_at`, pass@j for j = 1, 2, 4, ...; nothing without a reward.

    Args:
        rewards: The k rewards of each prompt.
        k: Samples per prompt.
    """
    if not rewards:
        return {}
    right = [sum(reward >= RIGHT_FROM for reward in own) for own in rewards]
    sums, each = [sum(own) for own in rewards], [float(k)] * len(rewards)
    inside = all(0 <= reward <= 1 for own in rewards for reward in own)
    ladder = sorted({2**power for power in range(k.bit_length()) if 2**power <= k} | {k})
    return {
        f"avg@{k}": Estimate.share(sums, each) if inside else Estimate.ratio(sums, each),
        f"pass@{k}": Estimate.share([pass_at_k(k, count, k) for count in right], [1.0] * len(right)),
        "pass_at": {str(j): sum(pass_at_k(k, count, j) for count in right) / len(right) for j in ladder},
    }


def tally_parts(parts: dict[str, list[float]], samples: Sequence[Mapping[str, float]]) -> None:
    """Adds one prompt's mean of each part over the samples that have it."""
    for name in dict.fromkeys(name for sample in samples for name in sample):
        own = [sample[name] for sample in samples if name in sample]
        parts.setdefault(name, []).append(sum(own) / len(own))


def of_parts(parts: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The estimate of each part over prompts, as `reward/<part>`; if all values lie within 0 and 1 it is a share."""
    row: dict[str, Any] = {}
    for name, values in parts.items():
        inside = all(0 <= value <= 1 for value in values)
        estimate = Estimate.share(values, [1.0] * len(values)) if inside else Estimate.mean(values)
        assert estimate is not None  # a part is there because a sample had it
        row[f"reward/{name}"] = estimate.plain()
    return row
