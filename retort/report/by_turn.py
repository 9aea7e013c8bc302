"""Plots over the turns of episodes: how curves rise or fall along an episode, and success by horizon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from retort.evaluate.profile import TURNS
from retort.report.groups import Group, Points, all_runs, over_seeds
from retort.report.plots import Series, plot

#: The part of a run's steps that is averaged at either end of it.
PART = 0.1
_TURN = "/turn-"
#: Curves that are drawn by turn among the others: name -> title, unit.
KNOWN: Mapping[str, tuple[str, str]] = {
    "reverse_kl": ("Reverse KL by turn", "nats per token"),
    "student_entropy": ("Student’s entropy by turn", "nats per token"),
    "teacher_entropy": ("Teacher’s entropy by turn", "nats per token"),
    "turn_weight": ("Weight by turn", "mean factor"),
}
_GREY = 6


def is_by_turn(key: str) -> bool:
    """Whether a metric is a curve's mean in one turn: it has its place in a plot by turn."""
    name, found, turn = key.rpartition(_TURN)
    return bool(name and found and turn.isdecimal() and int(turn) > 0)


def turn_label(longest: float) -> str:
    """The label of an axis of turns; the last bin holds all later turns, if there are any."""
    return f"turn ({TURNS}: and later ones)" if longest == TURNS else "turn"


def by_turn_figures(groups: Sequence[Group]) -> str:
    """The plots of `KNOWN`, and success by horizon; empty for runs without episodes."""
    figures = [_by_turn(groups, name, title, unit) for name, (title, unit) in KNOWN.items()]
    return "".join([*figures, _by_horizon(groups)])


def other_figures(groups: Sequence[Group]) -> list[str]:
    """Plots of all other curves that are known by turn, one each."""
    keys = dict.fromkeys(key for run in all_runs(groups) for key in run.curves if is_by_turn(key))
    names = dict.fromkeys(key.rpartition(_TURN)[0] for key in keys)
    return [_by_turn(groups, name, f"{name} by turn", "") for name in names if name not in KNOWN]


def _by_turn(groups: Sequence[Group], name: str, title: str, unit: str) -> str:
    """A curve over turns in the first and in the last steps."""
    several = len(groups) > 1
    series: list[Series] = []
    for place, label in enumerate(("first steps", "last steps")):
        for group in groups:
            points, band = over_seeds([_means(run.curves, name, last=place == 1) for run in group.runs])
            if not points:
                continue
            if several:
                series.append(Series(label, points, group.color % _GREY, 1 - place, group.name, band))
            else:
                series.append(Series(label, points, 0 if place else _GREY, 1 - place, band=band))
    if not any(len(one.points) > 1 for one in series):
        return ""
    longest = max(turn for one in series for turn, _ in one.points)
    return plot(title, unit, series, x_label=turn_label(longest), x_range=(1, longest), smooth=False, values=False)


def _means(curves: Mapping[str, Points], name: str, *, last: bool) -> dict[float, float]:
    """The mean at each turn over the first or the last tenth of the steps that have turns, at least one step."""
    own = {
        int(key.rpartition(_TURN)[2]): points
        for key, points in curves.items()
        if is_by_turn(key) and key.rpartition(_TURN)[0] == name
    }
    steps = sorted({step for points in own.values() for step, _ in points})
    count = max(1, round(PART * len(steps)))
    chosen = set(steps[-count:] if last else steps[:count])
    found: dict[float, float] = {}
    for turn, points in sorted(own.items()):
        if values := [y for step, y in points if step in chosen]:
            found[turn] = sum(values) / len(values)
    return found


def _by_horizon(groups: Sequence[Group]) -> str:
    """Success at each horizon of a curriculum, over the steps that had it."""
    series: list[Series] = []
    for group in groups:
        points, band = over_seeds([_at_horizon(run.curves) for run in group.runs], (0.0, 1.0))
        if len(points) > 1:
            series.append(Series(group.name if len(groups) > 1 else "", points, group.color % _GREY, band=band))
    if not series:
        return ""
    return plot(
        "Success by horizon",
        "share of episodes",
        series,
        kind="share",
        x_label="horizon, turns",
        smooth=False,
        values=False,
    )


def _at_horizon(curves: Mapping[str, Points]) -> dict[float, float]:
    success = dict(curves.get("success", ()))
    found: dict[float, list[float]] = {}
    for step, horizon in curves.get("horizon", ()):
        if step in success:
            found.setdefault(horizon, []).append(success[step])
    return {horizon: sum(values) / len(values) for horizon, values in found.items()}
