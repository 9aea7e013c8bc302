"""One, two and three ranks of the same run beside one another: what a step takes, and how far memory is divided.

    python benchmarks/ranks.py                  # the built-in pair, and one with Qwen3's vocabulary
    python benchmarks/ranks.py --ranks 1 2 --pairs builtin --steps 4
    python benchmarks/ranks.py --ranks 2 --teacher replicated sharded
    python benchmarks/ranks.py --ranks 2 --pairs vocabulary --head gathered vocabulary

Each run is started by torchrun over gloo on this machine, one thread for each rank. Without the first step, which
compiles and allocates: seconds of a step, its tokens, megabytes over the loopback interface (of all processes on this
machine, so nothing else may use it), the largest resident memory of a rank, megabytes of slices that a rank keeps (the
student's weights and both moments of Adam) and of frozen models, and the share of a step that a rank spends waiting:
1 minus its CPU time.
Two cores are no scaling study: what this shows is what is divided, and what an exchange costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "seed": 3,
    "precision": "fp32",
    "device": "cpu",
    "checks": "skip",
    "method": {"name": "opd"},
    "optimizer": {"warmup": 0, "batch_tokens": 1024},
    "eval": {"problems": 0},
    "record": {"rollouts": 0, "overlap": 0},
    "checkpoint": {"every": 0},
}
PAIRS: dict[str, dict[str, Any]] = {
    "builtin": {"rollout": {"prompts": 24, "max_new_tokens": 48}},
    "vocabulary": {"rollout": {"prompts": 6, "max_new_tokens": 32}},
}


class Watching:
    """Notes when each step ends, and what this process has used until then."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, int]] = []
        self.tokens: list[int] = []
        self.kept = 0
        self.frozen = 0

    def on_step(self, run: Any, metrics: dict[str, Any]) -> None:
        from retort.models.sharding import slice_of

        self.marks.append((time.perf_counter(), time.process_time(), loopback()))
        self.tokens.append(int(metrics["tokens"]))
        states = [x for state in run.learner.optimizer.state.values() for x in state.values()]
        tensors = [slice_of(x) for x in [*run.student.trainable().values(), *states]]
        self.kept = sum(x.numel() * x.element_size() for x in tensors)
        frozen = [slice_of(x) for lm in run.teachers.lms.values() for x in lm.model.parameters()]
        self.frozen = sum(x.numel() * x.element_size() for x in frozen)

    def numbers(self) -> dict[str, float]:
        """Means over the steps but the first."""
        (wall, busy, sent), (ended, used, last) = self.marks[0], self.marks[-1]
        steps = len(self.marks) - 1
        return {
            "seconds": (ended - wall) / steps,
            "tokens": sum(self.tokens[1:]) / steps,
            "sent": (last - sent) / steps / 1e6,
            "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
            "kept": self.kept / 1e6,
            "frozen": self.frozen / 1e6,
            "waiting": max(0.0, 1.0 - (used - busy) / (ended - wall)),
        }


def loopback() -> int:
    """Bytes that went over the loopback interface."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def worker(out: Path, settings: dict[str, Any]) -> None:
    """One rank's part of a run; writes its numbers."""
    import torch

    from retort import api, ranks
    from retort.train import runner

    torch.set_num_threads(1)
    watching, world = Watching(), ranks.join()
    run = runner.start(api.assemble(settings), out / "run")
    run.callbacks = (watching,)
    run.go()
    (out / f"{world.rank}.json").write_text(json.dumps(watching.numbers()))


def measured(ranks: int, settings: dict[str, Any]) -> list[dict[str, float]]:
    """The numbers of each rank."""
    with tempfile.TemporaryDirectory(prefix="retort-ranks-") as folder:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        words = [*start, str(Path(__file__).resolve()), "--worker", folder, json.dumps(settings)]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def settings_of(pair: str, steps: int, folder: Path) -> dict[str, Any]:
    """Those of a run on a pair; the one with a large vocabulary is built in a folder."""
    found: dict[str, Any] = SMALL | PAIRS[pair] | {"steps": steps}
    if pair == "builtin":
        return found
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from large_vocabulary import build_pair

    build_pair(folder)
    rows = [{"prompt": " ".join(f"w{7 * row + place}" for place in range(16))} for row in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"student": "student", "teacher": "teacher", "data": "prompts.jsonl"}
    return found | {name: str(folder / place) for name, place in places.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--teacher", nargs="+", default=["replicated"], choices=["replicated", "sharded"])
    parser.add_argument("--head", nargs="+", default=["auto"], choices=["auto", "gathered", "vocabulary"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "SETTINGS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(Path(arguments.worker[0]), json.loads(arguments.worker[1]))
        return
    words = "pair | ranks | head | teacher | s a step | tokens | MB exchanged | MB resident, largest rank"
    print(f"| {words} | MB of slices | MB frozen | waiting |\n{'|---' * 11}|")
    for pair in arguments.pairs:
        with tempfile.TemporaryDirectory(prefix="retort-pair-") as folder:
            settings = settings_of(pair, arguments.steps, Path(folder))
            ways = list(itertools.product(arguments.head, arguments.teacher))
            for ranks, (head, teacher) in itertools.product(arguments.ranks, ways):
                if ranks > 1 or (head, teacher) == ways[0]:  # one process shares nothing
                    each = measured(ranks, settings | {"ranks": {"head": head, "teacher": teacher}})
                    names = [head, teacher] if ranks > 1 else ["", ""]
                    print(row([pair, ranks, *names], each), flush=True)


def row(names: list[Any], each: list[dict[str, float]]) -> str:
    """A row of the table."""
    first, waiting = each[0], sum(one["waiting"] for one in each) / len(each)
    resident, kept, frozen = (max(one[name] for one in each) for name in ("resident", "kept", "frozen"))
    cells = [*names, f"{first['seconds']:.2f}", f"{first['tokens']:,.0f}", f"{first['sent']:,.1f}"]
    cells += [f"{resident:,.0f}", f"{kept:,.1f}", f"{frozen:,.1f}", f"{waiting:.0%}"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
