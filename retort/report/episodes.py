"""Episodes of several turns as the page's script draws them: what was said, and where it went wrong.

The files may be damaged or somebody else's: what does not fit together is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from retort.report.read import as_list, as_object, number

#: Most characters shown of one message of an environment.
MOST_CHARACTERS = 4000


def messages_of(messages: object) -> list[list[str]]:
    """Role and text of messages."""
    return [[str(pair[0]), str(pair[1])] for pair in as_list(messages) if isinstance(pair, list) and len(pair) == 2]


def cut_text(text: str) -> str:
    """A text as long as it is shown, with the number of characters that are left out."""
    more = len(text) - MOST_CHARACTERS
    return f"{text[:MOST_CHARACTERS]} … {more:,} more characters" if more > 0 else text


def episode_of(row: Mapping[str, Any], count: int, values: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """The turns of an episode; empty for a row that is none.

    Args:
        row: A line of `rollouts.jsonl`.
        count: Number of its tokens.
        values: Its columns as they are shown; `reverse_kl` is averaged, or the difference of the log-probs.

    Returns:
        `turns`, each with `from` and `to` (its tokens), `gap` (mean reverse KL, nats), `reward`, `errors` (invalid
        calls), `success`, and `said` (role and text of what the environment replied); and `worst`, the index of the
        turn with the largest gap, where there are several and one of them has a gap above 0.
    """
    turn_A = [int(turn) if isinstance(turn, int) else -1 for turn in as_list(row.get("turns"))]
    outcomes = [as_object(outcome) for outcome in as_list(row.get("outcomes"))]
    if not turn_A and outcomes:
        turn_A = [0] * count
    steps = [after - before for before, after in pairwise(turn_A)]
    if len(turn_A) != count or not turn_A or turn_A[0] != 0 or any(step not in (0, 1) for step in steps):
        return {}
    ends = [index + 1 for index, step in enumerate(steps) if step] + [count]
    starts = [0, *ends[:-1]]
    gaps = _gaps(values, count)
    turns = [
        {"from": start, "to": end, "gap": _mean(gaps[start:end]), **_came(outcomes, index)}
        for index, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    known = {index: turn["gap"] for index, turn in enumerate(turns) if turn["gap"] is not None}
    worst = max(known, key=lambda index: known[index], default=None)
    marked = worst is not None and len(turns) > 1 and known[worst] > 0
    return {"turns": turns, **({"worst": worst} if marked else {})}


def _gaps(values: Mapping[str, Sequence[float | None]], count: int) -> Sequence[float | None]:
    """The reverse KL at each token: the exact one where the run has it, else that of the tokens drawn."""
    exact = values.get("reverse_kl", ())
    if len(exact) == count:
        return exact
    ours, theirs = values.get("student_logp", ()), values.get("teacher_logp", ())
    if len(ours) != count or len(theirs) != count:
        return [None] * count
    return [None if s is None or t is None else s - t for s, t in zip(ours, theirs, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known):.4g}") if known else None


def _came(outcomes: Sequence[Mapping[str, Any]], index: int) -> dict[str, Any]:
    """What came of a turn, as far as the row says it."""
    if index >= len(outcomes):
        return {}
    measures = as_object(outcomes[index].get("measures"))
    found = {
        "said": [[role, cut_text(text)] for role, text in messages_of(outcomes[index].get("messages"))],
        "reward": number(outcomes[index].get("reward")),
        "errors": number(measures.get("tool_errors")) or 0,
        "success": bool(number(measures.get("success"))),
    }
    return {name: value for name, value in found.items() if value not in ([], None, 0, False) or name == "reward"}
