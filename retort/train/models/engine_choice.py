"""Resolves `rollout.engine = "auto"`: who writes the rollouts, and why, before any weights are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from retort.config import Config
from retort.errors import UserError
from retort.models.described import describe
from retort.ranks import CLUSTER, here
from retort.rollout.engines.vllm_generator import has_vllm
from retort.train.given.given import CallerObjects
from retort.train.models.models import sources

#: Parameters below which a request over HTTP costs more than its tokens (docs/engines.md#measured).
SMALL = 10_000_000


@dataclass(frozen=True)
class Student:
    """What the choice has to know of a student.

    Attributes:
        reads_images: Whether it reads images.
        parameters: Its number of parameters, roughly; None where its configuration does not say.
    """

    reads_images: bool
    parameters: int | None


def choose(
    student: Student, *, vllm: bool, ranks: int, workers: int = 0, cluster: bool = False
) -> tuple[Literal["own", "vllm"], str]:
    """Chooses who writes.

    Args:
        student: The student.
        vllm: Whether an interpreter is named that has vLLM, or this one has it.
        ranks: Number of processes that train.
        workers: Number of processes that run the own loop besides.
        cluster: Whether Ray has placed these processes, before anybody chose.

    Returns:
        The value of `rollout.engine`, and the reason in words.
    """
    if workers:
        return "own", "rollout.workers run the own loop"
    if not vllm:
        return "own", "rollout.vllm_python names no interpreter that has vLLM, and this one has none"
    if cluster:
        return "own", "a cluster has a place for vLLM only where rollout.engine=vllm"
    if ranks > 1:
        return "own", f"{ranks} ranks train, and vLLM writes for one"
    if student.reads_images:
        return "own", "the student reads images, and vLLM is handed text alone"
    if student.parameters is None:
        return "own", "the student's configuration does not say how large it is"
    if student.parameters < SMALL:
        said = f"{student.parameters / 1e6:.1f} million parameters"
        return "own", f"the student has about {said}, for which a request costs more than its tokens"
    return "vllm", f"the student has about {student.parameters / 1e6:,.0f} million parameters and reads text alone"


def with_engine(config: Config, notes: list[str], caller_objects: CallerObjects) -> Config:
    """The settings with the engine that `auto` means; others stay as they are.

    Where the own loop is chosen, the interpreter is taken out of the settings: a resumed run repeats the choice.

    Args:
        config: The resolved configuration.
        notes: Collects a note for the user.
        caller_objects: The objects behind placeholders.

    Raises:
        UserError: The student's folder cannot be read; or continuous batching is asked for on several ranks.
    """
    if config.rollout.engine == "continuous" and here().size > 1:
        raise UserError("rollout.engine=continuous is not offered on several ranks; use rollout.engine=own")
    if config.rollout.engine != "auto":
        return config
    named, path = config.rollout.vllm_python is not None or has_vllm(), config.student
    # Of the student nothing is read where nothing depends on it; that it is missing is said later.
    student = _student(config, path, caller_objects) if named and path is not None else Student(False, None)
    workers, cluster = config.rollout.workers, CLUSTER in os.environ
    engine, why = choose(student, vllm=named, ranks=here().size, workers=workers, cluster=cluster)
    notes.append(f"rollout.engine=auto is {engine}: {why}")
    config = config.changed("rollout.engine", engine)
    if engine == "vllm":
        return config
    return config.changed("rollout.vllm_python", None).changed("rollout.vllm_options", [])


def _student(config: Config, path: str, caller_objects: CallerObjects) -> Student:
    name, source = sources(config.server, {"student": path}, caller_objects)["student"]
    found = describe(name, source, "student", stop=config.rollout.stop, trust_remote_code=config.trust_remote_code)
    return Student(found.image_tokens is not None, parameters_of(found.config))


def parameters_of(config: Any) -> int | None:
    """Roughly how many parameters a model has: its embeddings, and the products of its layers.

    Args:
        config: Its configuration of transformers.
    """
    text = config.get_text_config()
    width, layers, vocab = (getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    if width is None or layers is None or vocab is None:
        return None
    inner = getattr(text, "intermediate_size", None) or 4 * width
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    heads = 1 if getattr(text, "tie_word_embeddings", True) else 2
    return int(heads * vocab * width + layers * (4 * width**2 + 3 * experts * inner * width))
