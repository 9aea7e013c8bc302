"""Denoising step by denoising step: how far the student is from the teacher at each, held out and during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retort.report.alike import tables
from retort.report.curves import COLORS
from retort.report.flow_words import of_model, step_of
from retort.report.groups import Group, Points, all_runs, over_seeds
from retort.report.plots import Series, plot
from retort.report.read import RunFiles, as_list, as_object, number, spread
from retort.report.recorded_paths import paths_table
from retort.report.result import AFTER, BEFORE, WHO_COLORS

#: The part of a run's steps that is averaged at either end of it.
PART = 0.1
#: Most denoising steps that have a curve of their own over training.
MOST_CURVES = 5
#: Curves that are drawn step by step: name -> title, unit.
KNOWN: Mapping[str, tuple[str, str]] = {
    "reverse_kl": ("Reverse KL by denoising step", "nats"),
    "sampled_reverse_kl": ("Sampled reverse KL by denoising step", "nats"),
    "forward_kl": ("Forward KL by denoising step", "nats"),
}
_GREY = 6
_AXIS = "denoising step, from noise to data"
#: A logarithmic axis where the largest value is so many times the smallest.
_FAR = 30.0


def steps_section(groups: Sequence[Group]) -> str:
    """The section about single denoising steps; empty where nothing was measured by step."""
    split = tables([group for group in groups if group.whos()])
    named = [f"on {table.name}" if len(split) > 1 else "on held-out prompts" for table in split]
    figures = [_held_out(table.groups, where, len(groups) > 1) for table, where in zip(split, named, strict=True)]
    figures += [_ends(groups, name) for name in _names(groups)]
    figures += [_over_training(groups, name) for name in _names(groups)]
    shown, recorded = "".join(figures), paths_table(groups)
    if not shown and not recorded:
        return ""
    return (
        '<section aria-labelledby="steps"><h2 id="steps">Step by step</h2>'
        '<p class="muted">The divergence between the student’s next latent and the teacher’s, at each denoising step '
        "that adds noise, on the student’s own trajectories. Step 1 begins with pure noise.</p>"
        f'<div class="plots">{shown}</div>{recorded}</section>'
    )


# --- held out ---


def _held_out(groups: Sequence[Group], where: str, several: bool) -> str:
    series: list[Series] = []
    for who in (BEFORE, AFTER):
        for group in groups:
            points, band = over_seeds([_by_step(run, who) for run in group.runs])
            if not points:
                continue
            if several:
                color = group.color % COLORS
                series.append(Series(who, points, color, int(who == BEFORE), group.name, band))
            else:
                series.append(Series(who, points, WHO_COLORS[who], band=band or _intervals(group.runs[0], who)))
    return _plot(f"Reverse KL {where}", "nats, by denoising step", series)


def _cells(run: RunFiles, who: str) -> Sequence[Any]:
    return as_list(of_model(run, who, "kl_by_step"))


def _by_step(run: RunFiles, who: str) -> dict[float, float]:
    """KL by the number of the step, from 1; a step is a number, or a number with its interval."""
    values = [number(cell.get("value") if isinstance(cell, Mapping) else cell) for cell in _cells(run, who)]
    return {float(step): value for step, value in enumerate(values, 1) if value is not None}


def _intervals(run: RunFiles, who: str) -> Points:
    """Low and high at each step that has a value; none unless all of them have both."""
    cells = [as_object(cell) for cell in _cells(run, who) if number(as_object(cell).get("value")) is not None]
    ends = [(number(cell.get("low")), number(cell.get("high"))) for cell in cells]
    known = [(low, high) for low, high in ends if low is not None and high is not None]
    return known if len(known) == len(_by_step(run, who)) else []


def _plot(title: str, unit: str, series: Sequence[Series]) -> str:
    """A plot over denoising steps; logarithmic where the values are far apart."""
    series = [one for one in series if one.points]
    if not any(len(one.points) > 1 for one in series):
        return ""
    log = _is_far([y for one in series for _, y in one.points])
    if log:  # a band that reaches below 0 has no lower end there
        series = [Series(one.label, one.points, one.color, one.dash, one.run) for one in series]
    ticks = sorted({x for one in series for x, _ in one.points})
    words = f"{unit}, logarithmic" if log else unit
    return plot(title, words, series, x_label=_AXIS, x_ticks=ticks, smooth=False, values=False, log=log)


# --- during training ---


def _names(groups: Sequence[Group]) -> list[str]:
    """Curves that are known by denoising step, those of `KNOWN` first."""
    steps = [step for run in all_runs(groups) for key in run.curves if (step := step_of(key))]
    found = dict.fromkeys(name for name, _ in steps)
    return [*(name for name in KNOWN if name in found), *(name for name in found if name not in KNOWN)]


def _curves(run: RunFiles, name: str) -> dict[int, Points]:
    """The curve at each step, by its number from 1."""
    own = {step[1]: points for key, points in run.curves.items() if (step := step_of(key)) and step[0] == name}
    first = 1 if 0 in own else 0
    return {step + first: own[step] for step in sorted(own)}


def _titled(name: str, when: str) -> tuple[str, str]:
    title, unit = KNOWN.get(name, (f"{name} by denoising step", ""))
    return title if when == "" else f"{title}, {when}", unit


def _ends(groups: Sequence[Group], name: str) -> str:
    """A curve over denoising steps in the first and in the last training steps."""
    several = len(groups) > 1
    series: list[Series] = []
    for last, label in ((False, "first steps of training"), (True, "last steps of training")):
        for group in groups:
            points, band = over_seeds([_means(_curves(run, name), last=last) for run in group.runs])
            if several:
                color = group.color % COLORS
                series.append(Series(label, points, color, int(not last), group.name, band))
            else:
                series.append(Series(label, points, 0 if last else _GREY, int(not last), band=band))
    return _plot(*_titled(name, "in training"), series)


def _means(curves: Mapping[int, Points], *, last: bool) -> dict[float, float]:
    """The mean at each denoising step over the first or the last tenth of the training steps that have any."""
    steps = sorted({step for points in curves.values() for step, _ in points})
    count = max(1, round(PART * len(steps)))
    chosen = set(steps[-count:] if last else steps[:count])
    found: dict[float, float] = {}
    for index, points in curves.items():
        if values := [y for step, y in points if step in chosen]:
            found[float(index)] = sum(values) / len(values)
    return found


def _over_training(groups: Sequence[Group], name: str) -> str:
    """Some denoising steps' curves over training, the first and the last among them."""
    curves = [[_curves(run, name) for run in group.runs] for group in groups]
    every = sorted({step for runs in curves for run in runs for step in run})
    chosen = [every[index] for index in spread(len(every), 2 if len(groups) > 1 else MOST_CURVES)]
    series: list[Series] = []
    for index, step in enumerate(chosen):
        for group, runs in zip(groups, curves, strict=True):
            points, band = over_seeds([dict(run.get(step, [])) for run in runs])
            if points and len(groups) > 1:
                series.append(Series(f"step {step}", points, group.color % COLORS, index, group.name, band))
            elif points:
                series.append(Series(f"step {step}", points, index % COLORS, band=band))
    if not series:
        return ""
    title, unit = _titled(name, "")
    log = _is_far([y for one in series for _, y in one.points])
    words = f"{unit}, at some denoising steps{', logarithmic' if log else ''}"
    return plot(f"{title.removesuffix(' by denoising step')} over training", words, series, log=log)


def _is_far(values: Sequence[float]) -> bool:
    """Whether values are so far apart that only a logarithmic axis shows them all."""
    return min(values) > 0 and max(values) > _FAR * min(values)
