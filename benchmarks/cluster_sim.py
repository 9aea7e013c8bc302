"""A cluster that learns, simulated: who works, who waits, and how many steps an hour, for a layout and stage times.

    python benchmarks/cluster_sim.py measure --rounds 3    # runs on this machine: benchmarks/results/cluster_sim.json
    python benchmarks/cluster_sim.py predict               # GPUs, some minutes: the same file
    python benchmarks/cluster_sim.py page                  # docs/cluster-sim.md

The parts of a run are processes of a discrete-event simulation (simpy): ranks that learn, processes that generate,
servers of the teacher, environments. What each of them takes comes from outside (`Stages`): measured by
`cluster_stages.py`, or stated for GPUs by `cluster_gpus.py`.

How it is ordered. Batch j is written with the weights after max(0, j - s) steps, for a staleness s. At the boundary
before step i the trainer hands out its weights and asks for batch i + s (at the start for batches 0 to s). Batches are
written in order. The next begins when the last is complete, because all generators then take new weights together
(`Layout.together`). Step i waits until batch i is written and scored.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import simpy
from cluster_model import Batch, Completion, Layout, Load, Outcome, Stages

#: What a process of simpy is.
Events = Iterator[Any]


@dataclass
class Cluster:
    """What runs share: the clock, the servers of the teacher, and who worked for how long."""

    layout: Layout
    stages: Stages
    clock: simpy.Environment = field(default_factory=simpy.Environment)
    worked: list[tuple[str, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.teachers = simpy.Resource(self.clock, max(1, self.layout.teachers))

    def work(self, role: str, seconds: float, processes: int = 1) -> Events:
        """So many processes of a role work."""
        self.worked.append((role, self.clock.now, seconds * processes))
        yield self.clock.timeout(seconds)

    def teach(self, tokens: float) -> Events:
        """A server of the teacher scores a request, as soon as one is free."""
        with self.teachers.request() as place:
            yield place
            yield from self.work("teacher", self.stages.teacher(tokens))

    def counts(self) -> dict[str, int]:
        """Processes of each role."""
        own, runs = self.layout, self.layout.runs
        found = {"trainer": own.ranks * runs, "generator": own.generators * runs, "teacher": own.teachers}
        return {role: count for role, count in found.items() if count}


class Run:
    """One run in a cluster."""

    def __init__(self, cluster: Cluster, load: Load, steps: int, seed: int) -> None:
        self.cluster, self.load, self.steps = cluster, load, steps
        self.clock, self.layout, self.stages = cluster.clock, cluster.layout, cluster.stages
        self.seed = seed
        self.asked = [self.clock.event() for _ in range(steps)]
        self.written = [self.clock.event() for _ in range(steps)]
        self.scored = [self.clock.event() for _ in range(steps)]
        self.tokens = [0] * steps
        self.versions = [0] * steps
        self.version = 0
        self.ends: list[float] = []
        self.waited: list[float] = []
        self.staleness: Counter[int] = Counter()
        self.environments = simpy.Resource(self.clock, self.layout.environments)
        self.clock.process(self.learn())
        self.batches: dict[int, Batch] = {}
        for number in range(self.layout.generators):
            self.clock.process(self.generator(number))

    def learn(self) -> Events:
        """The trainer."""
        ahead = self.layout.staleness
        for step in range(self.steps):
            if self.layout.generators and step:
                yield from self.cluster.work("trainer", self.stages.keep, self.layout.ranks)
            for batch in range(step + ahead if step else 0, min(step + ahead + 1, self.steps)):
                self.asked[batch].succeed(self.version)
            if not self.layout.generators:
                self.versions[step] = self.version
                for number in range(self.layout.ranks):
                    self.clock.process(self.write(step, number, "trainer"))
            began = self.clock.now
            yield self.written[step]
            if self.layout.ask == "step":
                self.clock.process(self.score(step, self.tokens[step]))
            yield self.scored[step]
            self.waited.append(self.clock.now - began if self.layout.generators else 0.0)
            read = self.tokens[step] + self.load.rollouts * self.load.prompt_tokens
            learn = self.stages.learn(read / self.layout.ranks) + self.stages.exchange
            yield from self.cluster.work("trainer", learn, self.layout.ranks)
            yield from self.cluster.work("trainer", self.stages.besides(read))
            self.version += 1
            self.staleness[step - self.versions[step]] += self.tokens[step]
            self.ends.append(self.clock.now)

    def generator(self, number: int) -> Events:
        """A process that generates: it takes the weights of a batch that was asked for, and writes its part."""
        for step in range(self.steps):
            version = yield self.asked[step]
            if step and self.layout.together:
                yield self.written[step - 1]
            self.versions[step] = version
            if version:
                yield from self.cluster.work("generator", self.stages.update)
            yield from self.write(step, number, "generator")

    def writers(self) -> int:
        """Processes that share the prompts of a batch."""
        return self.layout.generators or self.layout.ranks

    def write(self, step: int, number: int, role: str) -> Events:
        """A process writes its prompts of a batch; the last one to end says that the batch is written."""
        if step not in self.batches:
            draw = random.Random(f"{self.seed}-{step}")  # the same lengths, whoever comes first
            self.batches[step] = Batch.drawn(self.load, self.writers(), draw)
        batch = self.batches[step]
        self.tokens[step] = sum(batch.tokens.values())

        def ended(group: int) -> None:
            batch.left[group] -= 1
            if not batch.left[group] and self.layout.ask == "group":
                read = batch.tokens[group] + self.load.samples * self.load.prompt_tokens
                batch.asked.append(self.clock.process(self.request(read)))

        if batch.parts[number]:
            yield from self.generate(batch.parts[number], role, ended)
        batch.writing -= 1
        if not batch.writing:
            self.written[step].succeed()
            if self.layout.ask == "group":
                self.clock.process(self.all_scored(step, batch.asked))
            elif self.layout.ask == "batch":
                self.clock.process(self.score(step, self.tokens[step]))

    def score(self, step: int, tokens: int) -> Events:
        """Has a whole batch scored: an even part by each server of the teacher, or by each rank."""
        read = tokens + self.load.rollouts * self.load.prompt_tokens
        parts = self.layout.teachers or self.layout.ranks
        if self.layout.teachers:
            parts = min(parts, self.load.prompts)
        yield from self.all_scored(step, [self.clock.process(self.request(read / parts)) for _ in range(parts)])

    def all_scored(self, step: int, asked: Sequence[simpy.Process]) -> Events:
        yield simpy.AllOf(self.clock, asked)
        self.scored[step].succeed()

    def request(self, tokens: float) -> Events:
        """One request to a server of the teacher; a rank that has the teacher is one."""
        if self.layout.teachers:
            yield from self.cluster.teach(tokens)
        else:
            yield from self.cluster.work("trainer", self.stages.teacher(tokens))

    def generate(self, sequences: Sequence[Completion], role: str, ended: Callable[[int], None]) -> Events:
        """One process writes its sequences: it takes in new ones as others end, and steps all of them together."""
        own, waiting, numbers = self.stages.decode, deque(sequences), itertools.count()
        active: list[tuple[int, int, Completion]] = []  # by the decode step after which a turn ends
        done = contexts = away = 0
        back = self.clock.event()
        yield from self.cluster.work(role, own.start)

        def visit(sequence: Completion) -> Events:
            nonlocal away, back
            with self.environments.request() as place:
                yield place
                yield self.clock.timeout(self.stages.environment)
            away -= 1
            waiting.append(sequence)
            back.succeed()
            back = self.clock.event()

        while waiting or active or away:
            read = 0
            while waiting and len(active) < self.layout.parallel:
                sequence = waiting.popleft()
                length = sequence.turns.popleft()
                heapq.heappush(active, (done + length, next(numbers), sequence))
                read += sequence.prompt
                sequence.read(length)
                contexts += sequence.prompt - length
            if read and own.prompt:
                yield from self.cluster.work(role, own.prompt * read)
            if not active:
                yield back
                continue
            count, ahead = len(active), active[0][0] - done
            each = own.step + own.row * count + own.context * (contexts + count * ahead / 2)
            began, returned = self.clock.now, back
            passed = ahead
            if away and count < self.layout.parallel:  # who returns from an environment is taken in at once
                yield simpy.AnyOf(self.clock, [self.clock.timeout(ahead * each), returned])
                if returned.triggered and each:
                    passed = min(ahead, round((self.clock.now - began) / each))
            else:
                yield self.clock.timeout(ahead * each)
            self.cluster.worked.append((role, began, self.clock.now - began))
            done, contexts = done + passed, contexts + passed * count
            while active and active[0][0] <= done:
                sequence = heapq.heappop(active)[2]
                contexts -= sequence.prompt
                if sequence.turns:
                    away += 1
                    self.clock.process(visit(sequence))
                else:
                    ended(sequence.group)


def simulate(layout: Layout, stages: Stages, load: Load, *, steps: int = 40, seed: int = 0) -> Outcome:
    """Simulates so many steps of each run.

    The first ones are left out, in which nothing is ahead yet, and the last ones, in which nothing is left to write.
    """
    cluster = Cluster(layout, stages)
    runs = [Run(cluster, load, steps, seed + number) for number in range(layout.runs)]
    cluster.clock.run()
    first, last = layout.staleness + 1, steps - 1 - layout.staleness
    if last <= first:
        raise ValueError(f"{steps} steps are too few for a staleness of {layout.staleness}")
    begin = max(run.ends[first - 1] for run in runs)
    end = min(run.ends[last] for run in runs)
    counts = cluster.counts()
    busy = dict.fromkeys(counts, 0.0)
    for role, began, seconds in cluster.worked:
        if begin <= began < end:
            busy[role] += seconds
    seconds = sum((run.ends[last] - run.ends[first - 1]) / (last + 1 - first) for run in runs) / len(runs)
    waited = sum(sum(run.waited[first : last + 1]) / (last + 1 - first) for run in runs) / len(runs)
    staleness = sum((run.staleness for run in runs), Counter[int]())
    return Outcome(
        seconds=seconds,
        waiting=waited / seconds,
        busy={role: found / (counts[role] * (end - begin)) for role, found in busy.items()},
        staleness=dict(sorted(staleness.items())),
        tokens=sum(sum(run.tokens) for run in runs) / steps / len(runs),
    )


def main() -> None:
    """The command."""
    import cluster_gpus as gpus
    import cluster_sim_page as pages
    import cluster_stages as stages

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "predict", "page"])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of measured runs")
    parser.add_argument("--repeats", type=int, default=2, help="how often each run is made in a round")
    parser.add_argument("--ahead", action="store_true", help="measure runs that write one step ahead, too")
    parser.add_argument("--results", type=Path, default=stages.RESULTS, help="file of what was measured and predicted")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs", help="folder of the page")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        plan = (*stages.PLAN, *stages.AHEAD) if arguments.ahead else stages.PLAN
        stages.keep(stages.measured(arguments.rounds, arguments.repeats, plan), arguments.results)
    elif arguments.command == "predict":
        gpus.keep(gpus.predictions(), arguments.results)
    else:
        pages.write(arguments.results, arguments.docs)


if __name__ == "__main__":
    main()
