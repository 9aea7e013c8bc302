"""The reward matrix: models down, rewards across, over all held-out prompts and over those of each domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retort.evaluate import Estimate
from retort.report.alike import tables
from retort.report.axes import minus
from retort.report.flow_words import of_model
from retort.report.groups import Group, rows
from retort.report.read import RunFiles, as_object, number
from retort.report.result import AFTER, BEFORE
from retort.report.words import escape

REWARD = "reward/"
#: Most domains and rewards that a page shows.
MOST_DOMAINS, MOST_REWARDS = 12, 8
_SHADES = 5


def rewards_of(groups: Sequence[Group]) -> list[str]:
    """Names of the rewards that were measured, in order."""
    found = dict.fromkeys(name.removeprefix(REWARD) for g in groups for name in g.metrics() if name.startswith(REWARD))
    found |= {name: None for own in _tables(groups) for rewards in own.values() for name in rewards}
    return list(found)[:MOST_REWARDS]


def matrix_section(groups: Sequence[Group]) -> str:
    """The section with the reward matrix; empty where no reward was measured."""
    split = tables([group for group in groups if group.whos()])
    parts = [(table.name, _matrix(table.groups, len(groups) > 1)) for table in split]
    parts = [(name, shown) for name, shown in parts if shown]
    if not parts:
        return ""
    on = "<h3 class=on>On {}</h3>" if len(parts) > 1 else ""
    shown = "".join(f"{on.format(escape(name))}{part}" for name, part in parts)
    over = "seeds (Student’s t)" if any(group.several for group in groups) else "prompts"
    return (
        '<section aria-labelledby="rewards"><h2 id="rewards">Rewards</h2>'
        '<p class="muted">Mean rewards of samples of held-out prompts, of all and of each domain; in brackets the 95 % '
        f"interval over {over}. The stronger the shade, the nearer to 1.</p>{shown}</section>"
    )


def _matrix(groups: Sequence[Group], several: bool) -> str:
    rewards = rewards_of(groups)
    if not rewards:
        return ""
    domains = list(dict.fromkeys(domain for own in _tables(groups) for domain in own))
    parts = ["", *domains[:MOST_DOMAINS]]
    shown = [
        (part, name) for part in parts for name in rewards if any(_cell(g, w, part, name) for g, w in _every(groups))
    ]
    spans = [(part, sum(own == part for own, _ in shown)) for part in parts]
    top = "".join(
        f'<th scope="colgroup" class="part" colspan="{count}">{_of(part)}</th>' for part, count in spans if count
    )
    first = [index == 0 or shown[index - 1][0] != part for index, (part, _) in enumerate(shown)]
    names = "".join(
        f'<th scope="col"{" class=begins" if begins else ""}>{escape(name)}</th>'
        for begins, (_, name) in zip(first, shown, strict=True)
    )
    body = "".join(_model_row(group, who, name, shown, first) for group, who, name in _once(groups, several))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Rewards by model"><table class="matrix"><thead>'
        f'<tr><td></td>{top}</tr><tr><th scope="col">Model</th>{names}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _of(domain: str) -> str:
    return escape(f"prompts of {domain}" if domain else "all prompts")


def _every(groups: Sequence[Group]) -> list[tuple[Group, str]]:
    order = {BEFORE: 0, AFTER: 1}
    found = [(group, who) for group in groups for who in group.whos()]
    return sorted(found, key=lambda one: order.get(one[1], 2))


def _once(groups: Sequence[Group], several: bool) -> list[tuple[Group, str, str]]:
    """All models with their names; the student before and teachers that are the same in several runs once."""
    found: list[tuple[Group, str]] = []
    known: list[tuple[str, list[Mapping[str, Any]]]] = []
    for group, who in _every(groups):
        content = (who, [_numbers(run, who) for run in group.runs])
        if who == AFTER or content not in known:
            found.append((group, who))
        known.append(content)
    whos = [who for _, who in found]
    each = [several and (who == AFTER or whos.count(who) > 1) for who in whos]
    return [(group, who, f"{who}, {group.name}" if own else who) for own, (group, who) in zip(each, found, strict=True)]


def _numbers(run: RunFiles, who: str) -> Mapping[str, Any]:
    row = next((row for row in rows(run) if row.get("who") == who), {})
    return {**{name: cell for name, cell in row.items() if name.startswith(REWARD)}, "": _domains(run, who)}


def _model_row(group: Group, who: str, name: str, shown: Sequence[tuple[str, str]], first: Sequence[bool]) -> str:
    cells = "".join(
        _shown(_cell(group, who, part, reward), begins) for begins, (part, reward) in zip(first, shown, strict=True)
    )
    css = f' class="c{group.color % 6}"' if who == AFTER else ""
    return f'<tr><th scope="row"><span{css}>{escape(name)}</span></th>{cells}</tr>'


def _shown(cell: Mapping[str, Any], begins: bool) -> str:
    value, low, high = (number(cell.get(key)) for key in ("value", "low", "high"))
    edge = " begins" if begins else ""
    if value is None:
        return f'<td class="muted{edge}">–</td>'
    shade = f"p{round(_SHADES * value)}" if 0 <= value <= 1 else "none"
    interval = "" if low is None or high is None else f"<small>[{_digits(low)}, {_digits(high)}]</small>"
    return f'<td class="{shade}{edge}">{_digits(value)}{interval}</td>'


def _digits(value: float) -> str:
    return minus(f"{value:,.{1 if abs(value) >= 10 else 2 if abs(value) >= 0.005 or value == 0 else 3}f}")


# --- numbers ---


def _tables(groups: Sequence[Group]) -> list[dict[str, dict[str, Mapping[str, Any]]]]:
    """Rewards by domain of all models of all runs."""
    return [_domains(run, who) for group in groups for run in group.runs for who in group.whos()]


def _domains(run: RunFiles, who: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Rewards of one model by domain."""
    return {
        str(domain): {str(name).removeprefix(REWARD): as_object(cell) for name, cell in as_object(own).items()}
        for domain, own in as_object(of_model(run, who, "by_domain")).items()
    }


def _cell(group: Group, who: str, domain: str, reward: str) -> Mapping[str, Any]:
    """A cell of the matrix: over seeds if there are several, else over prompts."""
    if not domain:
        return group.cell(who, f"{REWARD}{reward}")
    cells = [_domains(run, who).get(domain, {}).get(reward, {}) for run in group.runs]
    if not group.several:
        return cells[0]
    values = [value for cell in cells if (value := number(cell.get("value"))) is not None]
    interval = Estimate.over_runs(values)
    ends = [end for cell in cells for key in ("low", "high") if (end := number(cell.get(key))) is not None]
    if interval is not None and all(0 <= end <= 1 for end in (*values, *ends)):
        interval = interval.within(0.0, 1.0)
    return interval.plain() if interval is not None else {"value": values[0]} if values else {}
