"""The page of the bench of images, from the rows that `lab.read` returns."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import measure
from lab_itself_page import between
from lab_page import WEAK, Columns, Rows, table

from retort.evaluate.pixelated import CHANGED, ORIGINAL, PIXELATED

#: Whom all others are compared with.
CONTROL = "opd"
INTRO = """# The lab of images

<!-- Written by benchmarks/lab.py --bench shapes; edit benchmarks/lab_shapes_page.py. -->

Does a student of `va_opd` look more at the picture than one of `opd` or `gkd`? All learn on the built-in task of
pictures (`shapes`), from the same teacher, with the same prompts, order and random numbers of a seed, and one learning
rate. **Nothing is tuned for any method.** Who looks is measured by a second evaluation, on pixelated pictures with the
same random numbers: an answer that changes was owed to the picture.

```sh
python benchmarks/lab.py --bench shapes --out runs/lab-shapes    # runs what is missing; --report only writes this page
```

"""
LEGEND = """
± is half of a 95 % interval over seeds (Student's t){weak}. *Right* counts completions, *changed* those whose answer is
another one on the pixelated picture. *Seconds* are those of the steps alone in the fastest run, on one thread, beside
other work.
"""


def _after(name: str) -> Any:
    return lambda row: 100 * row["after"][name]


COLUMNS: Columns = (
    ("right, %", _after(ORIGINAL), 1),
    ("gain, points", lambda row: 100 * (row["after"][ORIGINAL] - row["before"][ORIGINAL]), 1),
    ("right, pixelated, %", _after(PIXELATED), 1),
    ("changed, %", _after(CHANGED), 1),
    ("changed before, %", lambda row: 100 * row["before"][CHANGED], 1),
    ("tokens, thousands", lambda row: row["tokens"] / 1000, 0),
)


def page(rows: Rows, about: Mapping[str, Mapping[str, str]], wanted: Iterable[str]) -> str:
    """Markdown: the table, the most right answers first, and the differences to `opd` within a seed."""
    own = {name: [row for row in rows if row["method"] == name] for name in about}
    order = sorted(
        (name for name, found in own.items() if found),
        key=lambda name: -statistics.mean(row["after"][ORIGINAL] for row in own[name]),
    )
    done = {name: own[name] for name in order}
    fewest = min((len(found) for found in done.values()), default=0)
    weak = f"; n = {fewest} is weak" if fewest <= WEAK else ""
    missing = sorted(set(wanted) - set(done))
    notes = [f"`{name}`: {about[name]['note']}." for name in done if about[name]["note"]]
    parts = [
        INTRO + measure.in_words(measure.machine("cpu", 1)).replace(", load", "; load") + ".",
        _anchors(rows),
        table(done, about, COLUMNS),
        LEGEND.format(weak=weak),
        *(["Settings other than a paper's defaults: " + " ".join(notes)] if notes else []),
        *([f"Without a finished run: {', '.join(missing)}."] if missing else []),
        f"## Against `{CONTROL}`",
        "Within a seed, in points, with 95 % intervals over seeds; none below three seeds.",
        _against(done),
        "![right answers against tokens learnt from, one panel per method](images/lab-shapes-accuracy.svg)",
    ]
    return "\n\n".join(parts) + "\n"


def _anchors(rows: Rows) -> str:
    """Where everybody starts, and where the teacher is."""
    taught = [row["teacher"] for row in rows if row["teacher"]]
    who = {"student before": [row["before"] for row in rows][:1], "teacher": taught[:1]}
    told = [
        f"{name}: right {100 * cells[ORIGINAL]:.1f} %, on pixelated pictures {100 * cells[PIXELATED]:.1f} %, changed "
        f"{100 * cells[CHANGED]:.1f} %"
        for name, found in who.items()
        for cells in found
    ]
    return "; ".join(told).capitalize() + "." if told else "No run is finished yet."


def _against(done: Mapping[str, Rows]) -> str:
    if CONTROL not in done:
        return f"`{CONTROL}` has no finished run."
    lines = [[name, *_difference(done[name], done[CONTROL])] for name in done if name != CONTROL]
    return measure.markdown(["method", "seeds", "right", "right, pixelated", "changed"], lines)


def _difference(ours: Rows, theirs: Rows) -> list[Any]:
    one, other = ({row["seed"]: row["after"] for row in rows} for rows in (ours, theirs))
    both: Sequence[int] = sorted(set(one) & set(other))
    keys = (ORIGINAL, PIXELATED, CHANGED)
    return [len(both), *(between([100 * (one[seed][key] - other[seed][key]) for seed in both]) for key in keys)]
