"""How noisy ResOPD's gradient is beside that of `opd`, on the built-in tasks, along runs.

    python benchmarks/resopd_variance.py --out runs/resopd-variance             # runs what is missing, prints the table
    python benchmarks/resopd_variance.py --out runs/resopd-variance --report    # only the table

Both variances are exact (`retort.quantities`): at each token of a batch of the student's own, over all tokens that it
could have drawn there, of one token's gradient in the space of logits. So they are of the same students at the same
prefixes, and nothing in them is sampled but the prefixes. Two runs are made for each task and seed, one trained by
`opd` and one by `resopd`, as in the lab; they are measured at every tenth batch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import measure
from lab_benches import BENCHES
from lab_page import spread
from runs import Job, run_all
from torch import Tensor

from retort import registry
from retort.core.context import Context
from retort.core.parts import Quantity
from retort.method import Method, Watch
from retort.quantities import gradient_variance, residual_variance, sampled_tail

#: k of the teacher's top-k, the default of `resopd` among them.
KS = (1, 2, 4, 8, 16)
DEFAULT = 4
#: Batches from one measurement to the next, and of a whole run.
EVERY, STEPS = 10, 41
#: Tasks: settings of a run, as the lab has them, and how many rollouts a prompt gets.
TASKS: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "countdown": (BENCHES["beyond"].base, 4),
    "coached": ({**BENCHES["itself"].base, "teacher": "coached:teacher"}, 8),
    "rooms": (BENCHES["agents"].base, 4),
}
#: By whom the student is trained meanwhile.
TRAINED = ("opd", "resopd")


def larger(k: int) -> Quantity:
    """1 at tokens at which the variance of ResOPD's gradient is above that of the plain one, else 0."""
    plain, residual = gradient_variance(), residual_variance(k)

    def value(context: Context, view: str) -> Tensor:
        apart_N = residual.value(context, view) - plain.value(context, view)
        return (apart_N > 0).to(context.student_logp_N.dtype)

    return Quantity(f"larger(top-{k})", value, plain.needs | residual.needs)


def watched(name: str, samples: int) -> Method:
    """A published method with the variances as its only curves."""
    curves = {
        "plain": gradient_variance(),
        **{f"residual-{k}": residual_variance(k) for k in KS},
        **{f"larger-{k}": larger(k) for k in KS},
        **{f"tail-{k}": sampled_tail(k) for k in KS},
    }
    watch = tuple(Watch(curve, part, every=EVERY) for curve, part in curves.items())
    return replace(registry.load(name, samples=samples), watch=watch)


def jobs(out: Path, seeds: int, only: Sequence[str]) -> Iterator[Job]:
    """All runs."""
    for seed in range(seeds):
        for task in only or TASKS:
            base, samples = TASKS[task]
            settings = {
                **{name: value for name, value in base.items() if name != "method"},
                "steps": STEPS,
                "seed": seed,
                "eval": {**base["eval"], "problems": 16, "every": 0, "teacher": False},
                "record": {"rollouts": 1},
            }
            for name in TRAINED:
                folder = out / task / name / f"seed-{seed}"
                yield Job(task, name, seed, folder, settings, partial(watched, name, samples))


@dataclass(frozen=True)
class Measured:
    """The curves of one run, by batch."""

    task: str
    trained: str
    rows: Mapping[int, Mapping[str, float]]

    @staticmethod
    def of(job: Job) -> Measured:
        """Reads a finished run."""
        lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        return Measured(job.condition, job.method, {int(row["step"]): row for row in lines if "plain" in row})


def table(found: Sequence[Measured]) -> str:
    """Markdown: a row for each task, training and batch; ratios are of means over the batch's tokens."""
    rows: list[list[Any]] = []
    for task in TASKS:
        for trained in TRAINED:
            own = [one.rows for one in found if (one.task, one.trained) == (task, trained)]
            for step in sorted(set.intersection(*(set(one) for one in own)) if own else ()):
                at = [one[step] for one in own]
                rows.append(
                    [
                        task,
                        f"`{trained}`",
                        step - 1,
                        len(at),
                        spread([one["plain"] for one in at], 2),
                        *(spread([one[f"residual-{k}"] / one["plain"] for one in at], 2) for k in KS),
                        f"{100 * statistics.mean(one[f'larger-{DEFAULT}'] for one in at):.1f}",
                        f"{100 * statistics.mean(one[f'tail-{DEFAULT}'] for one in at):.1f}",
                    ]
                )
    header = ["task", "trained by", "after batches", "seeds", "variance of `opd`"]
    header += [f"ratio, k = {k}" for k in KS]
    return measure.markdown([*header, "tokens where k = 4 is noisier, %", "drawn in the tail of k = 4, %"], rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/resopd-variance"), help="folder of the runs")
    parser.add_argument("--only", nargs="*", default=(), choices=TASKS, metavar="TASK")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--nice", type=int, default=5, help="how far the runs stand back for others")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    todo = list(jobs(arguments.out, arguments.seeds, arguments.only))
    failed = [] if arguments.report else run_all(todo, arguments.jobs, arguments.nice)
    print(measure.in_words(measure.machine("cpu", 1)) + "\n")
    print(table([Measured.of(job) for job in todo if job.finished]))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
