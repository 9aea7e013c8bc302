"""The export, tried before the first step: what cannot be written at the end of a run is not worth beginning."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retort.models.files import blamed_on

if TYPE_CHECKING:
    from retort.models.lm import LanguageModel


def rehearse_export(lm: LanguageModel) -> None:
    """Tries all of an export but the weights' bytes: merging, names and shapes of the files, settings, tokenizer.

    Args:
        lm: The student, as it is before the first step.

    Raises:
        UserError: One of them fails.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if lm.adapter is not None:
        lm.adapter.check_merging()
    weights = {name: torch.empty_like(x, device="meta") for name, x in lm.model.state_dict().items()}
    if lm.adapter is not None:
        weights = {own: x for name, x in weights.items() if (own := lm.adapter.own_name(name)) is not None}
    bare = lm.model.generation_config
    with tempfile.TemporaryDirectory() as folder, blamed_on(lm.name, "could not be written at the end"):
        revert_weight_conversion(lm.model, weights)
        try:
            lm.model.generation_config = lm.written_generation
            lm.model.save_pretrained(folder, state_dict={})
        finally:
            lm.model.generation_config = bare
        lm.tokenizer.save_pretrained(folder)
        if lm.adapter is not None:
            lm.adapter.save(Path(folder) / "adapter")
