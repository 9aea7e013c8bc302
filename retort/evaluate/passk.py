"""avg@k and pass@k, with intervals over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval; both ends are NaN with a single problem."""

    value: float
    low: float
    high: float

    def plain(self) -> dict[str, float | None]:
        """As a dictionary; None for an end that is not known."""
        ends = (None if math.isnan(end) else end for end in (self.low, self.high))
        return dict(zip(("value", "low", "high"), (self.value, *ends), strict=True))

    def within(self, least: float, most: float = math.inf) -> Estimate:
        """The same, its interval cut to what the measure can be at all; the mean itself stays inside."""
        if math.isnan(self.low):
            return self
        low, high = max(self.low, min(least, self.value)), min(self.high, max(most, self.value))
        return Estimate(self.value, low, high)

    @staticmethod
    def mean(values: Sequence[float]) -> Estimate | None:
        """The mean of one number per problem, with Student's t; None without any."""
        return Estimate.ratio(values, [1.0] * len(values))

    @staticmethod
    def over_runs(values: Sequence[float]) -> Estimate | None:
        """The mean over runs that differ in their seed, with Student's t; None with fewer than two."""
        if len(values) < 2:
            return None
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))
        reach = student_t(len(values) - 1) * spread
        return Estimate(mean, mean - reach, mean + reach)

    @staticmethod
    def ratio(sums: Sequence[float], counts: Sequence[float]) -> Estimate | None:
        """A mean over tokens, sum of sums over sum of counts, with its interval over problems (linearised).

        The interval is Student's t. None without any count.
        """
        whole, problems = sum(counts), sum(count > 0 for count in counts)
        if not whole:
            return None
        mean = sum(sums) / whole
        if problems < 2:
            return Estimate(mean, math.nan, math.nan)
        squares = sum((x - mean * count) ** 2 for x, count in zip(sums, counts, strict=True))
        reach = student_t(problems - 1) * math.sqrt(squares * problems / (problems - 1)) / whole
        return Estimate(mean, mean - reach, mean + reach)

    @staticmethod
    def share(sums: Sequence[float], counts: Sequence[float]) -> Estimate | None:
        """A share, sum of sums over sum of counts, with Wilson's interval over problems; None without any count.

        Wilson's interval is for independent observations. Those of one problem are not, so it is taken for as many as
        say as much about the mean: the problems, divided by the part of a yes-or-no variable's variance that the means
        of the problems have. That part is drawn to 1 (each problem counts once) as if two problems had shown it: where
        all are right or all wrong, and with few of either kind, nothing is seen of it.

        Args:
            sums: Of each problem, from 0 to its count.
            counts: Observations of each problem.
        """
        whole, problems = sum(counts), sum(count > 0 for count in counts)
        if not whole:
            return None
        share = min(1.0, max(0.0, sum(sums) / whole))
        free = share * (1.0 - share)
        squares = sum((x - share * count) ** 2 for x, count in zip(sums, counts, strict=True))
        part = problems * squares / whole**2 / free if free else 1.0
        seen = min(float(problems), max(0.0, min(share, 1.0 - share) * whole - 1.0))
        size = min(problems * (seen + 2.0) / (seen * part + 2.0), whole)
        return Estimate(share, *wilson(share, size))


def wilson(share: float, size: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was seen in `size` independent observations (any number above 0)."""
    free, z2 = share * (1.0 - share), _Z * _Z
    middle, scale = share + z2 / (2 * size), 1.0 + z2 / size
    reach = _Z * math.sqrt(free / size + z2 / (4 * size * size))
    # At the ends exactly 0 and 1, which rounding may miss.
    low = 0.0 if share == 0.0 else max(0.0, (middle - reach) / scale)
    high = 1.0 if share == 1.0 else min(1.0, (middle + reach) / scale)
    return low, high


#: 97.5 % quantile of the normal distribution.
_Z = 1.959964
#: 97.5 % quantiles of Student's t by degrees of freedom, from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond ten degrees of freedom to three digits (an expansion about 1.96)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = _Z
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k completions is right: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: n, completions generated.
        right: c, the number that is right.
        k: At most n.
    """
    if not 0 < k <= samples:
        raise ValueError(f"k must lie between 1 and the {samples} samples, not {k}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
