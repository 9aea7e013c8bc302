"""The training loop, which knows no paper. Read `Run.go` from top to bottom."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from retort import config as configuration
from retort.controllers import Probe
from retort.core.rollouts import Group, in_groups
from retort.core.signals import TeacherSignal
from retort.core.steps import Clock
from retort.errors import FROM_OUTSIDE, RunError, UserError
from retort.method import Method
from retort.models.lm import LanguageModel
from retort.ranks import World, here
from retort.train.events.advice import advice
from retort.train.events.hooks import call
from retort.train.events.interruptions import Interruptions
from retort.train.events.observe import Observer, Silent
from retort.train.events.tracking import Tracker, open_tracker
from retort.train.given.given import CallerObjects, going_on
from retort.train.learning.control import Control
from retort.train.learning.probes import Probes
from retort.train.learning.rates import Rates
from retort.train.output import results
from retort.train.output.base import Evaluated, Output, Parts
from retort.train.storage import checkpoint
from retort.train.storage.folder import Claim, NoClaim, refuse_files
from retort.train.storage.metrics import JsonLines, Stopwatch
from retort.train.teaching.asking import Needs, ask


@dataclass(repr=False)
class Run:
    """A distillation run.

    Attributes:
        output: What it leaves behind, and its parts; `source`, `teachers` and `learner` are its three parties.
        folder: The folder of its files.
        observer: Receives progress, notes and tables.
        step: Number of batches done.
        best: Best held-out score so far, and the step that had it.
        origin: The checkpoint that it goes on from, if any.
        callbacks: Objects that the run calls, see `retort.train.callbacks.Callback`.
        caller_objects: Models, rows and a verifier that the caller passed as objects.
        new: Whether its folder has yet to be made.
        world: The ranks that make it together; the first one alone writes and is watched.
        results: The before/after table, `eval.json`: `rows`, one per evaluated model, and `gap_recovered`.

    Nothing is written before `go`.
    """

    output: Output
    folder: Path
    observer: Observer = field(default_factory=Silent)
    step: int = 0
    best: tuple[float, int] | None = None
    origin: Path | None = field(default=None, init=False)
    callbacks: Sequence[Any] = ()
    caller_objects: CallerObjects = field(default_factory=CallerObjects)
    new: bool = False
    world: World = field(default_factory=here)

    def __post_init__(self) -> None:
        self.prepared: Parts = self.output.prepared
        self.source, self.teachers, self.learner = self.prepared.batches, self.prepared.teachers, self.prepared.learner
        self.source.open(self.folder, lambda: self.step)
        self.control = Control(self.prepared.method.controllers, self.prepared.config.seed)
        self.probes = Probes(self.control, self._completions, self.learner, self._signals)
        self._lines = JsonLines(self.folder / "metrics.jsonl")
        self.rollouts, self.dropped = (JsonLines(self.folder / name) for name in ("rollouts.jsonl", "dropped.jsonl"))
        self.results: dict[str, Any] = {}
        self._difficulty: dict[str, float] | None = None
        self._advised: set[str] = set()
        self._interrupted = Interruptions(self._acknowledge)
        self._doing = "what is at hand"
        self._saved: Path | None = None
        self._stop: str | None = None
        self._newest = checkpoint.newest(self.folder / "checkpoints")
        self._claim = Claim(self.folder) if self.world.leads else NoClaim(self.folder)
        self.observer = self.observer if self.world.leads else Silent()
        self._identity = self.output.identity()
        self._go_on = going_on(self.prepared.config, self.folder, self.output.example)
        self.prepared.spread(lambda text: self.observer.note(text))

    @property
    def updates(self) -> int:
        """Number of optimizer steps done."""
        return self.learner.updates

    @property
    def student(self) -> LanguageModel:
        """The model that learns."""
        return self.learner.lm

    def __repr__(self) -> str:
        return f"<Run of {self.prepared.method.name} in '{self.folder}': step {self.step} of {self.prepared.steps}>"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One flat row per step, as in `metrics.jsonl`: `pandas.DataFrame(run.metrics)` is a table.

        `step` and `tokens` are counts, `time/...` seconds, entropies and divergences nats a token; None stands
        for a value that is not finite.
        """
        return [
            {name: float(value) if value in ("inf", "-inf") else value for name, value in row.items()}
            for row in self._lines.rows()
        ]

    def go(self) -> Run:
        """Runs to the end.

        Raises:
            RunError: It had to stop (interrupted, disk full, a teacher gone wrong); a checkpoint says where to go on.
        """
        for _, method in self.prepared.phases:
            self.teachers.check(method)
        with self.world.watched(f"go on with: {self._go_on}"):
            self._go()
        return self

    def _go(self) -> None:
        self.open()
        try:
            self.observer.summary(self.output.summary(), self.prepared.notes)
            config = self.prepared.config
            tracker = open_tracker(config.tracker, run_dir=self.folder, config=config.model_dump())
            # Signals last, for ranks that lost one are asked to end while they close and before they have said why.
            with self._interrupted, contextlib.closing(tracker), contextlib.closing(self.prepared):
                self._train(tracker)
            self._call("on_end")
        except KeyboardInterrupt:  # This is the second signal.
            raise RunError(self._stopped()) from None
        finally:
            self._claim.release()

    def _train(self, tracker: Tracker) -> None:
        every = self.prepared.config.checkpoint.every
        evaluations = self.output.evaluations(self.folder, self._claim.check)
        self.results = evaluations.results
        if not evaluations:
            self.observer.note("no prompts are held out, so there is no evaluation (eval.problems, eval.data)")
        with self._safe():
            self.prepared.begin(self.observer.note)
            self.probes.catch_up(*self.prepared.at(self.step))
        self._evaluate_first(evaluations)
        while self.step < self.prepared.steps and not self._ended():
            metrics, scores = self._one_step(tracker), None
            if evaluations.due(self.step):
                with self._safe(first=lambda known=metrics: self._log(known, tracker)):
                    scores = self._evaluate_now(evaluations)
                metrics |= {f"eval/{name}": value for name, value in scores.items()}
            # Logged before anything is saved: a checkpoint never claims a step whose line is missing.
            self._log(metrics, tracker)
            self._stop_if_requested()
            if (every and self.step % every == 0) or (self.best is not None and self.best[1] == self.step):
                self.save()
            self._call("on_step", dict(metrics))
            if scores is not None:
                self._call("on_eval", scores)

        self.save()
        if evaluations:
            with self._safe():
                scores = evaluations.student(self._progress("evaluating the student"), results.AFTER)
            self.results = evaluations.results
            self._call("on_eval", scores)
        self.output.save_model(self.folder / "model", self.results, self.step, self._claim.check)
        if evaluations:  # The table comes last: what cannot be shown has been written all the same.
            self.observer.table(self.results)

    def open(self) -> None:
        """Claims the folder and brings its files to where the run is: the first moment at which anything is written.

        Raises:
            UserError: Another process is at work in the folder, or was since this run was loaded.
        """
        if self._claim.held:
            return
        self.world.first(self._open)
        self.prepared.open(self.folder, lambda: self.step)
        if not self.world.leads:
            self._claim.take()
            self.source.go_back(self.step)
        self.new = False

    def _open(self) -> None:
        self._claim.take(make=self.new)
        try:
            if self.new:
                refuse_files(self.folder, [path.name for path in self.folder.iterdir()])
            elif checkpoint.newest(self.folder / "checkpoints") != self._newest:
                raise UserError(f"{self.folder}: another process went on with this run meanwhile; resume it anew")
            self._claim.sign()
            if self.new:
                self.caller_objects.keep(self.folder)
            configuration.save(self.prepared.config, self.folder / "config.json")
            self._lines.cut(self.step)
            self.rollouts.cut(self.step)
            self.dropped.cut(self.step)
            self.source.go_back(self.step)
            if self.origin is not None:
                checkpoint.supersede(self.origin.parent, self.step)
        except BaseException:
            self._claim.release()
            raise

    def _one_step(self, tracker: Tracker) -> dict[str, Any]:
        """Generates one batch of rollouts, has the teachers score it, and learns from it; returns its metrics."""
        self._doing = f"step {self.step + 1}"
        (method, clock), watch = self.prepared.at(self.step), Stopwatch()
        before, version = self.source.given_up, self.learner.updates
        with self._safe():
            if clock.done == 0:
                self.learner.begin()
            with watch("probe"):
                probed = self.probes.due(method, clock) if clock.done == 0 else self.probes.take_late()
                clock = replace(clock, controller_outputs=self.control.controller_outputs(method))
                hard = self._difficulties(method, clock)
            with watch("generate"):
                groups = self.teachers.with_passages(method, self.source.rollouts(method, clock, version, hard))
            lost = self.source.given_up - before
            with watch("teacher"):
                self.world.first(lambda: self.teachers.verify(self.step))
                signals = self.source.scored() or self._signals(method, groups, self.teachers.wanted(method, self.step))
        with watch("score"):
            batch = self.control.act(self.learner.score(method, groups, signals, clock), self.learner)
        means, values = self.learner.learn(batch, self._rates(method).factor(clock, self.learner.begun), watch)
        with watch("score"):
            self.control.learn(batch, self.learner)
        self.step += 1
        self._claim.check()
        for row in self.output.record(batch, values, self.step, self.folder):
            self.rollouts.append(row)
        for row in self.source.unended.rows(self.step):
            self.dropped.append(row)
        metrics = {"step": self.step, **means.values()}
        metrics |= self.output.metrics(batch, values, signals, self.source.version, lost) | self.prepared.metrics()
        metrics |= {f"control/{name}": value for name, value in batch.clock.controller_outputs.items()}
        metrics |= probed

        def timed() -> dict[str, Any]:
            times = self.source.stages(watch.values())
            decided, unit = len(batch.pack), self.output.decides
            speed = {unit: decided, f"{unit}_per_second": decided / times["time/step"]}
            return {**metrics, **speed, **times}

        def without_probe() -> None:  # The step is learnt: it is logged and saved, and probed when the run goes on.
            self.probes.owed = True
            self._log(timed(), tracker)

        with self._safe(first=without_probe), watch("probe"):
            metrics |= self.probes.due(method, replace(clock, step=self.step))
        return timed()

    def _signals(self, method: Method, groups: Sequence[Group], needs: Needs) -> dict[str, TeacherSignal]:
        return ask(self.teachers, method, groups, needs, self.learner, self.world)

    def _completions(self, method: Method, probe: Probe, clock: Clock) -> list[Group]:
        return self.teachers.with_passages(method, in_groups(self.source.probed(method.rollout, probe, clock)))

    def _rates(self, method: Method) -> Rates:
        """The learning rates of a method of the run; a cold start may have one of its own."""
        config = self.prepared.config
        cold = config.cold_start.learning_rate if method is not self.prepared.method else None
        scale = cold / config.optimizer.learning_rate if cold else 1.0
        return Rates(config.optimizer, scale, self.source.count * method.rollout.samples)

    def rise(self, steps: int) -> str | None:
        """One sentence where the learning rate rises because the run has more steps now than `steps`; else None."""
        method, clock = self.prepared.at(self.step)
        if clock.end != self.prepared.steps:
            return None
        return self._rates(method).rise(clock, self.learner.begun, self.learner.updates, steps)

    def _difficulties(self, method: Method, clock: Clock) -> dict[str, float] | None:
        if method.rollout.order is not None and self._difficulty is None:
            progress = self._progress("measuring how hard each prompt is")
            self._difficulty = self.prepared.difficulties(
                method.rollout, self.folder, first=clock.done == 0, progress=progress
            )
        return self._difficulty

    def _ended(self) -> bool:
        reason = self._stop or self.control.ended(self.prepared.method)
        if reason is not None:
            self.observer.note(f"the run ends after step {self.step} of {self.prepared.steps}: {reason}")
        return reason is not None

    def _log(self, metrics: dict[str, Any], tracker: Tracker) -> None:
        self._lines.append(metrics)
        tracker.log({k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}, self.step)
        self.observer.step(self.step, self.prepared.steps, metrics)
        for text in advice(metrics, self.prepared.method.watch, self.step, self._advised):
            self.observer.note(text)

    def save(self) -> Path:
        """Writes a checkpoint, and removes those that need not be kept."""
        folder, best = self.folder / "checkpoints", self.best
        if self._saved is not None and self._saved == folder / f"step-{self.step}":
            return self._saved
        weights, tensors, counts = self.learner.tensors()
        state = {**counts, **self.output.state(best, self._advised, self._identity)}
        state["owes_probe"] = self.probes.owed
        parts = self.control.tensors() | self.source.tensors() | self.teachers.tensors()
        self.world.first(self._claim.check)
        self._saved = checkpoint.save(folder, checkpoint.Checkpoint(self.step, weights, tensors, state, parts))
        keep = self.prepared.config.checkpoint.keep
        self.world.first(lambda: checkpoint.prune(folder, keep=keep, best=best[1] if best else None))
        return self._saved

    def restore(self, path: Path) -> None:
        """Restores the state of a checkpoint. The run's files stay as they are until `go`."""
        found = checkpoint.load(path)
        self.output.refuse_other_run(path, found, self._identity, self.observer.note)
        self.step = found.step
        self.learner.restore(found)
        self.control.restore(found.parts)
        self.source.restore(found.parts)
        self.teachers.restore(found.parts)
        self.best = tuple(found.state["best"]) if found.state["best"] else None
        self._advised, self.probes.owed = set(found.state["advised"]), found.state["owes_probe"]
        if self.prepared.steps < self.step:
            raise UserError(f"{path} is at step {self.step} already; --steps {self.prepared.steps} lies before it")
        self.origin = self._saved = path

    def _acknowledge(self, by: str) -> None:
        self.observer.note(f"{by}: finishing {self._doing}, then saving; press again (or signal again) to stop at once")

    def _stopped(self) -> str:
        last = checkpoint.newest(self.folder / "checkpoints")
        saved = f"{last.name} is its newest checkpoint" if last else "no checkpoint was saved yet"
        return f"stopped at once in {self._doing}; {saved}, go on with: {self._go_on}"

    def _progress(self, text: str) -> Any:
        self._doing = text

        def report(done: int, total: int) -> None:
            self.observer.phase(text, done, total)
            self._stop_if_requested()

        return report

    def _evaluate_first(self, evaluations: Evaluated) -> None:
        """Evaluates the teacher, and the student before it learns.

        A run that was resumed without an earlier evaluation (it was switched on later) has no "before" any more.
        """
        if evaluations and not evaluations.has_begun and not self.step:
            with self._safe():
                evaluations.teacher(self._progress("evaluating the teacher"))
                scores = evaluations.student(self._progress("evaluating the student"), results.BEFORE)
            self.results = evaluations.results
            self._call("on_eval", scores)

    def _evaluate_now(self, evaluations: Evaluated) -> dict[str, float]:
        # Not interruptible: the step is learnt but not logged yet, and a checkpoint now would claim a missing line.
        scores = evaluations.student(lambda done, total: self.observer.phase("evaluating the student", done, total))
        good = evaluations.goodness(scores)
        if good is not None and (self.best is None or good > self.best[0]):
            self.best = (good, self.step)
        return scores

    def _call(self, hook: str, *arguments: Any) -> None:
        with self._safe(RunError):
            self._stop = self.world.each(lambda: call(self.callbacks, hook, self, *arguments))[0] or self._stop

    @contextlib.contextmanager
    def _safe(self, kind: Any = FROM_OUTSIDE, first: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Guards code outside an update: an error of one of these kinds ends the run, saved after `first`."""
        marks = self.control.mark(), self.source.mark()
        try:
            yield
        except kind as error:
            for put_back in marks:
                put_back()
            first()
            self.save()
            raise type(error)(
                f"{error}; everything is saved at step {self.step} of {self.prepared.steps}, go on with: {self._go_on}"
            ) from error.__cause__

    def _stop_if_requested(self) -> None:
        by = self.world.any(self._interrupted.by)
        if by is None:
            return
        self.save()
        raise RunError(
            f"{by} at step {self.step} of {self.prepared.steps}; everything is saved, go on with: {self._go_on}"
        )
