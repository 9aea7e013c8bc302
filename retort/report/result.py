"""Before and after: the table with its intervals, differences between runs, and pass@k."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from retort.config import BUILTIN
from retort.errors import counted
from retort.evaluate.measures import Measure, measure, ordered
from retort.report.alike import source_name, tables
from retort.report.axes import Kind, minus, percent
from retort.report.curves import run_series
from retort.report.flow_words import all_flows, words_of
from retort.report.groups import Group, Points, all_runs, over_seeds, paired
from retort.report.plots import Series, plot
from retort.report.read import as_object, number
from retort.report.words import escape, listed

BEFORE, AFTER, TEACHER = "student before", "student after", "teacher"
#: Colours of those three in plots about one run; the last of the palette is grey.
WHO_COLORS: Mapping[str, int] = {AFTER: 0, TEACHER: 2, BEFORE: 6}
#: What the names of rewards begin with, and how many of them the page begins with.
REWARD, MOST_REWARDS = "reward/", 3
WHO_DASHES: Mapping[str, int] = {AFTER: 0, BEFORE: 1, TEACHER: 2}


def _label(metric: str) -> Measure:
    found = measure(metric)
    words = found.words.replace("'", "’")
    return found._replace(words=words if "@" in words else words[:1].upper() + words[1:])


# --- in words ---


def headlines(groups: Sequence[Group]) -> list[str]:
    """Sentences on how the runs changed the student, and how they differ."""
    if len(groups) == 1:
        return _headline(groups[0])
    split = tables([group for group in groups if group.whos()])
    found: list[str] = []
    for table in split:
        metrics = dict.fromkeys(metric for group in table.groups for metric in group.metrics())
        ranked = [_ranking(table.groups, metric) for metric in metrics if metric.startswith(("avg@", "pass@"))]
        where = f"On {table.name}: " if len(split) > 1 else ""
        found += [f"{where}{sentence}" for sentence in ranked if sentence]
        found += [sentence for group in table.groups[1:4] for sentence in _against(group, table.groups[0])]
    return found


def _ranking(groups: Sequence[Group], metric: str) -> str:
    """One measure of all runs, the highest first."""
    values = {group.name: number(group.cell(AFTER, metric).get("value")) for group in groups}
    ranked = sorted(((value, name) for name, value in values.items() if value is not None), reverse=True)
    if not ranked:
        return ""
    beside = [
        f"{who.removeprefix('student ')} {percent(sum(known) / len(known), 1)}"
        for who in (BEFORE, TEACHER)
        if (known := [v for group in groups if (v := number(group.cell(who, metric).get("value"))) is not None])
    ]
    aside = f" ({', '.join(beside)})" if beside else ""
    return f"{metric}{aside}: {', '.join(f'{name} {percent(value, 1)}' for value, name in ranked)}."


def _headline(group: Group) -> list[str]:
    """Sentences on accuracy and on the distance to the teacher; the one with more to gain comes first."""
    solved = next((name for name in group.metrics() if name.startswith("avg@")), None)
    by_tokens = "reverse_kl" in group.metrics()
    token = words_of([group])(" nats a token")
    measured, unit = ("reverse_kl", token) if by_tokens else ("reverse_kl_per_byte", " nats a byte")
    gap = _change(group, measured, "Reverse KL to the teacher", lambda value: f"{value:.3f}", unit)
    if solved is None:
        return gap
    name = f"Mean reward ({solved})" if all_flows([group]) else solved
    found = _change(group, solved, name, lambda value: percent(value, 1))
    before, teacher = (number(group.cell(who, solved).get("value")) for who in (BEFORE, TEACHER))
    if found and teacher is not None:
        more = f"; the teacher reaches {percent(teacher, 1)}"
        recovered = _recovered(group, solved)
        if recovered is not None:
            more += f", so {percent(recovered, 0)} of the gap to it is recovered"
        found = [found[0].removesuffix(".") + more + "."]
    # A teacher that solves no more than the student did has nothing to give in right answers.
    nothing_to_gain = teacher is not None and before is not None and teacher <= before
    return [*gap, *found] if nothing_to_gain else [*found, *_rewards(group), *gap]


def _rewards(group: Group) -> list[str]:
    """Sentences on the first rewards of a flow student, whose samples are not right or wrong."""
    if not all_flows([group]):
        return []
    found: list[str] = []
    names = [name for name in group.metrics() if name.startswith(REWARD)]
    for name in names[:MOST_REWARDS] if len(names) > 1 else []:  # a single one is the mean reward
        sentences = _change(group, name, name.removeprefix(REWARD), lambda value: f"{value:.2f}")
        others = [who for who in group.whos() if who not in (BEFORE, AFTER)]
        best = max((v for who in others if (v := number(group.cell(who, name).get("value"))) is not None), default=None)
        which = "the best teacher" if len(others) > 1 else "the teacher"
        more = "" if best is None else f"; {which} reaches {minus(f'{best:.2f}')}"
        found += [f"{sentence.removesuffix('.')}{more}." for sentence in sentences]
    return found


def _change(group: Group, metric: str, name: str, shown: Callable[[float], str], unit: str = "") -> list[str]:
    """One sentence on a measure before and after; none if it was not taken."""
    cells = [group.cell(who, metric) for who in (BEFORE, AFTER)]
    before, after = (number(cell.get("value")) for cell in cells)
    if before is None or after is None:
        return []
    here, there = shown(before), shown(after)
    verb = "rose" if after > before else "fell"
    text = f"{name} stayed at {here}" if after == before else f"{name} {verb} from {here} to {there}"
    text += unit
    if after != before and _overlap(cells[0], cells[1]):
        text += " (the intervals overlap)"
    if group.several:
        text += f" (means over {group.seeds()})"
    return [f"{text}."]


def _recovered(group: Group, metric: str) -> float | None:
    shares = [number(as_object(run.eval.get("gap_recovered")).get(metric)) for run in group.runs]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _against(group: Group, other: Group) -> list[str]:
    """A sentence on the difference in accuracy within each seed, where there are enough seeds."""
    parts, count = list[str](), 0
    for metric in (name for name in group.metrics() if name.startswith(("avg@", "pass@"))):
        cell = paired(group, other, AFTER, metric)
        if "low" in cell:
            sure = "" if cell["low"] > 0 or cell["high"] < 0 else ", which is no difference that these seeds can show"
            parts.append(f"{metric} {_points(cell)}{sure}")
        elif "n" in cell:
            points = minus(f"{100 * cell['value']:+.1f}")
            parts.append(f"{metric} {points} points in each of them")
        count = cell.get("n", count)
    if not parts:
        return []
    weak = " (weak)" if count <= 3 else ""
    return [f"{group.name} against {other.name}, within each of {count} seeds{weak}: {'; '.join(parts)}."]


def _points(cell: Mapping[str, float]) -> str:
    value, low, high = (minus(f"{100 * cell[key]:+.1f}") for key in ("value", "low", "high"))
    return f"{value} points [{low}, {high}]"


def _overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    ends = [number(cell.get(key)) for cell in (one, other) for key in ("low", "high")]
    if None in ends:
        return False
    low_one, high_one, low_other, high_other = (end or 0.0 for end in ends)
    return low_one <= high_other and low_other <= high_one


# --- tables ---


def result_section(groups: Sequence[Group]) -> str:
    """The section with the table, and pass@k beside it; empty if nothing was evaluated."""
    split = tables([group for group in groups if group.whos() or any(run.eval.get("pass_at") for run in group.runs)])
    several = len(groups) > 1
    parts = [(table, _result_tables(table.groups, several), _pass_at(table.groups, several)) for table in split]
    on = "<h3 class=on>On {}</h3>" if len(split) > 1 else ""
    shown = "".join(
        f"{on.format(escape(found.name))}"
        f'<p class="muted">{escape(_about(found.groups, several))}</p>'
        f'<div class="result{" wide" if several or all_flows(found.groups) else ""}"><div>{table}</div>{pass_at}</div>'
        for found, table, pass_at in parts
        if table or pass_at
    )
    return f'<section aria-labelledby="result"><h2 id="result">Before and after</h2>{shown}</section>' if shown else ""


def _result_tables(groups: Sequence[Group], several: bool) -> str:
    evaluated = [group for group in groups if group.whos()]
    if several and evaluated:
        return _side_by_side(evaluated)
    return "".join(_one_table(group) for group in evaluated)


def _about(groups: Sequence[Group], several: bool) -> str:
    run = next(run for group in groups for run in group.runs if run.eval)
    about, source = run.eval, source_name(run)
    apart = as_object(run.config.get("eval")).get("data") or source in BUILTIN
    of = f" {'of' if apart else 'held out of'} {source}" if source else ""
    words = [f"{counted(about['problems'], 'problem')}{of}"] if "problems" in about else []
    words += [f"graded as {about['task']}"] if about.get("task") not in (None, "data", source) else []
    words += [f"{about['graded']} of them graded"] if "graded" in about else []
    words += [f"{counted(about['k'], 'sample')} each"] if "k" in about else []
    lost = sum(int(number(n) or 0) for one in all_runs(groups) for n in as_object(one.eval.get("given_up")).values())
    words += [f"{lost} completions count as wrong because their comparison did not finish"] if lost else []
    seeds = any(group.several for group in groups)
    words += [f"in brackets the 95 % interval over {'seeds (Student’s t)' if seeds else 'problems'}"]
    flows = all_flows(groups)
    words += [f"uncertain: entropy above {about['threshold']} nats"] if "threshold" in about and not flows else []
    text = words_of(groups)("; ".join(words))
    once = several and not seeds
    more = " One seed each: the intervals say how exactly the models were measured, not what another seed would give."
    return f"{text[0].upper()}{text[1:]}.{more if once else ''}"


def _one_table(group: Group) -> str:
    """The table of one experiment: metrics down, models across."""
    shown = _shown(group, alone=True)
    whos = [who for who in group.whos() if not all_flows([group]) or any(group.cell(who, name) for name in shown)]
    gap = {metric: share for metric in group.metrics() if (share := _recovered(group, metric)) is not None}
    head = [*whos, *(["gap recovered"] if gap else [])]
    body: list[str] = []
    for metric in ordered(shown):
        kind = _label(metric).kind
        cells = "".join(f"<td>{_value(group.cell(who, metric), kind)}</td>" for who in whos)
        recovered = gap.get(metric)
        last = f"<td>{'' if recovered is None else f'<b>{percent(recovered, 0)}</b>'}</td>" if gap else ""
        body.append(f'<tr><th scope="row">{_named(metric, [group])}</th>{cells}{last}</tr>')
    return _table(head, body) if body else ""


def _shown(group: Group, *, alone: bool = False) -> list[str]:
    """The measures in the table; those of a single flow run without its rewards, which have a table of their own."""
    if not all_flows([group]):
        return group.metrics()
    taken = [m for m in group.metrics() if any("value" in group.cell(who, m) for who in group.whos())]
    return [metric for metric in taken if not (alone and metric.startswith(REWARD))]


def _side_by_side(groups: Sequence[Group]) -> str:
    """The table of several experiments: metrics down; students, differences from the first, and teachers across."""
    metrics = list(dict.fromkeys(metric for group in groups for metric in _shown(group)))
    compared = [group for group in groups[1:] if any("n" in paired(group, groups[0], AFTER, m) for m in metrics)]
    teachers = _teachers(groups, metrics)
    head = [group.name for group in groups]
    head += [f"{group.name} − {groups[0].name}" for group in compared]
    head += [f"teacher of {listed([one.name for one in taught])}" for taught in teachers]
    head[-1:] = ["teacher"] if len(teachers) == 1 else head[-1:]
    body: list[str] = []
    for metric in ordered(metrics):
        kind = _label(metric).kind
        cells = [
            _value(group.cell(AFTER, metric), kind, before=group.cell(BEFORE, metric), colored=group.color)
            for group in groups
        ]
        cells += [_difference(paired(group, groups[0], AFTER, metric), kind) for group in compared]
        cells += [_value(taught[0].cell(TEACHER, metric), kind) for taught in teachers]
        body.append(
            f'<tr><th scope="row">{_named(metric, groups)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        )
    caption = "The student after each run, and before it"
    if compared:
        caption += "; differences are taken within each seed, bold where the interval excludes 0"
    if len(teachers) > 1:
        caption += "; what is measured against a teacher is against each run’s own"
    return _table(head, body, caption)


def _teachers(groups: Sequence[Group], metrics: Sequence[str]) -> list[list[Group]]:
    """Runs whose teacher was evaluated, by teacher."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        if any(group.cell(TEACHER, metric) for metric in metrics):
            found.setdefault(str(group.runs[0].config.get("teacher")), []).append(group)
    return list(found.values())


