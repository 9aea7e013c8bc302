"""The page of methods whose teacher writes a text before it scores, from the rows that `lab.read` returns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import measure
from lab_itself_page import COLUMNS, differences
from lab_page import WEAK, Rows, anchors, spread, table

from retort.tasks import coached

#: Who writes first, whom that is compared with, and what differs between them.
WROTE: Sequence[tuple[str, str, str]] = (
    ("opsd, reasons first", "opsd", "16 rationales a batch"),
    ("sdft, teacher writes", "sdft", "no further text: the rollouts themselves"),
    ("peer_opd, summaries", "peer_opd, excerpts", "128 summaries a batch"),
    ("peer_opd, summaries", "peer_opd", "the same, and two further siblings"),
    ("unisd, induced", "unisd, random", "48 instructions a batch"),
)
INTRO = """# The lab of written texts

<!-- Written by benchmarks/lab.py --bench written; edit benchmarks/lab_written_page.py. -->

This page asks what it brings that a teacher
[writes a text before it scores](../views.md#texts-that-are-written-first): a rationale (`opsd`), the completions
themselves (`sdft`), a summary of each sibling (`peer_opd`), an instruction drawn from other problems (`unisd`). Each
has its control beside it. Task, models, prompts, random numbers and learning rate are those of the
[lab of self-distillation](lab-itself.md), and **nothing is tuned for any method**.

The student has 0.8M parameters and knows few words, none of them to explain with. Asked for a rationale, a summary or
an instruction, it writes one more answer to the question, which its teacher is then shown behind the word `maybe`. So
the table says what the machinery does, and little of what a model that can explain would gain by it.

```sh
python benchmarks/lab.py --bench written --out runs/lab-itself    # runs what is missing; --report only writes this page
```

"""
LEGEND = """
± is half of a 95 % interval over seeds (Student's t){weak}. The columns are those of the
[lab of self-distillation](lab-itself.md). *Tokens* are those in the loss, and what a teacher writes is not among them.
Held-out: 128 prompts x 8 completions at temperature 1.
"""


def page(rows: Rows, about: Mapping[str, Mapping[str, str]], wanted: Iterable[str]) -> str:
    """Markdown: the table in the order of the bench, who differs from whom, and what was written."""
    done = {name: found for name in about if (found := [row for row in rows if row["method"] == name])}
    fewest = min((len(found) for found in done.values()), default=0)
    weak = f"; n = {fewest} is weak" if fewest <= WEAK else ""
    missing = sorted(set(wanted) - set(done))
    notes = [f"`{name}`: {about[name]['note']}." for name in done if about[name]["note"]]
    parts = [
        INTRO + measure.in_words(measure.machine("cpu", 1)).replace(", load", "; load") + ".",
        anchors(rows),
        table(done, about, COLUMNS, "shown", seconds=False),
        LEGEND.format(weak=weak),
        *(["Settings other than a paper's defaults, and what they mean here: " + " ".join(notes)] if notes else []),
        *([f"Without a finished run: {', '.join(missing)}."] if missing else []),
        "## Pairs of conditions",
        "Within a seed, in points, with 95 % intervals over seeds; none below three seeds.",
        differences(done),
        "## What was written",
        "*Right* is the share of the texts in the recorded rollouts (one a batch) that answer the prompt rightly.",
        _texts(done),
        "[What this says](lab-notes.md#texts-written-before-the-teacher-scores), and what not, is on another page.",
    ]
    return "\n\n".join(parts) + "\n"


def _texts(done: Mapping[str, Rows]) -> str:
    known: dict[str, str] = {}
    for one, _, what in WROTE:
        known.setdefault(one, what)
    lines = [[one, known[one], right] for one in known if one in done and (right := _right(done[one])) is not None]
    return measure.markdown(["", "written", "right, %"], lines)


def _right(rows: Rows) -> str | None:
    """The share of written texts that answer the prompt rightly, with half of its interval over runs."""
    shares: list[float] = []
    for row in rows:
        lines = [json.loads(line) for line in (row["folder"] / "rollouts.jsonl").read_text().splitlines()]
        written = [(line["prompt"], own["text"]) for line in lines for own in line.get("passages", ())]
        if written:
            shares.append(100 * sum(coached.check(*own) for own in written) / len(written))
    return spread(shares, 0) if shares else None
