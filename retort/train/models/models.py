"""The models of a run: where each lies, how it is loaded, and what it is to the student.

Every model has a name, by which views and settings call it: `student`, `teacher`, `base`, or another in `[models]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from retort.align.pair import align_pair
from retort.config import Config
from retort.errors import UserError
from retort.models.held import Held
from retort.models.lm import LanguageModel, best_precision
from retort.models.load import load_model
from retort.ranks import here, local_rank
from retort.rollout.engines.base import Engine
from retort.rollout.engines.hf import HFEngine
from retort.teachers.local import LocalTeacher
from retort.train.given.given import Given


def sources(places: Mapping[str, str], given: Given) -> dict[str, tuple[str, str | Held]]:
    """What the user calls each model, and where it is read from: a folder, a hub name, or an object.

    Args:
        places: By the model's name.
        given: Objects for which texts stand among the places.
    """
    return {name: (place, given.source(place) or located(place)) for name, place in places.items()}


def load(config: Config, place: str, name: str, given: Given | None = None) -> LanguageModel:
    """A model as the settings say, and where they name one that was given as an object, a copy of that.

    Args:
        config: Resolved.
        place: Folder, hub name, or the text that stands for an object.
        name: Of the model; the one called `student` learns, all others are frozen.
        given: Objects of the caller's.

    Raises:
        UserError: It cannot be loaded.
    """
    held = (given or Given()).source(place)
    device = torch.device(device_of(config))
    as_student = name == "student" or (name == "base" and config.base is None)
    return load_model(
        place if held is None else held.name,
        source=held or located(place),
        role=name,
        precision=best_precision(device) if config.precision == "auto" else config.precision,
        device=device,
        attention=None if config.attention == "auto" else config.attention,
        stop=config.rollout.stop if as_student else None,
        trust_remote_code=config.trust_remote_code,
        weights=config.weights,
    )


def local_teacher(config: Config, student: LanguageModel, teacher: LanguageModel) -> LocalTeacher:
    """A teacher for this student, aligned with it.

    Raises:
        UserError: Their tokenizers disagree.
    """
    return LocalTeacher(
        teacher,
        alignment=align_pair(student, teacher),
        batch_tokens=config.optimizer.batch_tokens,
        template_options=config.rollout.template_options,
    )


def engine(config: Config, lm: LanguageModel, vocab: int) -> Engine:
    """What writes with a model of the run; only ids below `vocab` are tokens."""
    return HFEngine(lm, vocab=vocab, max_parallel=config.rollout.parallel)


def located(name: str) -> str:
    """Where a model lies: `countdown:student` and others ship with Retort, wherever that is installed."""
    from retort.tasks import coached, countdown, ranking

    bundled = {
        f"{task.__name__.rpartition('.')[2]}:{role}": path
        for task in (countdown, ranking, coached)
        for role, path in (("student", task.student_path), ("teacher", task.teacher_path))
    }
    return str(bundled[name]()) if name in bundled else name


def device_of(config: Config) -> str:
    """The device that the settings name, or the best there is."""
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
