"""What engines say of a model that is known in this process, wherever it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from retort.align.images import ImageTokens
from retort.models.lm import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

M = TypeVar("M", bound=LanguageModel)


class OfModel(Generic[M]):
    """The part of `Engine` that is the model's own.

    Attributes:
        lm: The model.
        reads_images: Whether the engine hands images on to it.
    """

    reads_images: ClassVar[bool] = True
    lm: M

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See `Engine`."""
        return self.lm.tokenizer

    @property
    def context(self) -> int:
        """See `Engine`."""
        return self.lm.context

    @property
    def image_tokens(self) -> ImageTokens | None:
        """See `Engine`."""
        return self.lm.image_tokens if self.reads_images else None
