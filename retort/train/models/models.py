"""The sources of a run's models, and how each is loaded.

Every model has a name, by which views and settings call it: `student`, `teacher`, `base`, or another in `[models]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from retort.align.pair import align_pair
from retort.align.spanned import align_spans
from retort.align.tokens import OtherTokenizer
from retort.config import Config
from retort.errors import UserError
from retort.models.in_memory import InMemoryModel
from retort.models.lm import LanguageModel, best_precision
from retort.models.load import load_model
from retort.models.quantized import Bits
from retort.ranks import here, local_rank
from retort.rollout.engines.base import Engine
from retort.rollout.engines.hf import HFEngine
from retort.teachers.local import LocalTeacher
from retort.teachers.spanned import SpanTeacher
from retort.train.given.given import CallerObjects


def sources(paths: Mapping[str, str], caller_objects: CallerObjects) -> dict[str, tuple[str, str | InMemoryModel]]:
    """Maps each model to its name for messages and its source: a folder, a hub name, or an object.

    Args:
        paths: Paths, hub names or placeholders by model name.
        caller_objects: The objects behind placeholders.
    """
    return {name: (path, caller_objects.source(path) or located(path)) for name, path in paths.items()}


def load(config: Config, path: str, name: str, caller_objects: CallerObjects | None = None) -> LanguageModel:
    """Loads a model as the settings say; of one that was given as an object, a copy.

    Args:
        config: The resolved configuration.
        path: A folder, a hub name, or the placeholder of an object.
        name: Name of the model; `student` learns, all others are frozen.
        caller_objects: The objects behind placeholders.

    Raises:
        UserError: The model cannot be loaded.
    """
    held = (caller_objects or CallerObjects()).source(path)
    device = torch.device(device_for(config))
    as_student = name == "student" or (name == "base" and config.base is None)
    return load_model(
        path if held is None else held.name,
        source=held or located(path),
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


def local_teacher(config: Config, student: LanguageModel, teacher: LanguageModel) -> LocalTeacher:
    """Makes a frozen model a teacher of the student, aligned with it: by ids, or by units of bytes.

    Raises:
        UserError: A stop is not among the ids of both, or a tokenizer cannot be read.
    """
    settings: dict[str, Any] = {
        "batch_tokens": config.optimizer.batch_tokens,
        "template_options": config.rollout.template_options,
    }
    try:
        return LocalTeacher(teacher, alignment=align_pair(student, teacher), **settings)
    except OtherTokenizer:
        return SpanTeacher(teacher, alignment=align_spans(student, teacher, teacher.name), **settings)


def engine(config: Config, lm: LanguageModel, vocab: int) -> Engine:
    """A rollout engine for a model of the run; only ids below `vocab` are tokens."""
    return HFEngine(lm, vocab=vocab, max_parallel=config.rollout.parallel)


def located(name: str) -> str:
    """The folder of a model that ships with Retort, such as `countdown:student`; other names stay as they are.

    Raises:
        UserError: The model is missing; the message says how to make it.
    """
    from retort.tasks import coached, countdown, ranking, rooms

    bundled = {
        f"{task.__name__.rpartition('.')[2]}:{role}": path
        for task in (countdown, ranking, coached, rooms)
        for role, path in (("student", task.student_path), ("teacher", task.teacher_path))
    }
    if name not in bundled:
        return name
    try:
        return str(bundled[name]())
    except FileNotFoundError as error:
        raise UserError(f"{name}: {error}") from None


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
