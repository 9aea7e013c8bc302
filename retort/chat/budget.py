"""What may be spent on a model that talks: calls, tokens, money."""

from __future__ import annotations

from dataclasses import dataclass

from retort.chat.base import ChatRequest

__all__ = ["Budget", "Prices", "Spent", "at_most"]

#: Tokens that a chat template may add to a message, and at both ends of a conversation.
_TEMPLATE = 64


@dataclass(frozen=True)
class Spent:
    """What was spent, or may be.

    Attributes:
        calls: Requests that were made; those that nobody answered count, too.
        prompt_tokens: Tokens read, as the model counts them.
        completion_tokens: Tokens generated.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Prices:
    """Prices in any currency.

    Attributes:
        prompt: Of a million tokens read.
        completion: Of a million tokens generated.

    Example:
        >>> from retort.chat.budget import Prices, Spent
        >>> Prices(prompt=2.0, completion=8.0).of(Spent(calls=3, prompt_tokens=500_000, completion_tokens=250_000))
        3.0
    """

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, spent: Spent) -> float:
        """What was spent, as money."""
        return (spent.prompt_tokens * self.prompt + spent.completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Budget:
    """The most that may be spent; None: no limit.

    Attributes:
        calls: Requests.
        tokens: Tokens read and generated, together.
        money: In the currency of the prices.

    Example:
        >>> from retort.chat.budget import Budget, Prices, Spent
        >>> Budget(calls=10).exceeded_by(Spent(calls=11), Prices())
        'budget_calls = 10'
    """

    calls: int | None = None
    tokens: int | None = None
    money: float | None = None

    def exceeded_by(self, spent: Spent, prices: Prices) -> str | None:
        """The limit that so much is beyond, as its setting and value; None where it is within all."""
        if self.calls is not None and spent.calls > self.calls:
            return f"budget_calls = {self.calls}"
        if self.tokens is not None and spent.tokens > self.tokens:
            return f"budget_tokens = {self.tokens}"
        if self.money is not None and prices.of(spent) > self.money:
            return f"budget_money = {self.money:g}"
        return None

    def shared(self, ways: int, spent: Spent, prices: Prices) -> Budget:
        """The budget of one of several that spend at the same time: what is left is divided evenly.

        Args:
            ways: How many spend.
            spent: What was spent before.
            prices: See `Prices`.
        """

        def part(limit: float | None, before: float) -> float | None:
            return None if limit is None else before + max(limit - before, 0) / ways

        calls, tokens = part(self.calls, spent.calls), part(self.tokens, spent.tokens)
        money = part(self.money, prices.of(spent))
        return Budget(None if calls is None else int(calls), None if tokens is None else int(tokens), money)


def at_most(request: ChatRequest) -> Spent:
    """The most that a request can cost: a token is at least one byte of text."""
    texts = [message.content for message in request.messages]
    texts += [str(dict(message.extra)) for message in request.messages if message.extra]
    texts += [] if request.schema is None else [str(request.schema)]
    read = sum(len(text.encode("utf-8", "replace")) for text in texts) + _TEMPLATE * (len(request.messages) + 1)
    return Spent(1, read, request.max_tokens)
