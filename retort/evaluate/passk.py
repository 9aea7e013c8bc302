"""avg@k and pass@k, with intervals over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval (normal approximation over problems)."""

    value: float
    low: float
    high: float

    def share(self) -> Estimate:
        """The same for a share: the interval ends at 0 and 1."""
        return Estimate(self.value, max(0.0, self.low), min(1.0, self.high))

    @staticmethod
    def of(values: Sequence[float]) -> Estimate | None:
        """The mean of one number per problem; None without any."""
        if not values:
            return None
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((x - mean) ** 2 for x in values) / max(1, len(values) - 1) / len(values))
        return Estimate(mean, mean - 1.96 * spread, mean + 1.96 * spread)

    @staticmethod
    def of_runs(values: Sequence[float]) -> Estimate | None:
        """The mean over runs that differ in their seed, with Student's t; None with fewer than two."""
        if len(values) < 2:
            return None
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))
        reach = student_t(len(values) - 1) * spread
        return Estimate(mean, mean - reach, mean + reach)

    @staticmethod
    def ratio(sums: Sequence[float], counts: Sequence[float]) -> Estimate | None:
        """A mean over tokens, sum of sums over sum of counts, with its interval over problems (linearised)."""
        whole = sum(counts)
        if not whole:
            return None
        mean = sum(sums) / whole
        squares = sum((x - mean * count) ** 2 for x, count in zip(sums, counts, strict=True))
        spread = math.sqrt(squares * len(sums) / max(1, len(sums) - 1)) / whole
        return Estimate(mean, mean - 1.96 * spread, mean + 1.96 * spread)


#: 97.5 % quantiles of Student's t by degrees of freedom, from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond ten degrees of freedom to three digits (an expansion about 1.96)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k answers is right: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: n, answers written.
        right: c, of which right.
        k: At most n.
    """
    if not 0 < k <= samples:
        raise ValueError(f"k must lie between 1 and the {samples} samples, not {k}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
