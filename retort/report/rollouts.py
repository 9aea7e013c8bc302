"""Recorded rollouts and completions, token by token: the data that the page's script draws.

The text of a model is hostile. Nothing of it becomes markup here: it goes into one block of JSON in which no character
can end the block, and the script writes it as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retort.report.episodes import episode_of, messages_of
from retort.report.groups import Group, all_runs
from retort.report.images import embedded, images_of
from retort.report.method_curves import OF_TOKENS
from retort.report.passages import passages_of
from retort.report.read import RunFiles, number, spread
from retort.report.units import over_unit, units_of

#: Most tokens shown of one rollout.
MOST_TOKENS = 2000
#: Most bytes of JSON of all rollouts of a page; there are fewer rollouts where they are long.
MOST_BYTES = 5_000_000
_GAP = "teacher − student log-prob"


@dataclass(frozen=True)
class Quantity:
    """The label, unit, kind and meaning of a column."""

    label: str
    unit: str
    kind: str
    about: str


MODELS, BETWEEN, LOSS = "The models", "Between them", "The loss"
KNOWN: Mapping[str, Quantity] = {
    "teacher_entropy": Quantity("teacher’s entropy", "nats", MODELS, "how uncertain the teacher was about this token"),
    "teacher_entropy_bound": Quantity("teacher’s entropy, at least", "nats", MODELS, "a lower bound, from its top-k"),
    "student_entropy": Quantity("student’s entropy", "nats", MODELS, "how uncertain the student was about this token"),
    "teacher_logp": Quantity("teacher’s log-prob", "nats", MODELS, "of the token that was generated"),
    "student_logp": Quantity("student’s log-prob", "nats", MODELS, "of the token that was generated"),
    _GAP: Quantity(_GAP, "nats", BETWEEN, "positive where the teacher likes the token better than the student does"),
    "reverse_kl": Quantity("reverse KL", "nats", BETWEEN, "estimated from the token alone where it can be negative"),
    "forward_kl": Quantity("forward KL", "nats", BETWEEN, "high where the student rules out what the teacher expects"),
    "visual_advantage": Quantity(
        "visual advantage", "nats", BETWEEN, "what the teacher’s log-prob of this token gains by the image’s details"
    ),
    "rollout_weight_min": Quantity("rollout’s weight", "", LOSS, "its share of its prompt’s loss"),
    "forward_kl_gated": Quantity("forward KL, gate open", "nats", BETWEEN, "as the method measures it"),
    "gate_open_fraction": Quantity("gate", "", LOSS, "1 where the teacher counts as uncertain"),
    "gate": Quantity("gate", "", LOSS, "1 where the teacher counts as uncertain"),
    "clip_fraction": Quantity("clipped", "", LOSS, "1 where the clip binds"),
    "teacher_topk_mass": Quantity("teacher’s top-k mass", "", MODELS, "probability that its top-k holds"),
    **{name: Quantity(label, unit, BETWEEN, about) for name, (label, unit, about) in OF_TOKENS.items()},
}
_ENDINGS: Mapping[str, tuple[str, str]] = {
    "advantage": ("nats", "how much better than expected this token was, for this term"),
    "weight": ("", "what multiplies this term at this token"),
    "value": ("nats", "this term at this token, before its weight"),
}
#: Columns that repeat another one, on some tokens only or throughout, and those of a whole batch.
_LEFT_OUT = ("student_entropy_gated", "visual_high_zero", "visual_high_share", "rollout_weight_max")
#: Shaded at first: the first of these that there is.
_FIRST = ("visual_advantage", _GAP, "reverse_kl", "forward_kl", "teacher_entropy", "student_entropy")


def quantity(name: str) -> Quantity:
    """The label and unit of a column."""
    if name in KNOWN:
        return KNOWN[name]
    term, dot, ending = name.rpartition(".")
    if dot and ending in _ENDINGS:
        unit, about = _ENDINGS[ending]
        return Quantity(f"{ending} ({term})", unit, LOSS, about)
    return Quantity(name.replace("_", " "), "nats" if name.endswith(("kl", "logp", "entropy")) else "", BETWEEN, "")


def rollouts_section(groups: Sequence[Group]) -> str:
    """The section with rollouts and completions; empty if none was recorded."""
    runs = all_runs(groups)
    training = [_training(run, row) for run in runs for row in run.rollouts]
    problems = _held_out(groups)
    held_out = _within_budget(problems, MOST_BYTES // 2)
    if not training and not held_out:
        return ""
    recorded = sum(run.recorded for run in runs)
    training = _within_budget(training, MOST_BYTES - len(_dump(held_out)))
    answers = [answer for problem in held_out for answer in problem["answers"]]
    columns = _columns([*training, *answers])
    data = {"columns": columns, "training": training, "held_out": held_out, "first": _first(columns)}
    if images := embedded(runs, [*training, *held_out]):
        data["images"] = images
    words = f"{len(training):,} of {recorded:,} recorded rollouts, spread evenly over the run" if training else ""
    words += f"; each cut after {MOST_TOKENS:,} tokens" if any(row.get("more") for row in [*training, *answers]) else ""
    also = (
        f"{'; ' if words else ''}{_count_text(held_out, problems)} held-out problems, completed before and after"
        if held_out
        else ""
    )
    return (
        '<section aria-labelledby="rollouts"><h2 id="rollouts">Token by token</h2>'
        f'<p class="muted">{words}{also}. Point at a token for its numbers; click to keep them; the arrow keys go from '
        "token to token.</p>"
        '<div id="tokens-view"><noscript><p>Rollouts are drawn by the script of this page, which is switched off.</p>'
        f'</noscript></div><script type="application/json" id="rollout-data">{_dump(data)}</script></section>'
    )


def _count_text(some: Sequence[Any], every: Sequence[Any]) -> str:
    return f"{len(some)} of {len(every)}" if len(some) < len(every) else str(len(every))


def _dump(data: Any) -> str:
    """JSON that cannot end the element it stands in, nor be taken for markup by anything."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _within_budget(rows: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """As many rows as the page may hold, spread evenly."""
    size = sum(len(_dump(row)) for row in rows)
    if size <= budget:
        return rows
    return [rows[index] for index in spread(len(rows), max(1, len(rows) * max(budget, 0) // size))]


# --- rows ---


def _training(run: RunFiles, row: Mapping[str, Any]) -> dict[str, Any]:
    return {"run": run.name, "step": number(row.get("step")), **_tokens(row)}


def _held_out(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Problems with all their completions: before, after each run (first seed of each experiment), the teacher's."""
    problems: dict[tuple[str, str], dict[str, Any]] = {}
    once: set[tuple[str, str, str]] = set()
    for group in groups:
        run = group.runs[0]
        for row in run.completions:
            # Another file may have another prompt of the same id.
            who, key = str(row.get("who", "")), (str(row.get("prompt_id", "")), str(row.get("prompt", "")))
            # What the student was before, and the teacher, are the same in every run that shares them.
            text = _dump([row.get("text"), row.get("ids")])
            if who != "student after" and (who, str(key), text) in once:
                continue
            once.add((who, str(key), text))
            problem = problems.setdefault(key, {**_prompt(row), "answers": []})
            named = f"{who}, {group.name}" if len(groups) > 1 and who != "teacher" else who
            problem["answers"].append({"who": named, **_tokens(row)})
    order = {"student before": 0, "student after": 1, "teacher": 2}
    for problem in problems.values():
        problem["answers"].sort(key=lambda answer: order.get(answer["who"].split(",")[0], 3))
    return list(problems.values())


