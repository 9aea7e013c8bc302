"""Recorded trajectories of training: one row each, with a cell for every decided step, shaded by a divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    known = [(run, row) for run, row in recorded if _values(row, name)]
    known = [known[index] for index in spread(len(known), MOST_ROWS)]
    largest = scale([value for _, row in known for value in _values(row, name) if value is not None])
    several = len(groups) > 1
    head = [*(["Run"] if several else []), "Training step", "Prompt", "Sample", "Reward", "Mean", "Each denoising step"]
    cells = "".join(f'<th scope="col"{_left(title)}>{title}</th>' for title in head)
    body = "".join(_row(run, row, name, largest, several) for run, row in known)
    return (
        f"<details><summary>{len(known)} recorded trajectories, step by step</summary>"
        f'<p class="muted">Shaded by {SHADED[name]} in nats, strongest from {largest:.3g}; noise is on the left.</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Recorded trajectories">'
        f'<table class="by-step"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _left(title: str) -> str:
    return ' class="left"' if title in ("Prompt", "Each denoising step") else ""


def _values(row: Mapping[str, Any], name: str) -> list[float | None]:
    """A value for each decided step; none where there is no number at all."""
    values = [number(value) for value in as_list(as_object(row.get("columns")).get(name))[:MOST_STEPS]]
    return values if any(value is not None for value in values) else []


def _row(run: RunFiles, row: Mapping[str, Any], name: str, largest: float, several: bool) -> str:
    values = _values(row, name)
    known = [value for value in values if value is not None]
    cells = "".join(_cell(index, value, largest) for index, value in enumerate(values, 1))
    step, member, reward = (number(row.get(key)) for key in ("step", "member", "reward"))
    shown = [
        *([f'<td class="left">{escape(run.name)}</td>'] if several else []),
        f"<td>{'–' if step is None else f'{step:g}'}</td>",
        f'<td class="left">{escape(str(row.get("prompt", ""))[:MOST_TEXT])}</td>',
        f"<td>{'–' if member is None else f'{member + 1:g}'}</td>",
        f"<td>{'–' if reward is None else f'{reward:.2f}'}</td>",
        f"<td>{sum(known) / len(known):.4f}</td>",
        f'<td class="left"><span class="cells">{cells}</span></td>',
    ]
    return f"<tr>{''.join(shown)}</tr>"


def _cell(step: int, value: float | None, largest: float) -> str:
    if value is None:
        return f'<i class="none" title="step {step}: no noise, not decided"></i>'
    kind = "n" if value < 0 else "p"
    shade = min(_SHADES, int(_SHADES * abs(value) / largest + 0.5))
    return f'<i class="{kind}{shade}" title="step {step}: {value:.3g} nats"></i>'
