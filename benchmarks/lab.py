"""The lab: every method on the built-in task, with the same models, prompts, rollouts and settings; nothing is tuned.

    python benchmarks/lab.py --out runs/lab              # run what is missing, then write docs/lab.md and its plots
    python benchmarks/lab.py --out runs/lab --report     # only the page, from the runs that are there
    python benchmarks/lab.py --only opd eopd --seeds 5

A run is one of the command's own (`retort train`) in a folder of its own, so this script may be ended at any time and
started again. All methods share student, teacher, prompts, the order of the data and the random numbers of a seed; a
method is given its paper's defaults, but for what is in `SETTINGS`. Intervals are 95 %, Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from lab_page import page, plots
from runs import Job, run_all

from retort import registry

#: What every run is: the built-in models and prompts, 40 batches of 64 prompts x 4 rollouts.
BASE: Mapping[str, Any] = {
    "student": "countdown:student",
    "teacher": "countdown:teacher",
    "data": "countdown",
    "steps": 40,
    "precision": "fp32",
    "threads": 1,
    "rollout": {"prompts": 64, "max_new_tokens": 14, "max_prompt_tokens": 8, "parallel": 4096},
    "optimizer": {
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup": 10,
        "weight_decay": 0.0,
        "beta2": 0.98,
        "updates": 1,
        "batch_tokens": 8192,
    },
    "eval": {
        "problems": 200,
        "samples": 8,
        "top_p": 1.0,
        "temperature": 1.0,
        "max_new_tokens": 14,
        "every": 20,
        "threshold": 0.8,
    },
    "checkpoint": {"every": 0},
    "record": {"rollouts": 1},
}
SAMPLES = 4
#: Methods that take part more than once, or not with their defaults: name in the lab -> method, settings, and why.
SETTINGS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "eopd": ("eopd", {"top_k": 8}, "top-8 of 266 ids; the paper's top-16 is of 150,000"),
    "gkd": ("gkd", {}, "half of the prompts with the data's own answer"),
    "gkd, reverse KL": ("gkd", {"divergence": "reverse_kl", "on_policy_fraction": 1.0, "temperature": 1.0}, ""),
    "gkd, forward KL": ("gkd", {"divergence": "forward_kl", "on_policy_fraction": 1.0, "temperature": 1.0}, ""),
    "gkd, JSD": ("gkd", {"divergence": "jsd", "on_policy_fraction": 1.0, "temperature": 1.0}, ""),
    "skew_kl": ("skew_kl", {}, "the run ends before the first validation, so all answers are the data's"),
    "skew_kl, student writes": ("skew_kl", {"on_policy_fraction": 1.0}, ""),
    "decoupled_kl": ("decoupled_kl", {}, ""),
    "decoupled_kl, teacher writes": ("decoupled_kl", {"prefix": "teacher"}, ""),
    "temperature": ("temperature", {}, "forward KL at a loss temperature of 2"),
    "temperature, reverse KL": ("temperature", {"divergence": "reverse_kl"}, "also at 2"),
    "arkd": ("arkd", {}, "all answers are the data's, one per prompt"),
    "local_teachability": (
        "local_teachability",
        {"of": "opd", "settings": {"samples": 4}, "max_segment": 2},
        "around opd; segments of 2 tokens, because an answer has 12",
    ),
    "sead": ("sead", {"curriculum": None}, "without its curriculum"),
    "sead, easy to hard": ("sead", {}, "the easiest of the prompts, in the order of their difficulty"),
}


def entries() -> dict[str, tuple[str, Mapping[str, Any], str]]:
    """Who takes part: every method that is registered, and the variants above."""
    found: dict[str, tuple[str, Mapping[str, Any], str]] = {}
    for method in registry.names():
        own = {name: entry for name, entry in SETTINGS.items() if entry[0] == method}
        found.update(own or {method: (method, {}, "")})
    return found


def jobs(out: Path, only: Sequence[str], seeds: int) -> Iterator[Job]:
    """All runs, seed by seed, so that an early end leaves whole comparisons."""
    for seed in range(seeds):
        for name, (method, settings, _) in entries().items():
            if only and name not in only and method not in only:
                continue
            folder = out / name.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
            given = {"name": method, **_samples(method), **settings}
            judged = {**BASE["eval"], "teacher": seed == 0 and name == "opd"}
            yield Job("lab", name, seed, folder, {**BASE, "eval": judged, "method": given, "seed": seed})


def _samples(method: str) -> dict[str, int]:
    return {"samples": SAMPLES} if "samples" in registry.load(method).settings else {}


def read(todo: Sequence[Job]) -> list[dict[str, Any]]:
    """One row per finished run: what it was, its table before and after, its curve, its cost."""
    rows: list[dict[str, Any]] = []
    for job in todo:
        if not job.finished:
            continue
        table = json.loads((job.folder / "eval.json").read_text())
        lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        cells = {row["who"]: _values(row) for row in table["rows"]}
        tokens, curve = 0, [{"step": 0, "tokens": 0, **cells["student before"]}]
        for line in lines:
            tokens += int(line["tokens"])
            judged = {key.removeprefix("eval/"): value for key, value in line.items() if key.startswith("eval/")}
            if judged and line is not lines[-1]:
                curve.append({"step": int(line["step"]), "tokens": tokens, **judged})
        curve.append({"step": len(lines), "tokens": tokens, **cells["student after"]})
        rows.append(
            {
                "method": job.method,
                "seed": job.seed,
                "before": cells["student before"],
                "after": cells["student after"],
                "teacher": cells.get("teacher"),
                "pass_at": table["pass_at"],
                "curve": curve,
                "tokens": tokens,
                "seconds": sum(float(line["time/step"]) for line in lines),
            }
        )
    return rows


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: cell["value"] for name, cell in row.items() if isinstance(cell, Mapping)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lab"), help="folder of the runs")
    parser.add_argument("--only", nargs="*", default=(), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs", help="where lab.md goes")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    todo = list(jobs(arguments.out, arguments.only, arguments.seeds))
    failed = [] if arguments.report else run_all(todo, arguments.jobs)
    rows = read(todo)
    about = {name: {"method": method, "note": note} for name, (method, _, note) in entries().items()}
    path = arguments.docs / "lab.md"
    path.write_text(page(rows, about, {job.method for job in todo}), encoding="utf-8")
    plots(rows, arguments.docs / "images")
    print(f"{path} and its plots, from {len(rows)} of {len(todo)} runs")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
