"""The source of rollouts: which prompts, which model completes each, how they are graded. It scores with no teacher."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from retort.align.chat import Renderer
from retort.align.stops import StopTokens
from retort.align.text import completion_text
from retort.controllers import Probe
from retort.core.random_streams import UniformStream, uniforms
from retort.core.rollouts import RIGHT_FROM, Group, Prompt, Rollout, Status, in_groups
from retort.core.sequences import TokenSequence
from retort.core.steps import Clock
from retort.errors import RunError
from retort.method import Method
from retort.ranks import World, here
from retort.rewards.base import Grader, graded
from retort.rollout.by_teacher import TeacherGenerator
from retort.rollout.engines.base import Engine, Sampling
from retort.rollout.episodes import EpisodeSetup, Task, run_episodes
from retort.rollout.plan import RolloutPlan
from retort.teachers.view import View
from retort.train.source.cache import RolloutCache, key
from retort.train.source.finishing import OnGroup, finished, graded_for, without_failed
from retort.train.source.order import Visit, easy_to_hard
from retort.train.source.partial import Generation, Partial, Waited
from retort.train.source.response import closed_ids, response_rollout
from retort.train.source.unended import Unended
from retort.train.storage.folder import TIMEOUTS
from retort.train.storage.metrics import JsonLines


@dataclass
class _Shared:
    """The visits of a batch by the model that completes them."""

    student: list[Visit] = field(default_factory=list)
    replay: list[Visit] = field(default_factory=list)
    teacher: list[Visit] = field(default_factory=list)
    dataset: list[Visit] = field(default_factory=list)


@dataclass(eq=False)
class Source:
    """Generates and grades the rollouts of a run.

    Attributes:
        prompts: The training prompts.
        probe: Prompts kept out of them for the method's probes.
        count: Number of prompts per batch.
        limit: Tokens of the longest completion.
        seed: The seed of the run.
        engine: Generates as the student.
        render: Renders a prompt as the student reads it.
        stops: Where the student's completions end.
        vocab: Number of ids that student and teachers share.
        teacher_generator: Generates as the teacher for the student, where there is one.
        grader: Grades rollouts, where any of the data has answers.
        rubric_grader: Grades them for methods that learn from a rubric (`Method.grading`).
        episodes: The environment that replies to the student.
        failed: What went wrong, in words, in each episode of the last batch that its environment could not go on with.
        version: Number of optimizer steps behind the student that wrote the last batch.
        cache: Rollouts of earlier batches; a run sets its own.
        late: The record of replies that came too late; a run sets its own.
        world: The ranks, each of which generates and grades a part of the batch.
        whole: Within it the student can generate without the other ranks; all enter it together.
        teacher_whole: The same for the teacher.
        shown: Gives a view's prompt as the student reads it, of a prompt, its visit and the tokens that a
            completion may have; None where there is no context.
        partial: What becomes of the student's completions that do not end within a budget of tokens.
    """

    prompts: Sequence[Prompt]
    probe: Sequence[Prompt]
    count: int
    limit: int
    seed: int
    engine: Engine
    render: Renderer
    stops: StopTokens
    vocab: int
    teacher_generator: TeacherGenerator | None = None
    grader: Grader | None = None
    rubric_grader: Grader | None = None
    episodes: EpisodeSetup = field(default_factory=EpisodeSetup)
    failed: list[str] = field(default_factory=list)
    version: int = 0
    cache: RolloutCache = field(default_factory=RolloutCache)
    late: JsonLines = field(default_factory=lambda: JsonLines(Path(TIMEOUTS)))
    world: World = field(default_factory=here)
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    teacher_whole: Callable[[], AbstractContextManager[None]] = nullcontext
    shown: Callable[[View, Prompt, int, int], TokenSequence | None] | None = None
    partial: Partial = field(default_factory=Waited)
    _ages: dict[str, float] = field(default_factory=lambda: {}, init=False)

    @property
    def unended(self) -> Unended:
        """What became of completions of the last batch that did not end within a budget of tokens."""
        return self.partial.unended

    @property
    def given_up(self) -> int:
        """Completions that count as wrong because their comparison with the right answer did not finish."""
        grader = self.grader
        return 0 if grader is None else sum(self.world.each(lambda: grader.given_up))

    def rollouts(
        self,
        method: Method,
        clock: Clock,
        version: int,
        difficulty: Mapping[str, float] | None = None,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """Generates and grades the rollouts of a batch, by visit to a prompt.

        Args:
            method: Its plan names the models that generate; its need of rewards decides what a grader may leave out.
            clock: The position in the run.
            version: Number of optimizer steps that the student has taken.
            difficulty: Difficulty by prompt id, for plans that order by it.
            on_group: Takes those of a visit that the student wrote as soon as they are graded, in any order.

        Raises:
            RunError: Nothing is left to learn from.
            UserError: The grader, or a row of the data, does not fit.
        """
        plan, self.version = method.rollout, version
        if plan.order is None:
            chosen = self.partial.visits(self.prompts, seed=self.seed, step=clock.step, count=self.count)
        else:
            hard = difficulty or {}
            chosen = easy_to_hard(self.prompts, hard, plan.order, seed=self.seed, clock=clock, count=self.count)
        shared, longest = self._share(plan, clock, chosen), self.horizon(plan, clock)
        again = [rollout for visit in shared.replay for rollout in self._replayed(visit, clock, longest)]
        rollouts = [
            *self._by_student(method, shared.student, longest, clock, on_group),
            *self._by_teacher(method, shared.teacher, longest, clock),
            *again,
            *(self.response_rollout(visit.prompt, visit.epoch, longest) for visit in shared.dataset),
        ]
        if not rollouts:
            problem = self.unended.problem or (
                f"the teacher ended none of its completions within {self.limit} tokens, so there is nothing to learn; "
                "raise rollout.max_new_tokens"
            )
            raise RunError(f"step {clock.step + 1}: {problem}")
        found, self.failed = without_failed(rollouts, clock)
        groups = in_groups(found)
        self._ages = self.partial.ages(groups, version)
        return groups

    def scored(self) -> None:
        """Teachers are asked when a batch is learnt from."""

    def stages(self, times: Mapping[str, float]) -> dict[str, float]:
        """The times of a step as they are, for it waits while its batch is written; and how old its tokens are."""
        return {**times, **self._ages}

    def close(self) -> None:
        """Has started nothing that would not end by itself."""

    def probed(self, plan: RolloutPlan, probe: Probe, clock: Clock) -> list[Rollout]:
        """Completions of the probe prompts: the data's, or the student's with the same uniform numbers every time."""
        prompts = self.probe[: probe.prompts]
        if probe.source == "dataset":
            return [self.response_rollout(prompt, 0, self.limit) for prompt in prompts]
        tasks = [
            Task(prompt, self.render(prompt), 0, UniformStream(self.seed, "probe", prompt.id)) for prompt in prompts
        ]
        sampling = Sampling(self.horizon(plan, clock), plan.temperature, plan.top_p)
        return self._divided(tasks, lambda own: self._played(own, sampling))

    def passed(self, plan: RolloutPlan, prompts: Sequence[Prompt], samples: int) -> dict[str, float]:
        """The student's pass rate on some prompts, by the prompt's id; needs a grader."""
        assert self.grader is not None  # checked by `prepare`
        tasks = [
            Task(prompt, self.render(prompt), member, UniformStream(self.seed, "difficulty", prompt.id, member))
            for prompt in prompts
            for member in range(samples)
        ]
        grader, sampling = self.grader, Sampling(self.limit, plan.temperature, plan.top_p)
        generated = self._divided(tasks, lambda own: graded(grader, self._played(own, sampling)))
        right = [(rollout.reward or 0.0) >= RIGHT_FROM for rollout in generated]
        return {
            prompt.id: sum(right[place * samples : (place + 1) * samples]) / samples
            for place, prompt in enumerate(prompts)
        }

    def horizon(self, plan: RolloutPlan, clock: Clock) -> int:
        """Tokens of the longest completion at this step: the plan's, within the run's limit."""
        return self.limit if plan.horizon is None else max(1, min(self.limit, int(clock.at(plan.horizon))))

    def response_rollout(self, prompt: Prompt, epoch: int, longest: int) -> Rollout:
        """The data's response to a prompt as a rollout, closed with the student's stop token.

        Raises:
            UserError: The response spells a control token of the student, or holds an id that not all models have.
        """
        context = self.render(prompt)
        ids = closed_ids(prompt, context, self.engine.tokenizer, self.stops, self.vocab)
        return response_rollout(prompt, epoch, longest, context, ids)

    def open(self, folder: Path, step: Callable[[], int]) -> None:
        """Keeps completions, and what its environment said too late, in a run's folder from now on.

        Args:
            folder: The folder; nothing is written yet.
            step: Returns the number of steps that the run has done.

        Raises:
            UserError: The record of late replies in it is damaged.
        """
        self.cache = RolloutCache(folder)
        late = folder / TIMEOUTS
        self.late = JsonLines(late / f"rank-{self.world.rank}.jsonl", own=True)
        rows = [row for path in sorted(late.glob("*.jsonl")) for row in JsonLines(path).rows()]
        self.episodes.waiting.timeouts.open(rows, self.late.append, step)

    def mark(self) -> Callable[[], None]:
        """Returns a function that restores the present replay buffer and open completions."""
        visits, reopen = tuple(self.cache.visits), self.partial.mark()

        def put_back() -> None:
            self.cache.put(visits)
            reopen()

        return put_back

    def go_back(self, step: int) -> None:
        """Restores the teacher's completions of a step; what came too late is kept, also behind it."""
        self.late.cut(sys.maxsize)
        self.cache.go_back(self.prompts, self.render, step)

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint: the replay buffer, and completions that go on in the next batch."""
        return {**self.cache.tensors(self.prompts), **self.partial.tensors(self.prompts)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`, and ignores those of other parts."""
        self.cache.restore(self.prompts, self.render, tensors)
        self.partial.restore(tensors, self.prompts)

    def _share(self, plan: RolloutPlan, clock: Clock, chosen: Sequence[Visit]) -> _Shared:
        """Assigns visits to models by one uniform number per visit: a growing share only adds to the student's."""
        shared, share = _Shared(), clock.at(plan.on_policy_fraction)
        others = shared.teacher if plan.off_policy == "teacher" else shared.dataset
        full = plan.replay is not None and len(self.cache.visits) >= plan.replay.capacity
        fresh = clock.at(plan.replay.fresh) if plan.replay is not None and full else 1.0
        for visit in chosen:
            # Streams are keyed: where every completion is the student's own, this number need not be drawn.
            if share == 1 and fresh == 1:
                shared.student.append(visit)
                continue
            uniform = float(uniforms(self.seed, "mixture", visit.epoch, visit.prompt.id, count=1))
            if uniform >= share:
                others.append(visit)
            elif uniform < share * fresh:
                shared.student.append(visit)
            else:
                shared.replay.append(visit)
        return shared

    def _by_student(
        self, method: Method, chosen: Sequence[Visit], longest: int, clock: Clock, on_group: OnGroup | None
    ) -> list[Rollout]:
        plan, tasks = method.rollout, list[Task]()
        setup = self.episodes.within(plan.curriculum, clock.done, self.seed)
        for visit in chosen:
            context = self._before(method, visit, longest)
            for member in range(plan.samples):
                uniform = UniformStream(self.seed, "rollouts", visit.epoch, visit.prompt.id, member)
                tasks.append(Task(visit.prompt, context, member, uniform, visit.epoch))
        self.engine.update(self.version)
        sampling = Sampling(longest, plan.temperature, plan.top_p)

        def finish(own: list[Rollout], begins: bool) -> list[Rollout]:
            return self._graded(method, self._own(plan, own), begins=begins)

        generation = Generation(
            self.engine,
            self.seed,
            sampling,
            self._divided,
            lambda own: finished(lambda each: self._played(own, sampling, setup, each), finish, on_group),
            lambda own, budget: self._own(plan, self._played(own, budget, setup)),
            lambda own: self._graded(method, own),
        )
        generated = self.partial.generate(tasks, generation)
        if method.grading is not None:
            method.grading.check(generated)
        if plan.replay is not None:
            self.cache.remember(in_groups(generated), plan.replay.capacity)
        return generated

    def _before(self, method: Method, visit: Visit, longest: int) -> TokenSequence:
        """What the student reads before it writes: its own prompt, or that of the view that the plan names."""
        under, context = method.rollout.prompt_view, None
        if under is not None:
            assert self.shown is not None  # `prepare` gives it.
            context = self.shown(method.views[under], visit.prompt, visit.epoch, longest)
        return self.render(visit.prompt) if context is None else context

    def _own(self, plan: RolloutPlan, rollouts: list[Rollout]) -> list[Rollout]:
        """Completions behind the student's own prompt, whatever it read when it wrote them."""
        if plan.prompt_view is None:
            return rollouts
        return [
            replace(own, sequences=(own.sequence.with_prefix(self.render(own.prompt)),), engine_logp_A=None)
            for own in rollouts
        ]

    def _divided(self, tasks: Sequence[Any], write: Callable[[Sequence[Any]], list[Rollout]]) -> list[Rollout]:
        """What comes of tasks or rollouts, by each rank its part of the visits, on all ranks in the order given."""
        with self.whole():
            return self.world.divide(tasks, write, key=lambda task: (task.prompt.id, task.visit))

    def _played(
        self, tasks: Sequence[Task], sampling: Sampling, setup: EpisodeSetup | None = None, on_visit: Any = None
    ) -> list[Rollout]:
        """The student's completions of some tasks, with whoever replies to it: the run's environment by default."""
        return run_episodes(self.engine, tasks, sampling, setup=setup or self.episodes, on_visit=on_visit)

    def _replayed(self, visit: Visit, clock: Clock, longest: int) -> list[Rollout]:
        """An earlier visit from the replay buffer, instead of a new one to this prompt."""
        uniform = float(uniforms(self.seed, "replay", clock.step, visit.prompt.id, count=1))
        return [self._cut(rollout, longest) for rollout in self.cache.visits[int(uniform * len(self.cache.visits))]]

    def _by_teacher(self, method: Method, chosen: Sequence[Visit], longest: int, clock: Clock) -> list[Rollout]:
        """The teacher's completions: cached ones, and new ones for all others."""
        plan, found = method.rollout, dict[tuple[int, int], Rollout]()
        wanted = [(index, member) for index in range(len(chosen)) for member in range(plan.samples)]
        if plan.keep:
            for index, member in wanted:
                kept = self.cache.completions.get(key(plan, chosen[index].prompt, member))
                if kept is not None:
                    found[index, member] = kept
        missing = [index for index in wanted if index not in found]
        with self.teacher_whole() if missing else nullcontext():
            new = self.world.divide(
                missing,
                lambda own: self._generated_by_teacher(method, [(chosen[i], member) for i, member in own], longest),
                key=lambda place: place[0],
            )
        found.update(zip(missing, new, strict=True))
        if plan.keep:
            self.cache.keep(new, plan, clock.step + 1)
        rollouts = [replace(found[index, member], visit=chosen[index].epoch) for index, member in wanted]
        if plan.attempts is not None:
            rollouts = [rollout for rollout in rollouts if rollout.status == Status.COMPLETED]
        return [self._cut(rollout, longest) for rollout in rollouts]

    def _generated_by_teacher(self, method: Method, wanted: Sequence[tuple[Visit, int]], longest: int) -> list[Rollout]:
        """Generates the teacher's completions in order; unfinished ones are tried again where the plan says so."""
        if not wanted:
            return []
        plan = method.rollout
        # Kept completions serve at every later length, and those that have to end get the room for it.
        room = self.limit if plan.keep or plan.attempts else longest
        found: dict[int, Rollout] = {}
        for attempt in range(plan.attempts or 1):
            ended = {index for index, own in found.items() if own.status == Status.COMPLETED}
            open_ = [index for index in range(len(wanted)) if index not in ended]
            tasks: list[Task] = []
            for visit, member in (wanted[index] for index in open_):
                epoch = "kept" if plan.keep else visit.epoch
                uniform = UniformStream(self.seed, "teacher", epoch, visit.prompt.id, member, attempt)
                tasks.append(Task(visit.prompt, self.render(visit.prompt), member, uniform, visit.epoch))
            assert self.teacher_generator is not None  # A plan with the teacher's completions asks for a teacher.
            generated = self.teacher_generator.generate(tasks, Sampling(room, plan.temperature, plan.top_p))
            found.update(zip(open_, generated, strict=True))
        return self._graded(method, [found[index] for index in range(len(wanted))])

    def _graded(self, method: Method, rollouts: list[Rollout], *, begins: bool = True) -> list[Rollout]:
        grader = self.grader if method.grading is None else self.rubric_grader
        return graded_for(method, grader, rollouts, begins=begins)

    def _cut(self, rollout: Rollout, longest: int) -> Rollout:
        """Cuts a rollout to the horizon."""
        if rollout.steps <= longest:
            return rollout
        before, ids = rollout.prefix_ids, rollout.action_ids[:longest]
        return rollout.cut(longest, completion_text(self.engine.tokenizer, ids, prompt_ids=before))