def _table(head: Sequence[str], body: Sequence[str], caption: str = "") -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    said = f"<caption>{escape(caption)}.</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Results"><table>{said}<thead><tr>'
        f'<th scope="col">Metric</th>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _named(metric: str, groups: Sequence[Group]) -> str:
    words, unit, _ = _label(metric)
    if not metric.startswith(REWARD):  # a reward's name is its own
        words, unit = map(words_of(groups), (words, unit))
    return f"{escape(words)}{f' <span class=muted>{escape(unit)}</span>' if unit else ''}"


def _value(cell: Mapping[str, Any], kind: Kind, *, before: Mapping[str, Any] | None = None, colored: int = 0) -> str:
    value, low, high = (number(cell.get(key)) for key in ("value", "low", "high"))
    if value is None:
        return '<span class="muted">–</span>'
    share = kind == "share"
    if share:  # over seeds, Student's t may reach beyond what is possible
        low, high = (None if end is None else min(1.0, max(0.0, end)) for end in (low, high))
    digits = 1 if share or abs(value) >= 10 else 3
    shown = [minus(f"{x * (100 if share else 1):,.{digits}f}") for x in (value, low, high) if x is not None]
    interval = f"<small>[{shown[1]}, {shown[2]}]</small>" if len(shown) == 3 else ""
    text = percent(value, 1) if share else shown[0]
    old = number((before or {}).get("value"))
    if old is None:
        return f"{text}{interval}"
    was = percent(old, 1) if share else minus(f"{old:,.{digits}f}")
    return f'<b class="c{colored % 6}">{text}</b>{interval}<small>before {was}</small>'


