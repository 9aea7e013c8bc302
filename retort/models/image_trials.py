"""Tries whether a model may read images together, and without its own forward, when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from retort.core.images import PromptImage
from retort.core.sequences import Media, TokenSequence
from retort.models.images import made_up
from retort.models.together import alike

if TYPE_CHECKING:
    from retort.models.lm import LanguageModel

#: Sizes of the made-up images, width and height, pixels.
_SIZES = ((40, 24), (30, 64))


def with_images(lm: LanguageModel, before: int, images: Sequence[PromptImage], behind: int, salt: int) -> TokenSequence:
    """A made-up text with images, and tokens behind them that are decided; the last of them but one is a placeholder.

    Args:
        lm: A model that reads images.
        before: Tokens before each image.
        images: The images.
        behind: Tokens behind the last image.
        salt: Makes other texts.
    """
    assert lm.vision is not None
    ids, media = list[int](), list[Media]()

    def text(count: int) -> list[int]:
        free = [token for token in range(lm.head().width) if token not in lm.vision.marks]  # type: ignore[union-attr]
        return [free[(7 * index + salt) % len(free)] for index in range(len(ids), len(ids) + count)]

    for image in images:
        ids += text(before)
        own = list(lm.vision.processing.ids(image))
        media.append(Media(image.digest, len(ids), len(own), image))
        ids += own
    return TokenSequence.of(ids, tuple(media)).then(text(behind), decided=True)


def tried_contexts(lm: LanguageModel) -> tuple[TokenSequence, TokenSequence]:
    """Two contexts with images to try decoding with, the second longer."""
    one, two = _images()
    return with_images(lm, 2, [one], 3, 1).read(), with_images(lm, 3, [two, one], 5, 2).read()


def _images() -> list[PromptImage]:
    return [made_up(*size, seed=seed) for seed, size in enumerate(_SIZES)]


def choose_images(lm: LanguageModel) -> None:
    """Sets, by trying, how sequences with images may be computed together; after `choose_batching`.

    Args:
        lm: A model with a `vision`; its `joins`, and `packs` and `shared_prefixes` of the model, are set.

    Raises:
        UserError: Its processor makes another number of tokens than its tower makes features.
    """
    vision = lm.vision
    assert vision is not None
    one, two = _images()
    vision.check_counts([one, two])
    sequences = [
        with_images(lm, 3, [one], 6, 1),
        with_images(lm, 4, [two, one], 3, 2),
        with_images(lm, 1, [two], 9, 3),
        TokenSequence.of([1, 2]).then([3, 4, 5], decided=True),
    ]
    prompt = sequences[0].prefix
    same = [prompt.then([5 + own, 9, 12, 7][: 2 + own], decided=True) for own in range(3)]
    with torch.no_grad():
        alone_ND = lm.alone(sequences).float()
        vision.joins = alike(lm, lambda: lm.padded(sequences), alone_ND)
        packs, shares = lm.packs, lm.shared_prefixes
        if packs:
            lm.shared_prefixes = False
            lm.packs = vision.joins and alike(lm, lambda: lm.packed(sequences), alone_ND)
            lm.shared_prefixes = shares
        if lm.packs and shares:
            same_ND = lm.alone(same).float()
            lm.shared_prefixes = alike(
                lm, lambda: lm.packed([*same, sequences[2]]), torch.cat([same_ND, lm.alone([sequences[2]])])
            )
    if not lm.packs:
        lm.shared_prefixes = False
    if not vision.joins:
        lm.notes.append(
            f"{lm.name}: sequences with images are computed one at a time: together, that family would change them"
        )
