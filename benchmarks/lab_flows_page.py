"""The pages of the benches of flows, from the rows that `lab.read` returns."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import measure
from lab_itself_page import between
from lab_page import WEAK, Columns, Rows, table

#: Whom all others are compared with.
CONTROL = "flow_opd"


@dataclass(frozen=True)
class Task:
    """What a page says of its task.

    Attributes:
        bench: Name of the bench.
        title: Of the page.
        knows: What each expert knows, in words.
        rewards: The reward that counts, by the domain of a prompt.
        words: The domains in words, for the heads of columns.
        samples: k of `avg@k`.
        batch: Samples of a batch.
    """

    bench: str
    title: str
    knows: str
    rewards: Mapping[str, str]
    words: Mapping[str, str]
    samples: int
    batch: int


GLYPHS = Task(
    "glyphs",
    "The lab of flows: small pictures",
    "one reward of the task [glyphs](../glyphs.md): the right character, or the right colour",
    {"glyph": "glyph", "color": "color"},
    {"glyph": "character", "color": "colour"},
    4,
    32,
)
PLANE = Task(
    "plane",
    "The lab of flows: points in the plane",
    "half of the task [plane](../glyphs.md#plane): two moons, or eight Gaussians",
    {"moons": "on_shape", "gaussians": "on_shape"},
    {"moons": "moons", "gaussians": "Gaussians"},
    8,
    192,
)
INTRO = """# {title}

<!-- Written by benchmarks/lab.py --bench {bench}; edit benchmarks/lab_flows_page.py. -->

Two experts each know {knows}.
Can one student learn both from them on its own trajectories, and does it better than GRPO on the rewards, or than the
mean of the experts' weights alone? All share prompts, order and random numbers of a seed, and denoise as often.
**Nothing is tuned for any of them**; where another learning rate stands in a name, the reason is below.

```sh
python benchmarks/lab.py --bench {bench} --out runs/lab-{bench}    # --report only writes this page
```

"""
LEGEND = """
± is half of a 95 % interval over seeds (Student's t){weak}. Shares are those of right samples among the held-out
prompts of that expert's domain, *mean* is their mean. The KL is that of a denoising step to the expert's, nats.
*Seconds* are those of the steps alone in the fastest run, on one thread, beside other work.
"""


def _of(task: Task, who: str, domain: str) -> Any:
    """The reward of a domain on its own prompts, in per cent."""
    return lambda row: 100 * row["by_domain"][who][domain][task.rewards[domain]]["value"]


def _mean(task: Task, who: str = "after") -> Any:
    return lambda row: 100 * row[who][f"avg@{task.samples}"]


def _columns(task: Task) -> Columns:
    return (
        ("mean, %", _mean(task), 1),
        ("gain, points", lambda row: _mean(task)(row) - _mean(task, "before")(row), 1),
        *((f"{task.words[domain]}, %", _of(task, "student after", domain), 1) for domain in task.rewards),
        ("KL", lambda row: row["after"]["reverse_kl"], 3),
        ("steps, thousands", lambda row: row["tokens"] / 1000, 0),
    )


def page(task: Task, rows: Rows, about: Mapping[str, Mapping[str, str]], wanted: Iterable[str]) -> str:
    """Markdown: the reward matrix of the models that are given, the table, and the differences within a seed."""
    own = {name: [row for row in rows if row["method"] == name] for name in about}
    order = sorted(
        (name for name, found in own.items() if found),
        key=lambda name: -statistics.mean(_mean(task)(row) for row in own[name]),
    )
    done = {name: own[name] for name in order}
    fewest = min((len(found) for found in done.values()), default=0)
    weak = f"; n = {fewest} is weak" if fewest <= WEAK else ""
    missing = sorted(set(wanted) - set(done))
    notes = [f"`{name}`: {about[name]['note']}." for name in done if about[name]["note"]]
    parts = [
        INTRO.format(title=task.title, bench=task.bench, knows=task.knows)
        + measure.in_words(measure.machine("cpu", 1)).replace(", load", "; load")
        + ".",
        "## Who knows what before the first step",
        _matrix(task, done),
        f"## After {_steps(rows)} batches of {task.batch} samples",
        table(done, about, _columns(task)),
        LEGEND.format(weak=weak),
        *(["What differs: " + " ".join(notes)] if notes else []),
        *([f"Without a finished run: {', '.join(missing)}."] if missing else []),
        f"## Against `{CONTROL}`",
        "Within a seed, in points, with 95 % intervals over seeds; none below three seeds.",
        _against(task, done),
    ]
    return "\n\n".join(parts) + "\n"


def _steps(rows: Rows) -> int:
    return max((row["curve"][-1]["step"] for row in rows), default=0)


def _matrix(task: Task, done: Mapping[str, Rows]) -> str:
    """Rewards of the given models, on the prompts of each domain."""
    lines: list[list[Any]] = []
    begins = {"the mean of the experts": CONTROL, "the student": f"{CONTROL}, from the student"}
    for words, name in begins.items():
        found = [row for row in done.get(name, []) if row["seed"] == 0]
        lines += [_rewards(task, words, row["by_domain"]["student before"]) for row in found[:1]]
    taught = next((row for own in done.values() for row in own if row["teachers"]), None)
    if taught is not None:
        lines += [
            _rewards(task, f"expert `{who.removeprefix('teacher ')}`", taught["by_domain"][who])
            for who in taught["teachers"]
        ]
    rewards = list(dict.fromkeys(task.rewards.values()))
    head = ["model", *(f"`{reward}` on prompts of `{domain}`, %" for domain in task.rewards for reward in rewards)]
    return measure.markdown(head, lines) if lines else "No run is finished yet."


def _rewards(task: Task, words: str, cells: Mapping[str, Any]) -> list[Any]:
    rewards = list(dict.fromkeys(task.rewards.values()))
    return [words, *(f"{100 * cells[domain][reward]['value']:.1f}" for domain in task.rewards for reward in rewards)]


def _against(task: Task, done: Mapping[str, Rows]) -> str:
    if CONTROL not in done:
        return f"`{CONTROL}` has no finished run."
    lines = [[name, *_difference(task, done[name], done[CONTROL])] for name in done if name != CONTROL]
    return measure.markdown(["", "seeds", "mean", *task.words.values()], lines)


def _difference(task: Task, ours: Rows, theirs: Rows) -> list[Any]:
    one, other = ({row["seed"]: _all(task, row) for row in rows} for rows in (ours, theirs))
    both: Sequence[int] = sorted(set(one) & set(other))
    return [len(both), *(between([one[seed][place] - other[seed][place] for seed in both]) for place in range(3))]


def _all(task: Task, row: Mapping[str, Any]) -> list[float]:
    return [_mean(task)(row), *(_of(task, "student after", domain)(row) for domain in task.rewards)]