def _prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt's id and text, and the turns of a conversation: role and text."""
    found: dict[str, Any] = {"id": str(row.get("prompt_id", "")), "prompt": str(row.get("prompt", ""))}
    turns = messages_of(row.get("messages"))
    return found | images_of(row) | ({"turns": turns} if turns else {})


def _tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    tokens = row.get("tokens")
    tokens = [str(token) for token in tokens] if isinstance(tokens, list) else [str(row.get("text", ""))]
    ids, values = row.get("ids"), _values(row)
    units = units_of(row, len(tokens), values)
    if units:
        values = _by_unit(values, units)
    found: dict[str, Any] = {
        **_prompt(row),
        "status": str(row.get("status", "")),
        "source": str(row.get("source", "student")),
        "reward": number(row.get("reward")),
        "tokens": tokens[:MOST_TOKENS],
        "values": {name: own[:MOST_TOKENS] for name, own in values.items()},
    }
    if episode := episode_of(row, len(tokens), values):
        found["episode"] = episode
    if passages := passages_of(row):
        found["passages"] = passages
    if units:
        found["units"] = {view: own | {"unit": own["unit"][:MOST_TOKENS]} for view, own in units.items()}
    if isinstance(ids, list) and len(ids) == len(tokens):
        found["ids"] = [number(one) for one in ids[:MOST_TOKENS]]
    if len(tokens) > MOST_TOKENS:
        found["more"] = len(tokens) - MOST_TOKENS
    return found


def _values(row: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Columns by name, four digits each."""
    given = row.get("columns")
    columns = {
        str(name): [_short(value) for value in values]
        for name, values in (given.items() if isinstance(given, Mapping) else ())
        if isinstance(values, list) and name not in _LEFT_OUT
    }
    teacher, student = columns.get("teacher_logp"), columns.get("student_logp")
    if teacher and student:
        gap = [None if t is None or s is None else _short(t - s) for t, s in zip(teacher, student, strict=False)]
        columns = {_GAP: gap, **columns}
    return columns


def _by_unit(
    values: Mapping[str, list[float | None]], units: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[float | None]]:
    """The columns of a rollout with units: what compares both sides is a unit's, divided evenly over its tokens."""
    found = dict(values)
    for view, own in units.items():
        for name in (f"{view}_logp", *([_GAP] if view == "teacher" else [])):
            if len(values.get(name, ())) == len(own["unit"]):
                found[name] = over_unit(values[name], own["unit"])
    return found


def _short(value: object) -> float | None:
    found = number(value)
    return None if found is None else float(f"{found:.4g}")


# --- columns ---


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All columns of the page with the scale of their shading, the same in all rollouts."""
    found: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for row in rows for name in row["values"]):
        known = [value for row in rows for value in row["values"].get(name, ()) if value is not None]
        if not known or (name.endswith(".weight") and set(known) == {1.0}):  # a term that counts everywhere
            continue
        shown = quantity(name)
        found.append({"name": name, "label": shown.label, "unit": shown.unit, "kind": shown.kind, "about": shown.about})
        found[-1] |= {"scale": scale(known), "signed": min(known) < 0 < max(known), "falling": max(known) <= 0}
    kinds, known_names = (BETWEEN, MODELS, LOSS), list(KNOWN)
    place = {name: index for index, name in enumerate(known_names)}
    return sorted(found, key=lambda one: (kinds.index(one["kind"]), place.get(one["name"], len(place))))


def scale(values: Sequence[float]) -> float:
    """The size that gets the darkest shade: the 95th percentile of all sizes that are not zero."""
    sizes = sorted(abs(value) for value in values if value)
    return sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))] if sizes else 1.0


def _first(columns: Sequence[Mapping[str, Any]]) -> str:
    names = [str(column["name"]) for column in columns]
    return next((name for name in _FIRST if name in names), names[0] if names else "")
