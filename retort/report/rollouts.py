"""Recorded rollouts, token by token, shaded by what was said about each token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from retort.report.read import RunFiles, number

#: Most tokens shown of one rollout.
MOST_TOKENS = 1000
LEVELS = 5
_BREAK = '<span class="muted">⏎</span>'
_GAP = "teacher − student log-prob"
#: The column shaded at first: the first of these that was recorded, else any.
_FIRST = (_GAP, "reverse_kl", "reverse.value")
_UNITS = (("logp", "nats"), ("log-prob", "nats"), ("entropy", "nats"), ("value", "nats"), ("kl", "nats"))


@dataclass(frozen=True)
class Column:
    """How one column is shaded, the same in every rollout of the page.

    Attributes:
        name: Of the column.
        scale: The size that gets the darkest shade: the 95th percentile of all sizes.
        signed: Whether it has both signs; if not, only the size is shaded.
        falling: Whether all of it is zero or below.
    """

    name: str
    scale: float
    signed: bool
    falling: bool

    @property
    def ends(self) -> tuple[str, str]:
        """What stands left and right of the colour scale."""
        if self.signed:
            return f"−{self.scale:.3g}", f"{self.scale:.3g} {_unit(self.name)} and beyond"
        sign = "−" if self.falling else ""
        return "0", f"{sign}{self.scale:.3g} {_unit(self.name)} and beyond"


def rollouts_section(runs: Sequence[RunFiles]) -> str:
    """The section with sample rollouts; empty if none was recorded."""
    shown = [(run.name, row, _columns(row)) for run in runs for row in run.rollouts]
    if not shown:
        return ""
    scales = [_scale(name, values) for name, values in _distinct([columns for _, _, columns in shown]).items()]
    preferred = {name: place for place, name in enumerate(_FIRST)}
    first = min(scales, key=lambda column: preferred.get(column.name, len(_FIRST)), default=None)
    several = len(runs) > 1
    blocks = [
        _rollout(run if several else "", row, columns, first, opened=index in (0, len(shown) - 1))
        for index, (run, row, columns) in enumerate(shown)
    ]
    picker = _picker(scales, first) if first else ""
    return (
        '<section aria-labelledby="rollouts"><h2 id="rollouts">Sample rollouts</h2>'
        f'<p class="muted">{len(shown)} of those recorded, from the beginning to the end of the run. '
        f"Point at a token for its numbers.</p>{picker}"
        f"{''.join(blocks)}</section>"
    )


def _columns(row: Mapping[str, Any]) -> dict[str, list[float | None]]:
    given = row.get("columns")
    if not isinstance(given, Mapping):
        return {}
    columns = {
        str(name): [number(value) for value in values] for name, values in given.items() if isinstance(values, list)
    }
    teacher, student = columns.get("teacher_logp"), columns.get("student_logp")
    if teacher and student:
        gap = [None if t is None or s is None else t - s for t, s in zip(teacher, student, strict=False)]
        columns = {_GAP: gap, **columns}
    return columns


def _distinct(rollouts: Sequence[Mapping[str, Sequence[float | None]]]) -> dict[str, list[Sequence[float | None]]]:
    """Column -> its values in every rollout; a column that says the same as an earlier one is left out."""
    found: dict[str, list[Sequence[float | None]]] = {}
    for name in dict.fromkeys(name for columns in rollouts for name in columns):
        values = [columns.get(name, []) for columns in rollouts]
        if values not in found.values():
            found[name] = values
    return found


def _scale(name: str, columns: Sequence[Sequence[float | None]]) -> Column:
    values = [value for column in columns for value in column if value is not None]
    sizes = sorted(abs(value) for value in values if value)
    scale = sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))] if sizes else 1.0
    negative = any(value < 0 for value in values)
    positive = any(value > 0 for value in values)
    return Column(name, scale, signed=negative and positive, falling=negative and not positive)


def level(value: float | None, column: Column) -> str:
    """The class that shades a token: `p` or `n` for the sign, 0 to 5 for the size, `none` where nothing is known."""
    if value is None:
        return "none"
    steps = min(LEVELS, math.floor(LEVELS * abs(value) / column.scale + 0.5))
    return f"{'n' if column.signed and value < 0 else 'p'}{steps}"


def _unit(name: str) -> str:
    return next((unit for ending, unit in _UNITS if name.endswith(ending)), "")


def _picker(columns: Sequence[Column], first: Column) -> str:
    options = "".join(
        f'<option value="{escape(column.name)}" data-scale="{column.scale:.6g}" '
        f'data-signed="{"1" if column.signed else ""}" data-low="{escape(column.ends[0])}" '
        f'data-high="{escape(column.ends[1])}"'
        f"{' selected' if column is first else ''}>{escape(column.name)}</option>"
        for column in columns
    )
    negative = "".join(f'<i class="n{step}"></i>' for step in range(LEVELS, 0, -1))
    positive = "".join(f'<i class="p{step}"></i>' for step in range(LEVELS + 1))
    return (
        f'<div class="shade"><label>Shade by <select id="column">{options}</select></label>'
        f'<span class="scale muted"><span id="low">{escape(first.ends[0])}</span> '
        f'<span id="negative"{"" if first.signed else " hidden"}>{negative}</span>{positive} '
        f'<span id="high">{escape(first.ends[1])}</span></span></div>'
    )


def _rollout(
    run: str,
    row: Mapping[str, Any],
    columns: Mapping[str, Sequence[float | None]],
    first: Column | None,
    *,
    opened: bool,
) -> str:
    tokens = row.get("tokens")
    if not isinstance(tokens, list):
        tokens = [str(row.get("text", ""))]
    spans = "".join(_token(str(token), index, columns, first) for index, token in enumerate(tokens[:MOST_TOKENS]))
    more = len(tokens) - MOST_TOKENS
    cut = f' <span class="muted">… {more:,} more tokens</span>' if more > 0 else ""
    short = {name: list(values[:MOST_TOKENS]) for name, values in columns.items()}
    data = escape(json.dumps(short, separators=(",", ":")))
    facts = [run, str(row.get("prompt_id", "")), str(row.get("status", "")), f"{len(tokens):,} tokens"]
    reward = number(row.get("reward"))
    if reward is not None:
        facts.insert(3, f"reward {reward:g}")
    if row.get("source", "student") != "student":
        facts.append(f"from the {row['source']}")
    return (
        f"<details{' open' if opened else ''}><summary><b>Step {escape(str(row.get('step', '?')))}</b>"
        f'<span class="muted">{escape(" · ".join(fact for fact in facts if fact))}</span></summary>'
        f'<div class="prompt">{escape(str(row.get("prompt", "")))}</div>'
        f'<div class="tokens" data-columns="{data}">{spans}{cut}</div></details>'
    )


def _token(token: str, index: int, columns: Mapping[str, Sequence[float | None]], first: Column | None) -> str:
    said = [token.replace("\n", "⏎")]
    for name, values in columns.items():
        value = values[index] if index < len(values) else None
        said.append(f"{name}: {'–' if value is None else f'{value:.4g} {_unit(name)}'.strip().replace('-', '−')}")
    values = columns.get(first.name, []) if first else []
    shade = level(values[index] if index < len(values) else None, first) if first else "none"
    # A line break at the token's end stands outside it, or its shade would show at the start of the next line.
    tail = "\n" if token.endswith("\n") else ""
    text = escape(token.removesuffix(tail)).replace("\n", f"{_BREAK}\n") + (_BREAK if tail else "")
    return f'<span class="t {shade}" title="{escape(chr(10).join(said))}">{text}</span>{tail}'
