"""Intervals at the edges: nothing right, all right, few problems, problems whose answers go together."""

from __future__ import annotations

import io
import math
import random
from typing import Any

import pytest
import torch
from rich.console import Console

from retort.console.terminal import RichObserver, trust_table
from retort.evaluate.passk import Estimate, wilson
from retort.evaluate.ranks import clustered_auroc
from retort.evaluate.unknown import why_unknown


def share(sums: list[float], counts: list[float]) -> Estimate:
    found = Estimate.share(sums, counts)
    assert found is not None
    return found


def test_none_of_four_is_no_certainty() -> None:
    # Wilson's upper end is z^2 / (n + z^2); four problems count as four, however often each was answered.
    for samples in (1.0, 8.0):
        none, every = share([0.0] * 4, [samples] * 4), share([samples] * 4, [samples] * 4)
        assert (none.value, none.low, none.high) == pytest.approx((0.0, 0.0, 3.8415 / 7.8415), abs=1e-4)
        assert (every.low, every.high) == pytest.approx((1 - none.high, 1.0))


def test_answers_of_yes_and_no_have_wilsons_interval() -> None:
    # 3 of 10, by the formula: (0.3 + 3.8415 / 20 -+ 1.96 sqrt(0.021 + 3.8415 / 400)) / 1.38415
    found = share([1.0] * 3 + [0.0] * 7, [1.0] * 10)
    assert (found.low, found.high) == pytest.approx((0.1078, 0.6032), abs=1e-4)
    assert (found.low, found.high) == pytest.approx(wilson(0.3, 10))


def test_an_interval_lies_between_that_of_problems_and_that_of_answers() -> None:
    alike = share([4.0] * 8, [8.0] * 8)  # each problem half right: their means do not vary at all
    apart = share([8.0] * 4 + [0.0] * 4, [8.0] * 8)
    assert (apart.low, apart.high) == pytest.approx(wilson(0.5, 8))
    low, high = wilson(0.5, 64)
    assert apart.low < alike.low <= low < 0.5 < high <= alike.high < apart.high


def test_one_problem_has_no_interval_unless_it_is_of_a_share() -> None:
    lone = Estimate.mean([3.0])
    assert lone is not None and math.isnan(lone.low)
    assert lone.plain() == {"value": 3.0, "low": None, "high": None}
    assert 0 < share([1.0], [2.0]).low < 0.5 < share([1.0], [2.0]).high < 1
    assert Estimate.share([], []) is None
    assert Estimate.share([0.0], [0.0]) is None


def _covered(rate: float, problems: int, samples: int, together: float, draws: int = 400) -> float:
    """How often an interval holds the rate; `together` is the correlation of the answers to one problem."""
    draw, hits = random.Random(7), 0
    for _ in range(draws):
        sums: list[float] = []
        for _ in range(problems):
            if together == 1:
                uniform_stream = float(draw.random() < rate)
            elif together == 0:
                uniform_stream = rate
            else:
                scale = 1 / together - 1
                uniform_stream = draw.betavariate(rate * scale, (1 - rate) * scale)
            sums.append(float(sum(draw.random() < uniform_stream for _ in range(samples))))
        found = share(sums, [float(samples)] * problems)
        hits += found.low <= rate <= found.high
    return hits / draws


@pytest.mark.parametrize("problems", [4, 8, 16, 50])
@pytest.mark.parametrize(("samples", "together"), [(1, 1.0), (4, 0.0), (4, 0.3), (8, 0.3), (8, 1.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(problems: int, samples: int, together: float) -> None:
    found = [_covered(rate, problems, samples, together) for rate in (0.02, 0.1, 0.3, 0.5, 0.9, 0.98)]
    # Wilson's interval is right on average; of very few answers of yes or no it misses somewhat more at some rates.
    assert sum(found) / len(found) >= 0.91, found
    assert min(found) >= 0.8, found


def test_an_auroc_of_one_in_few_problems_is_no_certainty() -> None:
    scores, right = torch.tensor([2.0, 3.0, 0.0, 1.0]), torch.tensor([True, True, False, False])
    found = clustered_auroc(scores, right, [0, 1, 2, 3])
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1.0, *wilson(1.0, 2)))
    alone = clustered_auroc(torch.tensor([1.0, 0.0]), torch.tensor([True, False]), [0, 0])
    assert alone is not None and alone.low < 0.5


def _shown(results: dict[str, Any]) -> str:
    stream = io.StringIO()
    RichObserver(Console(file=stream, width=160)).table(results)
    return stream.getvalue()


def test_the_table_shows_both_ends() -> None:
    none = share([0.0] * 4, [8.0] * 4).plain()
    length = {"value": 3.0, "low": None, "high": None}
    results = {"k": 8, "problems": 5, "graded": 4, "rows": [{"who": "m", "avg@8": none, "length": length}]}
    text = _shown(results)
    shown = [" ".join(line.split()) for line in text.splitlines()]
    assert "│ avg@8 │ 0.0% │" in shown
    assert "│ │ [0.0%, 49.0%] │" in shown
    assert "±" not in text
    assert "5 held-out prompts, 4 of them graded" in text
    assert "3.0 " in text


def _trust(**changes: Any) -> dict[str, Any]:
    row = {"predictor": "late position", "claimed_by": "", "viable": None, "helps": None}
    return {"branches": 8, "problems": 4, "prompts": "held-out prompts", "predictors": [row], **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"viable": 0.0, "alone": 0.0, "differing": 0}, ["no completion after a forced token is right, nor", "alike"]),
        ({"viable": 0.0, "alone": 0.5, "differing": 4}, ["no completion after a forced token is right.", "same side"]),
        ({"viable": 1.0, "alone": 1.0, "differing": 0}, ["every completion", "alike"]),
    ],
)
def test_trust_says_why_it_cannot_tell(changes: dict[str, Any], said: list[str]) -> None:
    stream = io.StringIO()
    Console(file=stream, width=200).print(trust_table(_trust(**changes)))
    text = " ".join(stream.getvalue().split())
    assert all(words in text for words in said), text


def test_trust_is_silent_where_it_can_tell_or_where_the_file_is_odd() -> None:
    cell = {"value": 0.7, "low": 0.6, "high": 0.8}
    row = {"predictor": "late position", "claimed_by": "", "viable": cell, "helps": cell}
    assert why_unknown(_trust(viable=0.5, alone=0.5, differing=3, predictors=[row])) == []
    for odd in (3, [], [3], {"a": 1}, None):
        assert why_unknown({"predictors": odd, "viable": "x", "differing": 10**400}) == []
