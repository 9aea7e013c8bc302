"""From a configuration to all parts of a run, with every check that can be made before the first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from retort import registry
from retort.align.chat import Renderer
from retort.cold_start import with_cold_start
from retort.config import Config
from retort.method import Method
from retort.models.chance import check_repeats
from retort.models.lm import LanguageModel, Precision
from retort.models.lora import add_adapter
from retort.models.rehearsal import rehearse_export
from retort.models.together import settle
from retort.rewards.base import Grader
from retort.rollout.by_teacher import TeacherWriter
from retort.rollout.engines.hf import HFEngine
from retort.teachers.base import Teacher
from retort.teachers.itself import OwnWeights, SelfTeacher
from retort.teachers.local import LocalTeacher
from retort.teachers.scene import Stage
from retort.teachers.templates import templates
from retort.train import pair, precision, reading
from retort.train.attention import quickest
from retort.train.before import batch_of, look, steps_of
from retort.train.contexts import need_context, need_room, note_unknown
from retort.train.diagnose import watching
from retort.train.given import Given
from retort.train.models import device_of, load, local_teacher, sources
from retort.train.needs import need_columns, need_responses, need_verifier, probe_prompts
from retort.train.prompts import graders, read_prompts
from retort.train.texts import check_texts
from retort.types import Prompt


@dataclass(frozen=True, eq=False)
class Setup:
    """All parts of a run.

    Attributes:
        config: Resolved.
        method: What is learnt.
        student: The model that learns.
        teacher_lm: The teacher's model, to judge it by the same measure; None where the student teaches itself.
        base_lm: A second frozen model, where the method has a view of it.
        own_weights: Of the student as its own teacher, where the method has a view of it.
        start: Digest of the student before training, where a self-teacher is that one.
        models: Who answers, by the model that a view names.
        teachers: Who answers, by view.
        vocab: Ids that student and teacher share.
        engine: How the student writes.
        teacher_writer: How the teacher writes for the student, where there is one.
        train: Prompts to learn from.
        held_out: Prompts to be judged on.
        probe: Prompts kept out of the training data for the method's probes.
        verifier: Grades training rollouts, where any of the training data has answers: see `Grader.can_grade`.
        judge_verifier: Grades answers to held-out prompts, where any of those has an answer.
        precision: Of products, resolved.
        render: A prompt's ids, as the student sees it.
        attention: Implementation, resolved; None for each model's own default.
        notes: What the user should know before the run starts.
    """

    config: Config
    method: Method
    student: LanguageModel
    teacher_lm: LanguageModel | None
    teachers: dict[str, Teacher]
    vocab: int
    engine: HFEngine
    teacher_writer: TeacherWriter | None
    train: list[Prompt]
    held_out: list[Prompt]
    probe: list[Prompt]
    verifier: Grader | None
    judge_verifier: Grader | None
    precision: Precision
    render: Renderer
    attention: str | None = None
    base_lm: LanguageModel | None = None
    own_weights: OwnWeights | None = None
    start: str | None = None
    models: dict[str, Teacher] = field(default_factory=lambda: {})
    notes: list[str] = field(default_factory=list)

    @property
    def lms(self) -> dict[str, LanguageModel]:
        """Every model of the run by its name; the student first."""
        frozen = {name: model.lm for name, model in self.models.items() if isinstance(model, LocalTeacher)}
        return {"student": self.student, **frozen}

    @property
    def batch_prompts(self) -> int:
        """Prompts per batch: what was asked for, or all there are."""
        return batch_of(self.config, len(self.train))

    @property
    def steps(self) -> int:
        """Batches of rollouts in the run."""
        return steps_of(self.config, len(self.train))

    @property
    def phases(self) -> list[tuple[int, Setup]]:
        """Where each method of the run begins, and the setup with it: the method's own, with what comes before it."""
        before = self.method.before
        if before is None:
            return [(0, self)]
        teachers = {name: self.models[view.model] for name, view in before[1].views.items()}
        return [(0, replace(self, method=before[1], teachers=teachers)), (before[0], self)]


