"""The page of the lab and its plots, from the rows that `lab.read` returns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure

from retort import registry
from retort.evaluate import Estimate

Rows = Sequence[Mapping[str, Any]]
Columns = Sequence[tuple[str, Callable[[Mapping[str, Any]], float | None], int]]

#: Up to this many seeds an interval is called weak; of fewer there is none.
WEAK = 3
#: Title, value and digits.
COLUMNS: Columns = (
    ("avg@8, %", lambda row: 100 * row["after"]["avg@8"], 1),
    ("pass@8, %", lambda row: 100 * row["after"]["pass@8"], 1),
    ("entropy kept, %", lambda row: 100 * row["after"]["student_entropy"] / row["before"]["student_entropy"], 0),
    ("KL to the teacher, nats", lambda row: row["after"]["reverse_kl"], 3),
    ("forward KL where the teacher is uncertain, nats", lambda row: row["after"]["forward_kl_uncertain"], 3),
    ("tokens, thousands", lambda row: row["tokens"] / 1000, 0),
)
INTRO = """# The lab

<!-- Written by benchmarks/lab.py; edit that. What is said of the papers is in docs/lab/lab-notes.md. -->

This page compares every method on the built-in task. All have the same student (0.8M parameters, cut out of its
teacher), the same teacher (1.3M), the same prompts, order and random numbers, 40 batches of 64 prompts x 4 rollouts,
and one learning rate. **Nothing is tuned for any method**, and a paper's defaults are for models a thousand times
larger. So the table compares objectives at one setting; it does not rank papers.

```sh
python benchmarks/lab.py --out runs/lab          # runs what is missing; --report only writes this page
```

