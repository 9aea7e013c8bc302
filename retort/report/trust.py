"""The section on which tokens of the teacher's can be trusted: the predictors of three papers, from `trust.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retort.evaluate.unknown import why_unknown
from retort.report.groups import Group
from retort.report.plots import Series, plot
from retort.report.read import as_list, as_object, number
from retort.report.words import escape


def trust_section(groups: Sequence[Group]) -> str:
    """The section about each run that was measured with `retort trust`; empty if none was."""
    measured = [(group.name, run.trust) for group in groups for run in group.runs if run.trust]
    parts = [_one(name if len(groups) > 1 else "", found) for name, found in measured]
    if not parts:
        return ""
    return (
        '<section aria-labelledby="trust"><h2 id="trust">Which tokens of the teacher’s can be trusted</h2>'
        '<p class="muted">At some positions of the student’s completions a token of the teacher was forced, and the '
        "student went on alone. AUROC: how often a number is higher where that ended well than where it did not "
        "(50 %: it predicts nothing), with 95 % bootstrap intervals over problems. “Right in the end” is PW-OPSD’s; "
        "it is easy late in a right completion, whoever chose the token. “Makes the difference” counts only positions "
        "where the student with the teacher’s token and the student alone ended differently.</p>"
        f"{''.join(parts)}</section>"
    )


def _one(name: str, found: Mapping[str, Any]) -> str:
    rows = [as_object(row) for row in as_list(found.get("predictors")) if as_object(row)]
    body = "".join(
        f'<tr><th scope="row">{_name(row)}</th>'
        f"<td>{_cell(row.get('viable'))}</td><td>{_cell(row.get('helps'))}</td></tr>"
        for row in rows
    )
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Predictors of trust"><table><thead><tr>'
        '<th scope="col">Predictor and its source</th><th scope="col">right in the end</th>'
        '<th scope="col">makes the difference</th>'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )
    head = f"<h3>{escape(name)}</h3>" if name else ""
    return f'{head}<p class="muted">{escape(_about(found))}</p>{table}<div class="plots">{_plots(found)}</div>'


def _name(row: Mapping[str, Any]) -> str:
    predictor, who = (str(row.get(key, "")).replace("'", "’") for key in ("predictor", "claimed_by"))
    return f"{escape(predictor)} <span class=muted>{escape(who)}</span>" if who else escape(predictor)


def _about(found: Mapping[str, Any]) -> str:
    counts = [int(number(found.get(key)) or 0) for key in ("branches", "problems", "differing")]
    viable, alone = (f"{(number(found.get(key)) or 0.0) * 100:.1f} %" for key in ("viable", "alone"))
    return (
        f"View “{found.get('view', '?')}” at step {int(number(found.get('step')) or 0)}: {counts[0]:,} forced tokens "
        f"in completions of {counts[1]:,} {found.get('prompts', 'prompts')}; {viable} ended right, {alone} of "
        f"those from the same positions without a forced token, and {counts[2]:,} pairs differ.{_shift(found)}"
        f"{''.join(f' {sentence}.' for sentence in why_unknown(found))}"
    )


def _shift(found: Mapping[str, Any]) -> str:
    value = number(found.get("shift_against_entropy"))
    if value is None:
        return ""
    return (
        f" What the teacher would add to the log-prob of the student’s own token goes with the student’s entropy by a "
        f"rank correlation (Spearman) of {value:+.2f}; DASD reports +0.52."
    )


def _cell(value: object) -> str:
    cell = as_object(value)
    mean, low, high = (number(cell.get(key)) for key in ("value", "low", "high"))
    if mean is None or low is None or high is None:
        return "–"
    text = f"{mean * 100:.0f} % <span class=muted>[{low * 100:.0f}, {high * 100:.0f}]</span>"
    return f"<strong>{text}</strong>" if low > 0.5 or high < 0.5 else text


def _plots(found: Mapping[str, Any]) -> str:
    figures: list[str] = []
    for key, title, x_label in (
        ("position", "Right in the end, along the completion", "position, as a share of the completion"),
        ("teacher_entropy", "Right in the end, by the teacher’s entropy", "teacher’s entropy, nats"),
        ("student_entropy", "Right in the end, by the student’s entropy", "student’s entropy, nats"),
    ):
        bins = [as_object(row) for row in as_list(as_object(found.get("bins")).get(key))]
        series = [
            Series(label, points, color, dash, band=band)
            for label, name, color, dash in (("teacher’s token", "viable", 0, 0), ("student alone", "alone", 1, 1))
            if (points := _points(bins, name)) and (band := _band(bins, name)) and len(band) == len(points)
        ]
        if series:
            figures.append(plot(title, "share", series, kind="share", x_label=x_label, smooth=False, values=False))
    return "".join(figures)


def _points(bins: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    found = [(number(row.get("at")), number(row.get(name))) for row in bins]
    return [(x, y) for x, y in found if x is not None and y is not None]


def _band(bins: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    found = [(number(row.get(f"{name}_low")), number(row.get(f"{name}_high"))) for row in bins]
    return [(low, high) for low, high in found if low is not None and high is not None]
