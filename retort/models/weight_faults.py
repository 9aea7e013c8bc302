"""Faults of weights that a library has read: missing, left over, of another shape, not finite."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

import torch

from retort.models.quantized import plain

#: Weights of parts that a text model does without, and buffers in older files: the text model is the same either way.
OTHER_PARTS = re.compile(
    r"(^|\.)(mtp|vision_tower|vision_model|visual|vision_encoder|multi_modal_projector|image_newline|audio_tower"
    r"|audio_encoder|embed_vision|embed_audio)(\.|$)|rotary_emb\.inv_freq$|(^|\.)position_ids$"
)
#: The same for a model that reads images.
PARTS = re.compile(r"(^|\.)(mtp|audio_tower|audio_encoder|embed_audio)(\.|$)|rotary_emb\.inv_freq$|(^|\.)position_ids$")
_NAMED = 3


def account(
    model: Any, info: Mapping[str, Any], dropped: Set[str] = frozenset(), parts: re.Pattern[str] = OTHER_PARTS
) -> tuple[list[str], list[str]]:
    """Faults of a model's weights, and notes on facts that are no faults.

    Args:
        model: The model, loaded.
        info: What the library says of it (`output_loading_info`): keys that are missing, unexpected or mismatched.
        dropped: Names of tensors that the library left out without a word.
        parts: Names of tensors, of parts that the model does without.
    """
    wrong, notes = list[str](), list[str]()
    surplus = set(map(str, info.get("unexpected_keys", ())))
    others = {key for key in surplus if parts.search(key)} | dropped
    shapes = {str(key): (tuple(there), tuple(here)) for key, there, here in info.get("mismatched_keys", ())}
    missing = sorted(set(map(str, info.get("missing_keys", ()))) - shapes.keys())
    if missing:
        wrong.append(f"{_counted(missing)} missing")
    if surplus - others:
        wrong.append(f"{_counted(sorted(surplus - others))} in the files, but not in the model")
    if shapes:
        key = min(shapes)
        there, here = shapes[key]
        wrong.append(f"{_counted(sorted(shapes))} of another shape ({key}: {there} in the files, {here} in the model)")
    broken = _not_finite(model, {*missing, *shapes})
    if broken:
        wrong.append(f"{_counted(broken)} with NaN or infinity in it")
    if others:
        notes.append(f"{_counted(sorted(others))} in its files, of parts that text does not need: left out")
    return wrong, notes


def _not_finite(model: Any, besides: set[str]) -> list[str]:
    """Names of tensors that hold NaN or infinity."""
    found, seen = list[str](), set[int]()
    for name, tensor in ((name, part) for name, kept in model.state_dict().items() for part in plain(kept)):
        if name in besides or not tensor.is_floating_point() or not tensor.numel() or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())  # tied tensors are checked once
        # The extremes are NaN where any element is, and no mask has to be allocated.
        extremes = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
        if not all(bool(extreme.isfinite()) for extreme in extremes):
            found.append(name)
    return sorted(found)


def _counted(keys: list[str]) -> str:
    shown = ", ".join(keys[:_NAMED])
    return f"{len(keys)} tensor(s) ({shown}{', ...' if len(keys) > _NAMED else ''})"
