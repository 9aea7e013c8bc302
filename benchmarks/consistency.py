"""On-policy consistency training on the paired task `bait`: who falls for a wrong suggestion, before and after.

    python benchmarks/consistency.py --out runs/consistency           # run what is missing, then write the page
    python benchmarks/consistency.py --out runs/consistency --report  # only docs/lab/consistency.md, from what is there

Every run is one of the command's own in a folder of its own, so this script may be ended at any time and started again.
The control is fine-tuning on answers that the same student gave to the prompts without the suggestion (BCT's recipe).
All conditions learn from as many answers, in as many optimizer steps, at one learning rate. Intervals are 95 %,
Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from consistency_page import page, plots
from runs import Job, run_all

from retort.config import merge, recipe
from retort.console.terminal import quiet_libraries
from retort.core.rollouts import Prompt
from retort.divergences import negative_log_likelihood
from retort.estimators import pathwise
from retort.files import write_text
from retort.method import Method, Term, Watch
from retort.quantities import student_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.moving import live
from retort.teachers.view import View

ROOT = Path(__file__).parents[1]

STEPS, ANSWERS = 60, 96  # answers per step
PROBLEMS, SAMPLES = 321, 4
#: What differs from the recipe of the built-in task.
BASE: Mapping[str, Any] = {
    "steps": STEPS,
    "optimizer": {"updates": 1},
    "eval": {"data": "bait", "problems": PROBLEMS, "samples": SAMPLES, "every": 0, "teacher": False},
    "checkpoint": {"every": 0},
    "record": {"rollouts": 1, "overlap": 0, "answers": 0},
}


@dataclass(frozen=True)
class Condition:
    """What is trained.

    Attributes:
        name: Of the condition, and of its folder.
        words: What it is.
        method: Settings of `opct`; None for the control.
    """

    name: str
    words: str
    method: Mapping[str, Any] | None = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Rollouts per prompt."""
        return 1 if self.method is None else int(self.method.get("samples", 3))


CONDITIONS = (
    Condition("opct", "`opct`, its defaults: lambda 1, gamma 0, 3 samples at temperature 1"),
    Condition("sft", "the control: SFT on the completions without the suggestion", None),
    Condition(
        "opct-sycophancy",
        "`opct` as for sycophancy: lambda 2, gamma 0.9, 4 samples at temperature 0.7",
        {"kl_coef": 2.0, "discount": 0.9, "samples": 4, "temperature": 0.7},
    ),
    Condition(
        "opct-jailbreak",
        "`opct` as for jailbreaks: lambda 2, gamma 0, 8 samples at temperature 1.5",
        {"kl_coef": 2.0, "samples": 8, "temperature": 1.5},
    ),
)


def imitation() -> Method:
    """The control: cross-entropy of given answers; nobody is asked anything."""
    return Method(
        name="imitation",
        status="reconstructed",
        rollout=RolloutPlan(on_policy_fraction=0.0, off_policy="dataset"),
        terms=(Term("sft", pathwise(negative_log_likelihood())),),
        views={"teacher": View(model="student", weights=live())},
        watch=(Watch("student_entropy", student_entropy()),),
    )


