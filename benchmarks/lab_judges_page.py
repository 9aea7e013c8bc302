"""The page of the bench whose teacher only talks, from the rows that `lab.read` returns."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import measure
from lab_itself_page import between
from lab_page import WEAK, Columns, Rows, anchors, spread, table

#: Whom all others are compared with.
CONTROL = "reward alone"
INTRO = """# The lab of judges

<!-- Written by benchmarks/lab.py --bench judges; edit benchmarks/lab_judges_page.py. -->

This page compares what a teacher's texts are worth: judged by a rubric (`ropd`), imitated, or beside the log-probs of a
model (`opd`). All have the same student (0.8M parameters), prompts, order and random numbers of a seed, 40 batches of
256 completions, and one learning rate. **Nothing is tuned for any method.**

The judge is [one by rules](../judges.md#a-judge-by-rules): it solves each problem, and decides five criteria by code.
It never errs, which no model can say of itself, and only right answers earn all its points. So the table says what the
objective makes of a perfect judge, and nothing about judges.

```sh
python benchmarks/lab.py --bench judges --out runs/lab-judges    # runs what is missing; --report only writes this page
```

"""
LEGEND = """
± is half of a 95 % interval over seeds (Student's t){weak}. *Rewards* says whose they are; *gain*, avg@8 after minus
before, in points; *entropy kept*, the student's own entropy on its own completions, after training relative to before.
*Seconds* are those of the steps alone in the fastest run, on one thread, beside other work, the judge's time included.
Held-out: 200 prompts x 8 completions at temperature 1.
"""
COLUMNS: Columns = (
    ("avg@8, %", lambda row: 100 * row["after"]["avg@8"], 1),
    ("gain, points", lambda row: 100 * (row["after"]["avg@8"] - row["before"]["avg@8"]), 1),
    ("pass@8, %", lambda row: 100 * row["after"]["pass@8"], 1),
    ("entropy kept, %", lambda row: 100 * row["after"]["student_entropy"] / row["before"]["student_entropy"], 0),
    ("tokens, thousands", lambda row: row["tokens"] / 1000, 0),
)


def page(rows: Rows, about: Mapping[str, Mapping[str, str]], wanted: Iterable[str]) -> str:
    """Markdown: the table, best avg@8 first, how far each is after fewer batches, and the differences to the reward."""
    own = {name: [row for row in rows if row["method"] == name] for name in about}
    order = sorted(
        (name for name, found in own.items() if found),
        key=lambda name: -statistics.mean(row["after"]["avg@8"] for row in own[name]),
    )
    done = {name: own[name] for name in order}
    fewest = min((len(found) for found in done.values()), default=0)
    weak = f"; n = {fewest} is weak" if fewest <= WEAK else ""
    missing = sorted(set(wanted) - set(done))
    notes = [f"`{name}`: {about[name]['note']}." for name in done if about[name]["note"]]
    parts = [
        INTRO + measure.in_words(measure.machine("cpu", 1)).replace(", load", "; load") + ".",
        anchors(rows),
        table(done, about, COLUMNS, "rewards"),
        LEGEND.format(weak=weak),
        *(["Settings other than a paper's defaults: " + " ".join(notes)] if notes else []),
        *([f"Without a finished run: {', '.join(missing)}."] if missing else []),
        "## After fewer batches",
        "avg@8 in %, all batches of 256 completions (prompts, where texts are imitated).",
        _early(done),
        f"## Against `{CONTROL}`",
        "Within a seed, in points, with 95 % intervals over seeds; none below three seeds.",
        _against(done),
        "![avg@8 against tokens learnt from, one panel per method](images/lab-judges-accuracy.svg)",
        "![own entropy against the step, one panel per method](images/lab-judges-entropy.svg)",
    ]
    return "\n\n".join(parts) + "\n"


def _early(done: Mapping[str, Rows]) -> str:
    steps = sorted({point["step"] for rows in done.values() for row in rows for point in row["curve"]})
    lines: list[list[Any]] = []
    for name, rows in done.items():
        known = [[100 * p["avg@8"] for row in rows for p in row["curve"] if p["step"] == step] for step in steps]
        lines.append([name, *(spread(values, 1) for values in known)])
    return measure.markdown(["", *(f"{step} batches" for step in steps)], lines)


def _against(done: Mapping[str, Rows]) -> str:
    if CONTROL not in done:
        return f"`{CONTROL}` has no finished run."
    lines = [[name, *_difference(done[name], done[CONTROL])] for name in done if name != CONTROL]
    return measure.markdown(["method", "seeds", "avg@8", "pass@8"], lines)


def _difference(ours: Rows, theirs: Rows) -> list[Any]:
    one, other = ({row["seed"]: row["after"] for row in rows} for rows in (ours, theirs))
    both: Sequence[int] = sorted(set(one) & set(other))
    keys = ("avg@8", "pass@8")
    return [len(both), *(between([100 * (one[seed][key] - other[seed][key]) for seed in both]) for key in keys)]
