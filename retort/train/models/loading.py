"""Loads the models of a run: the student that learns and all frozen ones, in one precision and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.align.chat import Renderer
from retort.config import Config
from retort.core.rollouts import Prompt
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.lm import LanguageModel, Precision
from retort.models.lora import add_adapter
from retort.models.offload import Room
from retort.models.randomness import check_repeats
from retort.models.rehearsal import rehearse_export
from retort.models.stored import load_stored
from retort.models.together import choose_batching
from retort.train.given.given import CallerObjects
from retort.train.models import precision
from retort.train.models.attention import quickest
from retort.train.models.models import Frozen, bits_of, load, load_frozen
from retort.train.models.offloading import offloaded, storage_of


@dataclass(frozen=True, eq=False)
class Loaded:
    """Loaded models, and what was chosen by measuring them.

    Attributes:
        config: The configuration with the precision that was chosen.
        student: The model that learns.
        frozen: All other models by name.
        attention: The attention implementation; None for each model's own default.
        render: Renders a prompt as the student reads it.
    """

    config: Config
    student: LanguageModel
    frozen: Mapping[str, Frozen]
    attention: str | None
    render: Renderer


def load_models(
    config: Config,
    paths: Mapping[str, str],
    render: Renderer,
    train: Sequence[Prompt],
    notes: list[str],
    caller_objects: CallerObjects,
    stored: Mapping[str, Path] | None = None,
) -> Loaded:
    """Loads every model that a run names.

    Args:
        config: The resolved configuration.
        paths: Paths or hub names by model name; the base may be that of the student.
        render: Renders a prompt as the student reads it.
        train: Training prompts; some are used for measuring.
        notes: Collects notes for the user.
        caller_objects: The objects behind placeholders among the paths.
        stored: Folders of what a cache holds of frozen models that are not to be loaded, by model name.

    Raises:
        UserError: A model cannot be loaded, or used as the settings ask.
    """
    stored = stored or {}
    student = load(config, paths["student"], "student", caller_objects)
    _adapt(config, student)
    rehearse_export(student)
    teaching = [name for name in ("teacher", *config.teachers.models) if name in paths and name not in stored]
    first = teaching[0] if teaching else ""
    found = load_frozen(config, paths[first], first, caller_objects) if teaching else None
    teacher = found if isinstance(found, LanguageModel) else None
    chosen = _precision(config, student, teacher, [render(prompt) for prompt in train[:64]], notes)
    config = config.changed("precision", chosen)
    if teacher is not None and teacher.here and teacher.precision != chosen:
        found = teacher = load(config, paths[first], first, caller_objects)
    pair = [lm for lm in (student, teacher) if lm is not None]
    attention = _attention(config, [lm for lm in pair if lm.here], render, train, notes)
    if config.optimizer.gradient_checkpointing:
        student.model.activation_checkpointing_enable({"use_reentrant": False})
        student.model.train()  # transformers checkpoints activations in this mode only; dropout is off all the same.
        check_repeats(student)
    notes += _pair_notes(pair)
    notes += found.notes if found is not None and teacher is None else []
    room, frozen = Room(), dict[str, Frozen]()
    if found is not None:
        frozen[first] = offloaded(config, paths[first], first, found, room, caller_objects)
    for name, path in paths.items():
        if name in stored:
            frozen[name] = _stored(config, stored[name], path, name, student, notes)
        elif name not in ("student", first):
            own = (
                _base(config, student, path, caller_objects)
                if name == "base"
                else load_frozen(config, path, name, caller_objects)
            )
            frozen[name] = offloaded(config, path, name, own, room, caller_objects)
            notes += [note for note in own.notes if note not in notes]
    return Loaded(config, student, frozen, attention, render)


def _stored(
    config: Config, folder: Path, path: str, name: str, student: LanguageModel, notes: list[str]
) -> LanguageModel:
    """What a cache holds of a model that is not loaded.

    Raises:
        UserError: Its scores are of another precision.
    """
    device = student.device
    found = load_stored(folder, path, name, device, trust_remote_code=config.trust_remote_code)
    if not found.elsewhere and found.precision != student.precision:
        raise UserError(
            f"the scores of the {name} {path} in the cache were computed in {found.precision}, and this run is in "
            f"{student.precision}; set precision={found.precision}"
        )
    notes.append(
        f"the {name} {path} is not loaded: its scores come from the cache (weights {found.fingerprint[:12]}), and "
        "held-out completions are not compared with it"
    )
    return found


def _pair_notes(pair: Sequence[LanguageModel]) -> list[str]:
    """Notes about student and teacher."""
    notes = [note for lm in pair for note in lm.notes]
    notes += [
        f"sequences of {lm.name} longer than {lm.together_up_to} tokens are computed one at a time: together, that "
        "family would change them"
        for lm in pair
        if lm.together_up_to is not None
    ]
    padded = [lm.name for lm in pair if not lm.packs and lm.together_up_to != 0]
    if padded:
        notes.append(f"sequences of {' and '.join(padded)} are padded: in one row, that family would mix them")
    return notes


def _adapt(config: Config, student: LanguageModel) -> None:
    """Adds the adapter that the settings name to the student, or freezes what is not to learn."""
    lora, vision = config.lora, config.optimizer.vision
    if vision != "auto" and student.vision is None:
        raise UserError(f"optimizer.vision = {vision}: the student {student.name} reads no images; leave it out")
    if vision == "frozen" and student.vision is not None:
        student.vision.freeze()
    if lora.rank:
        alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
        arguments: dict[str, Any] = {"targets": lora.targets, "rslora": lora.rslora, "seed": config.seed}
        add_adapter(student, rank=lora.rank, alpha=alpha, vision=vision == "trained", **arguments)


def _precision(
    config: Config,
    student: LanguageModel,
    teacher: LanguageModel | None,
    prompts: Sequence[TokenSequence],
    notes: list[str],
) -> Precision:
    """Resolves the precision (`auto` is measured on this pair), and sets the student to it."""
    if config.precision != "auto" or student.precision != "bf16":
        return student.precision
    chosen, note = precision.settle(student, teacher, prompts, config.seed)
    notes.append(note)
    if chosen != student.precision:
        student.precision = chosen
        student.working.drop()
        choose_batching(student)  # The precision also decides what may be computed together.
    return chosen


def _base(config: Config, student: LanguageModel, name: str, caller_objects: CallerObjects) -> Frozen:
    """Loads the base model; a student with an adapter still holds itself as it was.

    Raises:
        UserError: The weights of such a one would leave, too.
    """
    kept = student.adapter is not None and name == config.student and bits_of(config, "base") is None
    if kept and storage_of(config, "base") is not None:
        raise UserError(
            f"base {name}: models.base.offload is for a model with weights of its own, and this is the student "
            "without its adapter; leave it out"
        )
    return student.bare() if kept else load_frozen(config, name, "base", caller_objects)


def _attention(
    config: Config,
    loaded: Sequence[LanguageModel],
    render: Renderer,
    train: Sequence[Prompt],
    notes: list[str],
) -> str | None:
    """Resolves the attention implementation: the one that is set, or the quickest that all models have."""
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
