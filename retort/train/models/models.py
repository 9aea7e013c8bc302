"""The sources of a run's models, and how each is loaded.

Every model has a name, by which views and settings call it: `student`, `teacher`, `base`, or another in `[models]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from retort.align.pair import align_pair
from retort.align.spanned import align_spans
from retort.align.stops import StopMap, stop_tokens
from retort.align.tokens import OtherTokenizer
from retort.config import Config
from retort.config.clients import client_of
from retort.config.sections import ServerSection
from retort.errors import UserError
from retort.models.described import describe
from retort.models.endpoint import Endpoint, EndpointModel
from retort.models.in_memory import InMemoryModel
from retort.models.lm import LanguageModel, best_precision
from retort.models.load import load_model
from retort.models.quantized import Bits
from retort.models.served import ServedModel
from retort.models.server import OtherServer, Server
from retort.ranks import here, local_rank
from retort.rollout.engines.base import Engine
from retort.rollout.engines.hf import HFEngine
from retort.rollout.engines.served import ServedEngine
from retort.teachers.endpoint import EndpointTeacher
from retort.teachers.local import LocalTeacher
from retort.teachers.reader import Reader
from retort.teachers.served import ServedTeacher
from retort.teachers.spanned import SpanTeacher
from retort.train.given.given import CallerObjects
from retort.wire import is_url
from retort.wire.at_server import at_server

#: Where a model comes from: a folder or a hub name, an object of the caller's, or a server of either kind.
Source = str | InMemoryModel | Server | Endpoint
#: A model of a run that does not learn.
Frozen = LanguageModel | EndpointModel


def sources(
    asked: ServerSection, paths: Mapping[str, str], caller_objects: CallerObjects
) -> dict[str, tuple[str, Source]]:
    """Maps each model to its name for messages and its source.

    Args:
        asked: How servers are asked.
        paths: Paths, hub names, addresses or placeholders by model name.
        caller_objects: The objects behind placeholders.

    Raises:
        UserError: See `source_of`.
    """
    student = paths["student"]
    return {name: (path, source_of(asked, path, name, caller_objects, student=student)) for name, path in paths.items()}


def source_of(
    asked: ServerSection,
    path: str,
    name: str,
    caller_objects: CallerObjects | None = None,
    *,
    student: str | None = None,
) -> Source:
    """The source of a model: a folder, a hub name, an object, or a server.

    Args:
        asked: How servers are asked.
        path: A folder, a hub name, an address, or the placeholder of an object.
        name: Name of the model.
        caller_objects: The objects behind placeholders.
        student: The student's path, whose tokenizer a server of completions has if `server.tokenizer` names no other.

    Raises:
        UserError: A student is to learn on a server, the server does not answer, or a model that ships is missing.
    """
    held = (caller_objects or CallerObjects()).source(path)
    path = at_server(path)
    if held is not None or not is_url(path):
        return held or located(path)
    if name == "student":
        raise UserError(
            f"student = {path}: the weights of a model that learns, or that `retort eval` evaluates, must be here; "
            "name a folder or a hub name"
        )
    client = client_of(asked, path)
    try:
        return Server.at(client, narrow=asked.payload == "bf16")
    except OtherServer:
        reads = source_of(asked, asked.tokenizer or student or "", "tokenizer", caller_objects)
        if not isinstance(reads, str | InMemoryModel):
            raise UserError(f"server.tokenizer = {asked.tokenizer}: name a folder or a hub name") from None
        return Endpoint.at(client, asked.model, reads, same=asked.tokenizer is None)


def load_frozen(config: Config, path: str, name: str, caller_objects: CallerObjects | None = None) -> Frozen:
    """Loads a model that does not learn; one behind a server of completions is opened.

    Args:
        config: The resolved configuration.
        path: See `load`.
        name: Name of the model.
        caller_objects: The objects behind placeholders.

    Raises:
        UserError: The model cannot be loaded, or the server cannot be a teacher's.
    """
    source = source_of(config.server, path, name, caller_objects, student=config.student)
    if not isinstance(source, Endpoint):
        return load(config, path, name, caller_objects)
    found = describe(path, source, name, trust_remote_code=config.trust_remote_code)
    stops = found.stops or stop_tokens(found.tokenizer, None, found.config.get_text_config(), label=f"{name} {path}")
    return source.open(found.tokenizer, stops)


def load(config: Config, path: str, name: str, caller_objects: CallerObjects | None = None) -> LanguageModel:
    """Loads a model as the settings say; of one that was given as an object, a copy.

    Args:
        config: The resolved configuration.
        path: A folder, a hub name, an address, or the placeholder of an object.
        name: Name of the model; `student` learns, all others are frozen.
        caller_objects: The objects behind placeholders.

    Raises:
        UserError: The model cannot be loaded.
    """
    source = source_of(config.server, path, name, caller_objects, student=config.student)
    if isinstance(source, Endpoint):
        raise UserError(
            f"{path}: a server of completions has no whole model to give, only scores as the teacher of a run; serve "
            "the model with `retort serve`, or name its folder"
        )
    device = torch.device(device_for(config))
    as_student = name == "student" or (name == "base" and config.base is None)
    return load_model(
        path if isinstance(source, str) else source.name,
        source=source,
        role=name,
        precision=best_precision(device) if config.precision == "auto" else config.precision,
        device=device,
        attention=None if config.attention == "auto" else config.attention,
        stop=config.rollout.stop if as_student else None,
        trust_remote_code=config.trust_remote_code,
        weights=config.weights,
        bits=bits_of(config, name),
    )


def bits_of(config: Config, name: str) -> Bits | None:
    """The bits to which a model's weights are rounded; None: not at all.

    Raises:
        UserError: The layers of such a model would be spread over ranks.
    """
    bits = config.models[name].bits if name in config.models else None
    if bits is not None and config.ranks.teacher == "sharded" and here().size > 1:
        raise UserError(
            f"models.{name}.bits = {bits} with ranks.teacher = sharded: rounded weights cannot be spread over ranks; "
            "set ranks.teacher=replicated, or leave bits out"
        )
    return bits


def teacher_of(config: Config, student: LanguageModel, model: Frozen, notes: list[str]) -> Reader:
    """Makes a frozen model a teacher of the student: see `local_teacher`; one behind a server of completions, too.

    Args:
        config: The resolved configuration.
        student: The model that learns.
        model: The model that teaches.
        notes: Collects notes for the user.

    Raises:
        UserError: A model behind a server of completions has another tokenizer; or as `local_teacher`.
    """
    if not isinstance(model, EndpointModel):
        return local_teacher(config, student, model)
    try:
        alignment = align_pair(student, model)
    except OtherTokenizer as error:
        raise UserError(f"{model.name}: {error}; behind a server of completions a teacher needs the same") from None
    if alignment.stops.merged and not model.server.offers.whole:
        stop = alignment.stops
        further = ", ".join(str(student.tokenizer.convert_ids_to_tokens(token)) for token in stop.merged)
        notes.append(
            f"{model.name}: its model may also stop with {further}, whose probability the student's stop does not get: "
            "the server does not give it"
        )
        alignment = alignment.with_stops(StopMap(stop.swap, (), stop.into))
    return EndpointTeacher(
        model,
        alignment=alignment,
        batch_tokens=config.optimizer.batch_tokens,
        template_options=config.rollout.template_options,
    )


def local_teacher(config: Config, student: LanguageModel, teacher: LanguageModel) -> LocalTeacher:
    """Makes a frozen model a teacher of the student, aligned with it: by ids, or by units of bytes.

    Raises:
        UserError: A stop is not among the ids of both, or a tokenizer cannot be read.
    """
    settings: dict[str, Any] = {
        "batch_tokens": config.optimizer.batch_tokens,
        "template_options": config.rollout.template_options,
    }
    kind = ServedTeacher if isinstance(teacher, ServedModel) else LocalTeacher
    try:
        return kind(teacher, alignment=align_pair(student, teacher), **settings)
    except OtherTokenizer:
        return SpanTeacher(teacher, alignment=align_spans(student, teacher, teacher.name), **settings)


def engine(config: Config, lm: LanguageModel, vocab: int) -> Engine:
    """A rollout engine for a model of the run; only ids below `vocab` are tokens."""
    kind = ServedEngine if isinstance(lm, ServedModel) else HFEngine
    return kind(lm, vocab=vocab, max_parallel=config.rollout.parallel)  # pyright: ignore[reportArgumentType]


def rollout_engine(config: Config, student: LanguageModel, vocab: int) -> Engine:
    """Who writes a run's rollouts in this process; only ids below `vocab` are tokens.

    Raises:
        UserError: transformers' continuous batching is asked for, and not for this student.
    """
    if config.rollout.engine != "continuous":
        return engine(config, student, vocab)
    if student.image_tokens is not None:
        raise UserError(
            f"rollout.engine=continuous writes text alone, and {student.name} reads images; use rollout.engine=own"
        )
    from retort.rollout.engines.continuous import ContinuousEngine  # loads transformers

    made = ContinuousEngine(student, vocab=vocab, max_parallel=config.rollout.parallel)
    made.check()
    return made


def located(name: str) -> str:
    """The folder of a model that ships with Retort, such as `countdown:student`; other names stay as they are.

    Raises:
        UserError: The model is missing; the message says how to make it.
    """
    from retort.tasks import coached, countdown, glyphs, plane, ranking, rooms, shapes

    task, _, role = name.partition(":")
    tasks = (coached, countdown, glyphs, plane, ranking, rooms, shapes)
    found = next((own for own in tasks if own.__name__ == f"retort.tasks.{task}"), None)
    if found is None or role not in roles(found):
        return name
    try:
        return str(roles(found)[role]())
    except FileNotFoundError as error:
        raise UserError(f"{name}: {error}") from None


def roles(task: Any) -> dict[str, Callable[[], Path]]:
    """The models of a built-in task by name: a student and a teacher, or several teachers by their domains."""
    domains: Sequence[str] = getattr(task, "DOMAINS", ())
    teachers: dict[str, Callable[[], Path]] = {name: (lambda own=name: task.teacher_paths()[own]) for name in domains}
    return {"student": task.student_path, **(teachers or {"teacher": task.teacher_path})}


def device_for(config: Config) -> str:
    """The device that the settings name, or the best available one."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device = cuda, but torch sees no CUDA device here; use device=cpu or install a CUDA build of torch"
        )
    local, devices = local_rank(), torch.cuda.device_count()
    if config.device != "cpu" and 0 < devices <= local:
        raise UserError(
            f"more ranks than devices: rank {here().rank} is number {local} on its machine, and torch sees {devices} "
            f"CUDA devices there; start with --nproc-per-node {devices}, or set device=cpu"
        )
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device
