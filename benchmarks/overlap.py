"""How much of the shorter stage is hidden when batches are written ahead, with waits where a GPU would be.

    python benchmarks/overlap.py
    python benchmarks/overlap.py --steps 40 --stage 1.0
    python benchmarks/overlap.py --teachers

The engine sleeps for each token of a batch's longest completion, and the learner sleeps in each step, so that neither
needs this machine's cores: what is measured is the loop between them, on a real run of the built-in task. Lengths are
drawn, so that batches take longer and shorter (ragged). Hidden: the time that staleness saves, of the most that it
could save, which is the shorter stage's of the run that writes when it needs. A tokenizer and a small student are at
work besides, and their time cannot be hidden where they share a core with the rest.

With `--teachers` a teacher elsewhere, which sleeps, scores what was written: the whole batch behind it, or each group
as soon as it is there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from retort import config as configuration
from retort.core.rollouts import Status
from retort.models.lm import LanguageModel
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.train import runner
from retort.train.setup import prepare
from retort.train.teaching.early import EarlyTeachers
from retort.train.teaching.teachers import Teachers

#: The share of the shorter stage that has to be hidden.
WANTED = 0.8
#: Tokens of the longest completion, and of one on average.
LONGEST, MEAN = 24, 12
#: Prompts of a batch; and groups that a teacher scores at the same time.
PROMPTS, REQUESTS = 16, 4
#: Seconds of writing and of learning, as factors on `--stage`.
CASES = {"writing is longer": (1.5, 1.0), "both alike": (1.0, 1.0), "learning is longer": (1.0, 1.5)}


@dataclass(eq=False)
class SleepingEngine:
    """Writes tokens at random, as slowly as it is told, and follows a model by its version alone.

    Attributes:
        lm: The student.
        vocab: Only ids below this are tokens.
        per_token: Seconds for a token of all completions that are written together.
    """

    lm: LanguageModel
    vocab: int
    per_token: float
    name: str = "an engine that sleeps"
    noise_floor: float = 0.0
    version: int = -1
    image_tokens: None = None
    batches: int = 0
    _kept: set[int] = field(default_factory=set)

    @property
    def tokenizer(self) -> Any:
        """See `Engine`."""
        return self.lm.tokenizer

    @property
    def context(self) -> int:
        """See `Engine`."""
        return self.lm.context

    def open(self, folder: Path) -> None:
        """Keeps nothing."""

    def keep(self, version: int) -> None:
        """See `FollowingEngine`."""
        self._kept.add(version)

    def update(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """See `Engine`."""
        self.version = version

    def ready(self) -> AbstractContextManager[None]:
        """See `FollowingEngine`."""
        return nullcontext()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine`: completions of drawn lengths, after the time that the longest of them takes."""
        return self.generate_each(requests, sampling, lambda place, own: None)

    def generate_each(
        self, requests: Sequence[Request], sampling: Sampling, told: Callable[[int, Completion], None]
    ) -> list[Completion]:
        """See `EarlyEngine`: each is told after the time that its own tokens take."""
        found = [self._completion(own, min(sampling.max_new_tokens, len(own.uniforms))) for own in requests]
        began = time.perf_counter()
        for place in sorted(range(len(found)), key=lambda place: len(found[place].ids)):
            due = began + self.per_token * len(found[place].ids)
            time.sleep(max(0.0, due - time.perf_counter()))
            told(place, found[place])
        return found

    def close(self) -> None:
        """Has started nothing."""

    def metrics(self) -> dict[str, float]:
        """Measures nothing."""
        return {}

    def _completion(self, request: Request, room: int) -> Completion:
        stop = self.lm.stops.primary
        length = min(room, max(1, round(2 * MEAN * float(request.uniforms[0]))))
        others = [token for token in range(min(self.vocab, 200)) if token not in self.lm.stops.ids]
        ids = [others[int(own * len(others))] for own in request.uniforms[: length - 1].tolist()] + [stop]
        logp_A = torch.full((len(ids),), -5.0)
        return Completion(ids, logp_A, Status.COMPLETED, self.version)