def prepare(config: Config, method: Method | None = None, given: Given | None = None) -> Setup:
    """Loads and checks everything.

    Args:
        config: Resolved.
        method: Of the caller's own, instead of the configuration's.
        given: Objects of the caller's for which texts stand in the configuration.

    Raises:
        UserError: Whatever is wrong, in one line.
    """
    given = given or Given()
    method = watching(method or registry.load(**config.method), config.record.overlap, config.record.overlap_every)
    cold = config.cold_start
    if cold.steps:
        method = with_cold_start(method, cold.steps, loss=cold.loss, answers=cold.answers, attempts=cold.attempts)
    config = pair.without_idle_teacher(config, method)
    student_name, teacher_name, data = pair.named(config, method)
    notes: list[str] = []
    if config.threads:
        torch.set_num_threads(config.threads)
    train, held_out = read_prompts(config, data, notes, given)
    train, probe = probe_prompts(config, method, train, notes)
    need_responses(method, train, probe)
    verifier, judge_verifier = graders(config, train, held_out, notes, given)

    # Whoever learns from rewards or shows them needs all of them; curves make do with those there are.
    full = verifier if verifier is not None and all(map(verifier.can_grade, train)) else None
    need_verifier(method, full, train)
    need_columns(method, train, notes)
    reading.refuse_views(config, method)
    stage = Stage(templates(config.templates), config.seed, train, config.rollout.max_view_tokens)
    need_context(method, full, stage, notes)
    with_base = pair.base_name(config, method, student_name, teacher_name)
    others = pair.further(config, method)
    alone = with_base in (None, student_name) and not others
    if alone and teacher_name is not None:
        pair.refuse_same_name(method, student_name, teacher_name)
    named = {"student": student_name}
    named |= {"teacher": teacher_name} if teacher_name is not None else {}
    named |= {"base": with_base} if with_base not in (None, student_name) else {}
    named |= others
    device_of(config)
    looked = look(config, method, sources(named, given), train, held_out, notes)
    config, render = looked.config, looked.render
    student = load(config, student_name, "student", given)
    _adapt(config, student)
    rehearse_export(student)
    teacher = None if teacher_name is None else load(config, teacher_name, "teacher", given)
    chosen = _precision(config, student, teacher, [render(prompt) for prompt in train[:64]], notes)
    config = config.changed("precision", chosen)
    if teacher_name is not None and teacher is not None and teacher.precision != chosen:
        teacher = load(config, teacher_name, "teacher", given)
    loaded = [lm for lm in (student, teacher) if lm is not None]
    attention = _attention(config, loaded, render, train, notes)
    if config.optimizer.gradient_checkpointing:
        student.model.activation_checkpointing_enable({"use_reentrant": False})
        student.model.train()  # transformers checkpoints in this mode only; dropout is off all the same
        check_repeats(student)
    notes += [note for lm in loaded for note in lm.notes]
    notes += [
        f"sequences of {lm.name} longer than {lm.together_up_to} tokens are computed one at a time: together, that "
        "family would change them"
        for lm in loaded
        if lm.together_up_to is not None
    ]
    padded = [lm.name for lm in loaded if not lm.packs and lm.together_up_to != 0]
    if padded:
        notes.append(f"sequences of {' and '.join(padded)} are padded: in one row, that family would mix them")
    base = None if with_base is None else _base(config, student, with_base, given)
    frozen = {name: load(config, place, name, given) for name, place in others.items()}
    notes += [note for lm in (base, *frozen.values()) if lm is not None for note in lm.notes if note not in notes]
    lms = {"teacher": teacher, "base": base, **frozen, "student": student}
    local = {name: local_teacher(config, student, lm).on(stage) for name, lm in lms.items() if lm is not None}
    # Nobody may say of an id that one of the models lacks.
    vocab = min(model.alignment.vocab for model in local.values())
    local = {name: model.about(vocab) for name, model in local.items()}
    if teacher is not None:
        said = local["teacher"].alignment.describe(student.tokenizer, teacher.tokenizer)
        notes += [said] if said else []
        if alone:
            pair.refuse_same_weights(method, student, teacher)
        if base is not None and base.digest() == teacher.digest():
            raise pair.same_base(method)
    note_unknown(method, local, stage, notes)
    need_room(method, local, stage, notes)
    own = pair.own_weights(config, method, student)
    models: dict[str, Teacher] = {name: model for name, model in local.items() if name != "student"}
    if own is not None:
        models["student"] = SelfTeacher(local["student"], own)
    setup = Setup(
        config=config,
        method=method,
        student=student,
        teacher_lm=teacher,
        teachers={name: models[view.model] for name, view in method.views.items()},
        vocab=vocab,
        engine=HFEngine(student, vocab=vocab, max_parallel=config.rollout.parallel),
        teacher_writer=_writer(config, local["teacher"], student) if "teacher" in local else None,
        train=train,
        held_out=held_out,
        probe=probe,
        verifier=verifier,
        judge_verifier=judge_verifier,
        precision=student.precision,
        render=render,
        attention=attention,
        base_lm=base,
        own_weights=own,
        start=student.digest() if own is not None and own.from_start else None,
        models=models,
        notes=notes,
    )
    for role in named:
        looked.check_ids(role, local[role].lm)
    check_texts(method, train, student, list(setup.lms.values()), vocab)
    if setup.batch_prompts < config.rollout.prompts:
        notes.append(
            f"{len(train)} prompts are fewer than the {config.rollout.prompts} of a batch: every step uses all of them"
        )
    return setup


