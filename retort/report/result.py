"""Before and after: the table with its intervals, and pass@k."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from retort.report.curves import series_of
from retort.report.plots import Kind, Series, minus, percent, plot
from retort.report.read import RunFiles, as_object, number

#: Metrics of `eval.json`: words, unit, kind.
METRICS: Mapping[str, tuple[str, str, Kind]] = {
    "length": ("Length", "tokens", "number"),
    "student_entropy": ("Own entropy", "nats", "number"),
    "forward_kl_uncertain": ("Forward KL where the teacher is uncertain", "nats", "number"),
    "truncated": ("Truncated", "", "share"),
    "uncertain": ("Tokens where the teacher is uncertain", "", "share"),
    "reverse_kl": ("Reverse KL", "nats", "number"),
}


def _rows(run: RunFiles) -> list[Mapping[str, Any]]:
    rows = run.eval.get("rows")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _metrics(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Metrics that any row has: shares of right answers first, then the rest as they come."""
    names = dict.fromkeys(
        key for row in rows for key, value in row.items() if key != "who" and isinstance(value, Mapping)
    )
    return sorted(names, key=lambda name: (not name.startswith("avg@"), not name.startswith("pass@")))


def _cell(rows: Iterable[Mapping[str, Any]], who: str, metric: str) -> Mapping[str, Any]:
    return next((as_object(row.get(metric)) for row in rows if row.get("who") == who), {})


def headlines(run: RunFiles, named: bool) -> list[str]:
    """What the run did to the student, in a sentence: avg@k before and after, and how much of the gap is closed."""
    rows = _rows(run)
    for metric in (name for name in _metrics(rows) if name.startswith("avg@")):
        cells = [_cell(rows, who, metric) for who in ("student before", "student after", "teacher")]
        before, after, teacher = (number(cell.get("value")) for cell in cells)
        if before is None or after is None:
            continue
        verb = "rose" if after > before else "fell"
        here, there = percent(before, 1), percent(after, 1)
        text = f"{metric} stayed at {here}" if after == before else f"{metric} {verb} from {here} to {there}"
        if after != before and _overlap(cells[0], cells[1]):
            text += " (the intervals overlap)"
        if teacher is not None:
            text += f"; the teacher reaches {percent(teacher, 1)}"
        recovered = number(as_object(run.eval.get("gap_recovered")).get(metric))
        if recovered is not None:
            text += f", so {percent(recovered, 0)} of the gap to it is recovered"
        return [f"{run.name}: {text}." if named else f"{text}."]
    return []


def _overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    ends = [number(cell.get(key)) for cell in (one, other) for key in ("low", "high")]
    if None in ends:
        return False
    low_one, high_one, low_other, high_other = (end or 0.0 for end in ends)
    return low_one <= high_other and low_other <= high_one


def result_section(runs: Sequence[RunFiles]) -> str:
    """The section with the table, and pass@k beside it; empty if nothing was evaluated."""
    tables = "".join(_eval_table(run, len(runs) > 1) for run in runs if _rows(run))
    pass_at = _pass_at(runs)
    if not tables and not pass_at:
        return ""
    about = next(run.eval for run in runs if run.eval)
    words = [f"task {about['task']}"] if "task" in about else []
    words += [f"{about['problems']} problems"] if "problems" in about else []
    words += [f"{about['k']} samples each"] if "k" in about else []
    words += ["in brackets the 95 % interval over problems"]
    words += [f"uncertain: entropy above {about['threshold']} nats"] if "threshold" in about else []
    text = "; ".join(words)
    return (
        '<section aria-labelledby="result"><h2 id="result">Before and after</h2>'
        f'<p class="muted">{escape(text[0].upper() + text[1:])}.</p>'
        f'<div class="result"><div>{tables}</div>{pass_at}</div></section>'
    )


def _eval_table(run: RunFiles, named: bool) -> str:
    rows = _rows(run)
    gap = as_object(run.eval.get("gap_recovered"))
    who = [str(row.get("who", "?")) for row in rows]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in [*who, *(["gap recovered"] if gap else [])])
    body: list[str] = []
    for metric in _metrics(rows):
        right = metric.startswith(("avg@", "pass@"))
        words, unit, kind = METRICS.get(metric, (metric, "", "share" if right else "number"))
        cells = "".join(f"<td>{_value(as_object(row.get(metric)), kind)}</td>" for row in rows)
        recovered = number(gap.get(metric))
        last = f"<td>{'' if recovered is None else f'<b>{percent(recovered, 0)}</b>'}</td>" if gap else ""
        unit = f' <span class="muted">{escape(unit)}</span>' if unit else ""
        body.append(f'<tr><th scope="row">{escape(words)}{unit}</th>{cells}{last}</tr>')
    caption = f"<caption>{escape(run.name)}</caption>" if named else ""
    return (
        f'<div class="scroll"><table>{caption}<thead><tr><th scope="col">Metric</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _value(cell: Mapping[str, Any], kind: Kind) -> str:
    value, low, high = (number(cell.get(key)) for key in ("value", "low", "high"))
    if value is None:
        return '<span class="muted">–</span>'
    share = kind == "share"
    if share:  # an interval by normal approximation may reach beyond what is possible
        low, high = (None if end is None else min(1.0, max(0.0, end)) for end in (low, high))
    digits = 1 if share or abs(value) >= 10 else 3
    shown = [minus(f"{x * (100 if share else 1):,.{digits}f}") for x in (value, low, high) if x is not None]
    interval = f"<small>[{shown[1]}, {shown[2]}]</small>" if len(shown) == 3 else ""
    return f"{percent(value, 1) if share else shown[0]}{interval}"


def _pass_at(runs: Sequence[RunFiles]) -> str:
    order = [str(row.get("who")) for run in runs for row in _rows(run)]
    whos = dict.fromkeys([*order, *(str(who) for run in runs for who in as_object(run.eval.get("pass_at")))])
    series: list[Series] = []
    for place, who in enumerate(whos):
        for index, run in enumerate(runs):
            by_k = as_object(as_object(run.eval.get("pass_at")).get(who))
            found = [(float(k), number(value)) for k, value in by_k.items() if str(k).isdecimal()]
            points = sorted((k, y) for k, y in found if y is not None)
            if points:
                series.append(series_of(run, index, place, who, points, several=len(runs) > 1, alone=False))
    if not series:
        return ""
    ticks = sorted({x for one in series for x, _ in one.points})
    return plot(
        "pass@k",
        "problems with a right answer among k",
        series,
        kind="share",
        x_label="k",
        x_ticks=ticks,
        smooth=False,
    )