"""
LEGEND = """
± is half of a 95 % interval over seeds (Student's t){weak}. *Entropy kept* is the student's own entropy on its own
completions, after training relative to before; *KL to the teacher* is the reverse KL there. Both are at temperature 1,
also where the loss has another. *Tokens* are those in the loss; *seconds* are those of the steps alone in the fastest
run, on one thread, beside other runs. Held-out: 200 prompts x 8 completions at temperature 1.
"""


def page(rows: Rows, about: Mapping[str, Mapping[str, str]], wanted: Iterable[str]) -> str:
    """Markdown: the table, best avg@8 first, and the plots."""
    by_method = {name: [row for row in rows if row["method"] == name] for name in about}
    done = {name: found for name, found in by_method.items() if found}
    order = sorted(done, key=lambda name: -statistics.mean(row["after"]["avg@8"] for row in done[name]))
    shown = table({name: done[name] for name in order}, about, COLUMNS)
    fewest = min((len(found) for found in done.values()), default=0)
    weak = f"; n = {fewest} is weak" if fewest <= WEAK else ""
    missing = sorted(set(wanted) - set(done))
    notes = [f"`{name}`: {about[name]['note']}." for name in order if about[name]["note"]]
    parts = [
        INTRO + measure.in_words(measure.machine("cpu", 1)).replace(", load", "; load") + ".",
        anchors(rows),
        shown,
        LEGEND.format(weak=weak),
        *(["Settings other than a paper's defaults: " + " ".join(notes)] if notes else []),
        *([f"Without a finished run: {', '.join(missing)}."] if missing else []),
        "![avg@8 against tokens learnt from, one panel per method](images/lab-accuracy.svg)",
        "![pass@k after training, one panel per method](images/lab-pass-at-k.svg)",
        "![own entropy against the step, one panel per method](images/lab-entropy.svg)",
        "[What the table says about the papers](lab-notes.md), and where it contradicts them, is on a page of its own. "
        "Whether [extrapolation](cliff.md) beyond a teacher breaks structure is measured separately. Methods that "
        "need rewards, or a teacher that is shown more than the student, are in the "
        "[lab of self-distillation](lab-itself.md).",
    ]
    return "\n\n".join(parts) + "\n"


def table(
    done: Mapping[str, Rows],
    about: Mapping[str, Mapping[str, str]],
    columns: Columns,
    *told: str,
    seconds: bool = True,
) -> str:
    """A row per method: what it is, what is told about it in words, and what was measured."""
    header = ["method", "status", *told, "seeds", *(title for title, _, _ in columns), *["seconds"][: int(seconds)]]
    cells = [
        [
            _name(name, about),
            registry.load(about[name]["method"]).status,
            *(about[name][what] for what in told),
            len(rows),
            *_cells(rows, columns)[: len(columns) + int(seconds)],
        ]
        for name, rows in done.items()
    ]
    return measure.markdown(header, cells)


def anchors(rows: Rows) -> str:
    """Where everybody starts, and where the teacher is."""
    told = []
    before = [row["before"] for row in rows]
    for who, found in (("student before", before[:1]), ("teacher", _teachers(rows)[:1])):
        for cells in found:
            told.append(
                f"{who}: avg@8 {100 * cells['avg@8']:.1f} %, pass@8 {100 * cells['pass@8']:.1f} %, "
                f"own entropy {cells['student_entropy']:.3f} nats"
            )
    return "; ".join(told).capitalize() + "." if told else "No run is finished yet."


def _teachers(rows: Rows) -> list[Mapping[str, float]]:
    return [row["teacher"] for row in rows if row["teacher"]]


def _name(name: str, about: Mapping[str, Mapping[str, str]]) -> str:
    return f"`{name}`" if name == about[name]["method"] else name


def _cells(found: Rows, columns: Columns) -> list[str]:
    cells = [
        spread([number for row in found if (number := _known(value, row)) is not None], digits)
        for _, value, digits in columns
    ]
    # Of the same work, the fastest run was disturbed least.
    return [*cells, f"{min(row['seconds'] for row in found):.0f}"]


def spread(values: Sequence[float], digits: int) -> str:
    """The mean over seeds, and half of its 95 % interval where there are enough of them."""
    interval = Estimate.over_runs(values) if len(values) >= WEAK else None  # of two it would be noise
    # Seeds that agree to the last digit (all at 0 %) show no spread, which is no certainty.
    half = f" ± {interval.high - interval.value:.{digits}f}" if interval and interval.high > interval.low else ""
    return f"{statistics.mean(values):.{digits}f}{half}" if values else "–"


def _known(value: Callable[[Mapping[str, Any]], float | None], row: Mapping[str, Any]) -> float | None:
    """None for what was not measured."""
    try:
        return value(row)
    except KeyError:
        return None


def plots(rows: Rows, folder: Path, stem: str = "lab") -> None:
    """Three figures: a panel per method, with all the others in grey behind it."""
    average = next((own for row in rows for own in row["after"] if own.startswith("avg@")), "avg@8")
    accuracy = {
        name: [[(p["tokens"] / 1000, 100 * p[average]) for p in row["curve"]] for row in found]
        for name, found in _by(rows)
    }
    entropy = {
        name: [[(p["step"], p["student_entropy"]) for p in row["curve"] if "student_entropy" in p] for row in found]
        for name, found in _by(rows)
    }
    passes = {
        name: [sorted((int(k), 100 * share) for k, share in row["pass_at"]["student after"].items()) for row in found]
        for name, found in _by(rows)
    }
    panels(accuracy, folder / f"{stem}-accuracy.svg", "tokens learnt from, thousands", f"{average}, %")
    panels(passes, folder / f"{stem}-pass-at-k.svg", "k", "pass@k, %")
    panels(entropy, folder / f"{stem}-entropy.svg", "step", "own entropy, nats")


def _by(rows: Rows) -> list[tuple[str, Rows]]:
    return [(name, [row for row in rows if row["method"] == name]) for name in dict.fromkeys(r["method"] for r in rows)]


def panels(lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]], path: Path, across: str, up: str) -> None:
    """A grid of small plots, all with the same axes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "retort", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    wide = 5
    tall = -(-len(lines) // wide)
    figure, grid = pyplot.subplots(tall, wide, sharex=True, sharey=True, figsize=(10, 1.7 * tall), squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(lines):
            axes.axis("off")
            continue
        name = list(lines)[place]
        for runs in lines.values():
            axes.plot(*_mean(runs), color="#c8c8c8", linewidth=0.6)
        for run in lines[name]:
            axes.plot(*zip(*run, strict=True), color="#9ec5e8", linewidth=0.8)
        axes.plot(*_mean(lines[name]), color="#0b5cad", linewidth=1.6)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelbottom=place >= len(lines) - wide)  # also above an empty place
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(across)
    figure.supylabel(up)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": time.strftime("%Y-%m-%d")}, facecolor="white")
    pyplot.close(figure)


def _mean(runs: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    points = list(zip(*runs, strict=False))
    return [statistics.mean(x for x, _ in at) for at in points], [statistics.mean(y for _, y in at) for at in points]
