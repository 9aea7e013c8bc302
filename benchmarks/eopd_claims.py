"""The three claims of EOPD, measured: is entropy kept, is the teacher's uncertainty covered, is pass@8 higher?

    python benchmarks/eopd_claims.py --out runs/claims              # run what is missing, then print the tables
    python benchmarks/eopd_claims.py --out runs/claims --report     # only the tables, from the runs that are there

Every run is one of the command's own (`retort train`), in a folder of its own, and stops and resumes like one: end this
script whenever you like and start it again. Conditions change one thing at a time from the first, `base`. Methods of a
condition share the student, the prompts, the order of the data and all random numbers of a seed, so what is reported is
the difference within a seed, with its 95 % interval over seeds (Student's t).
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

from claims_table import markdown, summary
from runs import Job, run_all

from retort.config import merge

#: Methods compared, as settings. All exact divergences are gkd's, on student rollouts only.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "opd": {"name": "opd"},
    "eopd": {"name": "eopd", "top_k": 8},
    "reverse_kl": {"name": "gkd", "divergence": "reverse_kl", "on_policy_fraction": 1.0, "temperature": 1.0},
    "forward_kl": {"name": "gkd", "divergence": "forward_kl", "on_policy_fraction": 1.0, "temperature": 1.0},
}

#: Students trained from nothing for a moment; 0.25M and 0.94M parameters.
SHAPES: Mapping[str, Mapping[str, int]] = {
    "small": {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 256},
    "wide": {"hidden_size": 192, "num_hidden_layers": 2, "intermediate_size": 512},
}

#: The base: a student of 0.25M parameters trained from nothing for a moment, strictly on-policy, a constant rate.
BASE: Mapping[str, Any] = {
    "student": "small",
    "teacher": "countdown:teacher",
    "data": "countdown",
    "steps": 450,
    "precision": "fp32",
    "threads": 1,
    "method": {"samples": 4},
    "rollout": {"prompts": 32, "max_new_tokens": 14, "max_prompt_tokens": 8, "parallel": 4096},
    "optimizer": {
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup": 0,
        "weight_decay": 0.0,
        "beta2": 0.98,
        "updates": 1,
        "batch_tokens": 8192,
    },
    "eval": {"problems": 321, "samples": 8, "top_p": 1.0, "max_new_tokens": 14, "every": 150, "threshold": 0.8},
    "checkpoint": {"every": 150, "keep": 1},
    "record": {"rollouts": 1},
}


@dataclass(frozen=True)
class Condition:
    """What differs from the base.

    Attributes:
        name: Of the condition, and of its folder.
        changes: Settings.
        methods: Which of METHODS take part.
        seeds: How many; the exact divergences, which are there for orientation, get three at most.
        question: What it varies, in words.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    methods: Sequence[str] = ("opd", "eopd")
    seeds: int = 3
    question: str = ""


SHORT = {"steps": 300, "eval": {"every": 0}}
CONDITIONS = (
    Condition("base", {}, tuple(METHODS), 16, "0.25M student, 32 prompts x 4, rate 1e-3, top-8, gate at 0.8 nats"),
    Condition("batch", {"rollout": {"prompts": 64}}, seeds=5, question="64 prompts x 4 instead of 32 x 4"),
    Condition("gate-0", {**SHORT, "method": {"entropy_threshold": 0.0}}, ("eopd",), 5, "gate always open"),
    Condition("gate-0.4", {**SHORT, "method": {"entropy_threshold": 0.4}}, ("eopd",), question="gate at 0.4 nats"),
    Condition("gate-1.2", {**SHORT, "method": {"entropy_threshold": 1.2}}, ("eopd",), question="gate at 1.2 nats"),
    Condition("top-2", {**SHORT, "method": {"top_k": 2}}, ("eopd",), question="top-2 in the forward term"),
    Condition("top-all", {**SHORT, "method": {"top_k": 1000}}, ("eopd",), question="the whole vocabulary in it"),
    Condition("rate-low", {**SHORT, "optimizer": {"learning_rate": 3e-4}}, question="learning rate 3e-4"),
    Condition("rate-high", {**SHORT, "optimizer": {"learning_rate": 3e-3}}, question="learning rate 3e-3"),
    Condition("wide", {**SHORT, "student": "wide"}, question="0.94M student, twice as wide, else made alike"),
    Condition(
        "cut",
        {**SHORT, "steps": 200, "student": "countdown:student"},
        question="0.82M student cut out of its teacher, 200 steps",
    ),
)


