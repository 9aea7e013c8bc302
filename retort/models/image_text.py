"""Loads the image part of a model: its processor, and what of the model only images need."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from retort.core.images import PromptImage
from retort.errors import UserError
from retort.models import gguf
from retort.models.files import locate
from retort.models.images import ImageProcessing
from retort.models.in_memory import InMemoryModel
from retort.models.server import Server

#: Files of a processor; a folder with neither is read as a model of text alone.
_FILES = ("processor_config.json", "preprocessor_config.json")
_VIDEO = "video_preprocessor_config.json"


class Unreadable:
    """`retort.align.images.ImageTokens` of a model whose images cannot be read here, which text does not need."""

    placeholder = -1  # no token is one

    def __init__(self, reason: str) -> None:
        """Keeps the reason, one line for the user."""
        self.reason = reason

    def ids(self, image: PromptImage) -> NoReturn:
        """Raises `UserError`."""
        raise UserError(self.reason)


def find_processor(
    label: str, name: str, source: str | InMemoryModel | Server | None, *, trust_remote_code: bool
) -> ImageProcessing | Unreadable | None:
    """The processor of a model that reads images; None for a model of text alone.

    Args:
        label: Role and name of the model.
        name: The user's name for it.
        source: Its location, if not `name`; or a model that the caller or a server holds.
        trust_remote_code: Run code that comes with the model; of a server's never.

    Raises:
        UserError: There is no such model.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    try:
        if isinstance(source, InMemoryModel):
            return None if source.processor is None else _of(label, copy.deepcopy(source.processor))
        location, server = locate(label, name, source), source if isinstance(source, Server) else None
        trust_remote_code = trust_remote_code and server is None
        config = None if gguf.is_gguf(location) else _config(location, trust_remote_code)
        if config is None or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return None
        if server is not None and not server.about.images:
            raise _CannotError(f"{label}: it reads no images there; its server says why when it starts")
        if not any(_settings(location, name) for name in _FILES):
            if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
                return None
            raise _CannotError(
                f"{label}: no processor in its folder ({' or '.join(_FILES)}), so it reads no images; copy it from the "
                "folder that the model was made from"
            )
        return _read(label, location, trust_remote_code)
    except _CannotError as error:
        return Unreadable(str(error))


def _config(location: str, trust_remote_code: bool) -> Any:
    """The configuration of a model; None where it cannot be read, which whoever reads the model reports."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    except Exception:
        return None


class _CannotError(Exception):
    """Images cannot be read here."""


def _read(label: str, location: str, trust_remote_code: bool) -> ImageProcessing:
    """Reads a processor. Those of the PIL kind do; torchvision is not needed.

    A processor that also reads videos is made without that part where the part needs torchvision, which is missing.
    """
    if importlib.util.find_spec("PIL") is None:
        raise _CannotError(f"{label}: images need Pillow: pip install 'retort-distill[vision]'")
    from transformers import AutoProcessor

    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _quiet():
        try:
            return _of(label, AutoProcessor.from_pretrained(location, **arguments))
        except _CannotError:
            raise
        except Exception as error:  # files and families fail in many ways
            first = error
        if importlib.util.find_spec("torchvision") is None:
            with contextlib.suppress(Exception):  # what failed first is reported
                kind = _kind(location, trust_remote_code)
                if any("video" in name for name in kind.get_attributes()):
                    made = without_video(kind).from_pretrained(location, **arguments)
                    return _of(label, made, _video_settings(location))
    said = " ".join(str(first).split())[:250]
    raise _CannotError(f"{label}: its processor cannot be made, so it reads no images here: {said}") from None


def without_video(kind: Any) -> Any:
    """A class of processors without the parts that read videos, under its own name."""
    parts = [name for name in kind.get_attributes() if "video" not in name]
    return type(
        kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts), "__module__": kind.__module__}
    )


def _of(label: str, processor: Any, video: Mapping[str, Any] | None = None) -> ImageProcessing:
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise _CannotError(f"{label}: its processor is a {type(processor).__name__}, which reads no images")
    try:
        return ImageProcessing(processor, label.partition(" ")[2] or label, video)
    except UserError as error:
        raise _CannotError(str(error)) from None


def _kind(location: str, trust_remote_code: bool) -> Any:
    """The class of a model's processor."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    named = [
        own["processor_class"] for own in (_settings(location, file) for file in _FILES) if "processor_class" in own
    ]
    found = processor_class_from_name(named[0]) if named else None
    if found is not None:
        return found
    return PROCESSOR_MAPPING[type(_config(location, trust_remote_code))]


def _video_settings(location: str) -> Mapping[str, Any] | None:
    """The settings of a processor's video part, from where transformers takes them."""
    inside = _settings(location, _FILES[0]).get("video_processor")
    return inside or _settings(location, _VIDEO) or _settings(location, _FILES[1]) or None


def _settings(location: str, name: str) -> dict[str, Any]:
    """A JSON file of a model's folder; empty where it is missing or holds something else."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
        with open(path, encoding="utf-8") as file:  # type: ignore[arg-type]
            found = json.load(file)
    except (OSError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' hints at torchvision within the block."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
