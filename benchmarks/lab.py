"""The lab: every method on a built-in task, with the same models, prompts, rollouts and settings; nothing is tuned.

    python benchmarks/lab.py --out runs/lab              # run what is missing, then write docs/lab/lab.md and its plots
    python benchmarks/lab.py --bench itself --out runs/lab-itself    # methods without a bigger teacher: lab-itself.md
    python benchmarks/lab.py --bench agents --out runs/lab-agents    # episodes of many turns: lab-agents.md
    python benchmarks/lab.py --bench judges --out runs/lab-judges    # a judge instead of log-probs: lab-judges.md
    python benchmarks/lab.py --bench written --out runs/lab-itself   # teachers that write first: lab-written.md
    python benchmarks/lab.py --bench shapes --out runs/lab-shapes    # who looks at the picture: lab-shapes.md
    python benchmarks/lab.py --bench beyond --out runs/lab-beyond    # newer methods, composed teachers: lab-beyond.md
    python benchmarks/lab.py --bench glyphs --out runs/lab-glyphs    # flows, taught by two experts: lab-glyphs.md
    python benchmarks/lab.py --bench plane --out runs/lab-plane      # the same of points in the plane: lab-plane.md
    python benchmarks/lab.py --out runs/lab --report     # only the page, from the runs that are there
    python benchmarks/lab.py --only opd eopd --seeds 5

A run is one of the command's own (`retort train`) in a folder of its own, so this script may be ended at any time and
started again. All methods share student, teacher, prompts, the order of the data and the random numbers of a seed; a
method is given its paper's defaults, but for what `lab_benches` says. Intervals are 95 %, Student's t over seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lab_agents_page
import lab_beyond_page
import lab_flows_page
import lab_itself_page
import lab_judges_page
import lab_shapes_page
import lab_written_page
import servers
import weaker_models
from lab_benches import (
    AGENTS,
    BENCHES,
    BEYOND,
    FASTER,
    GLYPHS,
    ITSELF,
    JUDGES,
    PAIRED,
    PLANE,
    SHAPES,
    WRITTEN,
    Bench,
)
from lab_itself_page import rewards_of
from lab_page import page, plots
from runs import Job, run_all

from retort import registry


def _takes_part(name: str, method: str, only: Sequence[str]) -> bool:
    return not only or name in only or method in only


def jobs(bench: Bench, out: Path, only: Sequence[str], seeds: int, judge: str = "") -> Iterator[Job]:
    """All runs, seed by seed, so that an early end leaves whole comparisons; `judge` is the address of theirs."""
    for seed in range(seeds):
        for name, entry in bench.entries().items():
            if not _takes_part(name, entry.method, only):
                continue
            folder = out / bench.folder / name.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
            given = {"name": entry.method, **_samples(entry.method, bench.samples), **entry.settings}
            # The teacher is the same in all runs, and evaluated in one.
            control = name == bench.control if bench.control else entry.method == "opd"
            judged = {**bench.base["eval"], "teacher": seed == 0 and control}
            settings = {**bench.base, **entry.run, "eval": judged, "method": given, "seed": seed}
            if registry.load(entry.method).grading is not None:
                settings["judge"] = {"model": judge}
            paths = {own: str(out / "models" / which) for own, which in entry.weaker.items()}
            settings |= {"teacher": paths.pop("teacher")} if "teacher" in paths else {}
            settings |= {"models": {own: {"path": path} for own, path in paths.items()}} if paths else {}
            yield Job(bench.name, name, seed, folder, settings)


def _samples(method: str, samples: int) -> dict[str, int]:
    return {"samples": samples} if "samples" in registry.load(method).settings else {}


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
            tokens += int(line.get("tokens", line.get("denoising_steps", 0)))
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
                "teachers": {who: own for who, own in cells.items() if who.startswith("teacher ")},
                "by_domain": table.get("by_domain", {}),
                "pass_at": table["pass_at"],
                "profile": table["profile"],
                "curve": curve,
                "tokens": tokens,
                "views": {"no_context": _mean(lines, "view/teacher/no_context")},
                "folder": job.folder,
                "seconds": sum(float(line["time/step"]) for line in lines),
            }
        )
    return rows


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Over the steps that have it."""
    values = [line[name] for line in lines if name in line]
    return sum(values) / len(values) if values else None


