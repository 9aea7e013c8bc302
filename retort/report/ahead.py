"""What a run shows whose batches are written ahead: who was idle, and how old the tokens are that it learnt from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from retort.report.groups import Group, Points, over_seeds
from retort.report.plots import Series, plot

#: Plots over steps: title, unit, metrics with their labels, kind.
IDLE = (
    "Idle",
    "share of the step",
    {"idle/trainer": "trainer", "idle/generator": "generator", "idle/teacher": "teacher"},
    "share",
)
STALENESS = (
    "Staleness",
    "optimizer steps between writing and learning",
    {"staleness/mean": "mean over tokens", "staleness/max": "oldest"},
)
PARTIAL = (
    "Unended completions",
    "completions of a step",
    {
        "partial/dropped": "dropped",
        "partial/open": "go on in the next step",
        "partial/waiting": "ended, before others of their group",
    },
)
SEGMENTS = ("Segments", "segments of a learnt completion", {"partial/segments": "mean"})
_TOKENS = "staleness/tokens/"
_COLORS = 6


def is_of_staleness(key: str) -> bool:
    """Whether a metric is the number of tokens of one staleness: it has its place in the histogram."""
    return key.startswith(_TOKENS) and key.removeprefix(_TOKENS).isdecimal()


def staleness_figure(groups: Sequence[Group]) -> str:
    """A histogram of how old the learnt tokens were, over all steps; empty where no batch was written ahead."""
    several, found = len(groups) > 1, list[Series]()
    for group in groups:
        points, _ = over_seeds([_shares(run.curves) for run in group.runs])
        if points:
            # The last bin ends where one more would begin.
            points = [*points, (points[-1][0] + 1, points[-1][1])]
            found.append(Series(group.name if several else "", points, group.color % _COLORS if several else 0))
    if not found:
        return ""
    ends = [x for one in found for x, _ in one.points]
    return plot(
        "Staleness of the learnt tokens",
        "share of the tokens",
        found,
        kind="share",
        x_label="optimizer steps behind",
        x_range=(min(ends), max(ends)),
        smooth=False,
        stairs=1.0,
        values=False,
    )


def _shares(curves: Mapping[str, Points]) -> dict[float, float]:
    """The share of a run's tokens of each staleness, from 0 to the largest."""
    tokens = {
        int(key.removeprefix(_TOKENS)): sum(count for _, count in points)
        for key, points in curves.items()
        if is_of_staleness(key)
    }
    total = sum(tokens.values())
    return {float(age): tokens.get(age, 0.0) / total for age in range(max(tokens) + 1)} if total else {}
