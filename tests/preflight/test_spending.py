"""What a run will spend on a model that is asked."""

from __future__ import annotations

import pytest

from retort.chat.budget import Budget, Prices
from retort.core.grading import RubricPlan
from retort.preflight.rubrics import rubric_purposes
from retort.preflight.spending import Forecast, Purpose, forecast, spending_check

#: As `ropd`: a rubric for each group, and its rollouts verified one by one; references are there for a tenth.
ASKED = (
    Purpose("reference", calls=0.1 * 4, prompt_tokens=200, completion_tokens=1000),
    Purpose("rubric", calls=1, prompt_tokens=9000, completion_tokens=1500),
    Purpose("verdicts", calls_each=1, prompt_tokens=2000, completion_tokens=100),
)


def test_numbers_by_hand() -> None:
    found = forecast(320, 8, ASKED, Prices(prompt=2.0, completion=10.0))
    assert found.calls == pytest.approx(320 * (0.4 + 1 + 8))
    assert found.prompt_tokens == pytest.approx(320 * (0.4 * 200 + 9000 + 8 * 2000))
    assert found.completion_tokens == pytest.approx(320 * (0.4 * 1000 + 1500 + 8 * 100))
    assert found.money == pytest.approx((found.prompt_tokens * 2 + found.completion_tokens * 10) / 1e6)
    assert found.line == "3,010 calls, 8,030,000 tokens read and 864,000 generated, 24.7 in money"


def test_without_prices_there_is_no_money() -> None:
    found = forecast(10, 2, ASKED)
    assert found.money is None
    assert "money" not in found.line
    assert forecast(10, 2, ()) == Forecast(0, 0, 0)


@pytest.mark.parametrize(
    ("budget", "setting", "steps"),
    [
        (Budget(calls=1504), "judge.budget_calls = 1504", 5),
        (Budget(tokens=889_000), "judge.budget_tokens = 889000", 1),
        (Budget(money=12.0), "judge.budget_money = 12", 4),
        (Budget(calls=1504, money=0.5), "judge.budget_calls = 1504", 0),
    ],
)
def test_a_budget_that_ends_the_run_is_told_before(budget: Budget, setting: str, steps: int) -> None:
    prices = Prices(2.0, 10.0)
    check = spending_check(forecast(320, 8, ASKED, prices), budget, prices, steps=10, who="some model")
    assert check.verdict == "warn"
    assert f"{setting} will end the run after about {steps} step" in check.saw
    assert dict(check.values)["calls"] == pytest.approx(3008)


def test_a_budget_that_suffices_is_well() -> None:
    check = spending_check(forecast(320, 8, ASKED), Budget(calls=4000), steps=10, who="some model")
    assert check.verdict == "ok"
    assert check.saw.startswith("some model: about 3,010 calls")


@pytest.mark.parametrize(("per_call", "calls", "each"), [(None, 1, 12), (1, 12, 1), (5, 3, 4)])
def test_a_rubric_asks_for_answers_once_and_for_verdicts_in_so_many_calls(
    per_call: int | None, calls: int, each: int
) -> None:
    plan = RubricPlan(references=4, per_call=per_call)
    reference, rubric, verdicts = rubric_purposes(plan, samples=8, question=10, answer=100, visits=4)
    assert (reference.calls, rubric.calls, verdicts.calls) == (1, 1, calls), "each prompt is come to four times"
    assert rubric.prompt_tokens - (verdicts.prompt_tokens - each * 100) == 12 * 100 - 700
    assert verdicts.completion_tokens == each * 40
