"""What a step takes where completions are waited for, dropped or resumed, with waits where a GPU would be.

    python benchmarks/partial.py
    python benchmarks/partial.py --steps 40 --token 0.02

The engine sleeps for each token of a batch's longest completion or segment; lengths are drawn token by token, so that a
few completions are much longer than the others. The rest is a real run of the built-in task. A batch of `resume` may
learn from fewer or more completions than it begins, so compare tokens per second. Reading a prefix again costs nothing
here, as a GPU reads a thousand tokens while it generates a few.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from overlap import SleepingEngine

from retort import config as configuration
from retort.core.rollouts import Status
from retort.models.lm import LanguageModel
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.train import runner
from retort.train.setup import prepare

#: Tokens of the longest completion, of one on average without that limit, and of a segment.
LONGEST, MEAN, BUDGET = 56, 8, 16
PROMPTS = 16


class RaggedEngine(SleepingEngine):
    """Ends a completion at each token with the same probability, so it may go on where another one was interrupted."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine`: completions of drawn lengths, after the time that the longest of them takes."""
        found = [self._drawn(own, min(sampling.max_new_tokens, len(own.uniforms))) for own in requests]
        time.sleep(self.per_token * max(len(own.ids) for own in found))
        return found

    def _drawn(self, request: Request, room: int) -> Completion:
        stop = self.lm.stops.primary
        others = [token for token in range(min(self.vocab, 200)) if token not in self.lm.stops.ids]
        drawn = request.uniforms[:room]
        ends = (drawn < 1 / MEAN).nonzero().flatten().tolist()
        length, status = (ends[0] + 1, Status.COMPLETED) if ends else (room, Status.TRUNCATED)
        ids = [others[int(own * len(others))] for own in drawn[:length].tolist()]
        ids[-1:] = [stop] if ends else ids[-1:]
        return Completion(ids, torch.full((length,), -5.0), status, self.version)


def measured(folder: Path, partial: str, staleness: int, steps: int, token: float) -> dict[str, float]:
    """Of a run's steps: seconds, completions and tokens learnt, and their mean length; means.

    Args:
        folder: Of the run, which is made.
        partial: `rollout.partial`.
        staleness: `rollout.staleness`.
        steps: Batches.
        token: Seconds that a token takes.
    """

    def engine(config: Any, lm: LanguageModel, vocab: int, *more: Any) -> RaggedEngine:
        return RaggedEngine(lm, vocab, token)

    asked = {"engine": "vllm", "vllm_python": "none", "staleness": staleness, "prompts": PROMPTS}
    asked |= {"partial": partial, "max_new_tokens": LONGEST}
    settings = {
        "data": "countdown",
        "method": {"name": "opd", "samples": 2},
        "steps": steps,
        "rollout": asked | ({} if partial == "wait" else {"segment_tokens": BUDGET}),
        "optimizer": {"updates": 1},
        "eval": {"problems": 0},
        "checkpoint": {"every": 0},
        "checks": "skip",
    }
    with mock.patch.multiple(prepare, other_engine=engine, check_other_engine=lambda config: None):
        run = runner.start(configuration.resolve(configuration.recipe("countdown"), settings), folder)
    run.go()
    rows = run.metrics[LONGEST // BUDGET : -staleness or None]  # by then the longest of the first batch has ended
    seconds = sum(row["time/step"] for row in rows)
    completions = [row["tokens"] / row["length"] for row in rows]
    return {
        "seconds": seconds / len(rows),
        "completions": statistics.mean(completions),
        "tokens per second": sum(row["tokens"] for row in rows) / seconds,
        "length": sum(row["tokens"] for row in rows) / sum(completions),
        "truncated": statistics.mean(row["truncated_fraction"] for row in rows),
        "dropped": statistics.mean(row.get("partial/dropped", 0.0) for row in rows),
        "segments": statistics.mean(row.get("partial/segments", 1.0) for row in rows),
        "staleness": statistics.mean(row.get("staleness/mean", 0.0) for row in rows),
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description="seconds of a step where completions are waited for or not")
    parser.add_argument("--steps", type=int, default=30, help="batches of each run")
    parser.add_argument("--token", type=float, default=0.05, help="seconds that a token takes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| staleness | partial | s a step | completions | tokens a second | mean length | dropped | segments | age |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for staleness in (0, 1):
            for partial in ("wait", "drop", "resume"):
                own = measured(Path(place) / f"{partial} {staleness}", partial, staleness, asked.steps, asked.token)
                print(
                    f"| {staleness} | {partial} | {own['seconds']:.2f} | {own['completions']:.1f} | "
                    f"{own['tokens per second']:.0f} | {own['length']:.1f} | {own['dropped']:.1f} | "
                    f"{own['segments']:.2f} | {own['staleness']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
