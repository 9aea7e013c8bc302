"""`retort trust` on the built-in task, before and after training: which number tells where a teacher is to be trusted.

    python benchmarks/trust_table.py --out runs/trust     # trains and measures what is missing, prints the table

Each run is one of the command's own; each is measured three times, with other places, tokens and continuations. The
interval in brackets is that of the first measurement, 95 %, bootstrap over problems; behind it the three values' range.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import measure
from runs import Job, run_all

from retort.config import merge, recipe
from retort.files import write_text

PROBLEMS, PLACES, CANDIDATES, SEEDS = 321, 4, 2, 3
#: Condition: the task, the method, and whether it is trained.
CONDITIONS: Mapping[str, tuple[str, str, bool]] = {
    "opsd, start": ("coached", "opsd", False),
    "opsd, after": ("coached", "opsd", True),
    "opsd without its clip, after": ("coached", "opsd", True),
    "eopd, start": ("coached", "eopd", False),
    "eopd, after": ("coached", "eopd", True),
    "eopd on countdown, start": ("countdown", "eopd", False),
}


def jobs(out: Path) -> Iterator[Job]:
    """A run per condition; where nothing is to be trained, one step at a rate that rounds to nothing."""
    for condition, (task, method, trained) in CONDITIONS.items():
        settings = merge(
            recipe(task),
            {
                "steps": 60 if trained else 1,
                "rollout": {"prompts": 96 if method == "opsd" else 24},
                "eval": {"problems": PROBLEMS, "samples": 2, "teacher": False},
                "checkpoint": {"every": 0},
                "record": {"overlap": 0, "answers": 0},
            },
        )
        settings["method"] = {"name": method, **({"kl_clip": None} if "without its clip" in condition else {})}
        if not trained:
            settings = merge(settings, {"optimizer": {"learning_rate": 1e-12, "weight_decay": 0.0}})
        yield Job(condition, method, 0, out / condition.replace(", ", "-").replace(" ", "-"), settings)


def measured(job: Job) -> list[dict[str, Any]]:
    """Three measurements of a run, from disk where they were made; the first is the run's own `trust.json`."""
    import torch

    from retort.cli.trust import FILE
    from retort.cli.trust import measure as measure_trust

    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for seed in reversed(range(SEEDS)):
        path = job.folder / f"trust-{seed}.json"
        if not path.exists():
            made = measure_trust(job.folder, problems=PROBLEMS, places=PLACES, candidates=CANDIDATES, seed=seed)
            write_text(path, (job.folder / FILE).read_text())
            found.insert(0, made)
        else:
            found.insert(0, json.loads(path.read_text()))
    return found


def cells(found: Sequence[Mapping[str, Any]], place: int, question: str) -> str:
    """The first measurement with its interval, and the range over all."""
    own = [one["predictors"][place][question] for one in found]
    if any(cell is None for cell in own):
        return "–"
    values = [100 * cell["value"] for cell in own]
    first = f"{values[0]:.0f} [{100 * own[0]['low']:.0f}, {100 * own[0]['high']:.0f}]"
    tells = own[0]["low"] > 0.5 or own[0]["high"] < 0.5
    return f"{f'**{first}**' if tells else first} ({min(values):.0f} to {max(values):.0f})"


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A row per condition and predictor."""
    rows: list[list[str]] = []
    for condition, several in found.items():
        for place, row in enumerate(several[0]["predictors"]):
            rows.append(
                [
                    condition if place == 0 else "",
                    row["predictor"],
                    row["claimed_by"],
                    cells(several, place, "viable"),
                    cells(several, place, "helps"),
                ]
            )
    header = ["run", "predictor", "claimed by", "right in the end, %", "makes the difference, %"]
    return measure.markdown(header, rows)


def counts(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What was forced, and where that ended."""
    rows: list[list[str]] = []
    for condition, several in found.items():
        first = several[0]
        shifts = ", ".join(f"{one['shift_against_entropy']:+.2f}" for one in several)
        shares = [f"{100 * first[name]:.1f}" for name in ("viable", "alone")]
        rows.append([condition, f"{first['branches']:,}", *shares, f"{first['differing']:,}", shifts])
    return measure.markdown(
        ["run", "forced tokens", "right with it, %", "right alone, %", "pairs that differ", "Spearman, three times"],
        rows,
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trust"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    todo = list(jobs(arguments.out))
    failed = run_all(todo, arguments.jobs)
    found = {job.condition: measured(job) for job in todo if job.finished}
    print(table(found), counts(found), sep="\n\n")
    if arguments.json is not None:
        short = json.loads(json.dumps(found), parse_float=lambda digits: round(float(digits), 6))
        arguments.json.write_text(json.dumps(short) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
