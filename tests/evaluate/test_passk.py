"""pass@k against brute force, and the intervals."""

import itertools
import math

import pytest

from retort.evaluate.measures import bounds
from retort.evaluate.passk import Estimate, pass_at_k, student_t


@pytest.mark.parametrize(("samples", "right"), [(8, 0), (8, 1), (8, 3), (8, 8), (5, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples: int, right: int) -> None:
    answers = [1] * right + [0] * (samples - right)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_1_is_the_mean() -> None:
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)


def test_more_answers_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and the 8 samples"):
        pass_at_k(8, 3, 9)


def test_intervals() -> None:
    found = Estimate.mean([0.0, 1.0, 1.0, 0.0])
    assert found is not None
    assert (found.value, found.high - found.value) == pytest.approx((0.5, 3.182 * (1 / 3 / 4) ** 0.5))
    assert Estimate.mean([]) is None
    same = Estimate.ratio([2.0, 2.0], [4.0, 4.0])
    assert same is not None
    assert (same.value, same.low, same.high) == pytest.approx((0.5, 0.5, 0.5))
    # with equal counts, a ratio is a mean of means
    ratio = Estimate.ratio([0.0, 1.0, 1.0, 0.0], [1.0] * 4)
    assert ratio is not None
    assert (ratio.value, ratio.high) == pytest.approx((found.value, found.high))


@pytest.mark.parametrize(
    ("freedom", "table"), [(1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (15, 2.131), (30, 2.042), (1000, 1.962)]
)
def test_student_t_is_that_of_the_tables(freedom: int, table: float) -> None:
    assert student_t(freedom) == pytest.approx(table, abs=1e-3)


def test_the_interval_over_runs_is_students() -> None:
    found = Estimate.over_runs([1.0, 2.0, 3.0])
    assert found is not None
    assert found.value == pytest.approx(2.0)
    assert found.high - found.value == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert Estimate.over_runs([1.0]) is None


def test_an_interval_ends_where_the_measure_does() -> None:
    for name, ends in {"reverse_kl": (0.0, math.inf), "uncertain": (0.0, 1.0), "pass@8": (0.0, 1.0)}.items():
        assert bounds(name) == ends
    assert bounds("reward/points") == (-math.inf, math.inf)
    wide = Estimate.mean([0.0, 3.0])
    assert wide is not None and wide.low < 0
    cut = wide.within(0.0)
    assert (cut.value, cut.low, cut.high) == (wide.value, 0.0, wide.high)
    # The mean stays inside, also where rounding took it past the end.
    assert Estimate(-1e-9, -1.0, 1.0).within(0.0).low == -1e-9
    assert wide.within(0.0, 1.0).high == wide.value
    one = Estimate.mean([3.0])
    assert one is not None and one.within(0.0).plain() == {"value": 3.0, "low": None, "high": None}
