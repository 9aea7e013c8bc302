"""The tokens that stand for images in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from retort.core.images import PromptImage
from retort.core.rollouts import Prompt
from retort.core.sequences import Media, TokenSequence
from retort.errors import UserError

__all__ = ["ImageTokens", "context_of"]


class ImageTokens(Protocol):
    """How a model's processor writes images into a prompt."""

    @property
    def placeholder(self) -> int:
        """Id of the token that the chat template writes for each image."""
        ...

    def ids(self, image: PromptImage) -> Sequence[int]:
        """The tokens that the processor puts in place of one placeholder, by the size of the image.

        Raises:
            UserError: The processor refuses the image.
        """
        ...


def context_of(prompt: Prompt, ids: Sequence[int], image_tokens: ImageTokens | None, name: str) -> TokenSequence:
    """A rendered prompt with its images: each placeholder becomes the tokens that stand for its image.

    Args:
        prompt: The prompt.
        ids: Its ids, as `retort.align.chat.render` gives them.
        image_tokens: Of the model that reads it; None for a model of text alone.
        name: The model's name, for messages.

    Raises:
        UserError: A model of text alone is given images; or the chat template writes another number of placeholders
            than there are images.
    """
    images = prompt.images
    if image_tokens is None:
        if images:
            raise UserError(
                f"prompt '{prompt.id}' holds an image, and {name} reads text alone; give a model that reads images, or "
                "leave that row out"
            )
        return TokenSequence.of(ids)
    written = [image_tokens.ids(image) for image in images]
    count = ids.count(image_tokens.placeholder)
    if count != len(images):
        raise UserError(
            f"prompt '{prompt.id}': the chat template of {name} writes {count} placeholders for {len(images)} images; "
            "each image needs one"
        )
    found, media, left = list[int](), list[Media](), iter(zip(images, written, strict=True))
    for token in ids:
        if token != image_tokens.placeholder:
            found.append(token)
            continue
        image, own = next(left)
        media.append(Media(image.digest, len(found), len(own), image))
        found += own
    return TokenSequence.of(found, tuple(media))
