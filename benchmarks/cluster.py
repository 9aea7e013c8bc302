"""The same run on two ranks that torchrun starts and on two that Ray starts: what a step takes, and the whole command.

    build/cluster/bin/python benchmarks/cluster.py
    build/cluster/bin/python benchmarks/cluster.py --rounds 5 --steps 40

Both take turns, so that a machine that is busy with something else is so for both. Of each command: the median of
its steps but the first, in milliseconds, and the seconds of everything else (starting, loading, saving). The last line
is the median over rounds of the difference of a step, which is Ray's overhead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = [
    *("student=countdown:student", "teacher=countdown:teacher", "data=countdown", "method.name=opd", "seed=3"),
    *("precision=fp32", "device=cpu", "checks=skip", "rollout.prompts=8", "rollout.max_new_tokens=16"),
    *("optimizer.warmup=0", "eval.problems=0", "record.rollouts=0", "checkpoint.every=0", "cluster.ranks=2"),
]
WAYS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "retort", "train"],
    "Ray": ["-m", "retort", "train", "--cluster", "auto"],
}


def measured(way: str, steps: int, folder: Path) -> tuple[float, float]:
    """Milliseconds of a step, and seconds of all that is no step."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *WAYS[way], *SETTINGS, "--steps", str(steps), "--out", str(folder)]
    began = time.perf_counter()
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    took = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["time/step"] for row in rows]
    return 1000 * statistics.median(seconds[1:]), took - sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for way in WAYS:
                step, rest = measured(way, arguments.steps, Path(folder) / f"{way}-{number}")
                found[way].append(step)
                print(f"{way:9} {step:8.1f} ms a step {rest:8.1f} s besides", flush=True)
    apart = statistics.median(ray - torchrun for ray, torchrun in zip(found["Ray"], found["torchrun"], strict=True))
    print(f"Ray's overhead: {apart:+.1f} ms a step ({apart / statistics.median(found['torchrun']):+.1%})")


if __name__ == "__main__":
    main()
