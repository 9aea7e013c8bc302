"""Runs that differ only in their seed are one experiment: their mean, and what another seed would change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any

from retort.evaluate import Estimate
from retort.evaluate.measures import bounds
from retort.report.read import RunFiles, as_object, number

#: Settings that do not change what is learnt or how it is evaluated.
_BESIDE = ("out", "seed", "threads", "tracker", "eval.teacher", "eval.every", "record.", "checkpoint.")

Points = list[tuple[float, float]]

#: The range of a number whose range is not known.
_ANYTHING = (-math.inf, math.inf)


@dataclass(frozen=True)
class Group:
    """One experiment: a run, or several that differ in their seed.

    Attributes:
        name: Name on the page.
        runs: At least one.
        color: Index into the page's palette.
    """

    name: str
    runs: Sequence[RunFiles]
    color: int = 0

    @property
    def several(self) -> bool:
        """Whether the experiment has several seeds."""
        return len(self.runs) > 1

    def cell(self, who: str, metric: str) -> Mapping[str, Any]:
        """One cell of the before/after table: over seeds if there are several, else over problems."""
        cells = [cell(run, who, metric) for run in self.runs]
        if not self.several:
            return cells[0]
        values = [value for found in cells if (value := number(found.get("value"))) is not None]
        ends = [(number(found.get("low")), number(found.get("high"))) for found in cells]
        known = [(low, high) for low, high in ends if low is not None and high is not None]
        over = _plain(values, _range(metric, known))
        if "n" in over and "low" not in over and known:
            # Seeds that agree to the last digit (all at 0 %) say nothing of how exactly that is known: problems do.
            return {**over, "low": min(low for low, _ in known), "high": max(high for _, high in known)}
        return over

    def whos(self) -> list[str]:
        """Rows of the before/after table (models that were evaluated), in order."""
        return list(dict.fromkeys(str(row.get("who", "?")) for run in self.runs for row in rows(run)))

    def metrics(self) -> list[str]:
        """Measures that were taken, accuracies first."""
        found = dict.fromkeys(
            key for run in self.runs for row in rows(run) for key in row if isinstance(row[key], Mapping)
        )
        return sorted(found, key=lambda name: (not name.startswith("avg@"), not name.startswith("pass@")))

    def seeds(self) -> str:
        """The seeds as text; unfinished runs do not count."""
        ended = [run for run in self.runs if cell(run, "student after", "length")] or self.runs
        found = [str(run.config.get("seed", "?")) for run in ended]
        if len(found) == 1:
            return f"seed {found[0]}"
        weak = ": weak" if len(found) <= 3 else ""
        return f"{len(found)} seeds ({', '.join(found)}){weak}"


def rows(run: RunFiles) -> list[Mapping[str, Any]]:
    """Rows of a run's table."""
    found = run.eval.get("rows")
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def cell(run: RunFiles, who: str, metric: str) -> Mapping[str, Any]:
    """One cell of a run's table."""
    return next((as_object(row.get(metric)) for row in rows(run) if row.get("who") == who), {})


def seed_text(run: RunFiles) -> str:
    """A run's seed as text, whatever the file holds."""
    return str(run.config.get("seed"))


def over_seeds(
    curves: Sequence[Mapping[float, float]], limits: tuple[float, float] = _ANYTHING
) -> tuple[Points, Points]:
    """The mean of curves wherever at least half of them have a value, and its interval within its range."""
    curves = [curve for curve in curves if curve]
    if len(curves) <= 1:
        return sorted(curves[0].items()) if curves else [], []
    points: Points = []
    band: Points = []
    for x in sorted({x for curve in curves for x in curve}):
        values = [curve[x] for curve in curves if x in curve]
        interval = Estimate.over_runs(values)
        if interval is not None and 2 * len(values) >= len(curves):
            points.append((x, interval.value))
            interval = interval.within(*limits)
            band.append((interval.low, interval.high))
    return points, band


def paired(group: Group, other: Group, who: str, metric: str) -> Mapping[str, Any]:
    """`group` minus `other`, within each seed that both have: mean, interval over seeds, and how many seeds (`n`).

    There is no interval where the difference is the same in all of them.
    """
    ours, theirs = (
        {seed_text(run): number(cell(run, who, metric).get("value")) for run in side.runs} for side in (group, other)
    )
    pairs = [(value, theirs.get(seed)) for seed, value in ours.items()]
    return _plain([mine - yours for mine, yours in pairs if mine is not None and yours is not None])


def _range(metric: str, ends: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The range of a measure; one of a verifier's is a share if the intervals of all runs lie within 0 and 1."""
    known = bounds(metric)
    share = bool(ends) and all(low >= 0 and high <= 1 for low, high in ends)
    return (0.0, 1.0) if known == _ANYTHING and share else known


def _plain(values: Sequence[float], limits: tuple[float, float] = _ANYTHING) -> Mapping[str, Any]:
    interval = Estimate.over_runs(values)
    if interval is None:
        return {"value": values[0]} if values else {}
    if max(values) - min(values) <= 1e-9 * max(map(abs, values)):  # no spread was seen, which is no certainty
        return {"value": values[0], "n": len(values)}
    return {**interval.within(*limits).plain(), "n": len(values)}


# --- which runs belong together, and what to call them ---


def grouped(runs: Sequence[RunFiles]) -> list[Group]:
    """Runs in the order given; those that differ only in their seed together, unless they were named one by one."""
    found: dict[object, list[RunFiles]] = {}
    for index, run in enumerate(runs):
        same = found.get(_identity(run), []) if run.config else []
        # The same seed again is no further seed: somebody compares two versions of the code, say.
        again = any(seed_text(run) == seed_text(other) for other in same)
        alone = run.alone or again or not run.config
        found.setdefault(index if alone else _identity(run), []).append(run)
    members = list(found.values())
    names = _names(members)
    return [Group(name, inside, index) for index, (name, inside) in enumerate(zip(names, members, strict=True))]


def leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _identity(run: RunFiles) -> tuple[tuple[str, str], ...]:
    """The settings that identify a run, but for its seed; models or files named after the seed count as the same."""
    ending = f"-{run.config.get('seed')}"
    flat = {key: str(value) for key, value in leaves(run.config).items() if not key.startswith(_BESIDE)}
    if as_object(run.config.get("eval")).get("data") and run.eval:  # else each seed holds out its own
        flat["held-out prompts"] = str(run.eval.get("held_out"))
    return tuple(sorted((key, value.removesuffix(ending)) for key, value in flat.items()))


def method_name(run: RunFiles) -> str:
    """Name of a run's method."""
    method = run.config.get("method", "")
    return str(method.get("name", "")) if isinstance(method, Mapping) else str(method)


def _names(members: Sequence[Sequence[RunFiles]]) -> list[str]:
    """Runs that stand alone keep their own names; experiments take the shortest names that tell them apart."""
    if all(len(inside) == 1 for inside in members):
        return [inside[0].name for inside in members]
    methods = [method_name(inside[0]) for inside in members]
    for candidates in (methods, _tails(members)):
        if len(set(candidates)) == len(candidates) and all(candidates):
            return candidates
    return [f"{name} ({index})" for index, name in enumerate(methods, 1)]


def _tails(members: Sequence[Sequence[RunFiles]]) -> list[str]:
    """The shortest ends of the groups' common folders that tell the groups apart."""
    folders = [Path(commonpath([str(run.folder.resolve()) for run in inside])) for inside in members]
    parts = [folder.parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [""] * len(members)


def all_runs(groups: Iterable[Group]) -> list[RunFiles]:
    """All runs of all groups."""
    return [run for group in groups for run in group.runs]
