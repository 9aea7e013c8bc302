"""Has frozen models leave the device between their passes, as the settings say (`models.NAME.offload`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from retort.config import Config
from retort.errors import UserError
from retort.models import gguf
from retort.models.in_memory import InMemoryModel
from retort.models.lm import LanguageModel
from retort.models.offload import InFiles, InHost, Room, Storage
from retort.ranks import here
from retort.train.given.given import CallerObjects
from retort.train.models.models import Frozen, Source, bits_of, device_for, source_of


def storage_of(config: Config, name: str) -> Storage | None:
    """Where a model's weights wait between passes; None: they stay."""
    storage = config.models[name].offload if name in config.models else "none"
    return None if storage == "none" else storage


def refuse_offload(config: Config, models: Mapping[str, tuple[str, Source]]) -> None:
    """Refuses weights that cannot leave the device, before any are loaded.

    Args:
        config: The resolved configuration.
        models: By name, each model of the run that is to be loaded: its path for messages, and its source.

    Raises:
        UserError: As said.
    """
    for name, (path, source) in models.items():
        storage = storage_of(config, name)
        if storage is None or config.cache.only:
            continue
        why = _why_not(config, name, storage, source)
        if why is not None:
            raise UserError(f"{name} {path}: offload = {storage} {why}")


def _why_not(config: Config, name: str, storage: Storage, source: Source) -> str | None:
    """Why a model's weights cannot leave the device, and what to do, as the rest of a sentence; None if they can."""
    if name == "student":
        return "is for frozen models, and the student learns; leave it out"
    if not isinstance(source, str | InMemoryModel):
        return "is for weights that are loaded here, and a server holds these; leave it out"
    if config.ranks.teacher == "sharded" and here().size > 1:
        return "with ranks.teacher = sharded: layers that ranks share cannot leave; set ranks.teacher=replicated"
    if bits_of(config, name) is not None:
        return "is for whole weights, and bits rounds these; leave out one of the two"
    if storage == "cpu" and device_for(config) == "cpu":
        return "changes nothing in a run on a CPU, whose memory that is; set offload=disk, or leave it out"
    if storage == "disk" and isinstance(source, InMemoryModel):
        return "is for models in a folder, and this one is given as it is; give a path"
    if storage == "disk" and gguf.is_gguf(str(source)):
        return "is for safetensors, and this is a GGUF file, which takes long to read; set offload=cpu on a GPU"
    return None


def offloaded(config: Config, path: str, name: str, model: Frozen, room: Room, given: CallerObjects) -> Frozen:
    """The same model, whose weights are gone from its device if the settings say so.

    Args:
        config: The resolved configuration.
        path: The model's path, as in the settings.
        name: Its name.
        model: The model, loaded, as it will compute.
        room: Shared by all models of the run of which one is to be on the device at a time.
        given: The objects behind placeholders.

    Raises:
        UserError: Its weights cannot be had back from where they would wait.
    """
    storage = storage_of(config, name)
    if storage is None or not isinstance(model, LanguageModel):
        return model
    staying = [part for part in model.kept_head().parts if part is not None]
    source = source_of(config.server, path, name, given, student=config.student)
    waiting = InHost if storage == "cpu" else partial(InFiles, f"{name} {path}", str(source))
    model.offload.begin(model.model, staying, storage, waiting, room)
    return model
