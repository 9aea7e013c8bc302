"""The method of a run whose settings name none: it follows from the tokenizers of student and teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from retort.align.pair import align_ids
from retort.align.tokens import OtherTokenizer
from retort.config import DEFAULT_FOR_TWO_TOKENIZERS, merge
from retort.config.sections import ServerSection
from retort.errors import UserError
from retort.models.endpoint import Endpoint
from retort.models.files import read_tokenizer
from retort.train.given.given import CallerObjects
from retort.train.models.models import sources

__all__ = ["default_method"]


def default_method(layers: Sequence[Mapping[str, Any]], caller_objects: CallerObjects) -> dict[str, Any]:
    """The settings beneath `layers` that choose a method for two tokenizers; nothing where they are not needed.

    They are needed where the layers name a student and a teacher, but no method, and the teacher has other tokens than
    the student. No weights are read. A model that cannot be read is left to the checks of the run.

    Args:
        layers: Nested settings; later ones win.
        caller_objects: The objects behind placeholders.
    """
    methods = [layer["method"] for layer in layers if layer.get("method") is not None]
    if any(not isinstance(method, Mapping) or "name" in method for method in methods):
        return {}
    paths = {role: _last(layers, role) for role in ("student", "teacher")}
    if not all(isinstance(path, str) for path in paths.values()):
        return {}
    trust = bool(_last(layers, "trust_remote_code"))
    try:
        asked = ServerSection(**reduce(merge, [dict(layer.get("server") or {}) for layer in layers], {}))
    except (TypeError, ValueError):  # said where settings are checked
        asked = ServerSection()
    try:
        student, teacher = (
            read_tokenizer(
                name, source.reads if isinstance(source, Endpoint) else source, role, trust_remote_code=trust
            )
            for role, (name, source) in sources(
                asked, {role: str(path) for role, path in paths.items()}, caller_objects
            ).items()
        )
        align_ids(student, teacher)
    except OtherTokenizer:
        return {"method": {"name": DEFAULT_FOR_TWO_TOKENIZERS}}
    except UserError:
        pass
    return {}


def _last(layers: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((layer[key] for layer in reversed(layers) if layer.get(key) is not None), None)
