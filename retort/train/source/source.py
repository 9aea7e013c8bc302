"""The party that rollouts come from: which prompts, who answers each, what the grader says. It knows no teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from retort.align.chat import Renderer
from retort.align.encode import Spelt, response_ids
from retort.align.stops import StopTokens
from retort.align.text import completion_text
from retort.controllers import Probe
from retort.core.rollouts import Group, Prompt, Rollout, Status, in_groups
from retort.core.sequences import TokenSequence
from retort.core.steps import Clock
from retort.core.streams import UniformStream, uniforms
from retort.errors import RunError, UserError
from retort.method import Method
from retort.ranks import World, here
from retort.rewards.base import Grader, graded
from retort.rollout.by_teacher import TeacherGenerator
from retort.rollout.engines.base import Engine, Sampling
from retort.rollout.episodes import Task, run_episodes
from retort.rollout.plan import RolloutPlan
from retort.train.source.cache import RolloutCache, key
from retort.train.source.order import Visit, easy_to_hard, visits


@dataclass
class _Shared:
    """Who answers which visit of a batch."""

    student: list[Visit] = field(default_factory=list)
    replay: list[Visit] = field(default_factory=list)
    teacher: list[Visit] = field(default_factory=list)
    dataset: list[Visit] = field(default_factory=list)


@dataclass(eq=False)
class Source:
    """Where rollouts come from.

    Attributes:
        prompts: To learn from.
        probe: Prompts kept out of them for the method's probes.
        count: Prompts per batch.
        limit: The longest completion, tokens.
        seed: Of the run.
        engine: How the student writes.
        render: A prompt's ids, as the student reads it.
        stops: Where the student's completions end.
        vocab: Ids that student and teachers share.
        teacher_generator: How the teacher writes for the student, where there is one.
        grader: Of rollouts, where any of the data has answers.
        cache: What was kept of earlier batches; a run puts its own there.
        world: The ranks, each of which writes and grades a part of the batch.
        whole: Within it the student can write without the other ranks; all enter it together.
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
    cache: RolloutCache = field(default_factory=RolloutCache)
    world: World = field(default_factory=here)
    whole: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def given_up(self) -> int:
        """Completions that count as wrong because their comparison with the right one found no end."""
        grader = self.grader
        return 0 if grader is None else sum(self.world.each(lambda: grader.given_up))

    def rollouts(
        self, method: Method, clock: Clock, version: int, difficulty: Mapping[str, float] | None = None
    ) -> list[Group]:
        """The rollouts of a batch, graded, by visit to a prompt.

        Args:
            method: Its plan says who writes; whether it needs rewards decides what a grader may leave out.
            clock: Where the run is.
            version: Optimizer steps that the student has taken.
            difficulty: Of every prompt, for plans that order by it.

        Raises:
            RunError: Nothing is left to learn from.
            UserError: The grader, or a row of the data, does not fit.
        """
        plan = method.rollout
        if plan.order is None:
            chosen = visits(self.prompts, seed=self.seed, step=clock.step, count=self.count)
        else:
            hard = difficulty or {}
            chosen = easy_to_hard(self.prompts, hard, plan.order, seed=self.seed, clock=clock, count=self.count)
        shared, longest = self._share(plan, clock, chosen), self.horizon(plan, clock)
        again = [rollout for visit in shared.replay for rollout in self._replayed(visit, clock, longest)]
        rollouts = [
            *self._by_student(method, shared.student, longest, version),
            *self._by_teacher(method, shared.teacher, longest, clock),
            *again,
            *(self.given(visit.prompt, visit.epoch, longest) for visit in shared.dataset),
        ]
        if not rollouts:
            raise RunError(
                f"step {clock.step + 1}: the teacher came to an end in none of its answers within {self.limit} tokens, "
                "so there is nothing to learn; raise rollout.max_new_tokens"
            )
        return in_groups(rollouts)

    def probed(self, plan: RolloutPlan, probe: Probe, clock: Clock) -> list[Rollout]:
        """Answers to the prompts kept out for a probe: the data's, or the student's with always the same luck."""
        prompts = self.probe[: probe.prompts]
        if probe.source == "dataset":
            return [self.given(prompt, 0, self.limit) for prompt in prompts]
        tasks = [
            Task(prompt, self._context(prompt), 0, UniformStream(self.seed, "probe", prompt.id)) for prompt in prompts
        ]
        sampling = Sampling(self.horizon(plan, clock), plan.temperature, plan.top_p)
        return self._written(tasks, lambda own: run_episodes(self.engine, own, sampling))

    def passed(self, plan: RolloutPlan, prompts: Sequence[Prompt], samples: int) -> dict[str, float]:
        """The student's pass rate on some prompts, by the prompt's id; needs a grader."""
        assert self.grader is not None  # checked by `prepare`
        tasks = [
            Task(prompt, self._context(prompt), member, UniformStream(self.seed, "difficulty", prompt.id, member))
            for prompt in prompts
            for member in range(samples)
        ]
        grader, sampling = self.grader, Sampling(self.limit, plan.temperature, plan.top_p)
        written = self._written(tasks, lambda own: graded(grader, run_episodes(self.engine, own, sampling)))
        rewards = [rollout.reward or 0.0 for rollout in written]
        return {
            prompt.id: sum(reward > 0.5 for reward in rewards[place * samples : (place + 1) * samples]) / samples
            for place, prompt in enumerate(prompts)
        }

    def horizon(self, plan: RolloutPlan, clock: Clock) -> int:
        """The longest completion now, tokens: the plan's, within the run's limit."""
        return self.limit if plan.horizon is None else max(1, min(self.limit, int(clock.at(plan.horizon))))

    def given(self, prompt: Prompt, epoch: int, longest: int) -> Rollout:
        """The data's own answer to a prompt, closed with the student's stop token.

        Raises:
            UserError: It holds what is no ordinary text to the student, or an id that not all models have.
        """
        assert prompt.response is not None  # checked by `prepare`
        prompt_ids = self.render(prompt)
        try:
            ids = response_ids(prompt_ids, prompt.response, self.engine.tokenizer)
        except Spelt as error:
            raise UserError(
                f"row '{prompt.id}': its response spells the control token {error.token!r}, which the student's "
                "tokenizer cannot encode as ordinary text; take it out of the response, or drop the row"
            ) from None
        outside = [token for token in ids if token >= self.vocab]
        if outside:
            raise UserError(
                f"row '{prompt.id}': its response holds token id {outside[0]}, which student and teacher do not share"
            )
        ids = [*ids, self.stops.primary]
        return Rollout(
            prompt=prompt,
            sequence=TokenSequence.of(prompt_ids).then(ids[:longest], decided=True),
            status=Status.COMPLETED if len(ids) <= longest else Status.TRUNCATED,
            visit=epoch,
            source="dataset",
            text=prompt.response,
        )

    def open(self, folder: Path) -> None:
        """Keeps answers in a run's folder from now on."""
        self.cache = RolloutCache(folder)

    def mark(self) -> Callable[[], None]:
        """What puts back what is kept for replay as it is now."""
        visits = tuple(self.cache.visits)
        return lambda: self.cache.put(visits)

    def go_back(self, step: int) -> None:
        """Kept answers of the teacher's as they were after a step."""
        self.cache.go_back(self.prompts, self.render, step)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs: the student's rollouts that are kept for replay."""
        return self.cache.tensors(self.prompts)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts `tensors` back; those of others are not looked at."""
        self.cache.restore(self.prompts, self.render, tensors)

    def _context(self, prompt: Prompt) -> TokenSequence:
        return TokenSequence.of(self.render(prompt))

    def _share(self, plan: RolloutPlan, clock: Clock, chosen: Sequence[Visit]) -> _Shared:
        """Who answers which prompt, by one number per visit: a growing share only adds visits to the student's."""
        shared, share = _Shared(), clock.at(plan.on_policy_fraction)
        others = shared.teacher if plan.off_policy == "teacher" else shared.dataset
        full = plan.replay is not None and len(self.cache.visits) >= plan.replay.capacity
        fresh = clock.at(plan.replay.fresh) if plan.replay is not None and full else 1.0
        for visit in chosen:
            # Streams are keyed: where every answer is the student's own, this number can be left undrawn.
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

    def _by_student(self, method: Method, chosen: Sequence[Visit], longest: int, version: int) -> list[Rollout]:
        plan, tasks = method.rollout, list[Task]()
        for visit in chosen:
            context = self._context(visit.prompt)
            for member in range(plan.samples):
                uniform = UniformStream(self.seed, "rollouts", visit.epoch, visit.prompt.id, member)
                tasks.append(Task(visit.prompt, context, member, uniform, visit.epoch))
        self.engine.update(version)
        sampling = Sampling(longest, plan.temperature, plan.top_p)
        written = self._written(tasks, lambda own: self._graded(method, run_episodes(self.engine, own, sampling)))
        if plan.replay is not None:
            size = plan.samples
            groups = [tuple(written[start : start + size]) for start in range(0, len(written), size)]
            self.cache.remember(groups, plan.replay.capacity)
        return written

    def _written(self, tasks: Sequence[Task], write: Callable[[Sequence[Task]], list[Rollout]]) -> list[Rollout]:
        """What the student writes, by each rank its part of the visits, on all ranks in the order of the tasks."""
        with self.whole():
            return self.world.divide(tasks, write, key=lambda task: (task.prompt.id, task.visit))

    def _replayed(self, visit: Visit, clock: Clock, longest: int) -> list[Rollout]:
        """An old visit of the student's, in the place of a new one to this prompt."""
        uniform = float(uniforms(self.seed, "replay", clock.step, visit.prompt.id, count=1))
        return [self._cut(rollout, longest) for rollout in self.cache.visits[int(uniform * len(self.cache.visits))]]

    def _by_teacher(self, method: Method, chosen: Sequence[Visit], longest: int, clock: Clock) -> list[Rollout]:
        """The teacher's answers: kept ones, and new ones for what it has not answered yet."""
        plan, found = method.rollout, dict[tuple[int, int], Rollout]()
        wanted = [(place, member) for place in range(len(chosen)) for member in range(plan.samples)]
        if plan.keep:
            for place, member in wanted:
                kept = self.cache.answers.get(key(plan, chosen[place].prompt, member))
                if kept is not None:
                    found[place, member] = kept
        missing = [place for place in wanted if place not in found]
        new = self.world.divide(
            missing,
            lambda own: self._generated_by_teacher(method, [(chosen[place], member) for place, member in own], longest),
            key=lambda place: place[0],
        )
        found.update(zip(missing, new, strict=True))
        if plan.keep:
            self.cache.keep(new, plan, clock.step + 1)
        rollouts = [replace(found[place, member], visit=chosen[place].epoch) for place, member in wanted]
        if plan.attempts is not None:
            rollouts = [rollout for rollout in rollouts if rollout.status == Status.COMPLETED]
        return [self._cut(rollout, longest) for rollout in rollouts]

    def _generated_by_teacher(self, method: Method, wanted: Sequence[tuple[Visit, int]], longest: int) -> list[Rollout]:
        """New answers in order; where the plan says so, the teacher begins again where it came to no end."""
        if not wanted:
            return []
        plan = method.rollout
        # What is kept serves at every later length, what has to come to an end gets the room for it.
        room = self.limit if plan.keep or plan.attempts else longest
        found: dict[int, Rollout] = {}
        for attempt in range(plan.attempts or 1):
            open_ = [index for index in range(len(wanted)) if index not in found or _unfinished(found[index])]
            tasks: list[Task] = []
            for visit, member in (wanted[index] for index in open_):
                epoch = "kept" if plan.keep else visit.epoch
                uniform = UniformStream(self.seed, "teacher", epoch, visit.prompt.id, member, attempt)
                tasks.append(Task(visit.prompt, self._context(visit.prompt), member, uniform, visit.epoch))
            assert self.teacher_generator is not None  # a plan with the teacher's answers asks for a teacher
            written = self.teacher_generator.write(tasks, Sampling(room, plan.temperature, plan.top_p))
            found.update(zip(open_, written, strict=True))
        return self._graded(method, [found[index] for index in range(len(wanted))])

    def _graded(self, method: Method, rollouts: list[Rollout]) -> list[Rollout]:
        if self.grader is None:
            return rollouts
        found, wants = graded(self.grader, rollouts), method.wants_rewards
        lacking = next((rollout for rollout in found if rollout.reward is None), None)
        if wants is not None and lacking is not None:
            raise UserError(
                f"verifier '{self.grader.name}', row '{lacking.prompt.id}': it gave a completion no grade, and method "
                f"'{method.name}' learns from rewards ({wants}); grade every one, or choose a method without rewards"
            )
        return found

    def _cut(self, rollout: Rollout, longest: int) -> Rollout:
        """A rollout within the horizon."""
        if rollout.steps <= longest:
            return rollout
        before, ids = rollout.sequence.prefix.tokens_L.tolist(), rollout.action_ids[:longest]
        return rollout.cut(longest, completion_text(self.engine.tokenizer, ids, prompt_ids=before))


def _unfinished(rollout: Rollout) -> bool:
    return rollout.status != Status.COMPLETED
