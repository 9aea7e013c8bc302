"""Where student and teacher disagree: entropies, and the divergences by place and by the teacher's entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from retort.report.alike import tables
from retort.report.by_turn import turn_label
from retort.report.curves import COLORS
from retort.report.groups import Group, over_seeds
from retort.report.plots import Series, plot
from retort.report.read import RunFiles, as_object, number
from retort.report.result import AFTER, BEFORE, TEACHER, WHO_COLORS
from retort.report.words import escape

#: Neighbouring bins are put together until each holds this many tokens: fewer say nothing.
FEWEST = 30


def profiles_section(groups: Sequence[Group]) -> str:
    """The section on where the disagreement lies, measured on held-out prompts; empty if it was not measured."""
    several = len(groups) > 1
    split = [(table.name, _figures(table.groups, several)) for table in tables([g for g in groups if g.whos()])]
    split = [(name, figures) for name, figures in split if figures]
    if not split:
        return ""
    on = "<h3 class=on>On {}</h3>" if len(split) > 1 else ""
    shown = "".join(f'{on.format(escape(name))}<div class="plots">{figures}</div>' for name, figures in split)
    return (
        '<section aria-labelledby="where"><h2 id="where">Where they disagree</h2>'
        '<p class="muted">On every token of each model’s own held-out completions, with exact divergences. '
        f"Bins with fewer than {FEWEST} tokens are drawn together with their neighbours.</p>"
        f"{shown}</section>"
    )


def _figures(groups: Sequence[Group], several: bool) -> str:
    """Of runs that were evaluated alike; `several`: of how many the page is."""
    return "".join(
        (
            _histogram(groups, several),
            _averages(groups, several, "teacher_entropy", "student_entropy", "Student’s entropy by the teacher’s"),
            _averages(groups, several, "teacher_entropy", "forward_kl", "Forward KL by the teacher’s entropy"),
            _averages(groups, several, "teacher_entropy", "reverse_kl", "Reverse KL by the teacher’s entropy"),
            _averages(groups, several, "position", "forward_kl", "Forward KL along the completion"),
            _averages(groups, several, "position", "reverse_kl", "Reverse KL along the completion"),
            _averages(groups, several, "turn", "student_entropy", "Own entropy by turn"),
            _averages(groups, several, "turn", "forward_kl", "Forward KL by turn"),
            _averages(groups, several, "turn", "reverse_kl", "Reverse KL by turn"),
        )
    )


def _profile(run: RunFiles, who: str, part: str) -> Mapping[str, Any]:
    return as_object(as_object(as_object(run.eval.get("profile")).get(who)).get(part))


def _numbers(values: object) -> list[float | None]:
    return [number(value) for value in values] if isinstance(values, list) else []


# --- the histogram ---


def _histogram(groups: Sequence[Group], several: bool) -> str:
    """Shares of tokens by the entropy of whoever wrote them, and by the teacher's at the student's tokens."""
    whos = [AFTER] if several else [BEFORE, AFTER]
    series = [
        series
        for who in whos
        for group in groups
        if (series := _shares(group, who, "student_entropy", group.name if several else who, several))
    ]
    if not series:
        return ""
    group = groups[0]
    teacher = _shares(group, AFTER, "teacher_entropy", "teacher, at the student’s tokens", several)
    if teacher is not None:
        series.append(Series(teacher.label, teacher.points, 6 if several else WHO_COLORS[TEACHER], 1 if several else 0))
    return plot(
        "Entropy of each token",
        "share of tokens, logarithmic",
        series,
        kind="share",
        x_label=f"entropy, nats{_open_end(groups)}",
        smooth=False,
        log=True,
        stairs=_width(groups),
        values=False,
    )


def _open_end(groups: Sequence[Group]) -> str:
    """Words on the last bin, where anything fell into it: it has no upper end."""
    for run in (run for group in groups for run in group.runs):
        for who in (BEFORE, AFTER):
            found = _profile(run, who, "histogram")
            lower = _numbers(found.get("from"))
            last = [_numbers(found.get(name))[-1:] for name in ("student_entropy", "teacher_entropy")]
            if lower and any(count[0] for count in last if count):
                return f" (the last bin: {lower[-1] or 0:g} and more)"
    return ""


def _width(groups: Sequence[Group]) -> float:
    """Of a bin of the histogram."""
    for run in (run for group in groups for run in group.runs):
        lower = _numbers(_profile(run, AFTER, "histogram").get("from"))
        if len(lower) > 1 and lower[0] is not None and lower[1] is not None:
            return lower[1] - lower[0]
    return 0.1


def _shares(group: Group, who: str, name: str, label: str, several: bool) -> Series | None:
    curves: list[dict[float, float]] = []
    for run in group.runs:
        found = _profile(run, who, "histogram")
        lower, counts = _numbers(found.get("from")), _numbers(found.get(name))
        counts = [max(count or 0.0, 0.0) for count in counts]
        total = sum(counts)
        if total and len(lower) == len(counts):
            curves.append({x: count / total for x, count in zip(lower, counts, strict=True) if x is not None})
    points, _ = over_seeds(curves)
    if not points:
        return None
    return Series(label, points, group.color % COLORS if several else WHO_COLORS[who])


# --- averages in bins ---


def _averages(groups: Sequence[Group], several: bool, axis: str, name: str, title: str) -> str:
    series: list[Series] = []
    for who in [AFTER] if several else [BEFORE, AFTER]:
        for group in groups:
            points, band = over_seeds(_curves(group.runs, who, axis, name), (0.0, math.inf))
            if points:
                label = group.name if several else who
                color = group.color % COLORS if several else WHO_COLORS[who]
                series.append(Series(label, points, color, band=band))
    if not series:
        return ""
    return plot(title, "nats", series, smooth=False, values=False, **_axis(axis, name, series))


def _axis(axis: str, name: str, series: list[Series]) -> dict[str, Any]:
    if axis == "teacher_entropy":
        if name == "student_entropy":
            last = max(x for one in series for x, _ in one.points)
            series.append(Series("as much as the teacher", [(0.0, 0.0), (last, last)], 6, 1))
        return {"x_label": "teacher’s entropy, nats"}
    if axis == "turn":
        last = max(x for one in series for x, _ in one.points)
        return {"x_label": turn_label(last), "x_range": (1, last)}
    places = sorted({x for one in series for x, _ in one.points})
    # Places by themselves, or bins that double every two: either way one step of the axis each.
    return {"x_label": "token of the completion, from 1", "x_ticks": places, "x_names": [f"{x + 1:g}" for x in places]}


def _curves(runs: Sequence[RunFiles], who: str, axis: str, name: str) -> list[dict[float, float]]:
    """Each run's means in bins that all of them share: thin neighbours are put together until the bins hold enough."""
    profiles = [found for run in runs if (found := _profile(run, who, f"by_{axis}"))]
    if not profiles:
        return []
    lower = max(([x or 0.0 for x in _numbers(found.get("from"))] for found in profiles), key=len)
    tokens = [[max(count or 0.0, 0.0) for count in _numbers(found.get("tokens"))] for found in profiles]
    means = [_numbers(found.get(name)) for found in profiles]
    if any(len(one) != len(other) or len(one) > len(lower) for one, other in zip(tokens, means, strict=True)):
        return []
    # Runs of an earlier version have fewer bins of entropy: the first ones of those there are now.
    tokens = [[*row, *[0.0] * (len(lower) - len(row))] for row in tokens]
    means = [[*row, *[None] * (len(lower) - len(row))] for row in means]
    pooled = [sum(counts) for counts in zip(*tokens, strict=True)]
    merged = axis == "teacher_entropy"
    curves: list[dict[float, float]] = [{} for _ in profiles]
    for x, inside in _bins(lower, pooled, FEWEST * len(profiles) if merged else 1, middle=merged):
        for curve, counts, values in zip(curves, tokens, means, strict=True):
            known = [(counts[i], values[i]) for i in inside if counts[i] > 0 and values[i] is not None]
            if known:
                curve[x] = sum(count * (value or 0.0) for count, value in known) / sum(count for count, _ in known)
    return curves


def _bins(
    lower: Sequence[float], pooled: Sequence[float], fewest: float, *, middle: bool
) -> list[tuple[float, list[int]]]:
    """Where each bin is drawn (the mean place of its tokens, or its lower end), and which small bins it is made of."""
    width = lower[1] - lower[0] if len(lower) > 1 else 0.0
    found: list[tuple[float, list[int]]] = []
    inside: list[int] = []
    for index in range(len(lower)):
        inside.append(index)
        weight = sum(pooled[i] for i in inside)
        if weight >= fewest:
            place = sum(pooled[i] * (lower[i] + width / 2) for i in inside) / weight
            found.append((round(place, 3) if middle else lower[index], inside))
            inside = []
    return found
