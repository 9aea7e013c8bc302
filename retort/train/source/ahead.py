"""Batches that another thread writes ahead, while the student learns from earlier ones."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from retort.controllers import Probe
from retort.core.rollouts import Group, Prompt, Rollout
from retort.core.signals import TeacherSignal
from retort.core.steps import Clock
from retort.errors import RetortError
from retort.method import Method
from retort.rollout.engines.base import FollowingEngine
from retort.rollout.plan import RolloutPlan
from retort.train.source.ages import token_ages
from retort.train.source.source import Source
from retort.train.source.unended import Unended
from retort.train.source.waiting_batches import WaitingBatch, stored, unstored

#: Seconds that the end of a run waits for the thread, once the engine is closed.
_PATIENCE = 60.0


class Answers(AbstractContextManager["Answers"], Protocol):
    """What teachers say of one batch; behind its block nobody is asked any more."""

    @property
    def seconds(self) -> float:
        """How long they took."""
        ...

    def hear(self, group: Group) -> None:
        """Takes a group that is written and graded, while others are not; it may have them asked about it."""
        ...

    def of(self, groups: Sequence[Group]) -> Mapping[str, TeacherSignal] | RetortError:
        """What they say of the batch, or why they do not; nothing where they are asked when it is learnt from."""
        ...


class Asking(Protocol):
    """Who has teachers asked before a batch is learnt from."""

    def begin(self, method: Method, step: int) -> Answers:
        """Begins the batch of a step."""
        ...


@dataclass(frozen=True)
class _Job:
    """A batch that is to be written.

    Attributes:
        step: Its number, from 0.
        method: The method of that step.
        clock: The position in the run of that step.
        version: Version of the weights that write it.
        difficulty: See `Source.rollouts`.
    """

    step: int
    method: Method
    clock: Clock
    version: int
    difficulty: Mapping[str, float] | None


class Ahead:
    """A source whose batches are written by a thread, at most some steps before they are learnt from.

    Batch j, from 0, is written with the weights that the student has after max(0, j - staleness) steps. Before step i
    those weights are kept, and batch i + staleness is asked for; before the first step all up to that one are. One
    thread writes them, in order, so what is written depends on no clock. It runs while there is something to write.

    The source and its engine belong to that thread between `rollouts` and `tensors`. An error of it is raised by
    `rollouts` at the step that needs the batch; what was written before is learnt from first.

    Attributes:
        version: Version of the weights that wrote the last batch that was taken.
        failed: As of `Source`, of that batch.
        unended: As of `Source`, of that batch.
    """

    def __init__(
        self,
        source: Source,
        engine: FollowingEngine,
        staleness: int,
        at: Callable[[int], tuple[Method, Clock]],
        steps: Callable[[], int],
        teachers: Asking,
    ) -> None:
        """Begins without a thread.

        Args:
            source: Writes the batches, with `engine`.
            engine: Has weights of its own.
            staleness: Steps between the weights that write a batch and those that learn from it, at most.
            at: Gives method and clock of a step.
            steps: Gives the number of batches in the run.
            teachers: Has teachers asked about what is written.
        """
        self._teachers = teachers
        self._lane = source.world.lane()
        self._source, self._engine, self._staleness, self._at, self._steps = source, engine, staleness, at, steps
        self.version, self.failed, self.unended = 0, tuple[str, ...](), Unended()
        self._given_up = 0
        self._changed = threading.Condition()
        self._own = threading.local()
        self._queue, self._ready = deque[_Job](), dict[int, WaitingBatch]()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._next = 0
        self._taken: WaitingBatch | None = None
        self._busy = _Busy()
        self._times: dict[str, float] = {}
        self._began = 0.0, 0.0

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The training prompts."""
        return self._source.prompts

    @property
    def count(self) -> int:
        """Number of prompts per batch."""
        return self._source.count

    @property
    def given_up(self) -> int:
        """As of `Source`, of the batches that were taken."""
        return self._given_up

    def rollouts(
        self, method: Method, clock: Clock, version: int, difficulty: Mapping[str, float] | None = None
    ) -> list[Group]:
        """Asks for what may be written now, and waits for the batch of this step.

        Args:
            method: The method of this step.
            clock: The position in the run. Batches that are asked for see the outputs of controllers in it.
            version: Number of optimizer steps that the student has taken.
            difficulty: See `Source.rollouts`.

        Raises:
            RunError: As `Source.rollouts`, and what else the thread met when it wrote this batch.
            UserError: As `RunError`.
        """
        began = time.perf_counter()
        self._began, self._stopped = (began, self._busy.seconds()), False
        due = range(max(self._next, clock.step), min(clock.step + self._staleness, self._steps() - 1) + 1)
        if due:
            self._engine.keep(version)
        kept = time.perf_counter()
        for step in due:
            own, there = self._at(step)
            there = replace(there, controller_outputs=clock.controller_outputs)
            self._ask(_Job(step, own, there, version, difficulty))
        self._taken = taken = self._take(clock.step)
        self.version, self.failed, self.unended = taken.version, taken.failed, taken.unended
        self._given_up += taken.given_up
        self._times = {
            "time/sync": kept - began,
            "time/wait": time.perf_counter() - kept,
            "time/generate": taken.seconds,
            **({"time/teacher": taken.asking} if taken.signals else {}),
            **token_ages(taken.groups, version),
        }
        return taken.groups

    def scored(self) -> Mapping[str, TeacherSignal] | None:
        """What the teachers say of the last batch that was taken; None where they are to be asked now.

        Raises:
            RetortError: Why they did not answer.
        """
        taken, found = self._taken, None if self._taken is None else self._taken.signals
        if taken is not None and found is None:  # it comes from a checkpoint, which holds no signals
            with self._teachers.begin(self._at(taken.step)[0], taken.step) as answers:
                found = answers.of(taken.groups)
        if isinstance(found, RetortError):
            raise found
        return found or None

    def stages(self, times: Mapping[str, float]) -> dict[str, float]:
        """The times of a step by stage, the idle shares of trainer, writer and teacher, and how old its tokens are.

        Args:
            times: The step's own, seconds, as `time/<part>`; `time/generate` is how long the batch was waited for.
        """
        began, busy = self._began
        whole, passed = times["time/step"], time.perf_counter() - began
        waited = self._times["time/sync"] + self._times["time/wait"]
        return {
            **times,
            **self._times,
            "time/other": times["time/other"] + times["time/generate"] - waited,
            "idle/trainer": self._times["time/wait"] / whole,
            "idle/generator": max(0.0, 1.0 - (self._busy.seconds() - busy) / passed),
            "idle/teacher": max(0.0, 1.0 - {**times, **self._times}.get("time/teacher", 0.0) / whole),
        }

    def probed(self, plan: RolloutPlan, probe: Probe, clock: Clock) -> list[Rollout]:
        """Completions of the probe prompts that the data have; a probe that generates is refused before the run."""
        return self._source.probed(plan, probe, clock)

    def open(self, folder: Path, step: Callable[[], int]) -> None:
        """As of `Source`; what the thread writes down is of the step that it writes for."""
        self._source.open(folder, lambda: getattr(self._own, "step", step()))

    def mark(self) -> Callable[[], None]:
        """Returns a function that gives back a batch that was taken since."""
        before = self._taken

        def put_back() -> None:
            if self._taken is not before and self._taken is not None:
                self._ready[self._taken.step] = replace(self._taken, signals=None)
                self._taken = before

        return put_back

    def go_back(self, step: int) -> None:
        """As of `Source`."""
        self._source.go_back(step)

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint: that of the source, and what is written and not learnt from yet.

        It waits for the batches that were asked for.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)
        waiting = [self._ready[step] for step in sorted(self._ready)]
        return {**self._source.tensors(), **stored(waiting, self.prompts)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`, and ignores those of other parts."""
        self._source.restore(tensors)
        self._ready = {own.step: own for own in unstored(tensors, self.prompts)}
        self._next = max(self._ready, default=-1) + 1

    def close(self) -> None:
        """Ends the thread: what it is writing is given up, and its engine closed."""
        with self._changed:
            self._stopped, thread = True, self._thread
            self._queue.clear()
        self._engine.close()
        if thread is not None:
            thread.join(_PATIENCE)

    def _ask(self, job: _Job) -> None:
        with self._changed:
            if self._error is not None:  # nothing is written behind a batch that could not be
                return
            self._queue.append(job)
            self._next = job.step + 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="retort-writer", daemon=True)
                self._thread.start()

    def _take(self, step: int) -> WaitingBatch:
        with self._changed:
            self._changed.wait_for(lambda: step in self._ready or self._thread is None)
            if step in self._ready:
                return self._ready.pop(step)
            error, self._error, self._next = self._error, None, step
        assert error is not None, f"batch {step} was not asked for"
        raise error

    def _work(self) -> None:
        """What the thread does: it writes what is asked for, in order, until nothing is or something fails."""
        with self._lane():
            self._write()

    def _write(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._thread = None
                    self._changed.notify_all()
                    return
                job = self._queue.popleft()
            put_back = self._source.mark()
            try:
                written = self._written(job)
            except BaseException as error:
                put_back()
                with self._changed:
                    self._queue.clear()
                    self._error = error
                continue
            with self._changed:
                if not self._stopped:
                    self._ready[job.step] = written
                self._changed.notify_all()

    def _written(self, job: _Job) -> WaitingBatch:
        source, self._own.step = self._source, job.step
        before = source.given_up
        with self._teachers.begin(job.method, job.step) as answers:
            with self._busy:
                began = time.perf_counter()
                self._engine.update(job.version)
                groups = source.rollouts(job.method, job.clock, job.version, job.difficulty, answers.hear)
                seconds = time.perf_counter() - began
            counted, unended = (source.given_up - before, tuple(source.failed), seconds), source.unended
            signals = answers.of(groups)
            return WaitingBatch(job.step, job.version, groups, *counted, signals, answers.seconds, unended=unended)


class _Busy:
    """Seconds that the thread has been at work; the main thread reads them."""

    def __init__(self) -> None:
        self._done, self._since = 0.0, None

    _since: float | None

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        since, self._since = self._since, None
        self._done += time.perf_counter() - (since or 0.0)

    def seconds(self) -> float:
        """Up to now."""
        since = self._since
        return self._done + (0.0 if since is None else time.perf_counter() - since)
