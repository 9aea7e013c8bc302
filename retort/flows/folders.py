"""Folders of diffusers pipelines: what is in one, checked before a class is made or a weight is read.

A folder's `model_index.json` names a class for each part, and diffusers would import whatever it names. Only classes of
diffusers and transformers are taken, and only safetensors weights.
"""

# pyright: basic
from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.errors import UserError, quoted
from retort.files import read_object
from retort.models.files import errors_about, locate

INDEX = "model_index.json"
#: The scheduler whose steps are decisions.
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
#: Parts without which nothing is denoised or seen.
_NEEDED = ("transformer", "scheduler", "vae")
_LIBRARIES = ("diffusers", "transformers")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
#: The base classes of parts, by library.
_BASES = {
    "diffusers": ("ConfigMixin",),
    "transformers": (
        "PreTrainedModel",
        "PreTrainedTokenizerBase",
        "ProcessorMixin",
        "FeatureExtractionMixin",
        "ImageProcessingMixin",
    ),
}


@dataclass(frozen=True)
class PipelineFolder:
    """A folder that was checked.

    Attributes:
        path: Where it is.
        kind: Class of the pipeline.
        parts: Class of each part, by its name.
        absent: Parts that it goes without, such as a third text encoder.
    """

    path: Path
    kind: type[Any]
    parts: Mapping[str, type[Any]]
    absent: Sequence[str]


def need_diffusers() -> None:
    """Raises `UserError` if `diffusers` is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("a pipeline of diffusers needs the extra 'flow': pip install 'retort-distill[flow]'")


def read_folder(label: str, name: str) -> PipelineFolder:
    """Checks a diffusers folder, or one of the hub, which is fetched.

    Args:
        label: What messages call it.
        name: A folder, or a hub name.

    Raises:
        UserError: It is not there, or is no pipeline that can be read: a class of another library, a part that is
            missing, a scheduler that is no flow-matching one, pickled weights.
    """
    need_diffusers()
    path = Path(name).expanduser()
    if not path.exists():
        path = _fetched(label, name)
    try:
        index = read_object(path / INDEX)
    except UserError as error:
        raise UserError(f"{label}: {error}; name a folder that diffusers saved") from None
    import diffusers  # pyright: ignore[reportMissingImports]

    kind = _class(label, "diffusers", index.get("_class_name"), (diffusers.DiffusionPipeline,))
    parts = _parts(label, kind, index)
    for part, made in parts.items():
        _check_files(label, path / part, made)
    absent = [part for part in inspect.signature(kind.__init__).parameters if index.get(part) == [None, None]]
    return PipelineFolder(path, kind, parts, absent)


def _fetched(label: str, name: str) -> Path:
    """The folder of a pipeline of the hub, on this machine."""
    from diffusers import DiffusionPipeline  # pyright: ignore[reportMissingImports]

    with errors_about(label):
        return Path(
            DiffusionPipeline.download(locate(label, name, None), use_safetensors=True, trust_remote_code=False)
        )


def _parts(label: str, kind: type[Any], index: Mapping[str, Any]) -> dict[str, type[Any]]:
    """Class of each part."""
    wanted = inspect.signature(kind.__init__).parameters
    found = dict[str, type[Any]]()
    for part, value in index.items():
        if part.startswith("_") or part not in wanted or not isinstance(value, list):
            continue  # settings of the pipeline itself
        if value == [None, None]:
            continue
        if len(value) != 2:
            raise UserError(f"{label}: {INDEX}: {part} is {quoted(value, 80)}; it must name a library and a class")
        found[part] = _class(label, value[0], value[1], None)
    if "transformer" not in wanted:
        raise UserError(f"{label}: the denoiser of a {kind.__name__} is no transformer; flow matching needs one")
    optional = set(kind._optional_components)
    for part, parameter in wanted.items():
        required = parameter.default is inspect.Parameter.empty and part not in optional and part != "self"
        if part not in found and (part in _NEEDED or (required and part not in index)):
            raise UserError(f"{label}: {INDEX} names no {part}, which a {kind.__name__} needs; copy the folder again")
    if found["scheduler"].__name__ != SCHEDULER:
        raise UserError(
            f"{label}: its scheduler is {found['scheduler'].__name__}, no flow-matching one that Retort knows; "
            f"it must be {SCHEDULER}"
        )
    return found


def _class(label: str, library: object, name: object, bases: tuple[type[Any], ...] | None) -> type[Any]:
    """A class that `model_index.json` names, of diffusers or transformers alone."""
    if not isinstance(name, str) or library not in _LIBRARIES:
        raise UserError(
            f"{label}: {INDEX} names {quoted([library, name], 100)}; only classes of diffusers and transformers are "
            "loaded, never code that comes with a model"
        )
    module = importlib.import_module(str(library))
    with errors_about(label, f"{INDEX}: {quoted(name, 60)} cannot be imported"):
        found = getattr(module, name, None) if name.isidentifier() and not name.startswith("_") else None
    allowed = bases or tuple(getattr(module, base) for base in _BASES[str(library)])
    if not isinstance(found, type) or not issubclass(found, allowed):
        raise UserError(
            f"{label}: {INDEX} names {quoted(name, 60)}, which is no such class of the installed {library}; "
            f"update {library}, or mind the spelling"
        )
    return found


def _check_files(label: str, folder: Path, kind: type[Any]) -> None:
    """Checks that a part's folder is there, with safetensors weights if it has weights."""
    import torch

    if not folder.is_dir():
        raise UserError(f"{label}: no folder {folder.name}/, which {INDEX} names; copy the folder again")
    if not issubclass(kind, torch.nn.Module):
        return
    names = sorted(file.name for file in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        return
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        raise UserError(
            f"{label}: the weights of {folder.name} are pickled ({pickled[0]}), and unpickling can run code; convert "
            "them to safetensors (save_pretrained of a recent diffusers does)"
        )
    raise UserError(f"{label}: no weights in {folder.name}/; copy the folder again")
