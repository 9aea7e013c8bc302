"""A trial of the export before the first step, so that a run cannot fail at its end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retort.models.files import errors_about

if TYPE_CHECKING:
    from retort.models.lm import LanguageModel


def rehearse_export(lm: LanguageModel) -> None:
    """Tries all of an export except writing the weights: merging, names and shapes, settings, tokenizer.

    Args:
        lm: The student before the first step.

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
    with tempfile.TemporaryDirectory() as folder, errors_about(lm.name, "could not be written at the end"):
        revert_weight_conversion(lm.model, weights)
        try:
            lm.model.generation_config = lm.saved_generation
            lm.model.save_pretrained(folder, state_dict={})
        finally:
            lm.model.generation_config = bare
        lm.save_tokens(Path(folder))
        if lm.adapter is not None:
            lm.adapter.save(Path(folder) / "adapter")
