"""The page of the bench of flows, from the rows that `lab.read` returns."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import measure
from lab_itself_page import between
from lab_page import WEAK, Columns, Rows, table

#: Whom all others are compared with.
CONTROL = "flow_opd"
#: The rewards that experts know, which are also the domains of their prompts.
DOMAINS = ("glyph", "color")
INTRO = """# The lab of flows

<!-- Written by benchmarks/lab.py --bench glyphs; edit benchmarks/lab_glyphs_page.py. -->

Two experts each know one reward of the task [glyphs](../glyphs.md): the right character, or the right colour. Can one
student learn both from them on its own trajectories, and does it better than GRPO on the rewards, or than the mean of
the experts' weights alone? All share prompts, order, random numbers of a seed and one learning rate, and denoise as
often. **Nothing is tuned for any of them.**

```sh
python benchmarks/lab.py --bench glyphs --out runs/lab-glyphs    # runs what is missing; --report only writes this page
```

"""
LEGEND = """
± is half of a 95 % interval over seeds (Student's t){weak}. *Character* and *colour* are the shares of right samples
among the held-out prompts of that expert's domain, *mean* their mean. The KL is that of a denoising step to the
expert's, nats. *Seconds* are those of the steps alone in the fastest run, on one thread, beside other work.
"""


def _of(who: str, domain: str) -> Any:
    """The reward of a domain on its own prompts, in per cent."""
    return lambda row: 100 * row["by_domain"][who][domain][domain]["value"]


COLUMNS: Columns = (
    ("mean, %", lambda row: 100 * row["after"]["avg@4"], 1),
    ("gain, points", lambda row: 100 * (row["after"]["avg@4"] - row["before"]["avg@4"]), 1),
    ("character, %", _of("student after", "glyph"), 1),
    ("colour, %", _of("student after", "color"), 1),
    ("KL", lambda row: row["after"]["reverse_kl"], 2),
    ("steps, thousands", lambda row: row["tokens"] / 1000, 0),
)


def page(rows: Rows, about: Mapping[str, Mapping[str, str]], wanted: Iterable[str]) -> str:
    """Markdown: the reward matrix of the models that are given, the table, and the differences within a seed."""
    own = {name: [row for row in rows if row["method"] == name] for name in about}
    order = sorted(
        (name for name, found in own.items() if found),
        key=lambda name: -statistics.mean(row["after"]["avg@4"] for row in own[name]),
    )
    done = {name: own[name] for name in order}
    fewest = min((len(found) for found in done.values()), default=0)
    weak = f"; n = {fewest} is weak" if fewest <= WEAK else ""
    missing = sorted(set(wanted) - set(done))
    notes = [f"`{name}`: {about[name]['note']}." for name in done if about[name]["note"]]
    parts = [
        INTRO + measure.in_words(measure.machine("cpu", 1)).replace(", load", "; load") + ".",
        "## Who knows what before the first step",
        _matrix(done),
        "## After 60 batches of 32 pictures",
        table(done, about, COLUMNS),
        LEGEND.format(weak=weak),
        *(["What differs: " + " ".join(notes)] if notes else []),
        *([f"Without a finished run: {', '.join(missing)}."] if missing else []),
        f"## Against `{CONTROL}`",
        "Within a seed, in points, with 95 % intervals over seeds; none below three seeds.",
        _against(done),
    ]
    return "\n\n".join(parts) + "\n"


def _matrix(done: Mapping[str, Rows]) -> str:
    """Rewards of the given models, on the prompts of each domain."""
    lines: list[list[Any]] = []
    begins = {"the mean of the experts": CONTROL, "the student": f"{CONTROL}, from the student"}
    for words, name in begins.items():
        found = [row for row in done.get(name, []) if row["seed"] == 0]
        lines += [_rewards(words, row["by_domain"]["student before"]) for row in found[:1]]
    taught = next((row for own in done.values() for row in own if row["teachers"]), None)
    if taught is not None:
        lines += [
            _rewards(f"expert `{who.removeprefix('teacher ')}`", taught["by_domain"][who]) for who in taught["teachers"]
        ]
    head = ["model", *(f"{reward} on prompts of {domain}, %" for domain in DOMAINS for reward in DOMAINS)]
    return measure.markdown(head, lines) if lines else "No run is finished yet."


def _rewards(words: str, cells: Mapping[str, Any]) -> list[Any]:
    return [words, *(f"{100 * cells[domain][reward]['value']:.1f}" for domain in DOMAINS for reward in DOMAINS)]


def _against(done: Mapping[str, Rows]) -> str:
    if CONTROL not in done:
        return f"`{CONTROL}` has no finished run."
    lines = [[name, *_difference(done[name], done[CONTROL])] for name in done if name != CONTROL]
    return measure.markdown(["", "seeds", "mean", "character", "colour"], lines)


def _difference(ours: Rows, theirs: Rows) -> list[Any]:
    one, other = ({row["seed"]: _both(row) for row in rows} for rows in (ours, theirs))
    both: Sequence[int] = sorted(set(one) & set(other))
    return [len(both), *(between([one[seed][place] - other[seed][place] for seed in both]) for place in range(3))]


def _both(row: Mapping[str, Any]) -> tuple[float, float, float]:
    glyph, color = (_of("student after", domain)(row) for domain in DOMAINS)
    return 100 * row["after"]["avg@4"], glyph, color
