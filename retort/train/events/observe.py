"""The observer protocol of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Observer(Protocol):
    """Watches a run; the command line draws, a library call may stay silent."""

    def summary(self, lines: Mapping[str, str], notes: list[str]) -> None:
        """Receives the start-up summary: what will be done, with what."""
        ...

    def phase(self, text: str, done: int, total: int) -> None:
        """Receives the progress of work other than training, such as an evaluation."""
        ...

    def step(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """Receives the metrics of a step."""
        ...

    def note(self, text: str) -> None:
        """Receives a warning, or where a file was written."""
        ...

    def table(self, results: Mapping[str, Any]) -> None:
        """Receives the before/after table."""
        ...


class Silent:
    """An observer that shows nothing."""

    def summary(self, lines: Mapping[str, str], notes: list[str]) -> None:
        """Does nothing."""

    def phase(self, text: str, done: int, total: int) -> None:
        """Does nothing."""

    def step(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def table(self, results: Mapping[str, Any]) -> None:
        """Does nothing."""