def _writer(config: Config, teacher: LocalTeacher, student: LanguageModel) -> TeacherWriter:
    engine = HFEngine(teacher.lm, vocab=teacher.alignment.width, max_parallel=config.rollout.parallel)
    return TeacherWriter(engine, teacher.render, alignment=teacher.alignment, student_stops=student.stops)


def _adapt(config: Config, student: LanguageModel) -> None:
    """Gives the student the adapter that the settings name."""
    lora = config.lora
    if lora.rank:
        alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
        add_adapter(student, rank=lora.rank, alpha=alpha, targets=lora.targets, rslora=lora.rslora, seed=config.seed)


def _precision(
    config: Config,
    student: LanguageModel,
    teacher: LanguageModel | None,
    prompts: Sequence[list[int]],
    notes: list[str],
) -> Precision:
    """The precision that the settings name or that `auto` stands for with this pair; the student computes in it."""
    if config.precision != "auto" or student.precision != "bf16":
        return student.precision
    chosen, note = precision.settle(student, teacher, prompts, config.seed)
    notes.append(note)
    if chosen != student.precision:
        student.precision = chosen
        student.working.drop()
        settle(student)  # what may be computed together is a matter of rounding, too
    return chosen


def _base(config: Config, student: LanguageModel, name: str, given: Given) -> LanguageModel:
    """The base model. Where that is the student as it was, a student with an adapter still holds it."""
    kept = student.adapter is not None and name == config.student
    return student.bare() if kept else load(config, name, "base", given)


def _attention(
    config: Config,
    loaded: Sequence[LanguageModel],
    render: Renderer,
    train: Sequence[Prompt],
    notes: list[str],
) -> str | None:
    """The implementation that the settings name, or the quickest of those that both models have."""
    if config.attention != "auto":
        return config.attention
    lengths = sorted(len(render(prompt)) for prompt in train[:64])
    length = lengths[len(lengths) // 2] + config.rollout.max_new_tokens
    chosen, times = quickest(list(loaded), length, max(1, config.optimizer.batch_tokens // length))
    if chosen is None:
        notes.append("attention is each model's own: they have no implementation in common to measure")
        return None
    measured = ", ".join(f"{name} {seconds * 1e3:,.0f} ms" for name, seconds in times.items())
    notes.append(f"attention is {chosen}, by measuring on batches like this run's ({measured})")
    return chosen
