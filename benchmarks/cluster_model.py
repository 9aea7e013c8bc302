"""What the simulator of a cluster is given, and what it says: stage times, a batch, a layout, an outcome."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Affine:
    """Seconds: some that are always there, and some for each token."""

    fixed: float = 0.0
    each: float = 0.0

    def __call__(self, tokens: float) -> float:
        return self.fixed + self.each * tokens


@dataclass(frozen=True)
class Decode:
    """What a process that generates takes, in seconds.

    Attributes:
        start: For a batch, whatever is in it.
        prompt: For each token of a prompt.
        step: For each decode step, whatever is in it.
        row: For each sequence of a decode step.
        context: For each token of context of a sequence of a decode step (the keys and values that it reads).
    """

    start: float = 0.0
    prompt: float = 0.0
    step: float = 0.0
    row: float = 0.0
    context: float = 0.0


@dataclass(frozen=True)
class Stages:
    """Seconds of each stage; tokens are those that are read, prompts included.

    Attributes:
        decode: Of a process that generates.
        teacher: A server of the teacher scores a request.
        learn: A rank scores and learns its part of a batch.
        besides: All else of a step, on the first rank.
        exchange: What ranks exchange in a step.
        keep: The trainer hands out its weights.
        update: A process that generates takes them.
        environment: One turn of an environment.
    """

    decode: Decode
    teacher: Affine
    learn: Affine
    besides: Affine = Affine()
    exchange: float = 0.0
    keep: float = 0.0
    update: float = 0.0
    environment: float = 0.0


@dataclass(frozen=True)
class Load:
    """A batch: prompts, completions of each, tokens of a prompt, and how the lengths of completions are drawn."""

    prompts: int
    samples: int
    prompt_tokens: int
    length: Callable[[random.Random], int]
    turns: int = 1

    @property
    def rollouts(self) -> int:
        """Completions of a batch."""
        return self.prompts * self.samples


def lognormal(mean: float, sigma: float, longest: int) -> Callable[[random.Random], int]:
    """Lengths with a long tail that is cut at `longest`; `mean` is the one before it is cut."""
    middle = math.log(mean) - sigma**2 / 2
    return lambda draw: max(1, min(longest, round(draw.lognormvariate(middle, sigma))))


def always(length: int) -> Callable[[random.Random], int]:
    """Completions of one length."""
    return lambda draw: length


@dataclass(frozen=True)
class Layout:
    """Who there is.

    Attributes:
        ranks: Processes of the trainer.
        generators: Processes that only generate; 0: the ranks generate, each its part, and nothing overlaps.
        parallel: Sequences that one of them generates at once.
        teachers: Servers of the teacher, which all runs share; 0: each rank has the teacher, and scores its part.
        runs: Runs at once, each with ranks and generators of its own.
        staleness: Steps by which writing may be ahead of learning.
        ask: Teachers score a group as soon as it is written, a batch as soon as it is, or at the step that learns it.
        environments: Environments that may act at once, of a run.
        together: All processes that generate take new weights together, when a batch is complete; otherwise each does
            as soon as it has written its part.
    """

    ranks: int = 1
    generators: int = 0
    parallel: int = 64
    teachers: int = 0
    runs: int = 1
    staleness: int = 0
    ask: Literal["group", "batch", "step"] = "batch"
    environments: int = 1
    together: bool = True

    def __post_init__(self) -> None:
        if self.staleness and not self.generators:
            raise ValueError("staleness needs processes that generate besides the ranks")


@dataclass
class Completion:
    """A completion that is being written: its group, and the tokens of each turn that is left."""

    group: int
    prompt: int
    turns: deque[int]

    def read(self, done: int) -> None:
        """Adds what was written to what is read next."""
        self.prompt += done


@dataclass
class Batch:
    """What is being written.

    Attributes:
        parts: The completions of each process: prompts are dealt out at the start, in order.
        left: Completions of each group that are not written yet.
        tokens: Tokens of each group.
        writing: Processes that have not ended yet.
        asked: What servers of the teacher were asked (processes of the simulation).
    """

    parts: list[list[Completion]]
    left: Counter[int]
    tokens: Counter[int]
    writing: int
    asked: list[Any] = field(default_factory=list)

    @staticmethod
    def drawn(load: Load, processes: int, draw: random.Random) -> Batch:
        """A batch of random lengths, dealt out to so many processes."""
        found = Batch([[] for _ in range(processes)], Counter(), Counter(), processes)
        for group, _ in itertools.product(range(load.prompts), range(load.samples)):
            turns = deque(load.length(draw) for _ in range(load.turns))
            found.parts[group % processes].append(Completion(group, load.prompt_tokens, turns))
            found.left[group] += 1
            found.tokens[group] += sum(turns)
        return found


@dataclass(frozen=True)
class Outcome:
    """What a simulation says of the steps after the first ones.

    Attributes:
        seconds: Of a step of one run.
        waiting: Share of it in which the trainer waits for a batch.
        busy: Share of the time in which a process of a role works, by role.
        staleness: Tokens that were learnt so many steps after the weights that wrote them.
        tokens: Generated tokens of a batch.
    """

    seconds: float
    waiting: float
    busy: dict[str, float]
    staleness: dict[int, int]
    tokens: float

    @property
    def steps_per_hour(self) -> float:
        """Steps of one run in an hour."""
        return 3600 / self.seconds
