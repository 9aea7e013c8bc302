"""Removes randomness from a student: it learns about the same distribution that it sampled from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from retort.core.sequences import TokenSequence
from retort.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from retort.models.lm import LanguageModel

#: Relative difference of hidden states that two passes over one text may have.
_ROUNDING = 1e-2


def without_randomness(model: PreTrainedModel) -> None:
    """Switches off everything that is random in training mode: dropout, and the noise of routers."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Many families keep a number and call a function: attention_dropout, layerdrop, router_jitter_noise, ...
        for name, value in vars(module).items():
            if isinstance(value, float) and any(word in name for word in ("drop", "jitter", "noise")):
                vars(module)[name] = 0.0


def check_repeats(lm: LanguageModel) -> None:
    """Checks that passes over one text agree, in the current mode of the model.

    Raises:
        UserError: They differ by more than rounding.
    """
    ids_L = (torch.arange(min(32, lm.context)) * 7 + 1) % lm.head().width
    sequence = TokenSequence(ids_L, torch.arange(len(ids_L)) > 0)
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        first_ND, *others = [lm.hidden([sequence]).float() for _ in range(4)]
    apart = max(float((one_ND - first_ND).norm(dim=1).max()) for one_ND in others)
    if not apart <= _ROUNDING * float(first_ND.norm(dim=1).max()):
        family = type(lm.model).__name__
        raise UserError(
            f"{lm.name}: two passes over one text differ in training mode, by randomness inside {family}; "
            "set its random settings to 0 in its config.json, or optimizer.gradient_checkpointing=false"
        )