def about(bench: Bench) -> dict[str, dict[str, str]]:
    """What the pages say about who takes part, in words."""
    return {
        name: {
            "method": entry.method,
            "note": entry.note,
            "shown": entry.shown,
            "rewards": rewards_of(registry.load(entry.method).needs_rewards, entry.rewards),
        }
        for name, entry in bench.entries().items()
    }


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: cell["value"] for name, cell in row.items() if isinstance(cell, Mapping)}


def _run(bench: Bench, arguments: argparse.Namespace) -> list[str]:
    """Runs what is not finished, with the bench's judge and models at hand; returns what went wrong."""
    asking = [e for name, e in bench.entries().items() if _takes_part(name, e.method, arguments.only)]
    if any(entry.weaker for entry in asking):
        weaker_models.make(arguments.out / "models")
    with servers.ours(bench.judge) if bench.judge else contextlib.nullcontext() as judge:
        url = judge.url if judge else ""
        todo = list(jobs(bench, arguments.out, arguments.only, arguments.seeds, url))
        return run_all(todo, arguments.jobs, arguments.nice)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lab"), help="folder of the runs")
    parser.add_argument("--bench", choices=BENCHES, default="outside", help="who teaches")
    parser.add_argument("--only", nargs="*", default=(), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--nice", type=int, default=5, help="how far the runs stand back for others")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs/lab", help="where lab.md goes")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bench = BENCHES[arguments.bench]
    failed = [] if arguments.report else _run(bench, arguments)
    # Two benches share a page, so what the other one has finished is shown as well.
    shown = ITSELF if bench is FASTER else bench
    own = list(jobs(shown, arguments.out, arguments.only, arguments.seeds))
    rows, wanted = read(own), {job.method for job in own}
    path = arguments.docs / f"{shown.name}.md"
    if shown is ITSELF:
        faster = read(list(jobs(FASTER, arguments.out, arguments.only, arguments.seeds)))
        text = lab_itself_page.page(rows, faster, about(shown), wanted, PAIRED)
    elif shown is AGENTS:
        text = lab_agents_page.page(rows, about(shown), wanted)
    elif shown is JUDGES:
        text = lab_judges_page.page(rows, about(shown), wanted)
    elif shown is WRITTEN:
        text = lab_written_page.page(rows, about(shown), wanted)
    elif shown is SHAPES:
        text = lab_shapes_page.page(rows, about(shown), wanted)
    elif shown is BEYOND:
        text = lab_beyond_page.page(rows, about(shown), wanted)
    elif shown in (GLYPHS, PLANE):
        task = lab_flows_page.GLYPHS if shown is GLYPHS else lab_flows_page.PLANE
        text = lab_flows_page.page(task, rows, about(shown), wanted)
    else:
        text = page(rows, about(shown), wanted)
    path.write_text(text, encoding="utf-8")
    if shown in (WRITTEN, GLYPHS, PLANE):
        print(f"{path}, from {len(rows)} of {len(own)} runs")
        raise SystemExit(1 if failed else 0)
    if shown is AGENTS:
        lab_agents_page.plots(rows, arguments.docs / "images")
        print(f"{path} and its plot, from {len(rows)} of {len(own)} runs")
        raise SystemExit(1 if failed else 0)
    # The paired task is another one, and harder: on the same axes it would press all others into a line.
    plots([row for row in rows if row["method"] not in PAIRED], arguments.docs / "images", shown.name)
    print(f"{path} and its plots, from {len(rows)} of {len(own)} runs")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
