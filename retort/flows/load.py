"""Opens velocity models: pipelines of diffusers, Retort's small flows, and LoRA adapters over either."""

# pyright: basic
from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from retort.errors import UserError
from retort.files import unnameable
from retort.flows import folders, lora
from retort.flows.base import VelocityModel
from retort.models.files import errors_about

#: The file and the key by which a folder is a small flow of Retort's.
CONFIG, KEY = "config.json", "retort_flow"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
#: Longest settings that are looked into, bytes.
_LONGEST = 1_000_000
#: Where modules were opened from.
_PLACES: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()


def is_flow(path: str | Path, base: str | Path | None = None) -> bool:
    """Whether a name is that of a velocity model. It reads settings, and of hub names asks for one small file.

    Args:
        path: A folder with `model_index.json`, with `config.json` that holds `retort_flow`, or with a LoRA adapter over
            one of these; or a hub name.
        base: The adapter's base, instead of the one that its folder names.
    """
    if unnameable(str(path)) is not None:
        return False
    folder = Path(path).expanduser()
    try:
        if not folder.exists():
            return _on_hub(str(path))
        if (folder / folders.INDEX).is_file():
            return True
        if (folder / lora.CONFIG).is_file():
            named = base or _settings(folder / lora.CONFIG).get("base_model_name_or_path")
            # An adapter over an adapter is none.
            return isinstance(named, str | Path) and not is_adapter(named) and is_flow(named)
        return KEY in _settings(folder / CONFIG)
    except OSError:
        return False


def open_flow(
    path: str | Path,
    *,
    role: str,
    device: torch.device | str = "cpu",
    height: int | None = None,
    width: int | None = None,
    base: str | Path | VelocityModel | None = None,
) -> VelocityModel:
    """Opens a velocity model; its weights are fp32 (those of a small flow may be float64).

    An adapter is added to the weights of its base.

    Args:
        path: As in `is_flow`.
        role: Its role, for messages; a student's module learns, any other's does not.
        device: Where it goes.
        height: Height of images, pixels; the pipeline's own by default. Small flows have the size that they have.
        width: Width of images.
        base: An adapter's base, instead of the one that its folder names. An opened one is used unless the folder names
            another that is there; it is copied, and the two share text encoders and decoder.

    Raises:
        UserError: It cannot be opened, or an adapter is for another base.

    Example:
        >>> from retort.flows.load import open_flow
        >>> flow = open_flow("stabilityai/stable-diffusion-3.5-medium", role="student")  # doctest: +SKIP
        >>> flow.latent_shape  # doctest: +SKIP
        (16, 128, 128)
    """
    label = f"{role} {path}"
    problem = unnameable(str(path))
    if problem is not None:
        raise UserError(f"{label}: {problem}")
    folder = Path(path).expanduser()
    if is_adapter(folder):
        found = _adapted(label, folder, device=device, height=height, width=width, base=base)
    elif _is_small(folder):
        found = _small(label, folder, device, (height, width))
    elif folder.is_dir() and (folder / CONFIG).exists() and not (folder / folders.INDEX).exists():
        raise UserError(
            f"{label}: no flow model is in that folder: neither {folders.INDEX} of a diffusers pipeline nor '{KEY}' in "
            f"{CONFIG}"
        )
    else:
        from retort.flows.pipeline import PipelineFlow

        found = PipelineFlow.open(label, str(path), device=device, height=height, width=width)
    found.module.requires_grad_(role == "student").eval()
    _PLACES[found.module] = folder
    return found


def _adapted(
    label: str,
    folder: Path,
    *,
    device: torch.device | str,
    height: int | None,
    width: int | None,
    base: str | Path | VelocityModel | None,
) -> VelocityModel:
    """The base of an adapter with it in its weights."""
    factors = lora.read_factors(label, folder)
    named = lora.read_settings(label, folder).get("base_model_name_or_path")
    if base is not None and (not isinstance(base, VelocityModel) or not named or _shares(base, named)):
        named = base
    if not named or not isinstance(named, str | Path | VelocityModel):
        raise UserError(
            f"{label}: {lora.CONFIG} names no base (base_model_name_or_path); write the base's folder there"
        )
    if isinstance(named, VelocityModel):
        if lora.adapter_in(named.module) is not None:
            raise ValueError("a base with an adapter in it: open the experts before the student gets its adapter")
        found = copy.deepcopy(named)
        found.module.to(device)
    elif is_adapter(named):
        raise UserError(f"{label}: its base {named} is an adapter, too; merge that one, and name the merged folder")
    else:
        found = open_flow(named, role=f"{label}: its base", device=device, height=height, width=width)
    lora.add_product(found.module, factors, label)
    return found


def _shares(base: VelocityModel, named: object) -> bool:
    """Whether an opened model is the base that an adapter's folder names, or the one that it names is not there."""
    place = Path(str(named)).expanduser()
    return not place.exists() or base.module not in _PLACES or place.resolve() == _PLACES[base.module].resolve()


def _small(label: str, folder: Path, device: torch.device | str, size: tuple[int | None, int | None]) -> VelocityModel:
    from retort.flows.small import SmallFlow

    with errors_about(label):
        try:
            found = SmallFlow.open(folder)
        except UserError as error:
            raise UserError(f"{label}: {error}") from None
    found.module.to(device)
    own = found.latent_shape[1:] if len(found.latent_shape) == 3 else (None, None)
    for name, wanted, there in zip(("height", "width"), size, own, strict=True):
        if wanted is not None and wanted != there:
            makes = "points" if there is None else f"images of {own[0]} x {own[1]} pixels"
            raise UserError(f"{label}: flow.{name} = {wanted}, and this model makes {makes}; leave flow.{name} out")
    return found


def is_adapter(path: str | Path) -> bool:
    """Whether a name is that of an adapter's folder."""
    return (Path(path).expanduser() / lora.CONFIG).is_file()


def _is_small(folder: Path) -> bool:
    return not (folder / folders.INDEX).is_file() and KEY in _settings(folder / CONFIG)


def _settings(file: Path) -> dict[str, Any]:
    """The settings in a file; none where it cannot be read, which is said where it is opened."""
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(_LONGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _on_hub(name: str) -> bool:
    """Whether the hub, or what is kept of it here, has a pipeline of that name."""
    if _HUB_NAME.fullmatch(name) is None:
        return False
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    try:
        kept = [try_to_load_from_cache(name, file) for file in (folders.INDEX, CONFIG)]
        if isinstance(kept[0], str) or isinstance(kept[1], str):
            return isinstance(kept[0], str)
        return not constants.HF_HUB_OFFLINE and HfApi().file_exists(name, folders.INDEX)
    except Exception:  # whatever is wrong with the hub or the name is said where the model is loaded
        return False