def jobs(out: Path, only: Sequence[str], seeds: int | None) -> Iterator[Job]:
    """All runs: three seeds of every condition, then what is beyond, so that an early end leaves whole comparisons."""
    chosen = [condition for condition in CONDITIONS if not only or condition.name in only]
    for first, last in ((0, 3), (3, 1000)):
        for condition in chosen:
            count = condition.seeds if seeds is None else seeds
            for seed in range(first, min(last, count)):
                for method in condition.methods:
                    if seed < 3 or method in ("opd", "eopd"):
                        yield _job(out, condition, method, seed)


def _job(out: Path, condition: Condition, method: str, seed: int) -> Job:
    # Merged by hand, not as a method of another name: `samples` and the rest must reach every method.
    changes = {key: value for key, value in condition.changes.items() if key != "method"}
    settings = merge({key: value for key, value in BASE.items() if key != "method"}, changes)
    given = {**METHODS[method], **BASE["method"], **condition.changes.get("method", {})}
    if settings["student"] in SHAPES:
        settings["student"] = str(out / "students" / f"{settings['student']}-{seed}")
    settings["eval"] = {**settings["eval"], "teacher": seed == 0}
    return Job(condition.name, method, seed, out / condition.name / method / f"seed-{seed}",
               {**settings, "method": given, "seed": seed})  # fmt: skip


def make_student(folder: Path, seed: int) -> None:
    """A student from nothing, cold-started until it knows the form and little more; its name is its shape's.

    It stops at a supervised loss, not after a number of steps: at that age a few more steps are the difference between
    a student that solves nothing and one that solves a fifth.
    """
    from retort.console.terminal import quiet_libraries
    from retort.tasks.countdown import build

    if (folder / "README.md").exists():
        return
    quiet_libraries()
    tokenizer = build.build_tokenizer()
    model = build.build_model(tokenizer, SHAPES[folder.name.partition("-")[0]], seed)
    build.train(model, tokenizer, build.Recipe(steps=2400, batch=128, lr=3e-3, seed=1000 + seed, until=0.5, bf16=False))
    build.export(folder.name, model, "From nothing, by supervised learning down to a loss of 0.5 nats.", folder.parent)


def make_students(names: Sequence[str], workers: int) -> None:
    """Those of the students that do not ship with Retort and are not there yet."""
    folders = [Path(name) for name in dict.fromkeys(names) if not name.startswith("countdown:")]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(make_student, folders, [int(folder.name.rpartition("-")[2]) for folder in folders]))


def read(todo: Sequence[Job]) -> list[dict[str, Any]]:
    """One row per run and moment at which it was judged: condition, method, seed, step, and every measure's value."""
    rows: list[dict[str, Any]] = []
    for job in todo:
        if not job.finished:
            continue
        about = {"condition": job.condition, "method": job.method, "seed": job.seed}
        table = json.loads((job.folder / "eval.json").read_text())
        cells = {row["who"]: row for row in table["rows"]}
        lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        mass = [line["teacher_topk_mass"] for line in lines if "teacher_topk_mass" in line]
        rows.append({**about, "step": 0, **_values(cells["student before"])})
        for line in lines[:-1]:
            found = {key.removeprefix("eval/"): value for key, value in line.items() if key.startswith("eval/")}
            if found:
                rows.append({**about, "step": line["step"], **found})
        over_run = {"teacher_topk_mass": sum(mass) / len(mass)} if mass else {}
        rows.append({**about, "step": job.steps, **_values(cells["student after"]), **over_run})
    return rows


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: cell["value"] for name, cell in row.items() if isinstance(cell, Mapping)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="folder of the runs")
    parser.add_argument("--only", nargs="*", default=(), choices=[c.name for c in CONDITIONS], metavar="CONDITION")
    parser.add_argument("--seeds", type=int, help="instead of each condition's own number")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--json", type=Path, help="write all numbers here, too")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    todo = list(jobs(arguments.out, arguments.only, arguments.seeds))
    failed: list[str] = []
    if not arguments.report:
        make_students([job.settings["student"] for job in todo], arguments.jobs)
        failed = run_all(todo, arguments.jobs)
    rows = read(todo)
    questions = {condition.name: condition.question for condition in CONDITIONS}
    found = summary(rows, questions)
    print(markdown(found))
    if arguments.json:
        short = json.loads(json.dumps({"rows": rows, **found}), parse_float=lambda digits: round(float(digits), 5))
        arguments.json.write_text(json.dumps(short) + "\n")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
