"""Findings: what a check saw, why it matters, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "warn", "fatal"]
_ORDER: tuple[Verdict, ...] = ("ok", "warn", "fatal")


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Short name.
        verdict: `ok`, `warn` (it will run, but read this) or `fatal` (what comes out would not be what was asked for).
        saw: What was measured, with units.
        why: Why it matters.
        remedy: What to do; empty where nothing needs doing.
        values: The numbers behind it.
        table: Rows of a table that belongs to `saw`, the first of them its head; empty where there is none.
    """

    name: str
    verdict: Verdict
    saw: str
    why: str
    remedy: str = ""
    values: tuple[tuple[str, float], ...] = ()
    table: tuple[tuple[str, ...], ...] = ()

    @property
    def line(self) -> str:
        """The finding and its remedy in one line."""
        return f"{self.name}: {self.saw}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Examination:
    """All checks of a pair.

    Attributes:
        checks: In the order in which they were made.
        quick: Whether those that generate were left out.
    """

    checks: tuple[Check, ...]
    quick: bool = False

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all checks."""
        return worst([check.verdict for check in self.checks])

    def of(self, verdict: Verdict) -> tuple[Check, ...]:
        """The checks with a verdict."""
        return tuple(check for check in self.checks if check.verdict == verdict)

    def __getitem__(self, name: str) -> Check:
        """The check of a name."""
        found = next((check for check in self.checks if check.name == name), None)
        if found is None:
            raise KeyError(f"no check {name!r}; there are {', '.join(check.name for check in self.checks)}")
        return found

    def __iter__(self) -> Iterator[Check]:
        """All checks."""
        return iter(self.checks)

    def plain(self) -> dict[str, Any]:
        """The examination as plain values for JSON."""
        rows = [{**asdict(check), "values": dict(check.values)} for check in self.checks]
        for row in rows:
            if not row["table"]:
                del row["table"]
        return {"verdict": self.verdict, "quick": self.quick, "checks": rows}


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst of some verdicts; `ok` of none."""
    return _ORDER[max((_ORDER.index(verdict) for verdict in verdicts), default=0)]
