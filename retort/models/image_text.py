"""Loads the image part of a model: its processor, and what of the model only images need."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from retort.core.images import PromptImage
from retort.errors import RetortError, UserError
from retort.models.images import ImageProcessing

if TYPE_CHECKING:
    from retort.models.lm import LanguageModel

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


def reads_images(location: str, *, trust_remote_code: bool) -> bool:
    """Whether a folder or hub name holds a model of images and text of transformers, with a processor."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    except Exception:  # whoever reads the model reports it
        return False
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and any(_settings(location, name) for name in _FILES)


def read_processor(label: str, location: str, *, trust_remote_code: bool) -> ImageProcessing:
    """Reads the processor of a model of images and text. Processors of the PIL kind do; torchvision is not needed.

    A processor that also reads videos is made without that part where the part needs torchvision, which is missing.

    Args:
        label: Role and name of the model.
        location: A folder or hub name.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: Pillow is missing, or the processor cannot be read.
    """
    if importlib.util.find_spec("PIL") is None:
        raise UserError(f"{label}: images need Pillow: pip install 'retort-distill[vision]'")
    from transformers import AutoProcessor

    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _quiet():
        try:
            return _of(label, AutoProcessor.from_pretrained(location, **arguments))
        except RetortError:
            raise
        except Exception as error:  # files and families fail in many ways
            first = error
        if importlib.util.find_spec("torchvision") is None:
            kind = _kind(location, trust_remote_code)
            if kind is not None and any("video" in name for name in kind.get_attributes()):
                with contextlib.suppress(Exception):
                    made = without_video(kind).from_pretrained(location, **arguments)
                    return _of(label, made, _video_settings(location))
    said = " ".join(str(first).split())[:250]
    raise UserError(f"{label}: its processor cannot be made, so it reads no images here: {said}") from None


def without_video(kind: Any) -> Any:
    """A class of processors without the parts that read videos, under its own name."""
    parts = [name for name in kind.get_attributes() if "video" not in name]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts), "__module__": kind.__module__})


def freeze_vision(lm: LanguageModel) -> None:
    """Freezes what makes the features of images: vision tower and projector.

    Raises:
        UserError: The family does not keep them apart from its text model.
    """
    if lm.vision is None:
        return
    if not lm.vision.modules():
        raise UserError(
            f"optimizer.vision = frozen: {type(lm.model).__name__} does not keep its vision tower apart from its text "
            "model; leave it out"
        )
    for parameter in lm.vision.parameters():
        parameter.requires_grad_(False)


def text_linears(lm: LanguageModel) -> list[str]:
    """Names of the linear layers of a model that are no part of its vision tower or projector."""
    model: Any = lm.model
    outside = set[int]()
    if lm.vision is not None:
        outside = {id(module) for part in lm.vision.modules().values() for module in part.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in outside
    ]


def _of(label: str, processor: Any, video: Mapping[str, Any] | None = None) -> ImageProcessing:
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UserError(f"{label}: its processor is a {type(processor).__name__}, which reads no images")
    return ImageProcessing(processor, label.partition(" ")[2] or label, video)


def _kind(location: str, trust_remote_code: bool) -> Any:
    """The class of a model's processor; None where transformers has none."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    named = [own["processor_class"] for own in map(lambda n: _settings(location, n), _FILES) if "processor_class" in own]
    found = processor_class_from_name(named[0]) if named else None
    if found is not None:
        return found
    config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    return PROCESSOR_MAPPING[type(config)] if type(config) in PROCESSOR_MAPPING else None


def _video_settings(location: str) -> Mapping[str, Any] | None:
    """The settings of a processor's video part, from where transformers takes them."""
    inside = _settings(location, _FILES[0]).get("video_processor")
    return inside or _settings(location, _VIDEO) or _settings(location, _FILES[1]) or None


def _settings(location: str, name: str) -> dict[str, Any]:
    """A JSON file of a model's folder; empty where it is missing or holds something else."""
    from transformers.utils import cached_file

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