def measured(
    folder: Path, staleness: int, steps: int, writing: float, learning: float, *, prompts: int = 4
) -> dict[str, float]:
    """Of a run's steps: seconds of one and of writing its batch, means; and idle shares, medians.

    Args:
        folder: Of the run, which is made.
        staleness: `rollout.staleness`.
        steps: Batches.
        writing: Seconds that a batch of longest completions takes to be written.
        learning: Seconds that a step sleeps.
        prompts: Of a batch.
    """

    def engine(config: Any, lm: LanguageModel, vocab: int, *more: Any) -> SleepingEngine:
        return SleepingEngine(lm, vocab, writing / LONGEST)

    asked = {"engine": "vllm", "vllm_python": "none", "staleness": staleness, "prompts": prompts}
    asked["max_new_tokens"] = LONGEST
    settings = {
        "data": "countdown",
        "method": {"name": "opd"},
        "steps": steps,
        "rollout": asked,
        "eval": {"problems": 0},
        "checkpoint": {"every": 0},
        "checks": "skip",
    }
    with mock.patch.multiple(prepare, other_engine=engine, check_other_engine=lambda config: None):
        run = runner.start(configuration.resolve(configuration.recipe("countdown"), settings), folder)
    run.learner.learn = _after(lambda: time.sleep(learning), run.learner.learn)  # type: ignore[method-assign]
    run.go()
    rows = run.metrics[2:-2]  # neither the first batches, which are waited for, nor the last ones, behind which none is
    idle = {name: statistics.median(row.get(f"idle/{name}", 0.0) for row in rows) for name in ("trainer", "generator")}
    return {**idle, **{name: statistics.mean(row[f"time/{name}"] for row in rows) for name in ("step", "generate")}}


@contextmanager
def scored_elsewhere(seconds: float, *, by_group: bool) -> Iterator[None]:
    """Within, teachers count as servers, which score groups at `REQUESTS` at a time and sleep meanwhile.

    Args:
        seconds: For a whole batch.
        by_group: Whether each group is a question of its own, or the batch is one.
    """
    score = Teachers.score

    def slow(self: Teachers, method: Any, groups: Sequence[Any], *more: Any) -> Any:
        time.sleep(seconds / PROMPTS * (REQUESTS if by_group else len(groups)))
        return score(self, method, groups, *more)

    server = SimpleNamespace(scores=[], listen=lambda say: None, verify=lambda tolerance: None)
    elsewhere = property(lambda self: dict.fromkeys(self.models, server))
    asked = partial(EarlyTeachers, requests=REQUESTS if by_group else 0)
    with (
        mock.patch.multiple(Teachers, score=slow, remote=elsewhere),
        mock.patch.object(prepare, "EarlyTeachers", lambda teachers, requests: asked(teachers)),
    ):
        yield


def with_teachers(steps: int, stage: float) -> None:
    """Prints how long steps take whose batches are scored whole, and group by group."""
    print("| writing, scoring, learning | scored | s a step | hidden of scoring | trainer idle |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for times in ((1.0, 0.8, 1.0), (1.5, 1.0, 0.5)):
            alone = 0.0
            for by_group in (False, True):
                writing, scoring, learning = (own * stage for own in times)
                with scored_elsewhere(scoring, by_group=by_group):
                    folder = Path(place) / f"{times} {by_group}"
                    found = measured(folder, 1, steps, writing, learning, prompts=PROMPTS)
                alone = alone or found["step"]
                hidden = f"{(alone - found['step']) / scoring:.0%}" if by_group else ""
                how = "by group" if by_group else "whole"
                shown = ", ".join(f"{own * stage:g}" for own in times)
                print(f"| {shown} s | {how} | {found['step']:.2f} | {hidden} | {found['trainer']:.0%} |", flush=True)


def _after(first: Callable[[], None], work: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any) -> Any:
        first()
        return work(*arguments)

    return both


def main() -> None:
    """Prints a table, and fails where too little is hidden."""
    parser = argparse.ArgumentParser(description="share of the shorter stage that writing ahead hides")
    parser.add_argument("--steps", type=int, default=16, help="batches of each run")
    parser.add_argument("--stage", type=float, default=0.6, help="seconds of a stage")
    parser.add_argument("--teachers", action="store_true", help="measure what it saves to score group by group")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.teachers:
        with_teachers(asked.steps, asked.stage)
        return
    print("| stages | staleness | s a step | hidden of the shorter | trainer idle | generator idle |")
    print("|---|---|---|---|---|---|")
    least = 1.0
    with tempfile.TemporaryDirectory() as place:
        for case, (writing, learning) in CASES.items():
            alone, shorter = 0.0, 1.0
            for staleness in (0, 1, 2):
                times = (writing * asked.stage, learning * asked.stage)
                found = measured(Path(place) / f"{case} {staleness}", staleness, asked.steps, *times)
                shown = "| |"
                if staleness:
                    hidden = (alone - found["step"]) / shorter
                    least = min(least, hidden)
                    shown = f"{hidden:.0%} | {found['trainer']:.0%} | {found['generator']:.0%}"
                else:
                    alone, shorter = found["step"], min(found["generate"], times[1])
                print(f"| {case} | {staleness} | {found['step']:.2f} | {shown} |", flush=True)
    if least < WANTED:
        raise SystemExit(f"only {least:.0%} of the shorter stage were hidden; {WANTED:.0%} are wanted")


if __name__ == "__main__":
    main()
