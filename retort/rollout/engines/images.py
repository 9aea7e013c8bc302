"""Images in the contexts of a decoded batch. Axis letters: see `retort.core`; B is rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel
from retort.models.vision import Features, Placed, Vision, placed_in


@dataclass(frozen=True, eq=False)
class Images:
    """The images of contexts that end in one column, and the positions of all tokens there.

    Attributes:
        vision: How the model reads them.
        placed: The images.
        features: Of each.
        position_BL: Positions of the tokens, [B, L]; [axes, B, L] where the family counts along the sides of images.
    """

    vision: Vision
    placed: Sequence[Placed]
    features: Sequence[Features]
    position_BL: Tensor

    @staticmethod
    def of(lm: LanguageModel, contexts: Sequence[TokenSequence]) -> Images | None:
        """The images of contexts, whose features are computed here; None where there are none."""
        if lm.vision is None or not any(context.media for context in contexts):
            return None
        longest = max(len(context) for context in contexts)
        placed = placed_in(contexts, [longest - len(context) for context in contexts])
        counted = [lm.vision.positions(context) for context in contexts]
        rows = [
            torch.arange(len(context)) if own is None else own for context, own in zip(contexts, counted, strict=True)
        ]
        position = torch.stack([functional.pad(own, (longest - own.shape[-1], 0)) for own in rows], dim=-2)
        with lm.offload.present():
            features = lm.vision.features([own.media.payload for own in placed])
        return Images(lm.vision, placed, features, position.to(lm.device))

    def read(self, *, input_ids: Tensor, **more: Any) -> Any:
        """The pass over the contexts."""
        return self.vision.joined(input_ids, self.placed, self.features, **more)
