"""From a configuration to the three parties of a run, with every check that can be made before the first token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from retort import registry
from retort.chat.asking import Asking
from retort.config import Config
from retort.config.clients import environment_client
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.method import Method
from retort.methods._cold_start import with_cold_start
from retort.methods._engine import corrected_for_engine
from retort.models.lm import LanguageModel
from retort.ranks import here
from retort.rewards.base import Grader
from retort.rollout.by_teacher import TeacherGenerator
from retort.rollout.engines.base import FollowingEngine
from retort.rollout.episodes import EpisodeSetup
from retort.rollout.plan import RolloutPlan
from retort.teachers.itself import SelfTeacher
from retort.teachers.local import LocalTeacher
from retort.teachers.reader import Reader
from retort.teachers.templates import templates
from retort.teachers.view_input import Stage
from retort.train.given.given import CallerObjects
from retort.train.learning.diagnose import watching
from retort.train.learning.learner import Learner
from retort.train.learning.passes import HeadUse, Passes
from retort.train.models.engine_choice import with_engine
from retort.train.models.judge import asker, check_settings, open_record, step_metrics
from retort.train.models.loading import Loaded, load_models
from retort.train.models.models import device_for, engine, rollout_engine, sources, teacher_of
from retort.train.models.other_engine import check_other_engine, other_engine
from retort.train.models.several import several
from retort.train.setup import pair
from retort.train.setup.before import batch_prompts, check_before_loading, need_groups, step_count
from retort.train.setup.contexts import need_context, need_room, note_unknown
from retort.train.setup.grading import rubric_grader
from retort.train.setup.images import check_images
from retort.train.setup.needs import Data, read_data
from retort.train.setup.partial import check_partial, partial_of, refuse_images
from retort.train.setup.phases import Phased
from retort.train.setup.staleness import check_staleness, generates_older_tokens
from retort.train.setup.texts import check_texts
from retort.train.source import difficulty
from retort.train.source.ahead import Ahead
from retort.train.source.source import Source
from retort.train.storage.folder import ENGINE, refuse_unshared
from retort.train.teaching.authors import drafting
from retort.train.teaching.cached import cached, hint_at_cache, refuse_unknown_weights, stored_models
from retort.train.teaching.early import EarlyTeachers
from retort.train.teaching.teachers import Teachers


@dataclass(frozen=True, eq=False)
class Prepared(Phased):
    """The parts of a run before its first step.

    Attributes:
        config: The resolved configuration.
        method: The method, with what comes before it.
        source: Generates the rollouts.
        teachers: Score the rollouts.
        learner: Trains the student.
        held_out: Prompts for evaluation.
        eval_grader: Grades completions of these, where any has an answer.
        attention: The attention implementation; None for each model's own default.
        notes: Notes for the user before the run starts.
        asker: Asks a model that only talks, where the settings name one.
        other_engine: The source's engine, where it is a process of its own.
    """

    config: Config
    method: Method
    source: Source
    teachers: Teachers
    learner: Learner
    held_out: Sequence[Prompt]
    eval_grader: Grader | None
    attention: str | None = None
    notes: list[str] = field(default_factory=list)
    asker: Asking | None = None
    other_engine: FollowingEngine | None = None

    @property
    def student(self) -> LanguageModel:
        """The model that learns."""
        return self.learner.lm

    @property
    def lms(self) -> dict[str, LanguageModel]:
        """Every model of the run in this process, by name; the student first."""
        return {"student": self.student, **self.teachers.lms}

    @property
    def steps(self) -> int:
        """Number of batches of rollouts in the run."""
        return step_count(self.config, len(self.source.prompts))

    def spread(self, say: Callable[[str], None]) -> None:
        """Spreads the models over the ranks, as the settings say; in a single process it does nothing.

        Args:
            say: Takes what is decided later, one sentence each.

        Raises:
            UserError: A family that cannot be spread.
        """
        self.teachers.listen(say)
        self.source.episodes.listen(say)
        if self.asker is not None:
            self.asker.listen(say)
        self.learner.spread(say)
        self.notes.extend(self.teachers.spread(sharded=self.config.ranks.teacher == "sharded"))

    def open(self, folder: Path, step: Callable[[], int]) -> None:
        """Has kept in a run's folder what is asked of a model; all ranks call it.

        Args:
            folder: The folder, which rank 0 has claimed.
            step: Returns the number of steps that the run has done.

        Raises:
            UserError: A rank does not see the folder, or the record in it is damaged.
        """
        refuse_unshared(folder, here())
        if self.other_engine is not None:
            self.other_engine.open(folder / ENGINE)
        asking = self.asker
        if asking is not None:
            here().each(lambda: open_record(asking, folder, step))

    def begin(self, say: Callable[[str], None]) -> None:
        """Starts the engine that is a process of its own, and says how far it is from the trainer.

        Raises:
            UserError: It does not start with the student, or computes something else.
        """
        if self.other_engine is not None:
            other = self.other_engine
            with other.ready():
                noise = f"{other.noise_floor:.1e} nats"
            say(f"{other.name} generates: its log-probs are {noise} a token from the student's here")

    @property
    def batches(self) -> Source | Ahead:
        """What the loop asks for a batch: the source, or who has it write ahead in another thread."""
        return self._batches

    @cached_property
    def _batches(self) -> Source | Ahead:
        staleness, engine = self.config.rollout.staleness, self.other_engine
        if not staleness or engine is None:
            return self.source
        early = EarlyTeachers(self.teachers, self.config.server.requests)
        return Ahead(self.source, engine, staleness, self.at, lambda: self.steps, early)

    def close(self) -> None:
        """Ends what the run started beside itself."""
        self.batches.close()
        if self.other_engine is not None:
            self.other_engine.close()

    def metrics(self) -> dict[str, float]:
        """Of a step: what teachers, an engine and a model that is asked have to say; all ranks call it."""
        asked, other = self.asker, self.other_engine
        found = {} if asked is None else step_metrics(asked)
        found |= self.source.episodes.metrics()
        return self.teachers.metrics() | found | ({} if other is None else other.metrics())

    def difficulties(
        self, plan: RolloutPlan, folder: Path, *, first: bool, progress: Callable[[int, int], None]
    ) -> dict[str, float]:
        """How hard each prompt is, see `retort.train.source.difficulty.difficulties`."""
        return difficulty.difficulties(self.source, plan, folder, first=first, progress=progress)


def prepare(
    config: Config,
    method: Method | None = None,
    caller_objects: CallerObjects | None = None,
    *,
    asks: bool = True,
) -> Prepared:
    """Loads and checks everything.

    Args:
        config: The resolved configuration.
        method: A method of the caller's own, instead of the configuration's.
        caller_objects: The objects behind placeholders in the configuration.
        asks: Whether the judge is asked later, so that its server is contacted, or its model loaded, now.

    Raises:
        UserError: Whatever is wrong, in one line.
    """
    caller_objects, notes = caller_objects or CallerObjects(), list[str]()
    config = with_engine(config, notes, caller_objects)
    method = run_method(config, method)
    config = pair.without_idle_teacher(config, method)
    check_settings(config)
    check_other_engine(config)
    check_staleness(config, method)
    check_partial(config, method)
    names = pair.named(config, method)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = read_data(config, method, names[2], notes, caller_objects)
    refuse_images(config, data.train)
    stage = Stage(templates(config.templates), config.seed, data.train, config.rollout.max_view_tokens)
    need_context(method, data.full, stage, notes)
    need_groups(config, len(data.train))
    model_paths = pair.model_paths(config, method, *names[:2])
    device_for(config)
    stored = stored_models(config, method, model_paths)
    read = {name: path for name, path in model_paths.items() if name != "base" or path != model_paths["student"]}
    with hint_at_cache(config, model_paths):
        places = {name: str(stored.get(name, path)) for name, path in read.items()}
        located = {
            name: (read[name], source) for name, (_, source) in sources(config.server, places, caller_objects).items()
        }
        refuse_unknown_weights(config, located)
        checked = check_before_loading(config, method, located, data.train, data.held_out, notes)
    loaded = load_models(checked.config, model_paths, checked.render, data.train, notes, caller_objects, stored)
    local = _aligned(method, loaded, stage, notes)
    check_images(loaded.student, local, [*data.train, *data.probe, *data.held_out])
    for readers in _readers(config, local):
        note_unknown(method, readers, stage, notes)
        need_room(method, readers, stage, notes)
    asking = asker(loaded.config, loaded.frozen, caller_objects, say=notes.append) if asks else None
    prepared = _parties(method, loaded, local, data, notes, asking)
    for name in read:
        checked.check_ids(name, local[name].lm)
    check_texts(method, data.train, loaded.student, list(prepared.lms.values()), prepared.learner.vocab)
    if prepared.source.count < config.rollout.prompts:
        notes.append(
            f"{len(data.train)} prompts are fewer than the {config.rollout.prompts} of a batch: every step uses all of "
            "them"
        )
    return prepared


def run_method(config: Config, method: Method | None) -> Method:
    """The caller's or the configuration's method, with the curves and the cold start that the settings ask for."""
    record, several_teach = config.record, bool(config.teachers.models)
    method = method or registry.load(**config.method)
    method = watching(method, record.overlap, record.overlap_every, several=several_teach)
    corrects = config.rollout.correction == "truncated"
    if corrects and (config.rollout.engine == "vllm" or generates_older_tokens(config)):
        method = corrected_for_engine(method)
    cold = config.cold_start
    if not cold.steps:
        return method
    return with_cold_start(method, cold.steps, loss=cold.loss, answers=cold.answers, attempts=cold.attempts)


def _aligned(method: Method, loaded: Loaded, stage: Stage, notes: list[str]) -> dict[str, Reader]:
    """Makes every model a teacher of the student, over the ids that all of them share."""
    config, student, frozen = loaded.config, loaded.student, loaded.frozen
    lms = {**frozen, "student": student}
    local = {name: teacher_of(config, student, lm, notes).on(stage) for name, lm in lms.items()}
    # No signal may cover an id that one of the models lacks.
    vocab = min(model.alignment.vocab for model in local.values())
    local = {name: model.for_vocab(vocab) for name, model in local.items()}
    for name in [name for name in ("teacher", *config.teachers.models) if name in frozen]:
        note = local[name].alignment.describe(student.tokenizer, frozen[name].tokenizer)
        notes += [note] if note else []
    if "teacher" in frozen:
        pair.refuse_equal(config, method, student, frozen)
    return local


def _readers(config: Config, local: Mapping[str, Reader]) -> list[Mapping[str, Reader]]:
    """Which model reads the views of each name; as many tables as there are teachers."""
    return [{**local, "teacher": local[name]} for name in config.teachers.models] or [local]


def _parties(
    method: Method,
    loaded: Loaded,
    local: Mapping[str, Reader],
    data: Data,
    notes: list[str],
    asking: Asking | None,
) -> Prepared:
    """Source, teachers and learner."""
    config, student = loaded.config, loaded.student
    own = pair.own_weights(config, method, student)
    models: dict[str, Any] = {name: model for name, model in local.items() if name != "student"}
    if own is not None:
        models["student"] = SelfTeacher(cast("LocalTeacher", local["student"]), own)
    if config.teachers.models:
        models["teacher"] = several(config.teachers, models, [*data.train, *data.probe, *data.held_out], data.full)
    vocab = local["student"].alignment.vocab
    learner = _learner(config, student, vocab, own)
    other = other_engine(config, student, vocab, data.train, loaded.render, lambda: learner.updates)
    source = Source(
        prompts=data.train,
        probe=data.probe,
        count=batch_prompts(config, len(data.train)),
        limit=config.rollout.max_new_tokens,
        seed=config.seed,
        engine=rollout_engine(config, student, vocab) if other is None else other,
        render=loaded.render,
        stops=student.stops,
        vocab=vocab,
        teacher_generator=_teacher_generator(method, config, local.get("teacher"), student),
        grader=data.grader,
        rubric_grader=rubric_grader(config, method, data.train, asking, data.full),
        episodes=EpisodeSetup.named(
            config.environment,
            config.rollout.template_options,
            turns=config.rollout.max_turns,
            tools=config.rollout.tools,
            history=config.rollout.history,
            waiting=config.rollout.waiting,
            client=environment_client(config.server),
        ),
        whole=student.whole if other is None else other.ready,
        teacher_whole=local["teacher"].lm.whole if "teacher" in local else nullcontext,
        shown=local["student"].shown,
        partial=partial_of(config),
    )
    start = student.digest() if own is not None and own.from_start else None
    return Prepared(
        config=config,
        method=method,
        source=source,
        teachers=Teachers(
            models,
            own,
            start,
            config.server.check_every,
            config.server.tolerance,
            cached(config, models, student, here().size),
            drafting(config, method, local, own, local["student"].stage),
        ),
        learner=learner,
        held_out=data.held_out,
        eval_grader=data.eval_grader,
        attention=loaded.attention,
        notes=notes,
        asker=asking,
        other_engine=other,
    )


def _learner(config: Config, student: LanguageModel, vocab: int, own: Any) -> Learner:
    """Trains the student; `own`: the weights of a self-teacher, where there is one."""
    return Learner(
        Passes(student, vocab, config.optimizer.batch_tokens, head=HeadUse(config.ranks.head)),
        config.optimizer,
        moved=None if own is None else own.moved,
        variance_every=config.record.gradient_variance_every,
    )


def _teacher_generator(
    method: Method, config: Config, teacher: Reader | None, student: LanguageModel
) -> TeacherGenerator | None:
    """What generates as the teacher; None where there is none, or one that only scores.

    Raises:
        UserError: Completions of a teacher that only scores are to be learnt from.
    """
    if not isinstance(teacher, LocalTeacher):
        phases = [method] if method.before is None else [method.before[1], method]
        wants = next((phase.name for phase in phases if "teacher" in phase.rollout.sources), None)
        if teacher is not None and wants is not None:
            raise UserError(
                f"method '{wants}' learns from completions that the teacher generates, and behind a server of "
                f"completions ({teacher.name}) it only scores; serve it with `retort serve`"
            )
        return None
    generator = engine(config, teacher.lm, teacher.alignment.width)
    return TeacherGenerator(generator, teacher.render, alignment=teacher.alignment, student_stops=student.stops)
