"""The cliff of reward extrapolation: does structure break above the predicted lambda? `listopd` on the task `ranking`.

    python benchmarks/cliff.py --out runs/cliff            # run what is missing, then write docs/lab/cliff.md, plots
    python benchmarks/cliff.py --out runs/cliff --report   # only the page, from the runs that are there

The student starts at the teacher's own weights, so at lambda = 1 there is nothing to learn and all its answers parse;
the base is the task's small student. Every run is one of the command's own (`retort train`) in a folder of its own, so
this script may be ended at any time and started again. The predicted boundary is computed from p and b that the runs
measured at their first step, when their rollouts are the teacher's. Intervals are 95 %, Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from cliff_judge import SAMPLES, greedy, judged, target
from cliff_page import page, plots, summary
from rich.progress import Progress
from runs import Job, run_all

from retort.config import merge, recipe
from retort.console.terminal import quiet_libraries
from retort.files import write_text

ROOT = Path(__file__).parents[1]

PROBLEMS = 256
#: What differs from the recipe of the built-in task.
BASE: Mapping[str, Any] = {
    "student": "ranking:teacher",
    "teacher": "ranking:teacher",
    "base": "ranking:student",
    "steps": 60,
    "optimizer": {"learning_rate": 1e-3},
    "eval": {"problems": PROBLEMS, "samples": SAMPLES, "every": 0, "teacher": False},
    "checkpoint": {"every": 0},
    "record": {"rollouts": 1, "overlap": 0, "answers": PROBLEMS},
}
#: On both sides of what a first look predicted (1.24 to 1.34). 1.01 is the control: hardly any extrapolation, all of
#: the noise. At 1 a student that is its teacher has no gradient, and at 0.5 the target lies towards the base: those two
#: are for orientation. What the question hangs on is run first.
FEWER = (3.0, 1.01, 1.2)
MORE = (1.5, 1.3, 2.0, 1.1)
ORIENTATION = (0.5, 1.0)


@dataclass(frozen=True)
class Condition:
    """What differs from the base.

    Attributes:
        name: Of the condition, and of its folder.
        question: What it varies, in words; empty for more values of lambda of one that is there.
        changes: Settings.
        grid: Values of lambda.
    """

    name: str
    question: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    grid: Sequence[float] = FEWER


CONDITIONS = (
    Condition("base", "60 steps of 128 prompts, learning rate 1e-3"),
    Condition("base", "", grid=MORE),
    Condition("base", "", grid=ORIENTATION),
    # Only for b, which `direct` measures at the same step in the other of the paper's two ways.
    Condition("direct", "one step, b measured directly", {"steps": 1, "method": {"base_mode": "direct"}}, (1.0,)),
    Condition("rate-low", "learning rate 1e-4", {"optimizer": {"learning_rate": 1e-4}}),
    Condition("rate-high", "learning rate 3e-3", {"optimizer": {"learning_rate": 3e-3}}),
    Condition("steps", "120 steps of 64 prompts", {"steps": 120, "rollout": {"prompts": 64}}),
)


def jobs(out: Path, only: Sequence[str], seeds: int) -> Iterator[Job]:
    """All runs, condition by condition and seed by seed, so that an early end leaves whole comparisons."""
    for condition in CONDITIONS:
        if only and condition.name not in only:
            continue
        for seed in range(seeds):
            for weight in condition.grid:
                settings = merge(merge(recipe("ranking"), BASE), condition.changes)
                settings["method"] = {**settings["method"], "reward_weight": weight}
                folder = out / condition.name / f"lambda-{weight:g}" / f"seed-{seed}"
                yield Job(condition.name, f"{weight:g}", seed, folder, {**settings, "seed": seed})


def after(todo: Sequence[Job], out: Path, workers: int) -> None:
    """Greedy answers of every finished student, and samples of the target at every lambda, where not measured yet."""
    tasks: list[tuple[Path, Callable[..., Any], tuple[Any, ...]]] = []
    for job in todo:
        if job.finished and job.steps > 1:
            tasks.append((job.folder / "greedy.json", greedy, (job.folder / "model", PROBLEMS)))
    for weight in (*FEWER, *MORE, *ORIENTATION):
        tasks.append((out / "target" / f"{weight:g}.json", target, (weight, PROBLEMS)))
    left = [task for task in tasks if not task[0].exists()]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool, Progress() as bar:
        for _ in bar.track(pool.map(_measure, left), total=len(left), description="greedy, target"):
            pass


def _measure(task: tuple[Path, Callable[..., Any], tuple[Any, ...]]) -> None:
    path, measure, arguments = task
    quiet_libraries()
    found = measure(*arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found))


def read(todo: Sequence[Job]) -> list[dict[str, Any]]:
    """One row per finished run: what it was, what was measured before it learnt, its curves, and its answers after."""
    rows: list[dict[str, Any]] = []
    for job in todo:
        if not job.finished:
            continue
        table = json.loads((job.folder / "eval.json").read_text())
        cells = {row["who"]: row for row in table["rows"]}
        lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        answers = [json.loads(line) for line in (job.folder / "answers.jsonl").read_text().splitlines()]
        own = [answer for answer in answers if answer["who"] == "student after"]
        first, greedily = lines[0], job.folder / "greedy.json"
        rows.append(
            {
                "condition": job.condition,
                "weight": float(job.method),
                "seed": job.seed,
                "steps": job.steps,
                "cap": json.loads((job.folder / "config.json").read_text())["method"]["cap"],
                "teacher_mass": first["contract_teacher_mass"],
                "base_mass": first["contract_base_mass"],
                "safe": first.get("lambda_star_safe"),
                "before": cells["student before"][f"avg@{SAMPLES}"]["value"],
                "parse": cells["student after"][f"avg@{SAMPLES}"]["value"],
                "length": cells["student after"]["length"]["value"],
                **{
                    k: v
                    for k, v in judged([a["prompt"] for a in own], [a["text"] for a in own]).items()
                    if k != "parse"
                },
                "greedy": json.loads(greedily.read_text()) if greedily.exists() else None,
                "curve": [line["reward"] for line in lines],
                "tail": [line.get("contract_tail") for line in lines],
                "boundary": first.get("contract_tail_boundary"),
                "seconds": sum(float(line["time/step"]) for line in lines),
            }
        )
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/cliff"), help="folder of the runs")
    names = sorted({condition.name for condition in CONDITIONS})
    parser.add_argument("--only", nargs="*", default=(), choices=names, metavar="CONDITION")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "lab", help="where cliff.md goes")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "cliff.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    todo = list(jobs(arguments.out, arguments.only, arguments.seeds))
    failed = [] if arguments.report else run_all(todo, arguments.jobs)
    if not arguments.report:
        after(todo, arguments.out, arguments.jobs)
    # The page is about all runs that are there, whatever was asked for this time.
    everything = list(jobs(arguments.out, (), arguments.seeds))
    rows = read(everything)
    if not any(row["condition"] == "base" for row in rows):
        raise SystemExit("no run of the condition `base` is finished: there is nothing to write a page about")
    aims = [json.loads(path.read_text()) for path in sorted((arguments.out / "target").glob("*.json"))]
    questions = {condition.name: condition.question for condition in CONDITIONS if condition.question}
    found = summary(rows, aims, questions)
    path = arguments.docs / "cliff.md"
    path.write_text(
        page(found, rows, Counter(job.condition for job in everything if not job.finished)), encoding="utf-8"
    )
    plots(found, rows, arguments.docs / "images")
    short = json.loads(json.dumps({"rows": rows, **found}), parse_float=lambda digits: round(float(digits), 6))
    arguments.json.write_text(json.dumps(short) + "\n", encoding="utf-8")
    print(f"{path}, its plots and {arguments.json}, from {len(rows)} of {len(everything)} runs")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
