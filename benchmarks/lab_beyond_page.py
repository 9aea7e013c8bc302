"""The page of the bench of newer methods, from the rows that `lab.read` returns."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
from lab_itself_page import between
from lab_page import COLUMNS, LEGEND, WEAK, Rows, anchors, spread, table

#: Whom all others are compared with.
CONTROLS = ("opd", "eopd")
#: `w2s_opd` with a pair of which both are worse than the student, and `opd` from the better one of that pair alone.
WORSE_PAIR, WORSE_TEACHER = "w2s_opd, worse pair", "opd, worse teacher"
#: Curves of the noise of a gradient: title, and name among the metrics.
NOISE = (
    ("at a token, exact", "gradient_variance"),
    ("at a token, of `opd`'s estimator there", "gradient_variance_plain"),
    ("over all weights, from prompt to prompt", "batch_gradient_variance"),
)
INTRO = """# The lab of newer methods

<!-- Written by benchmarks/lab.py --bench beyond; edit benchmarks/lab_beyond_page.py. -->

Methods published after those of the [lab](lab.md), on its task and its models, beside `opd` and `eopd`: the same
prompts, order and random numbers of a seed, 40 batches of 64 prompts x 4 rollouts, and one learning rate. **Nothing is
tuned for any method.** `opd2` and `w2s_opd` ask models that the task does not have, which `benchmarks/weaker_models.py`
trains.

```sh
python benchmarks/lab.py --bench beyond --out runs/lab-beyond    # runs what is missing; --report only writes this page
```

"""


def page(rows: Rows, about: Mapping[str, Mapping[str, str]], wanted: Iterable[str]) -> str:
    """Markdown: the table, best avg@8 first, the differences to the controls within a seed, and the noise."""
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
        table(done, about, COLUMNS),
        LEGEND.format(weak=weak) + "For `w2s_opd` the teacher is the better one of its pair.",
        *(["Settings other than a paper's defaults: " + " ".join(notes)] if notes else []),
        *([f"Without a finished run: {', '.join(missing)}."] if missing else []),
        *(part for control in CONTROLS for part in _against(control, done)),
        *_worse_pair(done),
        "## Noise of the gradient",
        "Means over the batches at which it was measured (every tenth) and over seeds, nats squared. What a token adds "
        "is exact, in the space of logits; the last column is that of whole gradients, from their differences between "
        "prompts.",
        _noise(done),
        "![avg@8 against tokens learnt from, one panel per method](images/lab-beyond-accuracy.svg)",
        "![pass@k after training, one panel per method](images/lab-beyond-pass-at-k.svg)",
        "![own entropy against the step, one panel per method](images/lab-beyond-entropy.svg)",
        "[What this says about the papers](lab-notes.md#newer-methods) is on a page of its own, with the noise of "
        "`resopd` at each token along runs. `reopd` needs episodes and is in the [lab of agents](lab-agents.md).",
    ]
    return "\n\n".join(parts) + "\n"


def _against(control: str, done: Mapping[str, Rows]) -> list[str]:
    """Differences within a seed, with intervals, under a heading."""
    if control not in done:
        return []
    lines = [[name, *_difference(done[name], done[control])] for name in done if name != control]
    return [
        f"## Against `{control}`",
        "Within a seed, with 95 % intervals over seeds; none below three seeds. Right answers in points.",
        measure.markdown(["method", "seeds", "avg@8", "pass@8", "entropy kept, points"], lines),
    ]


def _difference(ours: Rows, theirs: Rows) -> list[Any]:
    one, other = ({row["seed"]: row for row in rows} for rows in (ours, theirs))
    both: Sequence[int] = sorted(set(one) & set(other))

    def of(number: Any) -> str:
        return between([100 * (number(one[seed]) - number(other[seed])) for seed in both])

    return [
        len(both),
        of(lambda row: row["after"]["avg@8"]),
        of(lambda row: row["after"]["pass@8"]),
        of(lambda row: row["after"]["student_entropy"] / row["before"]["student_entropy"]),
    ]


def _worse_pair(done: Mapping[str, Rows]) -> list[str]:
    """Whether a student learns from models that are all worse than it, under a heading."""
    if WORSE_PAIR not in done or WORSE_TEACHER not in done:
        return []
    ours, theirs = done[WORSE_PAIR], done[WORSE_TEACHER]
    numbers = ("avg@8", "pass@8")

    def line(title: str, cells: Sequence[Mapping[str, float]], since: str = "–") -> list[str]:
        return [title, *(spread([100 * own[key] for own in cells], 1) for key in numbers), since]

    def gain(rows: Rows) -> str:
        return between([100 * (row["after"]["avg@8"] - row["before"]["avg@8"]) for row in rows])

    lines = [
        line("student before", [row["before"] for row in ours]),
        line("better model of the pair", [row["teacher"] for row in theirs if row["teacher"]]),
        line("`opd` from that model", [row["after"] for row in theirs], gain(theirs)),
        line("`w2s_opd`", [row["after"] for row in ours], gain(ours)),
    ]
    difference = ", ".join(f"{key} {cell}" for key, cell in zip(numbers, _difference(ours, theirs)[1:], strict=False))
    return [
        "## A pair that is worse than the student",
        "`w2s_opd` claims that models which are all worse than the student teach it. Here both are: one small model, "
        "trained for 700 steps and for 500 (`halfway` and `weaker` of `benchmarks/weaker_models.py`). A "
        "reconstruction: the paper's pairs are language models before and after post-training. The control learns from "
        "the better one.",
        measure.markdown(["", "avg@8, %", "pass@8, %", "avg@8, points since before"], lines),
        f"`w2s_opd` − its control within a seed, points: {difference}. The control harms the student, so this says "
        "less than it seems. A lower temperature of sampling gives the untouched student as much avg@8, though not the "
        "pass@8 ([notes](lab-notes.md)).",
    ]


def _noise(done: Mapping[str, Rows]) -> str:
    lines = []
    for name, rows in done.items():
        found = [_curve(row["folder"], key) for _, key in NOISE for row in [*rows]]
        cells = [found[at : at + len(rows)] for at in range(0, len(found), len(rows))]
        lines.append([name, *(_mean([value for own in cell for value in own]) for cell in cells)])
    return measure.markdown(["method", *(title for title, _ in NOISE)], lines)


def _curve(folder: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [float(row[key]) for row in rows if key in row]


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3g}" if values else "–"
