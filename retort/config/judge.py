"""The settings of a model that is asked in conversation: it grades, compares, or generates references."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from retort.chat.asking import ATTEMPTS
from retort.chat.budget import Budget, Prices
from retort.chat.endpoint import KEY_VARIABLE, PATIENCE, TIMEOUT
from retort.config.sections import PathOrName, Section
from retort.wire import CONCURRENCY, is_url

__all__ = ["JudgeSection"]


class JudgeSection(Section):
    """A model that only talks, see docs/judges.md."""

    model: PathOrName | None = Field(
        default=None,
        description="who answers: address of a server of chat completions such as https://api.example.com/v1, model "
        "folder or hub name, or name of a model in [models]; null: nobody",
    )
    name: str | None = Field(
        default=None, min_length=1, max_length=1000, description="the model's name at the server; default: its only one"
    )
    key: str = Field(
        default=KEY_VARIABLE,
        pattern="^[A-Za-z_][A-Za-z0-9_]{0,99}$",
        description="environment variable that holds the server's key; the key itself is written nowhere",
    )
    timeout: float = Field(default=TIMEOUT, gt=0, le=86_400, description="seconds that one answer may take")
    patience: float = Field(
        default=PATIENCE,
        ge=0,
        le=1_000_000,
        description="seconds for which a request that failed is tried again; then there is no answer to it",
    )
    requests: int = Field(default=CONCURRENCY, ge=1, le=256, description="requests under way at once")
    attempts: int = Field(
        default=ATTEMPTS, ge=1, le=100, description="how often a question is asked until its answer can be read"
    )
    budget_calls: int | None = Field(
        default=None,
        ge=1,
        description="most calls of the run, which saves a checkpoint and ends before one more; null: no limit",
    )
    budget_tokens: int | None = Field(
        default=None,
        ge=1,
        description="most tokens that are read and generated; the run ends before a call may exceed it; null: no limit",
    )
    budget_money: float | None = Field(
        default=None,
        gt=0,
        description="most money, in the currency of the prices; the run ends before a call may exceed it; null: no "
        "limit",
    )
    price_prompt: float | None = Field(
        default=None, ge=0, description="price of a million tokens that are read; null: not said"
    )
    price_completion: float | None = Field(
        default=None, ge=0, description="price of a million tokens that are generated; null: not said"
    )
    references: PathOrName | None = Field(
        default=None,
        description="file with the teacher's answers, made by `retort references`, for methods that draw rubrics from "
        "them; null: the judge is asked for them",
    )
    replay: PathOrName | None = Field(
        default=None,
        description="judge.jsonl of another run (or its folder), from which alone questions are answered; null: "
        "the model is asked",
    )

    @field_validator("budget_calls", "budget_tokens", "budget_money", mode="before")
    @classmethod
    def _allows_something(cls, value: Any) -> Any:
        """Refuses a budget of 0 with its own words: some mean no limit by it."""
        if type(value) in (int, float) and value == 0:
            raise PydanticCustomError("budget", "a budget of 0 allows nothing; give more, or none for no limit")
        return value

    def moved(self, where: Callable[[str], str], models: Collection[str]) -> JudgeSection:
        """The section with its paths changed by `where`; addresses, and names of the run's models, stay."""
        model = self.model
        elsewhere = model is None or model in models or is_url(model)
        files = {name: where(path) for name in ("references", "replay") if (path := getattr(self, name)) is not None}
        return self.model_copy(update={"model": model if elsewhere else where(str(model)), **files})

    @property
    def budget(self) -> Budget:
        """What the run may spend."""
        return Budget(self.budget_calls, self.budget_tokens, self.budget_money)

    @property
    def prices(self) -> Prices:
        """What tokens cost; nothing, where it is not said."""
        return Prices(self.price_prompt or 0.0, self.price_completion or 0.0)
