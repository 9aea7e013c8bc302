"""The page of the bench in many turns, from the rows that `lab.read` returns."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
from lab_itself_page import between
from lab_page import WEAK, Columns, Rows, panels, table

#: Whom all others are compared with.
CONTROL = "opd"
#: Turns that the table has; the plot has all.
TURNS = 8
#: A bin of fewer tokens than this is left out: it would be noise.
FEWEST = 30
INTRO = """# The lab of agents

<!-- Written by benchmarks/lab.py --bench agents; edit benchmarks/lab_agents_page.py. -->

This page compares methods for episodes of many turns in the built-in environment, [Rooms](../rooms.md). All have the
same student and teacher (0.9M parameters each), the same games and random numbers of a seed, 30 batches of 12 games x 4
episodes, and one learning rate. **Nothing is tuned for any method**, and a paper's defaults are for models a thousand
times larger. So the table compares objectives at one setting; it does not rank papers.

```sh
python benchmarks/lab.py --bench agents --out runs/lab-agents    # runs what is missing; --report only writes this page
```

"""
LEGEND = """
± is half of a 95 % interval over seeds (Student's t){weak}. *Success* is the share of games that are won within 16
turns, of 150 held-out games x 2 episodes at temperature 1, always at the whole horizon; these differ between seeds, not
between methods. *Turns* and *wrong commands* are per episode. *KL to the teacher* is the reverse KL on the episodes
of the student, in nats per token. *Tokens* are those in the loss: a curriculum plays fewer turns. *Seconds* are those
of the steps alone in the fastest run, on one thread, beside other work.
"""
COLUMNS: Columns = (
    ("success, %", lambda row: 100 * row["after"]["success"], 1),
    ("gain, points", lambda row: 100 * (row["after"]["success"] - row["before"]["success"]), 1),
    ("turns", lambda row: row["after"]["turns"], 1),
    ("wrong commands", lambda row: row["after"]["tool_errors"], 2),
    ("KL to the teacher, nats", lambda row: row["after"]["reverse_kl"], 3),
    ("entropy kept, %", lambda row: 100 * row["after"]["student_entropy"] / row["before"]["student_entropy"], 0),
    ("tokens, thousands", lambda row: row["tokens"] / 1000, 0),
)


def page(rows: Rows, about: Mapping[str, Mapping[str, str]], wanted: Iterable[str]) -> str:
    """Markdown: who won how often, how far all are from the teacher at each turn, and the differences to OPD."""
    own = {name: [row for row in rows if row["method"] == name] for name in about}
    done = {name: found for name, found in own.items() if found}
    order = sorted(done, key=lambda name: -statistics.mean(row["after"]["success"] for row in done[name]))
    done = {name: done[name] for name in order}
    fewest = min((len(found) for found in done.values()), default=0)
    weak = f"; n = {fewest} is weak" if fewest <= WEAK else ""
    notes = [f"`{name}`: {about[name]['note']}." for name in done if about[name]["note"]]
    missing = sorted(set(wanted) - set(done))
    return (
        "\n\n".join(
            [
                INTRO + measure.in_words(measure.machine("cpu", 1)).replace(", load", "; load") + ".",
                _anchors(rows),
                table(done, about, COLUMNS),
                LEGEND.format(weak=weak),
                *(["Settings other than a paper's defaults: " + " ".join(notes)] if notes else []),
                *([f"Without a finished run: {', '.join(missing)}."] if missing else []),
                "## Reverse KL by turn",
                "In nats per token, on held-out episodes of the student's own, mean over seeds. A turn that fewer than "
                f"{FEWEST} tokens belong to is left out.",
                _by_turn(done),
                "![Reverse KL to the teacher by turn, one panel per method](images/lab-agents-turns.svg)",
                "## Against OPD",
                "Within a seed, with 95 % intervals over seeds; none below three seeds.",
                _against(done),
            ]
        )
        + "\n"
    )


def _anchors(rows: Rows) -> str:
    told: list[str] = []
    for who, key in (("student before", "before"), ("teacher", "teacher")):
        found = [row[key] for row in rows if row[key]]
        if found:
            share = 100 * statistics.mean(cells["success"] for cells in found)
            told.append(f"{who}: success {share:.1f} %, {statistics.mean(c['turns'] for c in found):.1f} turns")
    return "; ".join(told).capitalize() + "." if told else "No run is finished yet."


def turns(row: Mapping[str, Any], who: str) -> list[tuple[float, float]]:
    """Turn and reverse KL of one model, nats per token, where enough tokens fell."""
    found = row["profile"].get(who, {}).get("by_turn", {})
    columns = zip(found.get("from", ()), found.get("tokens", ()), found.get("reverse_kl", ()), strict=True)
    return [(turn, value) for turn, tokens, value in columns if tokens >= FEWEST and value is not None]


def _by_turn(done: Mapping[str, Rows]) -> str:
    lines: list[list[Any]] = []
    every = [row for found in done.values() for row in found]
    for name, found, who in [
        ("student before", every, "student before"),
        *((name, found, "student after") for name, found in done.items()),
    ]:
        known = [dict(turns(row, who)) for row in found]
        means = [[own[turn] for own in known if turn in own] for turn in range(1, TURNS + 1)]
        lines.append([name, *(f"{statistics.mean(values):.3f}" if values else "–" for values in means)])
    return measure.markdown(["", *(f"turn {turn}" for turn in range(1, TURNS + 1))], lines)


def _against(done: Mapping[str, Rows]) -> str:
    if CONTROL not in done:
        return f"`{CONTROL}` has no finished run."
    lines = [[name, *_difference(done[name], done[CONTROL])] for name in done if name != CONTROL]
    return measure.markdown(["method", "seeds", "success, points", "KL to the teacher, nats x 100"], lines)


def _difference(ours: Rows, theirs: Rows) -> list[Any]:
    one, other = ({row["seed"]: row["after"] for row in rows} for rows in (ours, theirs))
    both: Sequence[int] = sorted(set(one) & set(other))
    keys = ("success", "reverse_kl")
    return [len(both), *(between([100 * (one[seed][key] - other[seed][key]) for seed in both]) for key in keys)]


def plots(rows: Rows, folder: Path) -> None:
    """The KL by turn of every method after training."""
    names = dict.fromkeys(row["method"] for row in rows)
    lines = {
        name: [points for row in rows if row["method"] == name and (points := turns(row, "student after"))]
        for name in names
    }
    shown = {name: own for name, own in lines.items() if own}
    if shown:
        panels(shown, folder / "lab-agents-turns.svg", "turn", "reverse KL, nats per token")
