"""What a run will spend on a model that is asked, before its first call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from retort.chat.budget import Budget, Prices, Spent
from retort.errors import counted
from retort.preflight.findings import Check

__all__ = ["Forecast", "Purpose", "forecast", "spending_check"]

_WHY = "calls of a hosted model cost money, and a budget that is used up ends the run"


@dataclass(frozen=True)
class Purpose:
    """What one kind of question costs in a group of rollouts.

    Attributes:
        name: In a word: `rubric`, `verdicts`, `reference`, ...
        calls: Calls in each group; below 1 where only some groups need one.
        calls_each: Calls for each rollout of a group, besides.
        prompt_tokens: Tokens that a call reads.
        completion_tokens: Tokens that a call generates.
    """

    name: str
    calls: float = 0.0
    calls_each: float = 0.0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0

    def of(self, groups: int, samples: int) -> Forecast:
        """What all groups of a run cost."""
        calls = groups * (self.calls + samples * self.calls_each)
        return Forecast(calls, calls * self.prompt_tokens, calls * self.completion_tokens)


@dataclass(frozen=True)
class Forecast:
    """What is expected to be spent.

    Attributes:
        calls: Calls, each answered at the first attempt.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens generated.
        money: In the currency of the prices; None where there are none.
    """

    calls: float
    prompt_tokens: float
    completion_tokens: float
    money: float | None = None

    @property
    def line(self) -> str:
        """The numbers in words."""
        money = "" if self.money is None else f", {_rounded(self.money)} in money"
        return (
            f"{_rounded(self.calls)} calls, {_rounded(self.prompt_tokens)} tokens read and "
            f"{_rounded(self.completion_tokens)} generated{money}"
        )


def forecast(groups: int, samples: int, purposes: Sequence[Purpose], prices: Prices | None = None) -> Forecast:
    """What a run will spend if every question is answered at the first attempt.

    Args:
        groups: Groups of rollouts in the whole run: steps times prompts of a step.
        samples: Rollouts of a group.
        purposes: What is asked.
        prices: What tokens cost, where that is known.

    Example:
        >>> from retort.chat.budget import Prices
        >>> from retort.preflight.spending import Purpose, forecast
        >>> asked = [Purpose("rubric", calls=1, prompt_tokens=6000, completion_tokens=1000)]
        >>> asked += [Purpose("verdicts", calls_each=0.25, prompt_tokens=3000, completion_tokens=500)]
        >>> forecast(1000, 8, asked, Prices(1.0, 4.0)).line
        '3,000 calls, 12,000,000 tokens read and 2,000,000 generated, 20 in money'
    """
    parts = [purpose.of(groups, samples) for purpose in purposes]
    total = Forecast(*(sum(getattr(own, name) for own in parts) for name in ("calls", *_TOKENS)))
    if prices is None or prices == Prices():
        return total
    read, generated = total.prompt_tokens * prices.prompt, total.completion_tokens * prices.completion
    return replace(total, money=(read + generated) / 1e6)


def spending_check(found: Forecast, budget: Budget, prices: Prices | None = None, *, steps: int, who: str) -> Check:
    """The finding of `retort doctor`.

    Args:
        found: What the run will spend.
        budget: What it may spend.
        prices: What tokens cost, where that is known.
        steps: Steps of the run.
        who: Name of the model, for the message.
    """
    prices = prices or Prices()
    whole = Spent(round(found.calls), round(found.prompt_tokens), round(found.completion_tokens))
    limit = budget.exceeded_by(whole, prices)
    saw = f"{who}: about {found.line}, if every question is answered at once"
    values = (("calls", found.calls), *((name, getattr(found, name)) for name in _TOKENS))
    values += () if found.money is None else (("money", found.money),)
    if limit is None:
        return Check("spending", "ok", saw, _WHY, values=values)
    within = _steps_within(whole, budget, prices, steps)
    return Check(
        "spending",
        "warn",
        f"{saw}; judge.{limit} will end the run after about {counted(within, 'step')} of {steps}",
        _WHY,
        "raise it, or ask less: fewer steps, prompts or samples",
        values,
    )


_TOKENS = ("prompt_tokens", "completion_tokens")


def _steps_within(whole: Spent, budget: Budget, prices: Prices, steps: int) -> int:
    """Steps that the budget lasts for, if all cost the same."""
    shares = [
        limit / spent
        for limit, spent in (
            (budget.calls, whole.calls),
            (budget.tokens, whole.tokens),
            (budget.money, prices.of(whole)),
        )
        if limit is not None and spent
    ]
    return int(steps * min(shares, default=1.0))


def _rounded(number: float) -> str:
    """A number to three digits, for a forecast."""
    if number < 100:
        return f"{number:.3g}"
    digits = max(len(str(int(number))) - 3, 0)
    return f"{round(number, -digits):,.0f}"
