"""Recorded trajectories of training: one row each, with a cell for every decided step, shaded by a divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retort.report.axes import label
from retort.report.groups import Group, all_runs
from retort.report.read import RunFiles, as_list, as_object, number, spread
from retort.report.rollouts import scale
from retort.report.words import escape

#: Shaded is the first of these that there is: name -> in words.
SHADED: Mapping[str, str] = {
    "reverse_kl": "reverse KL",
    "distillation.value": "the loss",
    "sampled_reverse_kl": "sampled reverse KL",
}
#: Most trajectories of a page, most steps of one, and most characters of a prompt.
MOST_ROWS, MOST_STEPS, MOST_TEXT = 40, 64, 160
_SHADES = 5


def paths_table(groups: Sequence[Group]) -> str:
    """A table of recorded trajectories, closed at first; empty where none has a value at its steps."""
    recorded = [(run, row) for run in all_runs(groups) for row in run.rollouts]
    name = next((one for one in SHADED if any(_values(row, one) for _, row in recorded)), None)
    if name is None:
        return ""
    paths = [(run, row, own) for run, row in recorded if (own := _values(row, name))]
    paths = [paths[index] for index in spread(len(paths), MOST_ROWS)]
    steps = sorted({step for _, _, own in paths for step in own}, reverse=True)[:MOST_STEPS]
    scales = {step: scale([own[step] for _, _, own in paths if step in own]) for step in steps}
    several = len(groups) > 1
    head = [*(["Run"] if several else []), "Training step", "Prompt", "Sample", "Reward", "Mean", "Each denoising step"]
    cells = "".join(f'<th scope="col"{_left(title)}>{title}</th>' for title in head)
    body = "".join(_row(run if several else None, row, own, scales) for run, row, own in paths)
    return (
        f"<details><summary>{len(paths)} recorded trajectories, step by step</summary>"
        f'<p class="muted">Shaded by {SHADED[name]}, each step by its own scale: only one in twenty exceeds the '
        "strongest shade. Noise is on the left; a step without noise has an empty cell.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Recorded trajectories">'
        f'<table class="by-step"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _left(title: str) -> str:
    return ' class="left"' if title in ("Prompt", "Each denoising step") else ""


def _values(row: Mapping[str, Any], name: str) -> dict[float, float]:
    """A value for each decided step, by its noise level; by minus its number where levels are not recorded."""
    values = [number(value) for value in as_list(as_object(row.get("columns")).get(name))]
    levels = [number(value) for value in as_list(row.get("sigmas"))]
    keys = levels if len(levels) == len(values) else [-float(step) for step in range(1, len(values) + 1)]
    found = {key: value for key, value in zip(keys, values, strict=True) if key is not None and value is not None}
    return dict(list(found.items())[:MOST_STEPS])


def _row(
    run: RunFiles | None, row: Mapping[str, Any], own: Mapping[float, float], scales: Mapping[float, float]
) -> str:
    cells = "".join(_cell(step, own.get(step), largest) for step, largest in scales.items())
    step, member, reward = (number(row.get(key)) for key in ("step", "member", "reward"))
    shown = [
        *([] if run is None else [f'<td class="left">{escape(run.name)}</td>']),
        f"<td>{'–' if step is None else f'{step:g}'}</td>",
        f'<td class="left">{escape(str(row.get("prompt", ""))[:MOST_TEXT])}</td>',
        f"<td>{'–' if member is None else f'{member + 1:g}'}</td>",
        f"<td>{'–' if reward is None else f'{reward:.2f}'}</td>",
        f"<td>{label(sum(own.values()) / len(own), 'number')}</td>",
        f'<td class="left"><span class="cells">{cells}</span></td>',
    ]
    return f"<tr>{''.join(shown)}</tr>"


def _cell(step: float, value: float | None, largest: float) -> str:
    where = f"noise level {step:.3g}" if step >= 0 else f"step {-step:g}"
    if value is None:
        return f'<i class="none" title="{where}: not decided"></i>'
    kind = "n" if value < 0 else "p"
    shade = min(_SHADES, int(_SHADES * abs(value) / largest + 0.5))
    return f'<i class="{kind}{shade}" title="{where}: {value:.3g} nats"></i>'