def _difference(cell: Mapping[str, Any], kind: Kind) -> str:
    value, low, high = (number(cell.get(key)) for key in ("value", "low", "high"))
    if value is None or "n" not in cell:
        return '<span class="muted">–</span>'
    scale, digits = (100, 1) if kind == "share" else (1, 1 if abs(value) >= 10 else 3)
    if low is None or high is None:
        return f"{minus(f'{scale * value:+,.{digits}f}')}<small>in each of</small><small>{cell['n']} seeds</small>"
    shown = [minus(f"{scale * x:+,.{digits}f}") for x in (value, low, high)]
    text = f"<b>{shown[0]}</b>" if low > 0 or high < 0 else shown[0]
    return f"{text}<small>[{shown[1]}, {shown[2]}]</small><small>{cell['n']} seeds</small>"


# --- pass@k ---


def _pass_at(groups: Sequence[Group], several: bool) -> str:
    evaluated = dict.fromkeys(who for group in groups for who in group.whos())
    whos = dict.fromkeys(
        [*evaluated, *(str(who) for run in all_runs(groups) for who in as_object(run.eval.get("pass_at")))]
    )
    series: list[Series] = []
    for place, who in enumerate(whos):
        curves = {group.name: _ladders(group, who) for group in groups}
        # What all runs share (the teacher, often the student before) is drawn once, in grey.
        shared = several and who != AFTER and len({str(points) for points, _ in curves.values() if points}) == 1
        for group in groups:
            points, band = curves[group.name]
            if not points or (shared and any(one.label == who for one in series)):
                continue
            if shared:
                series.append(Series(who, points, WHO_COLORS[BEFORE], WHO_DASHES.get(who, place)))
            elif several:
                dash = WHO_DASHES.get(who, place)
                series.append(run_series(group, dash, who, points, band, several=True, alone=False))
            else:
                series.append(Series(who, points, WHO_COLORS.get(who, place), band=band))
    if not series:
        return ""
    ticks = sorted({x for one in series for x, _ in one.points})
    return plot(
        "pass@k",
        words_of(groups)("problems with a right answer among k"),
        series,
        kind="share",
        x_label="k",
        x_ticks=ticks,
        smooth=False,
    )


def _ladders(group: Group, who: str) -> tuple[Points, Points]:
    return over_seeds([_ladder(as_object(run.eval.get("pass_at")).get(who)) for run in group.runs], (0.0, 1.0))


def _ladder(by_k: object) -> dict[float, float]:
    found = ((k, number(value)) for k, value in as_object(by_k).items() if str(k).isdecimal() and len(str(k)) < 10)
    return {float(k): value for k, value in found if value is not None}
