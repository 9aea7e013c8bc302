"""A run: it knows no paper. Read `Run.go` from top to bottom."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from retort import config as configuration
from retort.apply import check_needs, wanted
from retort.data import fingerprint
from retort.errors import RetortError, RunError, UserError
from retort.steps import Clock
from retort.tracking import Tracker, open_tracker
from retort.train import checkpoint, difficulty, export, record, results, shelf
from retort.train.advice import advice
from retort.train.callbacks import call
from retort.train.control import Control
from retort.train.diagnose import against_rewards
from retort.train.digests import adapter_state, digests, refuse_other_adapter, refuse_others
from retort.train.folder import Claim, refuse_files
from retort.train.given import Given, going_on
from retort.train.identity import compare, identity
from retort.train.interruptions import Interruptions
from retort.train.judging import Judging
from retort.train.metrics import JsonLines, Stopwatch
from retort.train.observe import Observer, Silent
from retort.train.rates import factor
from retort.train.score import ask_teachers, score
from retort.train.setup import Setup
from retort.train.summary import summary
from retort.train.update import learn
from retort.train.write import write_rollouts
from retort.types import Pack


@dataclass(repr=False)
class Run:
    """A distillation run.

    Attributes:
        setup: All its parts.
        folder: Where its files go.
        observer: Who watches.
        step: Batches of rollouts done.
        updates: Optimizer steps done.
        best: Best held-out score so far, and the step that had it.
        begun: Optimizer steps done when the method at hand took over.
        origin: The checkpoint that it goes on from, if any.
        callbacks: Whom it calls, see `retort.train.callbacks.Callback`.
        given: Objects of the caller's that its settings do not hold.
        new: Its folder is to be made.
        results: The before/after table, `eval.json`: `rows`, one for each who was judged, and `gap_recovered`.

    Nothing is written before `go`.
    """

    setup: Setup
    folder: Path
    observer: Observer = field(default_factory=Silent)
    step: int = 0
    updates: int = 0
    best: tuple[float, int] | None = None
    begun: int = 0
    origin: Path | None = field(default=None, init=False)
    callbacks: Sequence[Any] = ()
    given: Given = field(default_factory=Given)
    new: bool = False

    def __post_init__(self) -> None:
        settings = self.setup.config.optimizer
        self.optimizer = torch.optim.AdamW(
            list(self.setup.student.trainable().values()),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=True,  # one pass over the weights instead of a dozen: a fifth of the time on a CPU
        )
        self._lines = JsonLines(self.folder / "metrics.jsonl")
        self.rollouts = JsonLines(self.folder / "rollouts.jsonl")
        self.results: dict[str, Any] = {}
        self.shelf = shelf.Shelf(self.folder)
        self.control = Control(self.setup)
        self._phases = self.setup.phases
        self._difficulty: dict[str, float] | None = None
        self._advised: set[str] = set()
        self._interrupted = Interruptions(self._answer)
        self._doing = "what is at hand"
        self._saved: Path | None = None
        self._stop: str | None = None
        self._newest = checkpoint.newest(self.folder / "checkpoints")
        self._claim = Claim(self.folder)
        self._identity = identity(self.setup)
        self._go_on = going_on(self.setup.config, self.folder)

    def __repr__(self) -> str:
        return f"<Run of {self.setup.method.name} in '{self.folder}': step {self.step} of {self.setup.steps}>"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A flat row for each step done, as in `metrics.jsonl`: `pandas.DataFrame(run.metrics)` is a table.

        `step` and `tokens` are counts, `time/...` seconds, entropies and divergences nats a token; None is no number.
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
        for _, phase in self._phases:
            check_needs(phase.method, {view: teacher.capabilities for view, teacher in phase.teachers.items()})
        self.open()
        try:
            self.observer.summary(summary(self.setup), self.setup.notes)
            config = self.setup.config
            tracker = open_tracker(config.tracker, run_dir=self.folder, config=config.model_dump())
            with contextlib.closing(tracker), self._interrupted:
                self._train(tracker)
            self._tell("on_end")
        except KeyboardInterrupt:  # the second signal
            raise RunError(self._stopped()) from None
        finally:
            self._claim.release()
        return self

    def _train(self, tracker: Tracker) -> None:
        setup, every = self.setup, self.setup.config.checkpoint.every
        judging = Judging(setup, self.folder, self._claim.check)
        self.results = judging.results
        if not judging:
            self.observer.note("no prompts are held out, so there is no evaluation (eval.problems, eval.data)")
        self._judge_first(judging)

        while self.step < setup.steps and not self._ended():
            metrics, scores = self._one_step(), None
            if judging.due(self.step):
                with self._safe(first=lambda known=metrics: self._log(known, tracker)):
                    scores = self._judge_now(judging)
                metrics |= {f"eval/{name}": value for name, value in scores.items()}
            # Logged before anything is saved: a checkpoint never claims a step whose line is missing.
            self._log(metrics, tracker)
            self._stop_if_asked()
            if (every and self.step % every == 0) or (self.best is not None and self.best[1] == self.step):
                self.save()
            self._tell("on_step", dict(metrics))
            if scores is not None:
                self._tell("on_eval", scores)

        self.save()
        if judging:
            with self._safe():
                scores = judging.student(self._progress("judging the student"), results.AFTER)
            self.results = judging.results
            self._tell("on_eval", scores)
        self._claim.check()
        export.write_model(setup, self.folder / "model", self.results, self.step)
        if judging:  # last: what cannot be shown is written all the same
            self.observer.table(self.results)

    def open(self) -> None:
        """Claims the folder and brings its files to where the run is: the first moment at which anything is written.

        Raises:
            UserError: Another process is at work in it, or was since this run was loaded.
        """
        if self._claim.held:
            return
        self._claim.take(make=self.new)
        try:
            if self.new:
                refuse_files(self.folder, [path.name for path in self.folder.iterdir()])
            elif checkpoint.newest(self.folder / "checkpoints") != self._newest:
                raise UserError(f"{self.folder}: another process went on with this run meanwhile; resume it anew")
            self._claim.sign()
            if self.new:
                self.given.keep(self.folder)
            configuration.save(self.setup.config, self.folder / "config.json")
            self._lines.cut(self.step)
            self.rollouts.cut(self.step)
            self.shelf.go_back(self.setup, self.step)
            if self.origin is not None:
                checkpoint.supersede(self.origin.parent, self.step)
        except BaseException:
            self._claim.release()
            raise
        self.new = False

    def _one_step(self) -> dict[str, Any]:
        """Write, ask the teachers, learn: one batch of rollouts."""
        self._doing = f"step {self.step + 1}"
        setup, clock, watch = *self.now(), Stopwatch()
        before = 0 if setup.verifier is None else setup.verifier.given_up
        with self._safe():
            if clock.done == 0:
                self._take_over()
            with watch("probe"):
                probed = self.control.probe(setup, clock) if clock.done == 0 else {}
                clock = replace(clock, readings=self.control.readings(setup))
                hard = self._difficulties(setup, clock)
            with watch("generate"):
                rollouts = write_rollouts(setup, self.shelf, clock, self.updates, hard)
        lost = 0 if setup.verifier is None else setup.verifier.given_up - before
        pack = Pack.of(rollouts)
        with watch("teacher"):
            able = {view: teacher.capabilities for view, teacher in setup.teachers.items()}
            signals = ask_teachers(setup, pack, lambda view: wanted(setup.method, view, able[view], self.step))
        with watch("score"):
            batch = self.control.act(setup, score(setup, pack, signals, clock))
        version = self.updates
        rate = factor(self.setup, setup, clock, self.begun)
        own = setup.own_weights
        moved = None if own is None else own.moved
        self.updates, means, values = learn(setup, batch, self.optimizer, rate, self.updates, watch, moved)
        with watch("score"):
            self.control.learn(setup, batch)
        self.step += 1
        self._claim.check()
        for row in record.rows(setup, batch, values, self.step):
            self.rollouts.append(row)
        dials = {f"control/{name}": value for name, value in batch.clock.readings.items()}
        with watch("probe"):
            probed |= self.control.probe(setup, replace(clock, step=self.step))
        times = watch.values()
        speed = {"tokens": len(pack), "tokens_per_second": len(pack) / times["time/step"]}
        written = {
            **record.rollout_metrics(batch, version),
            **against_rewards(pack, values, batch.valid.get("teacher")),
            **({"given_up": lost} if lost else {}),
        }
        shown = record.view_metrics(signals, setup.method.views, len(rollouts)) | ({} if own is None else own.lags())
        return {"step": self.step, **means.values(), **written, **shown, **dials, **probed, **speed, **times}

    def now(self) -> tuple[Setup, Clock]:
        """The method at hand, in its setup, and where the run is."""
        number = max(index for index, (begins, _) in enumerate(self._phases) if begins <= self.step)
        begins, setup = self._phases[number]
        ends = [begun for begun, _ in self._phases[number + 1 :]]
        end, config = ends[0] if ends else self.setup.steps, setup.config
        return setup, Clock(self.step, end, begins, seed=config.seed, longest=config.rollout.max_new_tokens)

    def _take_over(self) -> None:
        """Every method of a run begins with an optimizer and a learning rate of its own."""
        self.optimizer.state.clear()
        self.begun = self.updates

    def _difficulties(self, setup: Setup, clock: Clock) -> dict[str, float] | None:
        if setup.method.rollout.order is not None and self._difficulty is None:
            progress = self._progress("measuring how hard each prompt is")
            self._difficulty = difficulty.difficulties(setup, self.folder, first=clock.done == 0, progress=progress)
        return self._difficulty

    def _ended(self) -> bool:
        reason = self._stop or self.control.ended(self.setup)
        if reason is not None:
            self.observer.note(f"the run ends after step {self.step} of {self.setup.steps}: {reason}")
        return reason is not None

    def _log(self, metrics: dict[str, Any], tracker: Tracker) -> None:
        self._lines.append(metrics)
        tracker.log({k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}, self.step)
        self.observer.step(self.step, self.setup.steps, metrics)
        for text in advice(metrics, self.setup.method.watch, self.step, self._advised):
            self.observer.note(text)

    def save(self) -> Path:
        """Writes a checkpoint of this moment, and drops those that are not to be kept."""
        folder = self.folder / "checkpoints"
        if self._saved is not None and self._saved == folder / f"step-{self.step}":
            return self._saved
        self._claim.check()
        state = {
            "updates": self.updates,
            "begun": self.begun,
            "best": self.best,
            "data": fingerprint(self.setup.train),
            **digests(self.setup),
            "precision": self.setup.precision,
            "advised": sorted(self._advised),
            "run": self._identity,
        }
        state |= adapter_state(self.setup.student)
        weights = self.setup.student.trainable()
        tensors = checkpoint.optimizer_tensors(self.optimizer)
        own = self.setup.own_weights
        parts = self.control.tensors() | self.shelf.tensors(self.setup) | (own.tensors() if own else {})
        self._saved = path = checkpoint.save(folder, checkpoint.Checkpoint(self.step, weights, tensors, state, parts))
        checkpoint.prune(folder, keep=self.setup.config.checkpoint.keep, best=self.best[1] if self.best else None)
        return path

    def restore(self, path: Path) -> None:
        """Puts the run where a checkpoint was taken. Its files stay as they are until `go`."""
        found = checkpoint.load(path)
        if found.state["data"] != fingerprint(self.setup.train):
            raise UserError(
                f"{path}: the training data changed since this checkpoint; resume with the data it was made with"
            )
        refuse_other_adapter(path, found.state, self.setup.student)
        refuse_others(path, found.state, self.setup)
        parameters = self.setup.student.trainable()
        if {name: p.shape for name, p in parameters.items()} != {name: w.shape for name, w in found.weights.items()}:
            raise UserError(
                f"{path}: the student {self.setup.student.name} is another model than the one it was made with"
            )
        compare(path, found.state, self._identity, self.folder, self.observer.note)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(found.weights[name])
        checkpoint.restore_optimizer(self.optimizer, found.optimizer)
        self.step, self.updates = found.step, int(found.state["updates"])
        self.begun = int(found.state["begun"])
        self.control.restore(found.parts)
        self.shelf.restore(self.setup, found.parts)
        if self.setup.own_weights is not None:
            self.setup.own_weights.restore(found.parts)
        self.best = tuple(found.state["best"]) if found.state["best"] else None
        self._advised = set(found.state["advised"])
        if self.setup.steps < self.step:
            raise UserError(f"{path} is at step {self.step} already; --steps {self.setup.steps} lies before it")
        self.origin = self._saved = path

    def _answer(self, by: str) -> None:
        self.observer.note(f"{by}: finishing {self._doing}, then saving; press again (or signal again) to stop at once")

    def _stopped(self) -> str:
        last = checkpoint.newest(self.folder / "checkpoints")
        saved = f"{last.name} is its newest checkpoint" if last else "no checkpoint was saved yet"
        return f"stopped at once in {self._doing}; {saved}, go on with: {self._go_on}"

    def _progress(self, text: str) -> Any:
        self._doing = text

        def report(done: int, total: int) -> None:
            self.observer.phase(text, done, total)
            self._stop_if_asked()

        return report

    def _judge_first(self, judging: Judging) -> None:
        """Judges the teacher, and the student before it learns.

        Not where a run was resumed without that (evaluation was switched on later): there is no "before" any more.
        """
        if judging and not judging.has_begun and not self.step:
            with self._safe():
                judging.teacher(self._progress("judging the teacher"))
                scores = judging.student(self._progress("judging the student"), results.BEFORE)
            self.results = judging.results
            self._tell("on_eval", scores)

    def _judge_now(self, judging: Judging) -> dict[str, float]:
        # Not interruptible: the step is learnt but not logged yet, and a checkpoint now would claim a missing line.
        scores = judging.student(lambda done, total: self.observer.phase("judging the student", done, total))
        good = judging.goodness(scores)
        if good is not None and (self.best is None or good > self.best[0]):
            self.best = (good, self.step)
        return scores

    def _tell(self, hook: str, *said: Any) -> None:
        with self._safe(RunError):
            self._stop = call(self.callbacks, hook, self, *said) or self._stop

    @contextlib.contextmanager
    def _safe(self, kind: type[RetortError] = UserError, first: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Where nothing is half learnt: what a verifier or callback raises ends the run, saved after `first`."""
        states, visits = dict(self.control.states), tuple(self.shelf.visits)
        try:
            yield
        except kind as error:
            self.control.states, self.shelf.visits = states, deque(visits)
            first()
            self.save()
            raise type(error)(
                f"{error}; everything is saved at step {self.step} of {self.setup.steps}, go on with: {self._go_on}"
            ) from error.__cause__

    def _stop_if_asked(self) -> None:
        if self._interrupted.by is None:
            return
        self.save()
        raise RunError(
            f"{self._interrupted.by} at step {self.step} of {self.setup.steps}; everything is saved, go on with: "
            f"{self._go_on}"
        )
