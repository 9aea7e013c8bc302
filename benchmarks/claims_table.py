"""Tables of the benchmark of EOPD's claims: means over seeds, and differences within seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retort.evaluate import Estimate

Rows = Sequence[Mapping[str, Any]]

#: Measure, what it is, whether it is a share.
MEASURES: Mapping[str, tuple[str, bool]] = {
    "avg@8": ("avg@8", True),
    "pass@8": ("pass@8", True),
    "student_entropy": ("own entropy", False),
    "student_entropy_uncertain": ("own entropy at forks", False),
    "student_uncertain": ("tokens where itself uncertain", True),
    "forward_kl_uncertain": ("forward KL at forks", False),
    "reverse_kl": ("reverse KL", False),
}
#: The paper's claims about EOPD against OPD: the measure, and its sign.
CLAIMS = {
    "student_entropy": ("entropy kept, all tokens", 1),
    "student_entropy_uncertain": ("entropy kept, forks", 1),
    "forward_kl_uncertain": ("forward KL at forks lower", -1),
    "pass@8": ("pass@8 higher", 1),
    "avg@8": ("(avg@8, no claim)", 1),
}
WEAK = 3


def summary(rows: Rows, questions: Mapping[str, str]) -> dict[str, Any]:
    """Means by condition, method and step; and EOPD minus OPD within each seed."""
    means: list[dict[str, Any]] = []
    for condition, step in _moments(rows):
        for method in dict.fromkeys(row["method"] for row in rows if row["condition"] == condition):
            chosen = _chosen(rows, condition, method, step)
            if chosen:
                cells = {measure: _estimate(row.get(measure) for row in chosen.values()) for measure in MEASURES}
                mass = _estimate(row.get("teacher_topk_mass") for row in chosen.values())
                about = {"condition": condition, "method": method, "step": step, "seeds": len(chosen)}
                means.append({**about, **cells, "teacher_topk_mass": mass})
    differences = [
        {"condition": condition, "step": step, "measure": measure, **found}
        for condition, step in _moments(rows)
        if step
        for measure in MEASURES
        if (found := _difference(rows, condition, step, measure))
    ]
    return {"questions": dict(questions), "means": means, "differences": differences}


def _moments(rows: Rows) -> list[tuple[str, int]]:
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    found = {(row["condition"], row["step"]) for row in rows}
    return sorted(found, key=lambda place: (conditions.index(place[0]), place[1]))


def _chosen(rows: Rows, condition: str, method: str, step: int) -> dict[int, Mapping[str, Any]]:
    """By seed."""
    return {
        row["seed"]: row for row in rows if (row["condition"], row["method"], row["step"]) == (condition, method, step)
    }


def _estimate(values: Iterable[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    interval = Estimate.over_runs(known)
    if interval is None:
        return {"value": known[0], "n": 1} if known else None
    return {"value": interval.value, "low": interval.low, "high": interval.high, "n": len(known)}


def _difference(rows: Rows, condition: str, step: int, measure: str) -> dict[str, Any] | None:
    """EOPD minus OPD within each seed; a condition that changes EOPD alone is held against the OPD of the base."""
    ours = _chosen(rows, condition, "eopd", step)
    theirs = _chosen(rows, condition, "opd", step) or _chosen(rows, "base", "opd", step)
    pairs = [(ours[seed].get(measure), theirs[seed].get(measure)) for seed in sorted(set(ours) & set(theirs))]
    return _estimate([mine - yours for mine, yours in pairs if mine is not None and yours is not None])


# --- words ---


def markdown(found: Mapping[str, Any]) -> str:
    """All tables."""
    return "\n".join([*_claims(found), "", *_means(found)])


def verdict(cell: Mapping[str, float], sign: int) -> str:
    """What an interval says of a claim."""
    if "low" not in cell:
        return "one seed"
    ends = (cell["low"], cell["high"]) if sign > 0 else (-cell["high"], -cell["low"])
    word = "holds" if ends[0] > 0 else "opposite" if ends[1] < 0 else "open"
    return f"{word}, weak" if cell["n"] <= WEAK else word


def _claims(found: Mapping[str, Any]) -> list[str]:
    by_place = {(cell["condition"], cell["step"], cell["measure"]): cell for cell in found["differences"]}
    lines = ["EOPD minus OPD within each seed, [95 % interval over seeds], and what that says of the claim:", ""]
    heads = [words for words, _ in CLAIMS.values()]
    lines += [f"| condition | step | seeds | {' | '.join(heads)} |", f"|---|---|---|{'---|' * len(heads)}"]
    questions = dict(found["questions"])
    for condition, step in dict.fromkeys((cell["condition"], cell["step"]) for cell in found["differences"]):
        cells = {measure: by_place.get((condition, step, measure)) for measure in CLAIMS}
        seeds = max(int(cell["n"]) for cell in cells.values() if cell)
        shown = [_claim(cell, measure) for measure, cell in cells.items()]
        question = questions.pop(condition, "")  # once
        lines.append(f"| `{condition}`{f': {question}' if question else ''} | {step} | {seeds} | {' | '.join(shown)} |")
    return lines


def _claim(cell: Mapping[str, float] | None, measure: str) -> str:
    if cell is None:
        return "–"
    scale, digits = (100, 1) if MEASURES[measure][1] else (1, 3)
    numbers = [f"{scale * cell[key]:+.{digits}f}" for key in ("value", "low", "high") if key in cell]
    interval = f" [{numbers[1]}, {numbers[2]}]" if len(numbers) == 3 else ""
    return f"{numbers[0]}{interval} {verdict(cell, CLAIMS[measure][1])}".replace("-", "−")


def _means(found: Mapping[str, Any]) -> list[str]:
    heads = [f"{words}{', %' if share else ', nats'}" for words, share in MEASURES.values()]
    lines = ["Means over seeds (± half of the 95 % interval):", ""]
    lines += [f"| condition | step | method | seeds | {' | '.join(heads)} |", f"|---|---|---|---|{'---|' * len(heads)}"]
    for row in found["means"]:
        cells = [_mean(row[measure], share) for measure, (_, share) in MEASURES.items()]
        about = f"`{row['condition']}` | {row['step']} | {row['method']} | {row['seeds']}"
        lines.append(f"| {about} | {' | '.join(cells)} |")
    return lines


def _mean(cell: Mapping[str, float] | None, share: bool) -> str:
    if cell is None:
        return "–"
    scale, digits = (100, 1) if share else (1, 3)
    half = f" ± {scale * (cell['high'] - cell['value']):.{digits}f}" if "high" in cell else ""
    return f"{scale * cell['value']:.{digits}f}{half}"
