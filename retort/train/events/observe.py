"""What a run tells whoever is watching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Observer(Protocol):
    """Watches a run; the command line draws, a library call may stay silent."""

    def summary(self, lines: Mapping[str, str], notes: list[str]) -> None:
        """The start-up summary: what will be done, with what."""
        ...

    def phase(self, text: str, done: int, total: int) -> None:
        """Something other than training is under way (judging a model)."""
        ...

    def step(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """A batch of rollouts has been learnt from."""
        ...

    def note(self, text: str) -> None:
        """A warning, or where something was written."""
        ...

    def table(self, results: Mapping[str, Any]) -> None:
        """The before/after table."""
        ...


class Silent:
    """Watches nothing."""

    def summary(self, lines: Mapping[str, str], notes: list[str]) -> None:
        """Nothing."""

    def phase(self, text: str, done: int, total: int) -> None:
        """Nothing."""

    def step(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def table(self, results: Mapping[str, Any]) -> None:
        """Nothing."""