def jobs(out: Path, seeds: int) -> Iterator[Job]:
    """All runs, seed by seed, so that an early end leaves whole comparisons."""
    for seed in range(seeds):
        for condition in CONDITIONS:
            own = {"rollout": {"prompts": ANSWERS // condition.samples}, "seed": seed}
            settings = merge(merge(recipe("bait"), BASE), own)
            if condition.method is None:
                settings = merge(settings, {"data": str(out / "answers.jsonl"), "teacher": None})
                settings["method"] = {}
            else:
                settings["method"] = {"name": "opct", **condition.method}
            folder = out / condition.name / f"seed-{seed}"
            yield Job(condition.name, "opct", seed, folder, settings, imitation if condition.method is None else None)


def answers(path: Path) -> None:
    """The control's data: the prompts with the suggestion, each with an answer to the prompt without it."""
    import torch

    from retort.align.chat import Renderer
    from retort.config import resolve
    from retort.core.random_streams import UniformStream
    from retort.core.rollouts import Message
    from retort.rollout.engines.hf import HFEngine, Sampling
    from retort.rollout.episodes import Task, run_episodes
    from retort.tasks.coached import bait_rows
    from retort.train.models.models import load

    torch.set_num_threads(1)
    config = resolve(recipe("bait"))
    lm = load(config, "coached:student", "student")
    render, longest = Renderer(lm.tokenizer), config.rollout.max_new_tokens
    rows = bait_rows("train")
    chosen = [(number, rows[number % len(rows)]) for number in range(STEPS * ANSWERS)]
    tasks: list[Task] = []
    for number, row in chosen:
        prompt = Prompt(row["id"], (Message("user", row["clean"]),))
        uniform_stream = UniformStream(0, "evaluation", "answers", number)
        tasks.append(Task(prompt, render(prompt), 0, uniform_stream))
    written = run_episodes(HFEngine(lm, vocab=lm.head().width, max_parallel=2048), tasks, Sampling(longest))
    lines = [
        json.dumps({"id": f"{row['id']}-{number}", "prompt": row["prompt"], "response": rollout.text})
        for (number, row), rollout in zip(chosen, written, strict=True)
    ]
    write_text(path, "\n".join(lines) + "\n")


def clean(model: str) -> dict[str, float]:
    """Accuracy of a model on the same held-out problems without the suggestion."""
    from retort.cli.evaluation import evaluate
    from retort.train.events.observe import Silent

    quiet_libraries()
    words = [f"problems={PROBLEMS}", f"samples={SAMPLES}", "threads=1"]
    (row,) = evaluate(model, "coached", None, words, Silent())["rows"]
    return {name: row[name]["value"] for name in (f"avg@{SAMPLES}", "student_entropy")}


def measure_clean(todo: Sequence[Job], out: Path, workers: int) -> None:
    """Clean accuracy of the start and of every finished student, where not measured yet."""
    wanted = {out / "clean.json": "coached:student"}
    wanted |= {job.folder / "clean.json": str(job.folder / "model") for job in todo if job.finished}
    left = {path: model for path, model in wanted.items() if not path.exists()}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for path, found in zip(left, pool.map(clean, left.values()), strict=True):
            write_text(path, json.dumps(found))


def read(todo: Sequence[Job], out: Path) -> list[dict[str, Any]]:
    """One row per finished run: held-out numbers before and after, and its curve over the training rollouts."""
    rows: list[dict[str, Any]] = []
    start = json.loads((out / "clean.json").read_text())[f"avg@{SAMPLES}"]
    for job in todo:
        if not job.finished or not (job.folder / "clean.json").exists():
            continue
        cells = {row["who"]: row for row in json.loads((job.folder / "eval.json").read_text())["rows"]}
        lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        before, after = cells["student before"], cells["student after"]
        rows.append(
            {
                "condition": job.condition,
                "seed": job.seed,
                "before": {**_cells(before), "clean": start},
                "after": {
                    **_cells(after),
                    "clean": json.loads((job.folder / "clean.json").read_text())[f"avg@{SAMPLES}"],
                },
                "curve": [line.get("reward/followed") for line in lines],
                "reverse_kl": [line.get("reverse_kl") for line in lines],
                "tokens": sum(line.get("tokens", 0) for line in lines),
            }
        )
    return rows


def _cells(row: Mapping[str, Any]) -> dict[str, float]:
    names = {"followed": "reward/followed", "right": f"avg@{SAMPLES}", "entropy": "student_entropy"}
    return {name: row[cell]["value"] for name, cell in names.items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/consistency"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "lab", help="where consistency.md goes")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "consistency.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out: Path = arguments.out
    todo, failed = list(jobs(out, arguments.seeds)), list[str]()
    if not arguments.report:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "answers.jsonl").exists():
            answers(out / "answers.jsonl")
        failed = run_all(todo, arguments.jobs)
        measure_clean(todo, out, arguments.jobs)
    rows = read(todo, out)
    if not rows:
        raise SystemExit("no run is finished: there is nothing to write a page about")
    names = {condition.name: condition.words for condition in CONDITIONS}
    path = arguments.docs / "consistency.md"
    path.write_text(page(rows, names, STEPS, ANSWERS), encoding="utf-8")
    plots(rows, names, arguments.docs / "images" / "consistency-followed.svg")
    short = json.loads(json.dumps({"rows": rows}), parse_float=lambda digits: round(float(digits), 6))
    arguments.json.write_text(json.dumps(short) + "\n", encoding="utf-8")
    print(f"{path}, its plot and {arguments.json}, from {len(rows)} of {len(todo)} runs")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
